"""The layouts that can be read: a line each, and what a layout's file must hold."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vlbeit.convert.pixels import PixelScaling
from vlbeit.convert.rewriting import Plan
from vlbeit.tokens.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody wants of an import, beside the file.

    place             the file or folder that was named
    tokenizer         for a model whose file has no words; its size is the model's vocabulary
    vocabulary        BERT's vocab.txt, where it does not lie beside the weights
    copy_experts      L- and VL-experts begin as copies of the V-experts
    vl_layers         top blocks that get a VL-expert, where the layout does not say; None: its own
    per_layer_bias    one shared table of relative positions becomes one a layer
    heads             attention heads, where no table and no config.json tells
    text_positions    longest text of a model whose file has no text
    pixels            scaling of pixels, where no preprocessor_config.json tells; None: as ours
    classes           names of the classes, where no config.json tells
    partial           take what can be taken of a layout that has no exact place here
    """

    place: Path
    tokenizer: TextTokenizer
    vocabulary: str = ""
    copy_experts: bool = False
    vl_layers: int | None = None
    per_layer_bias: bool = False
    heads: int = 0
    text_positions: int = 64
    pixels: PixelScaling | None = None
    classes: tuple[str, ...] = field(default=())
    partial: bool = False


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a layout's module makes of a file: the plan, and the words of the model."""

    plan: Plan
    tokenizer: TextTokenizer


class Layout(NamedTuple):
    """A line of the table. The module has

    plan(tensors, request) -> Found       tensors: names to meta tensors, shapes without numbers
    canonical(name) -> str                the layout's own spelling of a name in the file
    """

    help: str
    module: str

    def plan(self, tensors: Mapping[str, Tensor], request: Request) -> Found:
        """Raises InputError when the file is not of this layout."""
        made: Callable[[Mapping[str, Tensor], Request], Found]
        made = importlib.import_module(self.module).plan
        return made(tensors, request)

    def canonical(self, name: str) -> str:
        spelling: Callable[[str], str] = importlib.import_module(self.module).canonical
        return spelling(name)


LAYOUTS: dict[str, Layout] = {
    "beit": Layout("BEiT (unilm), pretrained or fine-tuned classifier", "vlbeit.convert.beit"),
    "beitv2": Layout("BEiT v2 (unilm), pretrained or fine-tuned", "vlbeit.convert.beitv2"),
    "vlmo": Layout("VLMo (unilm): base, large, base-plus", "vlbeit.convert.vlmo"),
    "hf-beit": Layout("transformers' BEiT: pretrained, classifier", "vlbeit.convert.hf_beit"),
    "hf-vilt": Layout("transformers' ViLT, the trunk of any head", "vlbeit.convert.hf_vilt"),
    "hf-flava": Layout("transformers' FLAVA: image or text encoder", "vlbeit.convert.hf_flava"),
    "beit3": Layout("BEiT-3: refused; with --partial a warm start", "vlbeit.convert.beit3"),
}
"""What can be read, by the word of the command line."""
