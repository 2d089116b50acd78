"""Sliding windows against brute force: every pixel's mean over the windows that hold it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlbeit.nn.embed import to_patches
from vlbeit.tasks.sliding import (
    Inference,
    class_probabilities,
    class_scores,
    sliding_scores,
    to_floats,
    whole_scores,
    window_starts,
)

CLASSES, PATCH = 3, 4


def score(pixels: Tensor) -> Tensor:
    """A patchwise scorer that depends on the whole window: moving a window changes its scores."""
    if pixels.shape[2] % PATCH or pixels.shape[3] % PATCH:
        raise ValueError(f"{tuple(pixels.shape)} does not fit the patch")
    mean = F.avg_pool2d(pixels, PATCH)
    return 3 * mean + mean.cumsum(dim=2) + 0.5 * mean.cumsum(dim=3)


def upsampled(pixels: Tensor) -> Tensor:
    return F.interpolate(score(pixels), pixels.shape[2:], mode="bilinear", align_corners=False)


def brute(pixels: Tensor, crop: int, stride: int) -> Tensor:
    """Windows by their definition: every stride pixels from 0, and one at each far border."""
    height, width = pixels.shape[2:]
    filled = torch.zeros(*pixels.shape[:2], max(height, crop), max(width, crop))
    filled[..., :height, :width] = pixels
    places = []
    for side in filled.shape[2:]:
        places.append(sorted({*range(0, side - crop + 1, stride), side - crop}))
    windows = {
        (top, left): upsampled(filled[..., top : top + crop, left : left + crop])
        for top in places[0]
        for left in places[1]
    }
    out = torch.empty(len(pixels), CLASSES, height, width)
    for y in range(height):
        for x in range(width):
            over = [
                scores[..., y - top, x - left]
                for (top, left), scores in windows.items()
                if top <= y < top + crop and left <= x < left + crop
            ]
            out[..., y, x] = torch.stack(over).mean(dim=0)
    return out


@pytest.mark.parametrize(
    ("height", "width", "crop", "stride"),
    [(16, 16, 8, 5), (23, 37, 8, 5), (8, 30, 8, 8), (6, 19, 8, 3), (5, 5, 8, 4), (20, 9, 8, 7)],
)
def test_sliding_windows_equal_brute_force(gen, height, width, crop, stride):
    pixels = torch.randn(2, 3, height, width, generator=gen)
    found = sliding_scores(score, pixels, (crop, crop), (stride, stride))
    assert found.shape == (2, CLASSES, height, width)
    expected = brute(pixels, crop, stride)
    assert (found - expected).abs().max() <= 1e-5
    if max(height, width) > crop:  # and the windows do matter
        assert (found - whole_scores(score, pixels, PATCH)).abs().max() > 1e-2


@pytest.mark.parametrize("size", range(1, 40))
def test_windows_cover_every_pixel_and_never_leave_the_image(size):
    for crop, stride in ((8, 8), (8, 5), (8, 1), (4, 3)):
        starts = window_starts(size, crop, stride)
        assert starts == sorted(set(starts)) and starts[0] == 0
        assert all(b - a <= stride for a, b in zip(starts, starts[1:], strict=False))
        assert starts[-1] + crop == max(size, crop)


def test_one_window_over_the_image_is_the_whole_image(gen):
    pixels = torch.randn(1, 3, 8, 12, generator=gen)
    one = sliding_scores(score, pixels, (8, 12), (8, 12))
    assert torch.equal(one, whole_scores(score, pixels, PATCH))
    assert torch.equal(one, upsampled(pixels))


def test_whole_images_of_odd_sizes_are_filled_up_and_cut(gen):
    pixels = torch.randn(1, 3, 9, 14, generator=gen)
    found = whole_scores(score, pixels, PATCH)
    filled = torch.zeros(1, 3, 12, 16)
    filled[..., :9, :14] = pixels
    assert torch.equal(found, upsampled(filled)[..., :9, :14])


def test_scales_and_the_mirror_average_probabilities(gen):
    pixels = torch.randint(0, 256, (2, 3, 18, 25), generator=gen, dtype=torch.uint8)
    how = Inference(crop=(8, 8), stride=(5, 5), multiple=PATCH, scales=(0.5, 1.0, 1.5), flip=True)
    floats = pixels.float() / 127.5 - 1
    expected = []
    for scale in how.scales:
        size = [round(18 * scale), round(25 * scale)]
        image = F.interpolate(
            floats, size, mode="bilinear", align_corners=False, antialias=scale < 1
        )
        for mirror in (False, True):
            scores = brute(image.flip(3) if mirror else image, 8, 5)
            scores = F.interpolate(scores, (18, 25), mode="bilinear", align_corners=False)
            shares = torch.softmax(scores, dim=1)
            expected.append(shares.flip(3) if mirror else shares)
    found = class_probabilities(score, pixels, how)
    assert (found - torch.stack(expected).mean(dim=0)).abs().max() <= 1e-5
    assert (found.sum(dim=1) - 1).abs().max() <= 1e-6
    plain = class_probabilities(score, pixels, Inference(crop=(8, 8), stride=(5, 5), multiple=4))
    assert (found - plain).abs().max() > 1e-2  # the switches do something


def test_the_mirror_image_of_a_mirrored_answer_is_the_answer(gen):
    pixels = torch.randn(1, 3, 17, 22, generator=gen)
    how = Inference(crop=(8, 8), stride=(5, 5), multiple=PATCH, flip=True)
    found = class_probabilities(score, pixels, how)
    turned = class_probabilities(score, pixels.flip(3), how).flip(3)
    assert (found - turned).abs().max() <= 1e-6
    once = Inference(crop=(8, 8), stride=(5, 5), multiple=PATCH)
    apart = class_probabilities(score, pixels.flip(3), once).flip(3)
    assert (class_probabilities(score, pixels, once) - apart).abs().max() > 1e-2


def test_an_image_scores_the_same_alone_and_in_a_batch(gen):
    pixels = torch.randn(3, 3, 13, 21, generator=gen)
    how = Inference(crop=(8, 8), stride=(5, 5), multiple=PATCH)
    together = class_scores(score, pixels, how)
    alone = torch.cat([class_scores(score, one[None], how) for one in pixels])
    assert (together - alone).abs().max() <= 1e-6


def test_bytes_become_floats_as_in_the_model(gen):
    pixels = torch.randint(0, 256, (1, 3, 8, 8), generator=gen, dtype=torch.uint8)
    assert torch.equal(to_patches(pixels, 4), to_patches(to_floats(pixels), 4))


def test_settings_that_leave_gaps_or_break_patches_are_refused():
    with pytest.raises(ValueError, match=r"stride must be 1\.\.8 \(the window\), found 9"):
        Inference(crop=(8, 8), stride=(8, 9), multiple=4)
    with pytest.raises(ValueError, match="window of 10 is not a multiple of 4"):
        Inference(crop=(10, 8), stride=(5, 5), multiple=4)
    with pytest.raises(ValueError, match="scales"):
        Inference(scales=())
