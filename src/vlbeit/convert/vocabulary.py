"""Rows of a word table in the order of our ids.

Our ids 0 to 4 are [PAD], [UNK], [T_CLS], [T_SEP] and [MASK] in every vocabulary, so a foreign
table of word vectors has to be put in another order, and where the two vocabularies differ in size
it has to be resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlbeit.errors import InputError
from vlbeit.tokens.text import CLS, MASK, PAD, SEP, UNK, TextTokenizer, import_bert_vocab

BERT_NAMES = {PAD: "[PAD]", UNK: "[UNK]", CLS: "[CLS]", SEP: "[SEP]", MASK: "[MASK]"}
"""Our special tokens, and what BERT's vocabularies call them."""


def bert_rows(path: Path | str) -> tuple[TextTokenizer, list[int]]:
    """The tokenizer of a BERT `vocab.txt`, and for each of our ids the line (row) it had there.

    Raises:
        InputError: not such a file.
    """
    tokenizer = import_bert_vocab(path)
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    places = {piece: number for number, piece in enumerate(lines)}
    pieces = tokenizer.pieces(range(tokenizer.size))
    return tokenizer, [places[BERT_NAMES.get(piece, piece)] for piece in pieces]


def reordered_vocabulary(table: Tensor, rows: Sequence[int]) -> Tensor:
    """Row i of the result is row rows[i] of the table. Shapes: (V, ...) to (len(rows), ...).

    Rows that nobody asks for are left out (unused tokens that pad a table to a round number).

    Raises:
        ValueError: a row that the table does not have.
    """
    if max(rows) >= len(table):
        raise ValueError(
            f"the vocabulary has a piece with the number {max(rows)}, the table {len(table)} rows"
        )
    return table[torch.tensor(rows, device=table.device)]


def find_bert_vocabulary(place: Path, given: str) -> Path:
    """`--vocabulary FILE`, else the vocab.txt beside the weights.

    Raises:
        InputError: neither is there.
    """
    if given:
        return Path(given)
    beside = (place if place.is_dir() else place.parent) / "vocab.txt"
    if beside.is_file():
        return beside
    raise InputError(
        f"{place}: no vocab.txt beside the weights; give --vocabulary and BERT's vocab.txt that "
        "the model was trained with (bert-base-uncased for VLMo and ViLT)"
    )
