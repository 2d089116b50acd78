"""Reading of SentencePiece `.model` files without the SentencePiece library.

The file is one protocol-buffer message (`sentencepiece_model.proto`). Only the fields an encoder
needs are read; lengths are checked against the bytes at hand before anything is taken.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vlbeit.errors import InputError

# Field numbers and values of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_MODEL_TYPE, _SPACE_AS_SUFFIX = 3, 24
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 2, 3, 4, 5


@dataclass(frozen=True)
class SentencePieceModel:
    """pieces: (piece, log probability) in the file's order, ordinary pieces only."""

    pieces: list[tuple[str, float]]
    charsmap: bytes
    remove_extra_spaces: bool


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number longer than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message; fixed-width values as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError(f"a field of {length} bytes reaches past the end")
        yield tag >> 3, data[at : at + length]
        at += length


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _piece(message: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, _NORMAL
    for field, value in _fields(message):
        if field == 1:
            text = _as_bytes(value).decode("utf-8")
        elif field == 2:
            (single,) = struct.unpack("<f", _as_bytes(value))
            # The shortest decimal of that float32: `tokenizers` reads long decimals inexactly,
            # and a vocabulary must be the same after a save and a load.
            score = float(f"{single:.9g}")
        elif field == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def read_sentencepiece(data: bytes, name: str) -> SentencePieceModel:
    """Parse the bytes of a `.model` file; `name` is for messages.

    Raises:
        InputError: not such a file, or a model this library cannot represent exactly.
    """
    pieces: list[tuple[str, float]] = []
    kinds: set[int] = set()
    # Defaults of the proto.
    trainer = {_MODEL_TYPE: 1, _SPACE_AS_SUFFIX: 0}
    rules = {_DUMMY_PREFIX: 1, _REMOVE_EXTRA: 1, _ESCAPE: 1}
    charsmap = b""
    try:
        for field, value in _fields(data):
            if field == _PIECES:
                text, score, kind = _piece(_as_bytes(value))
                kinds.add(kind)
                if kind == _NORMAL:
                    pieces.append((text, score))
            elif field == _TRAINER:
                trainer |= {k: v for k, v in _fields(_as_bytes(value)) if isinstance(v, int)}
            elif field == _NORMALIZER:
                for number, rule in _fields(_as_bytes(value)):
                    if number == _CHARSMAP:
                        charsmap = _as_bytes(rule)
                    elif isinstance(rule, int):
                        rules[number] = rule
    except (ValueError, IndexError, struct.error) as error:
        raise InputError(f"{name}: is not a SentencePiece model ({error})") from None
    if not pieces:
        raise InputError(f"{name}: is not a SentencePiece model (no pieces in it)")

    refused = ""
    if trainer[_MODEL_TYPE] != 1:
        refused = f"model type {_MODEL_TYPES.get(trainer[_MODEL_TYPE], trainer[_MODEL_TYPE])}"
    elif _BYTE in kinds:
        refused = "byte fallback"
    elif _USER_DEFINED in kinds:
        refused = "user-defined pieces"
    elif trainer[_SPACE_AS_SUFFIX] or not rules[_DUMMY_PREFIX] or not rules[_ESCAPE]:
        refused = "its own rule for spaces"
    if refused:
        raise InputError(
            f"{name}: has {refused}; only Unigram models with the default rule for spaces "
            "import exactly. Train a vocabulary instead: `vlbeit tokenizer train-text`"
        )
    return SentencePieceModel(pieces, charsmap, bool(rules[_REMOVE_EXTRA]))
