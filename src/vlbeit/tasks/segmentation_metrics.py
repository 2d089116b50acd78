"""Segmentation figures, all from one confusion matrix of pixels.

The matrix is a plain sum: matrices of batches and of ranks are added, in any order, and the
figures are taken once at the end. They never are means of means.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = 255
"""The class number of a pixel that does not count."""


def confusion_matrix(
    predicted: Tensor, wanted: Tensor, classes: int, ignored: int = IGNORED
) -> Tensor:
    """(classes, classes) int64: pixels by the class they have (row) and the one named (column).

    Shapes: predicted, wanted: the same, any; class numbers in 0..classes - 1; `wanted` may also be
    `ignored`, and such a pixel counts nowhere, whatever was predicted for it.

    Raises:
        ValueError: shapes differ, or a class number is out of range.
    """
    if predicted.shape != wanted.shape:
        raise ValueError(
            f"a prediction of shape {tuple(predicted.shape)} for a map of {tuple(wanted.shape)}"
        )
    counted = wanted != ignored
    rows, columns = wanted[counted].long(), predicted[counted].long()
    for name, values in (("the map", rows), ("the prediction", columns)):
        if len(values) and not (0 <= int(values.min()) and int(values.max()) < classes):
            raise ValueError(
                f"{name} has classes {int(values.min())}..{int(values.max())}, the limit is "
                f"0..{classes - 1} (and {ignored}: not counted)"
            )
    return torch.bincount(rows * classes + columns, minlength=classes**2).view(classes, classes)


@dataclass(frozen=True, kw_only=True)
class SegmentationFigures:
    """All shares in [0, 1]. None stands for 0 / 0, and no mean counts it:

    the intersection over union of a class that neither occurs nor was named, and the accuracy of a
    class that does not occur. A class that does not occur but was named has an IoU of 0, and this
    one does count.
    """

    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    pixels: int


def segmentation_figures(matrix: Tensor) -> SegmentationFigures:
    """Figures from a confusion matrix, (classes, classes) int64.

    Raises:
        ValueError: the matrix counts no pixel.
    """
    counts = matrix.to("cpu", torch.float64)
    hits, having, named = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    total = int(matrix.sum())
    if total == 0:
        raise ValueError("no pixel to score: every pixel carries the ignored class")
    iou = shares(hits, having + named - hits)
    accuracy = shares(hits, having)
    return SegmentationFigures(
        mean_iou=mean_of_known(iou),
        mean_accuracy=mean_of_known(accuracy),
        pixel_accuracy=float(hits.sum()) / total,
        iou=iou,
        accuracy=accuracy,
        pixels=total,
    )


def shares(part: Tensor, whole: Tensor) -> tuple[float | None, ...]:
    """part / whole, None where whole is 0. Shapes: (C,) both."""
    return tuple(
        p / w if w > 0 else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)
    )


def mean_of_known(values: tuple[float | None, ...]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)
