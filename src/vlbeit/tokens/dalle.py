"""DALL-E's discrete VAE encoder, BEiT's visual tokenizer: one of 8,192 codes for 8 x 8 pixels.

    pixels / 255 * 0.8 + 0.1 -> 7 x 7 convolution -> four groups of two residual blocks, the first
        three followed by 2 x 2 max-pooling -> ReLU -> 1 x 1 convolution -> the largest logit

Source: openai/DALL-E (arXiv 2102.12092), whose files are pickled modules and are not read. The
same net is a plain state dict as transformers' `FlavaImageCodebook`; its tensor names are used
here. There is no picture decoder in it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.errors import ConfigError
from vlbeit.tokens.foreign_layout import Origin, TensorAccount, fill_from_foreign, size_of

GROUPS = 4
STRIDE = 8
"""Pixels of the network's own picture to a code: three poolings."""
NATIVE_SIDE = 112
"""Pixels of that picture in BEiT and FLAVA: 14 x 14 codes."""
MARGIN = 0.1
"""Pixels in [0, 1] are brought to [MARGIN, 1 - MARGIN] (DALL-E, logit-Laplace loss)."""


@dataclass(frozen=True, kw_only=True)
class DalleSizes:
    """Everything that the tensors' shapes do not tell, and what they do."""

    codes: int
    width: int
    """Channels of the first group; they double from group to group."""
    blocks: int
    """In each group."""
    patch: int = STRIDE
    """Side in pixels of what gets one code. More than 8: the picture is made smaller first, as
    BEiT does, which shows 112 x 112 to the tokenizer and 224 x 224 to the model."""


class ResidualBlock(nn.Module):
    """x + 1/64 of four convolutions (1 / layers squared), with a 1 x 1 where channels change."""

    def __init__(self, channels_in: int, channels: int, layers: int) -> None:
        super().__init__()
        self.gain = 1 / layers**2
        hidden = channels // 4
        same = channels_in == channels
        self.id_path = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)
        path = nn.Sequential()
        sides = ((channels_in, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3))
        for number, (a, b, kernel) in enumerate((*sides, (hidden, channels, 1)), start=1):
            path.add_module(f"relu_{number}", nn.ReLU())
            path.add_module(f"conv_{number}", nn.Conv2d(a, b, kernel, padding=kernel // 2))
        self.res_path = nn.ModuleDict({"path": path})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.id_path(x) + self.gain * self.res_path["path"](x)
        return out


class DalleNetwork(nn.Module):
    """The encoder. Nothing in it trains."""

    name: ClassVar[str] = "dalle"
    most_images: ClassVar[int] = 8
    """Pictures encoded at a time: their widest map has 256 numbers a pixel."""

    def __init__(self, sizes: DalleSizes) -> None:
        super().__init__()
        if sizes.patch % STRIDE:
            raise ConfigError(f"patch must be a multiple of {STRIDE}, found {sizes.patch}")
        self.sizes = sizes
        self.codes, self.patch = sizes.codes, sizes.patch
        self.shrink = sizes.patch // STRIDE
        self.image_size = (NATIVE_SIDE * self.shrink, NATIVE_SIDE * self.shrink)
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", nn.Conv2d(3, sizes.width, 7, padding=3))
        channels = sizes.width
        for number in range(1, GROUPS + 1):
            group = nn.Sequential()
            for block in range(1, sizes.blocks + 1):
                wide = sizes.width * 2 ** (number - 1)
                layers = GROUPS * sizes.blocks
                group.add_module(f"block_{block}", ResidualBlock(channels, wide, layers))
                channels = wide
            if number < GROUPS:
                group.add_module("pool", nn.MaxPool2d(2))
            self.blocks.add_module(f"group_{number}", nn.Sequential())
            self.blocks[-1].add_module("group", group)
        output = nn.Sequential()
        output.add_module("relu", nn.ReLU())
        output.add_module("conv", nn.Conv2d(channels, sizes.codes, 1))
        self.blocks.add_module("output", output)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of codes.

        Raises:
            ValueError: a size that the patch does not divide.
        """
        height, width = pixels.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image of {height} x {width} is not a multiple of patch {self.patch}")
        return height // self.patch, width // self.patch

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, codes, rows, columns)."""
        rows, columns = self.grid(pixels)
        shown = pixels.float() / 255
        if self.shrink > 1:
            size = (rows * STRIDE, columns * STRIDE)
            shown = F.interpolate(shown, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        out: Tensor = self.blocks((1 - 2 * MARGIN) * shown + MARGIN)
        return out

    def lookup(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, P) int64."""
        return self.logits(pixels).argmax(dim=1).flatten(1)


def is_dalle(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors are those of this encoder, in either layout."""
    return any(name.endswith(("blocks.input.weight", "blocks.input.w")) for name in tensors)


def import_dalle(
    tensors: Mapping[str, Tensor], *, patch: int = STRIDE, origin: str
) -> tuple[DalleNetwork, list[TensorAccount]]:
    """The encoder of a state dict of `FlavaImageCodebook`, of a whole FLAVA (`image_codebook.`;
    its other parts are dropped), or with DALL-E's own names (`.w`, `.b`).

    Args:
        patch: see `DalleSizes.patch`.
        origin: named in messages.

    Raises:
        InputError: a tensor is missing, unknown or of another shape.
        ConfigError: a patch that is no multiple of 8.
    """
    prefix = "image_codebook."
    whole = any(name.startswith(prefix) for name in tensors)
    dropped = [name for name in tensors if whole and not name.startswith(prefix)]
    file_names = {_flava_name(n.removeprefix(prefix)): n for n in tensors if n not in dropped}
    shown = {name: tensors[file_name] for name, file_name in file_names.items()}
    blocks = max(
        (
            int(match[1])
            for name in shown
            if (match := re.match(r"blocks\.group_1\.group\.block_(\d{1,3})\.", name))
        ),
        default=0,
    )
    sizes = DalleSizes(
        codes=size_of(shown, "blocks.output.conv.weight", 4, origin)[0],
        width=size_of(shown, "blocks.input.weight", 4, origin)[0],
        blocks=blocks,
        patch=patch,
    )
    with torch.device("meta"):
        network = DalleNetwork(sizes)
    own = network.state_dict()
    origins = {n: Origin(file_names.get(n, n), tuple(t.shape)) for n, t in own.items()}
    accounts = fill_from_foreign(network, origins, tensors, dropped=dropped, origin=origin)
    return network.eval().requires_grad_(False), accounts


def _flava_name(name: str) -> str:
    """DALL-E's name of a tensor as transformers' has it; that one stays as it is."""
    match = re.fullmatch(r"(blocks\..+)\.([wb])", name)
    if match is None:
        return name
    path = re.sub(r"\bgroup_(\d)\.(?!group\.)", r"group_\1.group.", match[1])
    path = re.sub(r"\bres_path\.(?!path\.)", "res_path.path.", path)
    return f"{path}.{'weight' if match[2] == 'w' else 'bias'}"
