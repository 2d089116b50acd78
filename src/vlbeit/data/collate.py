"""Samples to a micro-batch: stacked, captions padded to the longest of the micro-batch."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch

from vlbeit.data.streams import Sample
from vlbeit.tokens.text import TextTokenizer
from vlbeit.types import Batch, Stream


class Stacked(TypedDict):
    """A micro-batch in numpy: what a loader worker sends. Arrays as in `types.Batch`."""

    stream: Stream
    sample_ids: tuple[str, ...]
    arrays: dict[str, np.ndarray]


def stack(stream: Stream, samples: Sequence[Sample]) -> Stacked:
    """Put samples of one stream together; at least one.

    Texts shorter than the longest are filled with [PAD], with `word_valid` False there.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in ("pixels", "patch_masked", "depth_draws"):
        rows = [getattr(sample, name) for sample in samples]
        if rows[0] is not None:
            arrays[name] = np.stack(rows)
    if samples[0].words is not None:
        widths = np.array([len(s.words) for s in samples if s.words is not None])
        shape = (len(samples), int(widths.max()))
        arrays["words"] = np.full(shape, TextTokenizer.pad, dtype=np.int64)
        arrays["words_given"] = arrays["words"].copy()
        arrays["word_masked"] = np.zeros(shape, dtype=bool)
        arrays["word_valid"] = np.arange(shape[1]) < widths[:, None]
        for row, sample in enumerate(samples):
            for name in ("words", "words_given", "word_masked"):
                arrays[name][row, : widths[row]] = getattr(sample, name)
    return {
        "stream": stream,
        "sample_ids": tuple(sample.visit.sample_id for sample in samples),
        "arrays": arrays,
    }


def as_batch(stacked: Stacked) -> Batch:
    """The same memory as tensors."""
    tensors = {name: torch.from_numpy(array) for name, array in stacked["arrays"].items()}
    return Batch(stream=stacked["stream"], sample_ids=stacked["sample_ids"], **tensors)


def collate(stream: Stream, samples: Sequence[Sample]) -> Batch:
    """One masked micro-batch from samples of one stream."""
    return as_batch(stack(stream, samples))
