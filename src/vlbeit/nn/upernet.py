"""UPerNet on a plain Transformer: feature pyramid, segmentation head and auxiliary head.

The task layer of the paper's ADE20K rows (docs/paper.md 5): BEiT's pyramid over four taps of
the backbone, UPerNet (arXiv 1807.10221) over the pyramid, and a small convolutional head on its
third level whose loss is added while training. The numbers are those of `transformers`' BEiT
pyramid and UperNet heads under the same weights.

BEiT's training draws dropout (0.1) before both classifiers; here nothing is dropped, so the heads
are a function of their input alone.

    h, w  rows and columns of patches        C  channels inside the heads
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["batch", "group"]
"""What follows each convolution. "batch" is the peers' (over all ranks where the trainer turns it
into SyncBatchNorm); its statistics need some 16 images a step. "group" looks at one image only, so
that small batches train and results do not depend on the batch: for a CPU."""

GROUP_CHANNELS = 16
"""Channels normalised together. Not one: the 1 x 1 pool would leave a single number, always 0."""

POOLS = (1, 2, 3, 6)
"""Sides of the pooled maps of the deepest level (UPerNet)."""


def build_norm(kind: NormKind, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(1, channels // GROUP_CHANNELS), channels)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, pixel centres aligned. Shapes: (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class ConvNorm(nn.Module):
    """Convolution without bias, norm, ReLU; the map keeps its size."""

    def __init__(self, channels_in: int, channels: int, kernel: int, norm: NormKind) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = build_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class FeaturePyramid(nn.Module):
    """Four taps of equal size to maps of 4, 2, 1 and 1/2 times the patch grid (BEiT).

    x4 is two transposed convolutions with norm and GELU between, x2 is one, x1 is the tap itself,
    and 1/2 is max-pooling; a last odd row or column falls away there.
    """

    def __init__(self, width: int, norm: NormKind = "batch") -> None:
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, stride=2),
            build_norm(norm, width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.up2 = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, taps: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """Shapes: four taps (B, 1 + h * w, D), [I_CLS] first and left out; return (B, D, 4h, 4w),
        (B, D, 2h, 2w), (B, D, h, w), (B, D, h // 2, w // 2).

        Raises:
            ValueError: a tap does not fit the grid, or the grid has a side of one patch.
        """
        if min(grid) < 2:
            raise ValueError(f"a grid of {grid} patches; the pyramid halves it, 2 x 2 at least")
        tokens = grid[0] * grid[1] + 1
        if len(taps) != 4 or any(tap.shape[1] != tokens for tap in taps):
            lengths = [tap.shape[1] for tap in taps]
            raise ValueError(f"taps of {lengths} tokens; four of {tokens} fit the grid {grid}")
        fine, double, same, coarse = (tap[:, 1:].mT.unflatten(2, grid) for tap in taps)
        return [self.up4(fine), self.up2(double), same, F.max_pool2d(coarse, 2)]


class UperHead(nn.Module):
    """Pyramid pooling on the deepest level, a path back up, and one map of class scores."""

    def __init__(self, width: int, channels: int, classes: int, norm: NormKind = "batch") -> None:
        super().__init__()
        self.pools = nn.ModuleList(ConvNorm(width, channels, 1, norm) for _ in POOLS)
        self.bottleneck = ConvNorm(width + len(POOLS) * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(ConvNorm(width, channels, 1, norm) for _ in range(3))
        self.smooths = nn.ModuleList(ConvNorm(channels, channels, 3, norm) for _ in range(3))
        self.fuse = ConvNorm(4 * channels, channels, 3, norm)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Shapes: levels as from `FeaturePyramid`; return (B, classes, 4h, 4w)."""
        deepest = levels[-1]
        pooled = [
            resize(conv(F.adaptive_avg_pool2d(deepest, side)), deepest.shape[2:])
            for side, conv in zip(POOLS, self.pools, strict=True)
        ]
        maps = [lateral(x) for lateral, x in zip(self.laterals, levels[:-1], strict=True)]
        maps.append(self.bottleneck(torch.cat((deepest, *pooled), dim=1)))
        for i in (2, 1, 0):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i].shape[2:])
        maps[:3] = [smooth(x) for smooth, x in zip(self.smooths, maps[:3], strict=True)]
        finest = maps[0].shape[2:]
        fused = self.fuse(torch.cat([maps[0], *(resize(x, finest) for x in maps[1:])], dim=1))
        out: Tensor = self.classifier(fused)
        return out


class AuxiliaryHead(nn.Module):
    """One convolution and a classifier on the pyramid's third level, for training only (FCN)."""

    def __init__(self, width: int, channels: int, classes: int, norm: NormKind = "batch") -> None:
        super().__init__()
        self.conv = ConvNorm(width, channels, 3, norm)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Shapes: levels as from `FeaturePyramid`; return (B, classes, h, w)."""
        out: Tensor = self.classifier(self.conv(levels[2]))
        return out
