"""Segmentation figures against counting pixel by pixel."""

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from vlbeit.tasks.segmentation_metrics import confusion_matrix, segmentation_figures

CLASSES = 6


@pytest.fixture
def maps(gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Class 4 is named but does not occur; class 5 neither occurs nor is named; some ignored."""
    wanted = torch.randint(0, 4, (5, 7, 11), generator=gen)
    wanted[torch.rand(wanted.shape, generator=gen) < 0.2] = 255
    predicted = torch.where(
        torch.rand(wanted.shape, generator=gen) < 0.5,
        torch.randint(0, 5, wanted.shape, generator=gen),
        wanted.clamp(max=3),
    )
    return predicted, wanted


def brute(predicted: Tensor, wanted: Tensor) -> dict[str, object]:
    """By sets of pixels, class by class."""
    pairs = [
        (p, w)
        for p, w in zip(predicted.flatten().tolist(), wanted.flatten().tolist(), strict=True)
        if w != 255
    ]
    iou, accuracy = [], []
    for c in range(CLASSES):
        is_c = {i for i, (_, w) in enumerate(pairs) if w == c}
        named = {i for i, (p, _) in enumerate(pairs) if p == c}
        iou.append(len(is_c & named) / len(is_c | named) if is_c | named else None)
        accuracy.append(len(is_c & named) / len(is_c) if is_c else None)
    known, occurring = ([v for v in values if v is not None] for values in (iou, accuracy))
    return {
        "mean_iou": sum(known) / len(known),
        "mean_accuracy": sum(occurring) / len(occurring),
        "pixel_accuracy": sum(p == w for p, w in pairs) / len(pairs),
        "iou": tuple(iou),
        "accuracy": tuple(accuracy),
        "pixels": len(pairs),
    }


def test_the_figures_equal_a_count_of_pixels(maps):
    figures = segmentation_figures(confusion_matrix(*maps, CLASSES))
    found, expected = asdict(figures), brute(*maps)
    for several in ("iou", "accuracy"):
        assert found.pop(several) == expected.pop(several)  # the same two whole numbers, divided
    assert found == pytest.approx(expected, abs=1e-12)
    assert figures.iou[4] == 0.0 and figures.accuracy[4] is None
    assert figures.iou[5] is None and figures.accuracy[5] is None
    assert 0.3 < figures.mean_iou < figures.pixel_accuracy < 0.9


def test_matrices_add_over_batches_and_ranks_and_figures_do_not(maps):
    predicted, wanted = maps
    whole = confusion_matrix(predicted, wanted, CLASSES)
    parts = [
        confusion_matrix(p, w, CLASSES)
        for p, w in zip(predicted.split(2), wanted.split(2), strict=True)
    ]
    assert torch.equal(torch.stack(parts[::-1]).sum(dim=0), whole)
    mean = sum(segmentation_figures(part).mean_iou for part in parts) / len(parts)
    assert mean != pytest.approx(segmentation_figures(whole).mean_iou, abs=1e-4)


def test_what_is_predicted_at_ignored_pixels_changes_nothing(maps):
    predicted, wanted = maps
    elsewhere = torch.where(wanted == 255, (predicted + 1) % 99, predicted)
    assert torch.equal(
        confusion_matrix(elsewhere, wanted, CLASSES), confusion_matrix(predicted, wanted, CLASSES)
    )
    # The negative control: one counted pixel more or less is seen.
    counted = (wanted != 255).nonzero()[0]
    predicted[tuple(counted)] = (predicted[tuple(counted)] + 1) % CLASSES
    assert not torch.equal(
        confusion_matrix(elsewhere, wanted, CLASSES), confusion_matrix(predicted, wanted, CLASSES)
    )


def test_rows_are_what_is_there_and_columns_what_was_named():
    matrix = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 255]), 2)
    assert matrix.tolist() == [[0, 1], [0, 1]]


def test_byte_maps_count_like_any_other(maps):
    predicted, wanted = maps
    small = confusion_matrix(predicted.to(torch.uint8), wanted.to(torch.uint8), 200)
    assert torch.equal(small[:CLASSES, :CLASSES], confusion_matrix(predicted, wanted, CLASSES))


def test_maps_that_do_not_fit_are_refused():
    ones = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"the map has classes 9\.\.9, the limit is 0\.\.1"):
        confusion_matrix(ones, ones * 9, 2)
    with pytest.raises(ValueError, match=r"the prediction has classes -1"):
        confusion_matrix(-ones, ones, 2)
    with pytest.raises(ValueError, match="shape"):
        confusion_matrix(ones, ones[:1], 2)
    with pytest.raises(ValueError, match="no pixel"):
        segmentation_figures(confusion_matrix(ones, ones * 255, 2))
