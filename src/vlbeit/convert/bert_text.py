"""BERT's text embedding in this model: word, type and position, then a LayerNorm.

BERT adds a type vector to every word before the norm, and ViLT and VLMo add a type vector of the
modality after it. Both are the same for every token here, so they are folded: the first into the
word table, the second into the bias of the norm. Without positions the whole of it is a function
of the word alone, and the norm is folded into the table too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vlbeit.convert.rewriting import Rule
from vlbeit.convert.vocabulary import reordered_vocabulary

BERT_EPS = 1e-12
"""Of transformers' BertConfig, which VLMo takes as it is."""


@dataclass(frozen=True, kw_only=True)
class BertText:
    """Foreign names.

    modality  the table of modality types, whose row 0 is the text's; "": there is none
    """

    words: str
    types: str
    positions: str
    norm: str
    modality: str = ""

    @property
    def _modality(self) -> tuple[str, ...]:
        return (self.modality,) if self.modality else ()


def with_positions(names: BertText, rows: Sequence[int]) -> Iterator[Rule]:
    """A model with `text_norm_eps` and absolute positions. `rows` as in `reordered_vocabulary`."""
    yield Rule(
        target="text.words.weight",
        sources=(names.words, names.types),
        make=lambda words, types: reordered_vocabulary(words, rows) + types[0],
        action="folded",
        note="rows in the order of our ids, BERT's type vector added",
    )
    yield Rule(target="text.positions", sources=(names.positions,))
    yield Rule(target="text.norm.weight", sources=(f"{names.norm}.weight",))
    if names.modality:
        yield Rule(
            target="text.norm.bias",
            sources=(f"{names.norm}.bias", names.modality),
            make=lambda bias, types: bias + types[0],
            action="folded",
            note="the text's modality vector added",
        )
    else:
        yield Rule(target="text.norm.bias", sources=(f"{names.norm}.bias",))


def without_positions(names: BertText, rows: Sequence[int]) -> Rule:
    """A model without text norm and absolute positions: all of it in the word table."""

    def folded(words: Tensor, types: Tensor, weight: Tensor, bias: Tensor, *more: Tensor) -> Tensor:
        table = reordered_vocabulary(words, rows) + types[0]
        normed = F.layer_norm(table, table.shape[-1:], weight, bias, BERT_EPS)
        return normed + more[0][0] if more else normed

    norm = (f"{names.norm}.weight", f"{names.norm}.bias")
    return Rule(
        target="text.words.weight",
        sources=(names.words, names.types, *norm, *names._modality),
        make=folded,
        action="folded",
        note="rows in the order of our ids; type vectors and LayerNorm worked in",
    )
