"""BEiT-3: refused, or what little of it has a place, as a warm start (`--partial`).

BEiT-3 has query, key, value and output projections of its own for each modality, a LayerNorm more
inside attention and inside the feed-forward layer (after the nonlinearity, so it folds into
nothing), and no VL-expert. Only patch projection, [I_CLS], mask vector and word vectors mean the
same here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlbeit.config import ModelConfig
from vlbeit.convert.beit import patch_rules, pretrained
from vlbeit.convert.blocks import HEAD_WIDTH, count_blocks, shape_of, square_side
from vlbeit.convert.layouts import Found, Request
from vlbeit.convert.pixels import PixelScaling
from vlbeit.convert.rewriting import Drop, Plan, Rule, flat
from vlbeit.convert.vocabulary import reordered_vocabulary
from vlbeit.errors import InputError
from vlbeit.tokens.text import SPECIALS

WORDS = "beit3.text_embed.weight"
PATCH = "beit3.vision_embed.proj"
BLOCK = "beit3.encoder.layers.{}."
POSITIONS = "beit3.encoder.embed_positions.A.weight"
FIRST_ROWS = 3
"""Rows of that table before the patches': two that fairseq never uses, and [I_CLS]."""
REASON = "BEiT-3 has it for each modality, this model shares it"
DROPS = (
    Drop(pattern="beit3.encoder.*", reason=REASON),
    Drop(pattern="mlm_head.*", reason="a head over the outputs of another trunk"),
    Drop(pattern="mim_head.*", reason="a head over the outputs of another trunk"),
)


def canonical(name: str) -> str:
    """The name as it is."""
    return name


def plan(tensors: Mapping[str, Tensor], request: Request) -> Found:
    """Raises InputError unless the request is for a part, or for a file that is no BEiT-3."""
    origin = str(request.place)
    if not request.partial:
        raise InputError(
            f"{origin}: BEiT-3 cannot become this model: it has attention projections for each "
            "modality where ours are shared, a LayerNorm more in attention and in feed-forward "
            "layers, and no VL-expert. --partial takes patch projection, [I_CLS], mask vector and "
            "word vectors as a warm start, and leaves the rest as initialised"
        )
    width, _, patch, _ = shape_of(tensors, f"{PATCH}.weight", 4, origin)
    places = shape_of(tensors, POSITIONS, 2, origin)[0] - FIRST_ROWS
    side = square_side(places, POSITIONS, origin) * patch
    fc1 = BLOCK.format(0) + "ffn.A.fc1.weight"
    model = ModelConfig(
        width=width,
        layers=count_blocks(tensors, BLOCK, origin),
        heads=request.heads or max(1, width // HEAD_WIDTH),
        ffn=shape_of(tensors, fc1, 2, origin)[0],
        vl_layers=request.vl_layers or 0,
        image_size=(side, side),
        patch=patch,
        vocab=request.tokenizer.size,
        text_positions=request.text_positions,
        layer_scale=0.0,
    )
    rules = [
        *patch_rules(PATCH, request.pixels or PixelScaling()),
        Rule(target="image.cls", sources=("beit3.vision_embed.cls_token",), make=flat),
        Rule(target="image.masked_patch", sources=("beit3.vision_embed.mask_token",), make=flat),
    ]
    drops = list(DROPS)
    if request.tokenizer.size > len(SPECIALS):
        rules.append(word_rule(request.tokenizer.size))
    else:
        reason = "no --text-tokenizer was given that tells its words"
        drops.append(Drop(pattern=WORDS, reason=reason))
    return Found(
        plan=Plan(config=pretrained("beit3", model), rules=rules, drops=drops),
        tokenizer=request.tokenizer,
    )


def word_rule(size: int) -> Rule:
    """Word vectors in the order of `vlbeit tokenizer import beit3.spm`.

    BEiT-3 numbers words as XLM-R does: <s>, <pad>, </s>, <unk>, the file's ordinary pieces, and
    <mask> behind the last.
    """
    pad, unknown, begin, end, mask = 1, 3, 0, 2, size - 1
    rows = [pad, unknown, begin, end, mask, *range(4, size - 1)]
    return Rule(
        target="text.words.weight",
        sources=(WORDS,),
        make=lambda table: reordered_vocabulary(table, rows),
        note="rows in the order of our ids",
    )
