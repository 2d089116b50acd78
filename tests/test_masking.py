"""Masks have exact counts and the published statistics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlbeit.config import MaskingConfig
from vlbeit.draws import Draws
from vlbeit.masking import block_masked, replace_words, word_masked

BEIT_GRID, BEIT_COUNT, BEIT_BLOCK, BEIT_ASPECT = (14, 14), 75, 16, 1 / 0.3


def beit(key: int) -> np.ndarray:
    return block_masked(Draws(key, "mask"), BEIT_GRID, BEIT_COUNT, BEIT_BLOCK, BEIT_ASPECT)


def test_the_default_share_of_a_224_pixel_image_is_75_of_196_patches() -> None:
    assert round(MaskingConfig().image * 196) == BEIT_COUNT
    assert {int(beit(key).sum()) for key in range(500)} == {BEIT_COUNT}


@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    share=st.floats(0, 1),
    min_block=st.integers(1, 40),
    max_aspect=st.floats(1, 10),
    key=st.integers(0, 10**6),
)
@settings(max_examples=300, deadline=None)
def test_any_grid_hides_exactly_the_count_asked_for(
    rows: int, cols: int, share: float, min_block: int, max_aspect: float, key: int
) -> None:
    count = round(share * rows * cols)
    masked = block_masked(Draws(key), (rows, cols), count, min_block, max_aspect)
    assert masked.shape == (rows * cols,) and masked.dtype == bool
    assert masked.sum() == count


@pytest.mark.parametrize("count", [1, 10, 24, 25])
def test_a_small_grid_with_a_minimum_block_above_the_count_still_gets_its_count(count: int) -> None:
    for key in range(100):
        assert block_masked(Draws(key), (5, 5), count, 16, BEIT_ASPECT).sum() == count


def test_more_patches_than_the_grid_has_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hide 26 of 5 x 5"):
        block_masked(Draws(0), (5, 5), 26, 16, BEIT_ASPECT)


def neighbours_alike(masked: np.ndarray) -> float:
    """Share of neighbouring patches that are both hidden or both visible."""
    square = masked.reshape(BEIT_GRID)
    below, right = square[1:] == square[:-1], square[:, 1:] == square[:, :-1]
    return float((below.sum() + right.sum()) / (below.size + right.size))


def test_hidden_patches_form_blocks_and_scattered_ones_would_not_pass() -> None:
    blocks = np.mean([neighbours_alike(beit(key)) for key in range(200)])
    scattered = np.mean(
        [neighbours_alike(Draws(key).permutation(196) < BEIT_COUNT) for key in range(200)]
    )
    assert blocks > 0.75
    assert scattered < 0.6


def beit_v2_reference(random: np.random.Generator) -> np.ndarray:
    """BEiT v2's generator rewritten from its description (paper.md 3.2), with plain loops."""
    hidden: set[tuple[int, int]] = set()
    while len(hidden) < BEIT_COUNT:
        missing = BEIT_COUNT - len(hidden)
        before = len(hidden)
        for _ in range(10):
            area = random.uniform(min(BEIT_BLOCK, missing), max(BEIT_BLOCK, missing))
            aspect = np.exp(random.uniform(np.log(1 / BEIT_ASPECT), np.log(BEIT_ASPECT)))
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if height >= 14 or width >= 14:
                continue
            top, left = random.integers(0, 14 - height + 1), random.integers(0, 14 - width + 1)
            block = {(top + i, left + j) for i in range(height) for j in range(width)}
            if 0 < len(block - hidden) <= missing:
                hidden |= block
                break
        if len(hidden) == before:
            break
    masked = np.zeros(BEIT_GRID, dtype=bool)
    for row, col in hidden:
        masked[row, col] = True
    flat = masked.reshape(-1)
    flat[random.permutation(np.flatnonzero(~flat))[: BEIT_COUNT - len(hidden)]] = True
    return flat


def test_block_masks_have_the_statistics_of_a_loop_written_from_the_paper() -> None:
    random = np.random.default_rng(7)
    draws = 3000
    ours = np.stack([beit(key) for key in range(draws)]).mean(0)
    theirs = np.stack([beit_v2_reference(random) for _ in range(draws)]).mean(0)
    # Five standard errors of a difference of two shares with p about 0.38.
    assert np.abs(ours - theirs).max() < 5 * np.sqrt(2 * 0.38 * 0.62 / draws)
    assert ours.reshape(BEIT_GRID)[7, 7] > ours.reshape(BEIT_GRID)[0, 0] + 0.1, "centre is favoured"


@pytest.mark.parametrize(("rate", "words", "chosen"), [(0.15, 194, 29), (0.5, 62, 31), (0.5, 7, 4)])
def test_the_share_of_chosen_words_is_exact(rate: float, words: int, chosen: int) -> None:
    for key in range(50):
        assert word_masked(Draws(key), np.ones(words, dtype=bool), rate).sum() == chosen


def test_one_word_is_chosen_even_where_the_share_rounds_to_none() -> None:
    assert word_masked(Draws(0), np.array([False, True, True, False]), 0.15).sum() == 1
    assert word_masked(Draws(0), np.zeros(4, dtype=bool), 0.15).sum() == 0
    assert word_masked(Draws(0), np.ones(4, dtype=bool), 0.0).sum() == 0


@given(st.lists(st.booleans(), max_size=200), st.floats(0, 1), st.integers(0, 10**6))
@settings(deadline=None)
def test_specials_are_never_chosen(maskable: list[bool], rate: float, key: int) -> None:
    where = np.array(maskable, dtype=bool)
    assert not (word_masked(Draws(key), where, rate) & ~where).any()


def test_every_maskable_place_is_chosen_as_often_as_the_others() -> None:
    maskable = np.ones(40, dtype=bool)
    maskable[[0, -1]] = False
    runs = 4000
    share = np.stack([word_masked(Draws(k), maskable, 0.5) for k in range(runs)]).mean(0)
    assert share[0] == share[-1] == 0
    assert np.abs(share[1:-1] - 0.5).max() < 5 * np.sqrt(0.25 / runs)


def test_chosen_words_become_mask_random_or_stay_in_80_10_10() -> None:
    mask_id, low, size = 4, 5, 1005
    words = np.full(200_000, 7, dtype=np.int32)
    masked = word_masked(Draws("which"), np.ones(len(words), dtype=bool), 0.5)
    given_words = replace_words(Draws("fate"), words, masked, mask_id, low, size, 0.8, 0.1)
    assert given_words.dtype == words.dtype
    assert (given_words[~masked] == words[~masked]).all()
    fates = given_words[masked]
    n = len(fates)
    for share, found in [
        (0.8, (fates == mask_id).mean()),
        (0.1 + 0.1 / 1000, (fates == 7).mean()),  # a random word may be the word itself
        (0.1 - 0.1 / 1000, ((fates != mask_id) & (fates != 7)).mean()),
    ]:
        assert abs(found - share) < 5 * np.sqrt(share * (1 - share) / n), (share, found)
    random_words = fates[(fates != mask_id) & (fates != 7)]
    assert random_words.min() >= low and random_words.max() < size
    assert len(np.unique(random_words)) == size - low - 1, "every word of the vocabulary may come"


def test_a_wrong_split_would_be_noticed() -> None:
    words, masked = np.full(20_000, 7, dtype=np.int32), np.ones(20_000, dtype=bool)
    fates = replace_words(Draws("fate"), words, masked, 4, 5, 1005, 0.9, 0.1)
    assert abs((fates == 4).mean() - 0.8) > 5 * np.sqrt(0.16 / len(fates))


def test_the_same_key_hides_the_same_and_another_key_does_not() -> None:
    assert (beit(3) == beit(3)).all()
    assert (beit(3) != beit(4)).any()
