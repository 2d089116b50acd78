"""Samples to a micro-batch: stacked, captions padded to the longest of the micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np
import torch

from vlbeit.data.order import Visit
from vlbeit.tokens.text import TextTokenizer
from vlbeit.types import Batch, Stream


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One masked sample; the arrays are those of `types.Batch` without the batch dimension."""

    visit: Visit
    pixels: np.ndarray | None = None
    patch_masked: np.ndarray | None = None
    patch_codes: np.ndarray | None = None
    words: np.ndarray | None = None
    words_given: np.ndarray | None = None
    word_masked: np.ndarray | None = None
    depth_draws: np.ndarray | None = None


class Stacked(TypedDict):
    """A micro-batch in numpy: what a loader worker sends. Arrays as in the batch's type."""

    stream: str
    sample_ids: tuple[str, ...]
    arrays: dict[str, np.ndarray]


WIDTH_STEP = 8
"""Texts of differing lengths are filled up to a multiple of this. A matrix library that compiles
its products by shape (bf16 on a CPU) keeps those of every width it meets: 17 MB each for `tiny`.
A GPU's matrix units want multiples of 8 too."""


def padded_width(longest: int, allowed: int) -> int:
    """Columns for texts of which the longest has `longest` tokens; `allowed`: the most there may
    be, or 0: exactly as many as the longest has."""
    return (
        min(-WIDTH_STEP * (-longest // WIDTH_STEP), max(allowed, longest)) if allowed else longest
    )


def stack(stream: Stream, samples: Sequence[Sample], allowed: int = 0) -> Stacked:
    """Put samples of one stream together; at least one.

    Texts shorter than the longest are filled with [PAD], with `word_valid` False there; with
    `allowed`, the longest text there may be, all are filled as `padded_width` says.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in ("pixels", "patch_masked", "patch_codes", "depth_draws"):
        rows = [getattr(sample, name) for sample in samples]
        if rows[0] is not None:
            arrays[name] = np.stack(rows)
    if samples[0].words is not None:
        for name in ("words", "words_given"):
            texts = [getattr(sample, name) for sample in samples]
            arrays[name], arrays["word_valid"] = pad_words(texts, allowed)
        masked = [sample.word_masked for sample in samples if sample.word_masked is not None]
        arrays["word_masked"] = np.zeros_like(arrays["word_valid"])
        arrays["word_masked"][arrays["word_valid"]] = np.concatenate(masked)
    return {
        "stream": stream,
        "sample_ids": tuple(sample.visit.sample_id for sample in samples),
        "arrays": arrays,
    }


def pad_words(texts: Sequence[np.ndarray], allowed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Texts of (W,) ids to (B, columns) int64, filled with [PAD], and (B, columns) bool valid;
    columns as `padded_width` says."""
    widths = np.array([len(text) for text in texts])
    shape = (len(texts), padded_width(int(widths.max()), allowed))
    words = np.full(shape, TextTokenizer.pad, dtype=np.int64)
    for row, text in enumerate(texts):
        words[row, : widths[row]] = text
    return words, np.arange(words.shape[1]) < widths[:, None]


FILL = 255
"""What fills up byte arrays of different sizes; in a class map it stands for no class."""


def stack_filled(rows: Sequence[np.ndarray]) -> np.ndarray:
    """np.stack; bytes of different sizes are filled up to the largest with FILL, at their ends."""
    sizes = {row.shape for row in rows}
    if len(sizes) == 1 or rows[0].dtype != np.uint8:
        return np.stack(rows)
    stacked = np.full((len(rows), *map(max, zip(*sizes, strict=True))), FILL, dtype=np.uint8)
    for place, row in enumerate(rows):
        stacked[place][tuple(slice(side) for side in row.shape)] = row
    return stacked


def as_batch(stacked: Stacked) -> Batch:
    """The same memory as tensors."""
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array) for name, array in stacked["arrays"].items()
    }
    stream = cast(Stream, stacked["stream"])
    return Batch(stream=stream, sample_ids=stacked["sample_ids"], **tensors)


def collate(stream: Stream, samples: Sequence[Sample]) -> Batch:
    """One masked micro-batch from samples of one stream."""
    return as_batch(stack(stream, samples))
