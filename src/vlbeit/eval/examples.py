"""Held-out pairs to look at: hidden words and hidden patches as one model fills them in."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlbeit.data.loader import PretrainingStream
from vlbeit.data.records import BadSample
from vlbeit.eval.evaluate import LoadedRun
from vlbeit.eval.fill import FilledPatches, guess_patches, guess_words
from vlbeit.eval.heldout import visits_of


class Word(NamedTuple):
    """One piece of a caption. `guess` and `probability` are the model's, where it was hidden."""

    text: str
    starts: bool
    """Whether a space stands before it."""
    guess: str | None = None
    probability: float = 0.0

    @property
    def right(self) -> bool:
        return self.guess == self.text


@dataclass(frozen=True, kw_only=True)
class Example:
    """One held-out pair. The picture is (height, width, 3) uint8 as the model sees it."""

    sample_id: str
    caption: str
    words: list[Word]
    picture: np.ndarray
    with_text: FilledPatches | None
    without_text: FilledPatches | None


def pair_examples(run: LoadedRun, stream: PretrainingStream, count: int) -> list[Example]:
    """`count` pairs spread evenly over the stream, none of them chosen; bad ones are left out.

    Words and patches are hidden as in the evaluation, so these are among its samples.
    """
    found = []
    for visit in visits_of(stream, count):
        try:
            sample = stream.sample(visit)
        except BadSample:
            continue
        assert sample.pixels is not None and sample.words is not None
        assert sample.words_given is not None and sample.word_masked is not None
        assert sample.patch_masked is not None
        ids, masked = sample.words, sample.word_masked
        guesses = iter(guess_words(run, sample.words_given, masked, sample.pixels, top=1))
        words = []
        for number, piece, hidden in zip(ids, run.text.pieces(ids.tolist()), masked, strict=True):
            text, starts = spelt(piece, run.text.kind)
            if hidden:
                best = next(guesses)[0]
                guess = spelt(best.piece, run.text.kind)[0]
                words.append(Word(text, starts, guess, best.probability))
            elif number not in (run.text.pad, run.text.cls, run.text.sep):
                words.append(Word(text, starts))
        caption = run.text.decode(ids.tolist())
        fillings: list[FilledPatches | None] = [None, None]
        if run.visual is not None and run.visual.draws:
            fillings = [
                guess_patches(run, sample.pixels, sample.patch_masked, given)
                for given in (ids, None)
            ]
        found.append(
            Example(
                sample_id=":".join(map(str, visit)),
                caption=caption,
                words=words,
                picture=np.ascontiguousarray(sample.pixels.transpose(1, 2, 0)),
                with_text=fillings[0],
                without_text=fillings[1],
            )
        )
    return found


def spelt(piece: str, kind: str) -> tuple[str, bool]:
    """A vocabulary piece as a reader writes it, and whether a space stands before it."""
    if kind == "wordpiece":
        return (piece[2:], False) if piece.startswith("##") else (piece, True)
    return (piece[1:], True) if piece.startswith("\u2581") else (piece, False)
