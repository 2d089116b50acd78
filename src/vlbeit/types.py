"""The three types everything passes through, and the legend of dimensions.

    B  samples of a micro-batch          P  patches of an image (grid rows x grid columns)
    L  tokens of a sequence              W  tokens of a text, [T_CLS] and [T_SEP] included
    D  width of the model                V  size of a vocabulary or codebook
    H  attention heads                   N  rows picked out of a batch of sequences

Names: `valid` is True at a real token, `masked` is True at what is hidden from the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Stream = Literal["image", "text", "pair"]
STREAMS: tuple[Stream, ...] = ("image", "text", "pair")


class Modality(StrEnum):
    """Which expert serves a token. The paper's V-FFN, L-FFN and VL-FFN."""

    IMAGE = "v"
    TEXT = "l"
    FUSED = "vl"


class Span(NamedTuple):
    """Neighbouring tokens of a sequence that one expert serves."""

    modality: Modality
    length: int


class Known(NamedTuple):
    """What the host knows of a batch, so that nobody has to ask the device and wait for it."""

    words: int
    """To predict, of the whole batch."""
    patches: int
    padded: bool
    """Whether any text is shorter than the longest."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What collate made: one micro-batch of one stream, already masked.

    The model is deterministic given the batch: the masks, the replaced words and the draws that
    decide which paths are dropped are all in it.

    Shapes:
        pixels        (B, 3, height, width) uint8, RGB; None in the text stream
        patch_masked  (B, P) bool; exactly the same count in every row
        patch_codes   (B, P) int64, the visual tokenizer's code of each patch; None until the
                      tokenizer has been asked, unless the codes are stored
        words         (B, W) int64, the text as it is
        words_given   (B, W) int64, the text as the model sees it (80 / 10 / 10)
        word_masked   (B, W) bool, words to predict; never a special token or padding
        word_valid    (B, W) bool, False at padding
        depth_draws   (B, views, 2 * layers) float32 in [0, 1): a residual branch runs when its
                      draw is not below the branch's drop rate; None: nothing is dropped
        sample_ids    B strings "source:epoch:index"
        known         counted by `to` before the tensors leave the host; None: not counted
    """

    stream: Stream
    sample_ids: tuple[str, ...]
    pixels: Tensor | None = None
    patch_masked: Tensor | None = None
    patch_codes: Tensor | None = None
    words: Tensor | None = None
    words_given: Tensor | None = None
    word_masked: Tensor | None = None
    word_valid: Tensor | None = None
    depth_draws: Tensor | None = None
    known: Known | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def valid_words(self) -> Tensor | None:
        """`word_valid`, or None where no text is known to have padding."""
        return None if self.known is not None and not self.known.padded else self.word_valid

    def count(self) -> Known:
        """What is to predict, and whether there is padding."""
        return Known(
            words=0 if self.word_masked is None else int(self.word_masked.sum()),
            patches=0 if self.patch_masked is None else int(self.patch_masked.sum()),
            padded=self.word_valid is not None and not bool(self.word_valid.all()),
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        return replace(self, **mapped_tensors(self, change))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`, and counted."""
        known = self.known or self.count()
        return replace(self.mapped(lambda t: t.to(device, non_blocking=True)), known=known)

    def with_codes(self, codes: Tensor) -> Batch:
        """The same batch with the visual tokenizer's answer, (B, P) int64."""
        return replace(self, patch_codes=codes)

    def tokens(self) -> int:
        """Real tokens: padding is not counted, [I_CLS], [T_CLS] and [T_SEP] are."""
        words = 0 if self.word_valid is None else int(self.word_valid.sum())
        patches = 0 if self.patch_masked is None else self.patch_masked.shape[1] + 1
        return words + len(self) * patches

    def padding(self) -> int:
        """Places of texts that hold no token and are computed all the same."""
        return 0 if self.word_valid is None else int((~self.word_valid).sum())

    def pick(self, places: list[int]) -> Batch:
        """The samples at the given places."""
        index = torch.tensor(places, dtype=torch.long)
        picked: dict[str, Any] = {
            name: value[index.to(value.device)]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        ids = tuple(self.sample_ids[i] for i in places)
        return replace(self, sample_ids=ids, known=None, **picked)


@dataclass(frozen=True, kw_only=True)
class TaskBatch:
    """One micro-batch of a downstream task.

    Shapes:
        pixels        (B, I, 3, height, width) uint8, RGB, I images a sample; None without images
        words         (B, W) int64, [T_CLS] first and [T_SEP] last; None without a text
        word_valid    (B, W) bool, False at padding
        targets       by name, first dimension B; what else is in them is the task's business
        depth_draws   (B, passes, 2 * layers) as in `Batch`, one row for each forward pass of the
                      task; None: nothing is dropped
        sample_ids    B strings "source:epoch:index"
    """

    stream: str
    sample_ids: tuple[str, ...]
    pixels: Tensor | None = None
    words: Tensor | None = None
    word_valid: Tensor | None = None
    targets: dict[str, Tensor]
    depth_draws: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The same batch with every tensor changed."""
        targets = {name: change(value) for name, value in self.targets.items()}
        return replace(self, targets=targets, **mapped_tensors(self, change))

    def to(self, device: torch.device | str) -> TaskBatch:
        """The same batch with every tensor on `device`."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def image(self, number: int = 0) -> Tensor:
        """(B, 3, height, width): one image of every sample.

        Raises:
            ValueError: the batch has no pixels.
        """
        if self.pixels is None:
            raise ValueError(f"a {self.stream} batch without pixels")
        return self.pixels[:, number]

    def draws(self, forward: int = 0) -> Tensor | None:
        """(B, 2 * layers): the draws of one forward pass."""
        return None if self.depth_draws is None else self.depth_draws[:, forward]

    def tokens(self, patch: int) -> int:
        """Real tokens: padding is not counted, [I_CLS], [T_CLS] and [T_SEP] are."""
        words = 0 if self.word_valid is None else int(self.word_valid.sum())
        if self.pixels is None:
            return words
        images, _, height, width = self.pixels.shape[1:]
        return words + len(self) * images * (height * width // patch**2 + 1)

    def padding(self) -> int:
        """Places of texts that hold no token and are computed all the same."""
        return 0 if self.word_valid is None else int((~self.word_valid).sum())


def mapped_tensors(batch: Batch | TaskBatch, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The fields of a batch that are tensors, changed."""
    return {name: change(value) for name, value in vars(batch).items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class States:
    """The only thing the backbone sees.

    Shapes:
        x      (B, L, D)
        valid  (B, L) bool, or None when every token is real
        route  spans whose lengths add up to L; a pair is [text ; image] (paper section 2.1)
        grid   rows and columns of patches, for relative positions; None without an image
        depth_draws  (B, 2 * layers), or None
    """

    x: Tensor
    valid: Tensor | None
    route: tuple[Span, ...]
    grid: tuple[int, int] | None = None
    depth_draws: Tensor | None = None

    def __post_init__(self) -> None:
        covered = sum(span.length for span in self.route)
        if covered != self.x.shape[1]:
            raise ValueError(f"route covers {covered} tokens, x has {self.x.shape[1]}")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over a micro-batch; somebody else divides, once, by the global count.

    loss_sum is a scalar with a gradient, count and correct are scalars without. With nothing to
    predict the sums are zero and loss_sum still has a gradient.
    """

    loss_sum: Tensor
    count: Tensor
    correct: Tensor

    @staticmethod
    def zero(device: torch.device | str) -> Score:
        """Nothing counted, in three scalars on the device."""
        return Score(
            loss_sum=torch.zeros((), device=device),
            count=torch.zeros((), dtype=torch.int64, device=device),
            correct=torch.zeros((), dtype=torch.int64, device=device),
        )

    @staticmethod
    def of_logits(
        logits: Tensor, answers: Tensor, ignored: int = -100, weights: Tensor | None = None
    ) -> Score:
        """Cross-entropy, taken in float32.

        Args:
            logits: (N, classes).
            answers: (N,) int64, a class each, or `ignored` (torch's default): such a row counts
                nowhere.
            weights: (classes,) float32, what a row of each class counts in loss_sum; none: 1. They
                do not touch `count`, so that the mean of the loss stays a sum over a plain count.
        """
        logits = logits.float()
        counted = answers != ignored
        return Score(
            loss_sum=F.cross_entropy(
                logits, answers, weight=weights, ignore_index=ignored, reduction="sum"
            ),
            count=counted.sum(),
            correct=((logits.detach().argmax(dim=1) == answers) & counted).sum(),
        )

    def __add__(self, other: Score) -> Score:
        return Score(
            loss_sum=self.loss_sum + other.loss_sum,
            count=self.count + other.count,
            correct=self.correct + other.correct,
        )

    def detach(self) -> Score:
        """The same sums without a gradient."""
        return Score(loss_sum=self.loss_sum.detach(), count=self.count, correct=self.correct)

    def mean_loss(self) -> Tensor:
        """loss_sum over count; 0 when nothing was counted."""
        return self.loss_sum / self.count.clamp(min=1)

    def accuracy(self) -> Tensor:
        """correct over count, in [0, 1]; 0 when nothing was counted."""
        return self.correct / self.count.clamp(min=1)
