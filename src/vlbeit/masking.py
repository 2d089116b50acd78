"""Which patches and which words are hidden: pure functions of a stream of draws.

Patches: the block-wise algorithm of BEiT (2106.08254, Algorithm 1) with BEiT v2's correction to
an exact count, so that every image of a batch hides the same number of patches (docs/paper.md 3).
Words: an exact count too, drawn without repetition, then 80 / 10 / 10 as in BERT (docs/paper.md 3).
"""

import math

import numpy as np

from vlbeit.draws import Draws

_TRIES = 10
"""Blocks proposed before a round counts as fruitless (BEiT)."""


def block_masked(
    draws: Draws, grid: tuple[int, int], count: int, min_block: int, max_aspect: float
) -> np.ndarray:
    """Hide exactly `count` patches of a grid, in rectangular blocks.

    Blocks are proposed until `count` is reached or a round of ten proposals adds nothing; what
    is then missing is drawn from the visible patches one by one. A proposal's area is uniform
    between `min_block` and what is still missing, its aspect ratio log-uniform within
    [1 / max_aspect, max_aspect], its corner uniform; it is taken when it hides at least one new
    patch and no more than are missing, so there is never a patch too many. On grids so small
    that `min_block` exceeds `count`, the first block has the area `count`.

    Args:
        grid: rows and columns of patches.
        min_block: fewest patches of a block (BEiT: 16).
        max_aspect: most elongated block, height over width or its inverse, at least 1.

    Returns:
        (rows * cols,) bool, row-major; exactly `count` are True.

    Raises:
        ValueError: `count` is not between 0 and rows * cols, or `max_aspect` is below 1.
    """
    rows, cols = grid
    if not 0 <= count <= rows * cols:
        raise ValueError(f"cannot hide {count} of {rows} x {cols} patches")
    if max_aspect < 1:
        raise ValueError(f"max_aspect is {max_aspect}; a block's aspect ratio is at least 1")
    masked = np.zeros((rows, cols), dtype=bool)
    min_block = min(min_block, count)
    tallest, widest = max(rows - 1, 1), max(cols - 1, 1)  # BEiT: no block spans the grid
    log_aspect = math.log(max_aspect)
    missing = count
    while missing > 0:
        # Four numbers a proposal, drawn for the whole round at once: a call costs more than a draw.
        round_draws = iter(draws.uniforms(4 * _TRIES).tolist())
        for area_draw, aspect_draw, top_draw, left_draw in zip(*[round_draws] * 4, strict=True):
            area = min_block + area_draw * (missing - min_block)
            aspect = math.exp((2 * aspect_draw - 1) * log_aspect)
            height = max(round(math.sqrt(area * aspect)), 1)
            width = max(round(math.sqrt(area / aspect)), 1)
            if height > tallest or width > widest:
                continue
            top = int(top_draw * (rows - height + 1))
            left = int(left_draw * (cols - width + 1))
            block = masked[top : top + height, left : left + width]
            new = height * width - int(np.count_nonzero(block))
            if 0 < new <= missing:
                block[:] = True
                missing -= new
                break
        else:
            break
    flat = masked.reshape(-1)
    if missing > 0:
        visible = np.flatnonzero(~flat)
        flat[visible[draws.permutation(len(visible))[:missing]]] = True
    return flat


def word_masked(draws: Draws, maskable: np.ndarray, rate: float) -> np.ndarray:
    """Choose round(rate * n) of the n maskable words, at least one where there is one.

    Args:
        maskable: (W,) bool, False at special tokens and padding.
        rate: share to choose, in [0, 1]; 0 chooses none.

    Returns:
        (W,) bool, True only where `maskable` is.

    Raises:
        ValueError: `rate` is no share.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}; a share lies between 0 and 1")
    masked = np.zeros(len(maskable), dtype=bool)
    places = np.flatnonzero(maskable)
    if rate > 0 and len(places) > 0:
        count = max(math.floor(rate * len(places) + 0.5), 1)
        masked[places[draws.permutation(len(places))[:count]]] = True
    return masked


def replace_words(
    draws: Draws,
    words: np.ndarray,
    masked: np.ndarray,
    mask_id: int,
    random_low: int,
    vocab_size: int,
    to_mask: float,
    to_random: float,
) -> np.ndarray:
    """The text as the model sees it: each chosen word becomes [MASK], a random word, or stays.

    Args:
        words: (W,) token ids.
        masked: (W,) bool, the words to predict.
        random_low, vocab_size: random words are uniform in [random_low, vocab_size); the ids
            below `random_low` are special tokens.
        to_mask, to_random: probability of each fate; the rest stays as it is (BERT: 0.8, 0.1).

    Returns:
        (W,) token ids of the dtype of `words`, equal to `words` where `masked` is False.

    Raises:
        ValueError: `to_mask` and `to_random` are not shares of one whole.
    """
    if to_mask < 0 or to_random < 0 or to_mask + to_random > 1:
        raise ValueError(f"to_mask {to_mask} and to_random {to_random} are not shares of one whole")
    given = words.copy()
    places = np.flatnonzero(masked)
    fate, which = draws.uniforms(2 * len(places)).reshape(2, -1)
    given[places[fate < to_mask]] = mask_id
    to_swap = (fate >= to_mask) & (fate < to_mask + to_random)
    span = vocab_size - random_low
    given[places[to_swap]] = random_low + (which[to_swap] * span).astype(words.dtype)
    return given
