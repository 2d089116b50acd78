"""Tables of positions at another size, against SciPy's spline and unilm's algorithm around it.

unilm calls `scipy.interpolate.interp2d`, which is gone since SciPy 1.14; `RectBivariateSpline` of
degree 3 and smoothing 0 is the same spline (checkpoints.md C0).
"""

import numpy as np
import pytest
import torch
from scipy.interpolate import RectBivariateSpline

from foreign_files import (
    GRID,
    HEADS,
    PATCH,
    beit_tensors,
    imported,
    model_of,
    save_training_file,
    worst,
)
from tiny_models import random_pixels
from vlbeit.convert.geometry import geometric_offsets, resize_relative
from vlbeit.convert.vocabulary import reordered_vocabulary
from vlbeit.errors import ConfigError
from vlbeit.nn.positions import resize_grid


def resized_by_unilm(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """unilm's procedure in NumPy, written from its description, with SciPy's spline."""
    reach, target = old - 1, new - 1
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        total = (1 - ratio**reach) / (1 - ratio)
        low, high = (low, ratio) if total > target else (ratio, high)
    places = np.cumsum(ratio ** np.arange(reach))
    places = np.concatenate((-places[::-1], [0.0], places))
    wanted = np.arange(-target, target + 1.0)
    columns = []
    for column in table.T:
        square = column.reshape(2 * old - 1, 2 * old - 1).astype(np.float64)
        spline = RectBivariateSpline(places, places, square, kx=3, ky=3, s=0)
        columns.append(spline(wanted, wanted).ravel())
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    ("old", "new"), [(14, 24), (14, 30), (14, 32), (14, 16), (4, 7), (14, 10), (24, 14)]
)
def test_a_resized_table_is_that_of_scipys_spline(old, new, gen):
    table = torch.randn((2 * old - 1) ** 2, 3, generator=gen)
    found = resize_relative(table, old, new)
    expected = torch.from_numpy(resized_by_unilm(table.numpy(), old, new)).float()
    assert found.shape == ((2 * new - 1) ** 2, 3)
    assert worst(found, expected) <= 1e-5
    # Not another interpolation with the same shapes.
    plain = resize_grid(table, (2 * old - 1,) * 2, (2 * new - 1,) * 2)
    assert worst(plain, expected) > 1e-1


def test_neighbours_stay_neighbours_and_the_middle_stays_the_middle(gen):
    places = geometric_offsets(13, 23)
    steps = places.diff()
    assert places[13] == 0 and steps[13] == 1 and places[-1] == pytest.approx(23, abs=1e-3)
    assert (steps[13:].diff() > 0).all()
    table = torch.randn(27 * 27, 2, generator=gen)
    resized = resize_relative(table, 14, 24).view(47, 47, 2)
    old = table.view(27, 27, 2)
    assert worst(resized[23, 22:25], old[13, 12:15]) <= 1e-5


def test_a_smaller_table_is_cut_out_of_the_middle(gen):
    """The search ends at 1.01, so a smaller target samples the middle (checkpoints.md C2)."""
    table = torch.randn(27 * 27, 2, generator=gen)
    cut = resize_relative(table, 14, 4).view(7, 7, 2)
    assert worst(cut[3, 2:5], table.view(27, 27, 2)[13, 12:15]) <= 1e-5


def test_only_the_rows_of_patches_move_at_conversion(tmp_path):
    tensors = beit_tensors()
    path = save_training_file(tmp_path / "beit.pth", tensors, "model")
    converted = imported("beit", path, resized={"image_size": 6 * PATCH})
    assert converted.plan.config.model.image_size == (48, 48)
    table = converted.tensors["backbone.relative_bias.table"]
    source = tensors["rel_pos_bias.relative_position_bias_table"]
    expected = resized_by_unilm(source[:-3].numpy(), GRID, 6)
    assert worst(table[: 11 * 11], torch.from_numpy(expected).float()) <= 1e-5
    assert torch.equal(table[121:124], source[-3:])
    (entry,) = converted.receipt.named("interpolated")
    assert "geometric spline, grid (4, 4) to (6, 6)" in entry.note
    model = model_of(converted)
    assert model.backbone(model.embed_image(random_pixels(1, (48, 48)))).isfinite().all()
    for size in (20, 4):
        with pytest.raises(ConfigError, match="not a multiple of the patch"):
            imported("beit", path, resized={"image_size": size})


def test_absolute_positions_are_resampled_bicubically(tmp_path):
    tensors = beit_tensors()
    del tensors["rel_pos_bias.relative_position_bias_table"]
    tensors["pos_embed"] = torch.randn(1, GRID * GRID + 1, 16)
    path = save_training_file(tmp_path / "beit.pth", tensors, "model")
    converted = imported("beit", path, heads=HEADS, resized={"image_size": 48})
    found = converted.tensors["image.positions"]
    as_the_model_does = resize_grid(tensors["pos_embed"][0, 1:], (GRID, GRID), (6, 6))
    assert torch.equal(found[1:], as_the_model_does)
    assert torch.equal(found[0], tensors["pos_embed"][0, 0])
    assert [e.target for e in converted.receipt.named("interpolated")] == ["image.positions"]


def test_a_table_of_words_is_put_in_another_order_cut_and_never_made_up(gen):
    table = torch.randn(7, 3, generator=gen)
    rows = [5, 0, 0, 2]
    found = reordered_vocabulary(table, rows)
    assert torch.equal(found, torch.stack([table[row] for row in rows]))
    assert torch.equal(reordered_vocabulary(table[:, 0], range(7)), table[:, 0])
    with pytest.raises(ValueError, match="number 7, the table 7 rows"):
        reordered_vocabulary(table, [0, 7])
