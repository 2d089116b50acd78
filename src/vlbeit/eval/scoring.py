"""Masked prediction looked at row by row: who was right about which word or patch."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlbeit.nn.model import VLBeit
from vlbeit.objectives import after_class, need
from vlbeit.types import Batch, States


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One row per hidden position.

    Shapes: all (N,): `sample` counts samples from 0, `answer` and `predicted` are ids, `loss` is
    the cross-entropy in nats.
    """

    sample: np.ndarray
    answer: np.ndarray
    predicted: np.ndarray
    loss: np.ndarray

    def shifted(self, samples: int) -> "Rows":
        """The same rows with sample numbers that start at `samples`."""
        return replace(self, sample=self.sample + samples)

    def where(self, keep: np.ndarray) -> "Rows":
        return Rows(**{name: values[keep] for name, values in vars(self).items()})

    @staticmethod
    def join(parts: list["Rows"]) -> "Rows":
        if not parts:
            empty = np.zeros(0, dtype=np.int64)
            return Rows(sample=empty, answer=empty, predicted=empty, loss=np.zeros(0))
        return Rows(
            **{
                name: np.concatenate([vars(part)[name] for part in parts])
                for name in vars(parts[0])
            }
        )

    def sums(self, samples: int) -> dict[str, np.ndarray]:
        """Per sample: hidden positions, right ones, and the sum of the loss; each (samples,)."""
        right = (self.predicted == self.answer).astype(np.float64)
        return {
            "count": np.bincount(self.sample, minlength=samples).astype(np.float64),
            "correct": np.bincount(self.sample, right, minlength=samples),
            "loss": np.bincount(self.sample, self.loss, minlength=samples),
        }


def predict_rows(model: VLBeit, states: States, head: str, wanted: Tensor, answers: Tensor) -> Rows:
    """Shapes: wanted (B, L) bool, answers (N,) in row-major order of `wanted`."""
    logits = model.heads[head](model.backbone.rows(states, wanted)).float()
    loss = F.cross_entropy(logits, answers, reduction="none")
    return Rows(
        sample=wanted.nonzero()[:, 0].cpu().numpy(),
        answer=answers.cpu().numpy(),
        predicted=logits.argmax(dim=-1).cpu().numpy(),
        loss=loss.double().cpu().numpy(),
    )


def text_rows(model: VLBeit, batch: Batch) -> Rows:
    """Hidden words from the text alone (MLM; for a pair: the blind condition "no image")."""
    masked = need(batch.word_masked, "word_masked", batch.stream)
    words = need(batch.words, "words", batch.stream)
    given = need(batch.words_given, "words_given", batch.stream)
    states = model.embed_text(given, batch.word_valid)
    return predict_rows(model, states, "mlm", masked, words[masked])


def image_rows(model: VLBeit, batch: Batch) -> Rows:
    """Hidden patches from the image alone (MIM; for a pair: the condition "no text")."""
    masked = need(batch.patch_masked, "patch_masked", batch.stream)
    codes = need(batch.patch_codes, "patch_codes", batch.stream)
    states = model.embed_image(need(batch.pixels, "pixels", batch.stream), masked)
    return predict_rows(model, states, "mim", after_class(masked), codes[masked])


def pair_word_rows(model: VLBeit, batch: Batch, pixels: Tensor | None = None) -> Rows:
    """Hidden words of a pair, from its other words and its own or the given images."""
    masked = need(batch.word_masked, "word_masked", batch.stream)
    words = need(batch.words, "words", batch.stream)
    given = need(batch.words_given, "words_given", batch.stream)
    pixels = need(batch.pixels if pixels is None else pixels, "pixels", batch.stream)
    states = model.embed_pair(given, batch.word_valid, pixels)
    wanted = F.pad(masked, (0, states.x.shape[1] - masked.shape[1]), value=False)
    return predict_rows(model, states, "mlm", wanted, words[masked])


def pair_patch_rows(
    model: VLBeit, batch: Batch, text: tuple[Tensor, Tensor | None] | None = None
) -> Rows:
    """Hidden patches of a pair, from its other patches and its own or the given texts."""
    masked = need(batch.patch_masked, "patch_masked", batch.stream)
    codes = need(batch.patch_codes, "patch_codes", batch.stream)
    words, valid = text or (need(batch.words, "words", batch.stream), batch.word_valid)
    states = model.embed_pair(words, valid, need(batch.pixels, "pixels", batch.stream), masked)
    wanted = F.pad(masked, (states.x.shape[1] - masked.shape[1], 0), value=False)
    return predict_rows(model, states, "mim", wanted, codes[masked])


def neighbour(value: Tensor, last: Tensor) -> Tensor:
    """Each sample gets the value of the one before it; the first gets that of `last`, (1, ...)."""
    return torch.cat((last, value[:-1]))
