"""Class maps of whole images of any shape: one pass, or windows that overlap; scales and mirror.

As the segmentation peers do (mmsegmentation's encoder_decoder, which BEiT uses): scores of
overlapping windows are averaged as they are, before softmax; over scales and the mirror image it is
probabilities that are averaged. The last window of a row or column is shifted inwards, so that
all windows have the same size and the image's border is scored in full windows.

What scores is any function of pixels; nothing here knows the model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scorer = Callable[[Tensor], Tensor]
"""Pixels (B, 3, h, w) float in [-1, 1] -> class scores (B, classes, h', w') of any resolution."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How an image becomes a class map.

    `whole`: one pass over the image, filled up with grey to a multiple of `multiple`.
    `slide`: windows of `crop` pixels every `stride` pixels; a side shorter than the window is
    filled up with grey. What is filled up is cut off again.
    """

    mode: Literal["whole", "slide"] = "slide"
    crop: tuple[int, int] = (512, 512)
    """Window height and width, multiples of the patch. BEiT: 512."""
    stride: tuple[int, int] = (341, 341)
    """BEiT: 341, two thirds of the window."""
    multiple: int = 16
    """The patch."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes of the image that are scored. BEiT's multi-scale: .5, .75, 1, 1.25, 1.5, 1.75."""
    flip: bool = False
    """Whether the mirror image is scored too."""

    def __post_init__(self) -> None:
        for side, step in zip(self.crop, self.stride, strict=True):
            if not 0 < step <= side:
                raise ValueError(f"stride must be 1..{side} (the window), found {step}")
            if side % self.multiple:
                raise ValueError(f"a window of {side} is not a multiple of {self.multiple}")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales must be above 0 and at least one, found {self.scales}")


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """Where the windows along one side begin; the last one ends at the border.

    >>> window_starts(10, 4, 3)
    [0, 3, 6]
    >>> window_starts(11, 4, 3)
    [0, 3, 6, 7]
    """
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, size - crop), 0) for i in range(count)]


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1], as the model's own embedding does; floats pass."""
    return pixels.float() / 127.5 - 1.0 if pixels.dtype == torch.uint8 else pixels


def fill_up(pixels: Tensor, height: int, width: int) -> Tensor:
    """Grey (0) below and to the right, up to the given size at least."""
    lacking = (max(height - pixels.shape[2], 0), max(width - pixels.shape[3], 0))
    return F.pad(pixels, (0, lacking[1], 0, lacking[0]))


def scores_at(score: Scorer, pixels: Tensor) -> Tensor:
    """The scorer's answer at the pixels' own resolution, (B, classes, h, w) float32."""
    scores = score(pixels).float()
    if scores.shape[2:] == pixels.shape[2:]:
        return scores
    return F.interpolate(scores, size=pixels.shape[2:], mode="bilinear", align_corners=False)


def whole_scores(score: Scorer, pixels: Tensor, multiple: int) -> Tensor:
    """Class scores from one pass. Shapes: pixels (B, 3, H, W), return (B, classes, H, W)."""
    height, width = pixels.shape[2:]
    filled = fill_up(pixels, *(multiple * math.ceil(side / multiple) for side in (height, width)))
    return scores_at(score, filled)[..., :height, :width]


def sliding_scores(
    score: Scorer, pixels: Tensor, crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """The mean of the class scores of all windows over each pixel.

    Shapes: pixels (B, 3, H, W), return (B, classes, H, W).
    """
    height, width = pixels.shape[2:]
    filled = fill_up(pixels, *crop)
    total: Tensor | None = None
    seen = pixels.new_zeros(filled.shape[2:])
    for top in window_starts(filled.shape[2], crop[0], stride[0]):
        for left in window_starts(filled.shape[3], crop[1], stride[1]):
            window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            scores = scores_at(score, filled[window])
            if total is None:
                total = scores.new_zeros(*scores.shape[:2], *filled.shape[2:])
            total[window] += scores
            seen[window] += 1
    assert total is not None  # there is always a first window
    return (total / seen)[..., :height, :width]


def class_scores(score: Scorer, pixels: Tensor, how: Inference) -> Tensor:
    """Class scores of one size of the image. Shapes: (B, 3, H, W) -> (B, classes, H, W)."""
    if how.mode == "whole":
        return whole_scores(score, pixels, how.multiple)
    return sliding_scores(score, pixels, how.crop, how.stride)


def resized(pixels: Tensor, scale: float) -> Tensor:
    """The image `scale` times as large, sides rounded, one pixel at least."""
    if scale == 1.0:
        return pixels
    size = [max(1, round(side * scale)) for side in pixels.shape[2:]]
    return F.interpolate(
        pixels, size=size, mode="bilinear", align_corners=False, antialias=scale < 1.0
    )


def class_probabilities(score: Scorer, pixels: Tensor, how: Inference) -> Tensor:
    """Probabilities of every class at every pixel, averaged over scales and the mirror image.

    Shapes: pixels (B, 3, H, W) uint8 or float in [-1, 1]; return (B, classes, H, W) float32. The
    class map is its argmax over dimension 1.
    """
    image = to_floats(pixels)
    mirrored: Sequence[bool] = (False, True) if how.flip else (False,)
    total: Tensor | None = None
    for scale in how.scales:
        sized = resized(image, scale)
        for mirror in mirrored:
            scores = class_scores(score, sized.flip(3) if mirror else sized, how)
            if scale != 1.0:
                size = image.shape[2:]
                scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
            shares = scores.softmax(dim=1)
            shares = shares.flip(3) if mirror else shares
            total = shares if total is None else total + shares
    assert total is not None
    return total / (len(how.scales) * len(mirrored))
