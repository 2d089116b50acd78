"""A small prepared world that the stream and loader tests share: shards, sources, vocabulary."""

import io
import json
from collections.abc import Container
from pathlib import Path

import numpy as np
from PIL import Image

from vlbeit.config import (
    BatchConfig,
    CropConfig,
    InputConfig,
    MaskingConfig,
    ModelConfig,
    PretrainConfig,
    TextTokenizerConfig,
)
from vlbeit.data.records import RecordSource, write_shards
from vlbeit.tokens.text import TextTokenizer, train_text_tokenizer
from vlbeit.types import Stream

WORDS = "a red blue green circle square stands left right of two three small large above".split()

CONFIG = PretrainConfig(
    recipe="toy",
    model=ModelConfig(image_size=(32, 32), patch=8, layers=3, drop_path=0.1),
    input=InputConfig(
        text_length=16,
        pair_text_length=12,
        images=CropConfig(scale=(0.5, 1.0)),
        pairs=CropConfig(scale=(0.5, 1.0), flip=0.0),
    ),
    batch=BatchConfig(images=6, texts=5, pairs=8, micro=3),
    masking=MaskingConfig(image=0.4, min_block=4),
)


def sentence(number: int, words: int) -> str:
    return " ".join(np.random.default_rng(number).choice(WORDS, words))


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def image_source(
    folder: Path, name: str = "photos", records: int = 40, bad: Container[int] = ()
) -> RecordSource:
    """Pictures; those whose number is in `bad` cannot be decoded."""
    rows = ((f"{i:04d}", {"png": b"<html>" if i in bad else picture(i)}) for i in range(records))
    return RecordSource(name, [str(path) for path in write_shards(rows, folder, name, 16)])


def pair_source(
    folder: Path, name: str = "captioned", records: int = 48, bad: Container[int] = ()
) -> RecordSource:
    """Pictures with one to three captions of 1 to 14 words; the bad ones have an empty caption."""

    def members(i: int) -> dict[str, bytes]:
        texts = [sentence(100 * i + c, 1 + (7 * i + 5 * c) % 14) for c in range(1 + i % 3)]
        captions = {"captions": [" "] if i in bad else texts}
        return {"png": picture(1000 + i), "json": json.dumps(captions).encode()}

    rows = ((f"{i:04d}", members(i)) for i in range(records))
    return RecordSource(name, [str(path) for path in write_shards(rows, folder, name, 16)])


def text_source(
    folder: Path, name: str = "prose", records: int = 3, lines: list[bytes] | None = None
) -> RecordSource:
    """Documents, one a line; `lines` are added to the first record."""

    def member(i: int) -> bytes:
        documents = [sentence(5000 + 100 * i + d, 3 + d % 9).encode() for d in range(40)]
        return b"\n".join(documents + (lines or [] if i == 0 else [])) + b"\n"

    rows = ((f"{i:04d}", {"txt": member(i)}) for i in range(records))
    return RecordSource(name, [str(path) for path in write_shards(rows, folder, name, 2)])


def toy_tokenizer() -> TextTokenizer:
    return train_text_tokenizer(
        (sentence(i, 8) for i in range(200)), TextTokenizerConfig(kind="wordpiece", vocab=120)
    )


def toy_sources(folder: Path) -> dict[Stream, list[RecordSource]]:
    """Two image sources, one of texts, two of pairs."""
    return {
        "image": [image_source(folder), image_source(folder, "drawings", 10)],
        "text": [text_source(folder)],
        "pair": [pair_source(folder), pair_source(folder, "alt-texts", 21)],
    }
