"""A run that was never trained: held-out pairs whose picture says the word, and models to ask.

Each picture is one shade of grey and its caption repeats one word, by a fixed table, so what a
model can know from the picture alone is known exactly.
"""

import io
import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from tiny_models import TINY, fill_normal
from vlbeit.config import (
    BatchConfig,
    CropConfig,
    InputConfig,
    MaskingConfig,
    PretrainConfig,
    TextTokenizerConfig,
)
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.records import write_shards
from vlbeit.eval.evaluate import LoadedRun
from vlbeit.nn.model import VLBeit
from vlbeit.tokens.text import TextTokenizer, train_text_tokenizer
from vlbeit.types import Modality, Span, States

COLOURS = ("red", "green", "blue", "white")
SHAPES = ("ring", "star")
FILLERS = ("look", "here", "now")
SHADES = {"red": 16, "green": 80, "blue": 144, "white": 208}
PAIRS, IMAGES, TEXTS = 23, 12, 2
VOCAB = 120


def colour_of(index: int) -> str:
    """Uneven shares, in no regular order."""
    return COLOURS[(index * index + index // 3) % 5 % 4]


def caption_of(index: int) -> str:
    colour, shape = colour_of(index), SHAPES[index % 3 == 0]
    return " ".join([colour, shape, colour, *FILLERS[: index % 4], colour])


def grey_png(shade: int, side: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write_world(folder: Path, *, shift: int = 0, streams=("pair", "image", "text")) -> Path:
    """A prepared folder with a val split. With a `shift` each caption has another's picture."""
    pairs = (
        (
            f"{i:04d}",
            {
                "png": grey_png(SHADES[colour_of((i + shift) % PAIRS)]),
                "json": json.dumps({"captions": [caption_of(i)]}).encode(),
            },
        )
        for i in range(PAIRS)
    )
    images = ((f"{i:04d}", {"png": grey_png(20 * i)}) for i in range(IMAGES))
    texts = (
        (f"{i:04d}", {"txt": "".join(f"{caption_of(j)}\n" for j in range(30)).encode()})
        for i in range(TEXTS)
    )
    made = {"pair": (pairs, PAIRS), "image": (images, IMAGES), "text": (texts, TEXTS)}
    sources = [
        SourceInfo(f"{s}s", s, "val", [str(p) for p in write_shards(made[s][0], folder, s)], n)
        for s, (_, n) in made.items()
        if s in streams
    ]
    words = {"colour": list(COLOURS), "shape": list(SHAPES)}
    Dataset.write(folder, "shades", sources, {"attribute_words": words})
    return folder


def shade_words() -> TextTokenizer:
    lines = [caption_of(i) for i in range(PAIRS)] + [" ".join(COLOURS + SHAPES + FILLERS)]
    return train_text_tokenizer(lines, TextTokenizerConfig(kind="wordpiece", vocab=VOCAB))


class Shades:
    """A visual tokenizer that needs no training: the code is the mean brightness of a patch."""

    codes, patch, image_size, digest = 16, 8, (32, 32), "0" * 64
    draws = True
    facts: dict[str, object] = {}

    def encode(self, pixels: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(pixels.double().mean(dim=1, keepdim=True), self.patch)
        return (means / 16).long().flatten(1).clamp(max=self.codes - 1)

    def decode(self, codes: Tensor) -> Tensor:
        pixels = (codes * 16 + 8).to(torch.uint8)[:, None]
        side = self.patch
        return pixels.repeat_interleave(side, 2).repeat_interleave(side, 3).repeat(1, 3, 1, 1)

    def to(self, device: object) -> "Shades":
        return self


class OneHot:
    """Stands in for VLBeit. Each position holds the logits of what it would say: in a pair the
    colour whose shade the picture has if it `reads`, else always the same word and code."""

    def __init__(self, text: TextTokenizer, *, reads: bool) -> None:
        self.reads = reads
        self.width = VOCAB
        self.names = {shade: int(text.encode(name)[0]) for name, shade in SHADES.items()}
        self.always = int(text.encode("look")[0])
        self.heads = {"mlm": nn.Identity(), "mim": nn.Identity()}

    @property
    def backbone(self) -> "OneHot":
        return self

    def eval(self) -> "OneHot":
        return self

    def parameters(self) -> list[Tensor]:
        return []

    def states(self, said: Tensor, length: int) -> States:
        x = 20.0 * nn.functional.one_hot(said, self.width).float()
        spans = (Span(Modality.TEXT, length),)
        return States(x=x[:, None].expand(-1, length, -1), valid=None, route=spans)

    def embed_text(self, words: Tensor, valid: Tensor | None = None) -> States:
        return self.states(torch.full((len(words),), self.always), words.shape[1])

    def embed_image(self, pixels: Tensor, masked: Tensor) -> States:
        return self.states(torch.zeros(len(pixels), dtype=torch.long), masked.shape[1] + 1)

    def embed_pair(
        self, words: Tensor, valid: Tensor | None, pixels: Tensor, masked: Tensor | None = None
    ) -> States:
        said = torch.full((len(words),), self.always)
        if self.reads:
            shades = pixels[:, 0, 0, 0].tolist()
            said = torch.tensor([self.names[shade] for shade in shades])
        patches = (pixels.shape[2] // 8) * (pixels.shape[3] // 8)
        return self.states(said, words.shape[1] + patches + 1)

    def rows(self, states: States, wanted: Tensor) -> Tensor:
        return states.x[wanted]


def tiny_run(data: Path, *, reads: bool | None = None, visual: bool = True) -> LoadedRun:
    """`reads` None: a real model with random weights; else the stand-in."""
    text = shade_words()
    whole = CropConfig(scale=(1.0, 1.0), flip=0.0, jitter=0.0)
    config = PretrainConfig(
        recipe="toy",
        data=(str(data),),
        precision="fp32",
        model=replace(TINY, codes=16, vocab=VOCAB),
        input=InputConfig(text_length=12, pair_text_length=12, images=whole, pairs=whole),
        batch=BatchConfig(images=4, texts=4, pairs=4, micro=4),
        masking=MaskingConfig(min_block=2),
    )
    model: VLBeit | OneHot
    if reads is None:
        model = VLBeit(config.model)
        fill_normal(model)
    else:
        model = OneHot(text, reads=reads)
    return LoadedRun(
        folder=data,
        step=7,
        config=config,
        model=model.eval(),  # type: ignore[arg-type]
        text=text,
        visual=Shades() if visual else None,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )
