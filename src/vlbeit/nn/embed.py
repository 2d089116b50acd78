"""Pixels and words to States: the only place that asks which modalities are there."""

import torch
from torch import Tensor, nn

from vlbeit.nn.linear import Linear
from vlbeit.nn.positions import resize_grid


class ImageEmbed(nn.Module):
    """[I_CLS, v_1 .. v_P] + positions (paper section 2.1).

    Patches are flattened and projected; a masked patch becomes one learned vector before
    positions are added (BEiT). Pixels are uint8, or floats already in [-1, 1]; uint8 is mapped
    to [-1, 1] here (mean = std = 0.5, as BEiT, VLMo and BEiT-3).
    """

    def __init__(
        self, width: int, patch: int, image_size: tuple[int, int], absolute: bool = True
    ) -> None:
        super().__init__()
        if image_size[0] % patch or image_size[1] % patch:
            raise ValueError(f"image size {image_size} is not a multiple of the patch {patch}")
        self.patch = patch
        self.native_grid = (image_size[0] // patch, image_size[1] // patch)
        self.proj = Linear(3 * patch * patch, width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.masked_patch = nn.Parameter(torch.zeros(width))
        places = self.native_grid[0] * self.native_grid[1]
        self.positions = nn.Parameter(torch.zeros(places + 1, width)) if absolute else None

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of pixels (B, 3, height, width).

        Raises:
            ValueError: the size is not a multiple of the patch.
        """
        height, width = pixels.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image of {height} x {width} is not a multiple of patch {self.patch}")
        return height // self.patch, width // self.patch

    def forward(self, pixels: Tensor, patch_masked: Tensor | None = None) -> Tensor:
        """(B, 3, height, width), (B, P) bool -> (B, P + 1, D)."""
        rows, columns = self.grid(pixels)
        x: Tensor = self.proj(to_patches(pixels, self.patch))
        if patch_masked is not None:
            x = torch.where(patch_masked[..., None], self.masked_patch.to(x.dtype), x)
        x = torch.cat((self.cls.to(x.dtype).expand(x.shape[0], 1, -1), x), dim=1)
        if self.positions is not None:
            places = resize_grid(self.positions[1:], self.native_grid, (rows, columns))
            x = x + torch.cat((self.positions[:1], places))
        return x


def to_patches(pixels: Tensor, patch: int) -> Tensor:
    """(B, 3, height, width) -> (B, P, 3 * patch * patch), floats; channel-major inside a patch.

    Reshape and one product is 1.3 times faster than a convolution; the order of a patch's
    numbers is that of a convolution weight (D, 3, patch, patch), so BEiT's loads by a reshape.
    """
    batch, channels, height, width = pixels.shape
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 127.5 - 1.0
    grid = pixels.reshape(batch, channels, height // patch, patch, width // patch, patch)
    places = (height // patch) * (width // patch)  # no -1: a rank may have no sample at all
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, places, channels * patch * patch)


class TextEmbed(nn.Module):
    """[T_CLS, w_1 .. w_M, T_SEP] + positions (paper section 2.1); the specials are in the ids.

    With `norm_eps` a LayerNorm follows, as in BERT, ViLT and VLMo base-plus; the paper has none.
    """

    def __init__(
        self, width: int, vocab: int, positions: int, absolute: bool = True, norm_eps: float = 0.0
    ) -> None:
        super().__init__()
        self.longest = positions
        self.words = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.zeros(positions, width)) if absolute else None
        self.norm = nn.LayerNorm(width, eps=norm_eps) if norm_eps else None

    def forward(self, words: Tensor) -> Tensor:
        """(B, W) int64 -> (B, W, D).

        Raises:
            ValueError: the text is longer than the position table.
        """
        length = words.shape[1]
        if length > self.longest:
            raise ValueError(f"text of {length} tokens, the position table has {self.longest}")
        x: Tensor = self.words(words)
        if self.positions is not None:
            x = x + self.positions[:length]
        return x if self.norm is None else self.norm(x)
