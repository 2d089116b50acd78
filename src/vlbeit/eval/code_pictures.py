"""What codes look like, by a tokenizer's pixel decoder: single codes, and pictures through them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlbeit.tokens.visual import VisualTokenizer

AROUND = 3
"""A code is drawn in the middle of a grid of so many by so many that repeats it: the decoder sees
neighbours, and most patches of a picture have some like themselves."""
SWATCH = 24
"""Least pixels a side of one code in a sheet."""
GAP = 4
DRAWN_AT_ONCE = 512


def code_patches(tokenizer: VisualTokenizer, codes: Tensor) -> np.ndarray:
    """(N,) int64 codes -> (N, patch, patch, 3) uint8, each as it looks among its like."""
    side, first = tokenizer.patch, (AROUND // 2) * tokenizer.patch
    found = [
        tokenizer.decode(part[:, None, None].expand(-1, AROUND, AROUND).contiguous())
        for part in codes.split(DRAWN_AT_ONCE)
    ]
    middle = torch.cat(found)[:, :, first : first + side, first : first + side]
    return np.ascontiguousarray(middle.permute(0, 2, 3, 1).cpu().numpy())


def by_likeness(patches: np.ndarray) -> np.ndarray:
    """(N,) int64: an order of (N, patch, patch, 3) patches in which neighbours look alike.

    By brightness in rows of equal length, and by colour (red minus blue) within each: good enough
    to see at a glance what kinds of codes there are.
    """
    mean = patches.reshape(len(patches), -1, 3).astype(np.float64).mean(axis=1)
    rows = max(1, round(math.sqrt(len(patches))))
    bright = np.argsort(mean.sum(axis=1), kind="stable")
    warm = mean[:, 0] - mean[:, 2]
    return np.concatenate(
        [part[np.argsort(warm[part], kind="stable")] for part in np.array_split(bright, rows)]
    )


def code_sheet(tokenizer: VisualTokenizer) -> Image.Image:
    """Every code of the codebook once, like beside like."""
    codes = torch.arange(tokenizer.codes)
    patches = code_patches(tokenizer, codes)
    patches = patches[by_likeness(patches)]
    columns = math.ceil(math.sqrt(len(patches)))
    scale = max(1, -(-SWATCH // tokenizer.patch))
    cell = tokenizer.patch * scale
    sheet = Image.new("RGB", (columns * cell, -(-len(patches) // columns) * cell), "white")
    for place, patch in enumerate(patches):
        swatch = Image.fromarray(patch).resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(swatch, (place % columns * cell, place // columns * cell))
    return sheet


def decoded(tokenizer: VisualTokenizer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of pictures and what they decode to.

    Shapes: pixels (B, 3, H, W) uint8, codes (B, H / patch, W / patch), pictures as pixels.
    """
    rows, columns = (side // tokenizer.patch for side in pixels.shape[-2:])
    codes = tokenizer.encode(pixels).reshape(len(pixels), rows, columns)
    return codes, tokenizer.decode(codes)


def in_rows(rows: Sequence[Tensor], scale: int = 1) -> Image.Image:
    """Rows of pictures, (B, 3, H, W) uint8 each, below each other with gaps, not smoothed."""
    height, width = (side * scale for side in rows[0].shape[-2:])
    columns = len(rows[0])
    size = (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for down, row in enumerate(rows):
        for right, pixels in enumerate(row.permute(0, 2, 3, 1).cpu().numpy()):
            picture = Image.fromarray(np.ascontiguousarray(pixels))
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (right * (width + GAP), down * (height + GAP)))
    return sheet
