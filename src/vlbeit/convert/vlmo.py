"""VLMo base, large and base-plus (docs/convert.md).

Base and large have relative positions only; our table has VLMo's rows, so it is taken as it is.
Base-plus has absolute positions, no table and no LayerScale. All three experts, with norms of
their own, have their place. VLMo's pretraining heads are others than ours and are left out: [MASK]
is never an image's there, so the mask vector of patches has no source either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor

from vlbeit.config import ModelConfig
from vlbeit.convert.beit import NORM_EPS, layer_rules, patch_rules, pretrained
from vlbeit.convert.bert_text import BERT_EPS, BertText, with_positions, without_positions
from vlbeit.convert.blocks import (
    HEAD_WIDTH,
    INDEX,
    UNILM_ATTENTION,
    BlockNames,
    block_rules,
    count_blocks,
    feed_forward,
    shape_of,
)
from vlbeit.convert.layouts import Found, Request
from vlbeit.convert.pixels import PixelScaling
from vlbeit.convert.rewriting import Drop, Plan, Rule
from vlbeit.convert.vocabulary import bert_rows, find_bert_vocabulary
from vlbeit.errors import ConfigError, InputError
from vlbeit.types import Modality

BLOCK = BlockNames(
    prefix="transformer.blocks.{}.",
    shared=UNILM_ATTENTION,
    experts={
        Modality.IMAGE: feed_forward("norm2_imag", "mlp_imag.fc1", "mlp_imag.fc2"),
        Modality.TEXT: feed_forward("norm2_text", "mlp_text.fc1", "mlp_text.fc2"),
        Modality.FUSED: feed_forward("norm2_vl", "mlp_vl.fc1", "mlp_vl.fc2"),
    },
)
TEXT = BertText(
    words="text_embeddings.word_embeddings.weight",
    types="text_embeddings.token_type_embeddings.weight",
    positions="text_embeddings.position_embeddings.weight",
    norm="text_embeddings.LayerNorm",
    modality="token_type_embeddings.weight",
)
PATCH, CLS, POSITIONS = (
    f"transformer.{name}" for name in ("patch_embed.proj", "cls_token", "pos_embed")
)
TABLE = "relative_position_bias_table"
GAMMA = "transformer.blocks.{}.gamma_{}"
VL_EXPERT = re.compile(r"transformer\.blocks\.(\d+)\.(norm2|mlp)_vl\.")
TEXT_ROWS = 196
"""Longest text of VLMo's pretraining; fine-tuned files keep the table's rows for it."""
HEADS = {544: 16}
"""Of a width that is not 64 a head: base-plus."""
DROPS = (
    INDEX,
    Drop(pattern="text_embeddings.position_ids", reason="a buffer: 0, 1, 2, ..."),
    Drop(pattern="mlm_score.*", reason="VLMo's word head has a layer more than ours"),
    Drop(pattern="pooler.*", reason="the pooler of VLMo's heads"),
    Drop(pattern="itm_score.*", reason="VLMo's matching head"),
    Drop(pattern="itc_*", reason="VLMo's contrast head"),
    Drop(pattern="logit_*scale", reason="the temperature of VLMo's contrast"),
    Drop(pattern="vqa_classifier.*", reason="a head of fine-tuning; its answers are not in it"),
    Drop(pattern="nlvr2_classifier.*", reason="a head of fine-tuning; it reads two poolers"),
)
UNUSED_POSITIONS = Drop(
    pattern=TEXT.positions, reason="stored but not used: the model has relative positions"
)


def canonical(name: str) -> str:
    """Files of several processes have "module." before every name."""
    return name.removeprefix("module.")


def plan(tensors: Mapping[str, Tensor], request: Request) -> Found:
    """Raises InputError for a file that is no VLMo, or without BERT's vocab.txt."""
    tokenizer, rows = bert_rows(find_bert_vocabulary(request.place, request.vocabulary))
    model = model_of(tensors, request, tokenizer.size)
    absolute = model.absolute_positions
    rules = [*embedding_rules(request.pixels or PixelScaling(), absolute)]
    if absolute:
        rules += with_positions(TEXT, rows)
    else:
        rules.append(without_positions(TEXT, rows))
        rules.append(Rule(target="backbone.relative_bias.table", sources=(TABLE,)))
    rules += layer_rules("transformer.norm", "backbone.norm")
    experts = {m: m for m in (Modality.IMAGE, Modality.TEXT)}
    for layer in range(model.layers):
        if layer >= model.layers - model.vl_layers:
            experts[Modality.FUSED] = Modality.FUSED
        rules += block_rules(BLOCK, layer, experts)
        if model.layer_scale:
            rules += [
                Rule(
                    target=f"backbone.blocks.{layer}.gamma_{number}",
                    sources=(GAMMA.format(layer, number),),
                )
                for number in (1, 2)
            ]
    drops = DROPS if absolute else (*DROPS, UNUSED_POSITIONS)
    found = Plan(config=pretrained("vlmo", model), rules=rules, drops=drops)
    return Found(plan=found, tokenizer=tokenizer)


def model_of(tensors: Mapping[str, Tensor], request: Request, vocab: int) -> ModelConfig:
    """The model that the shapes describe.

    Raises:
        InputError: something that every VLMo has is missing or of an impossible shape.
        ConfigError: nothing tells the number of heads.
    """
    origin = str(request.place)
    width, channels, patch, _ = shape_of(tensors, f"{PATCH}.weight", 4, origin)
    if channels != 3:
        raise InputError(f"{origin}: {PATCH}.weight is for {channels} channels, expected 3")
    layers = count_blocks(tensors, BLOCK.prefix, origin)
    stored = shape_of(tensors, TEXT.positions, 2, origin)[0]
    relative: Literal["none", "per_layer"]
    if TABLE in tensors:
        rows, columns = shape_of(tensors, TABLE, 2, origin)
        grid, texts = table_parts(rows, stored, origin)
        heads, relative = columns // layers, "per_layer"
    elif POSITIONS not in tensors:
        raise InputError(f"{origin}: missing {TABLE} (or, in a base-plus file, {POSITIONS})")
    else:
        places = shape_of(tensors, POSITIONS, 3, origin)[1] - 1
        grid, texts, relative = round(places**0.5), stored, "none"
        heads = request.heads or HEADS.get(width, width // HEAD_WIDTH)
        if grid**2 != places:
            raise InputError(f"{origin}: {POSITIONS} has {places} places, which is no square grid")
    if heads < 1 or width % heads:
        raise ConfigError(f"{origin}: width {width} in {heads} heads; give --heads")
    fused = sorted({int(match[1]) for match in map(VL_EXPERT.match, tensors) if match})
    if fused != list(range(layers - len(fused), layers)):
        raise InputError(f"{origin}: blocks {fused} of {layers} have a VL-expert, not the top ones")
    gammas = {GAMMA.format(layer, number) for layer in range(layers) for number in (1, 2)}
    return ModelConfig(
        width=width,
        layers=layers,
        heads=heads,
        ffn=shape_of(tensors, BLOCK.prefix.format(0) + "mlp_imag.fc1.weight", 2, origin)[0],
        vl_layers=len(fused),
        image_size=(grid * patch, grid * patch),
        patch=patch,
        vocab=vocab,
        text_positions=texts,
        absolute_positions=relative == "none",
        relative_bias=relative,
        layer_scale=ModelConfig().layer_scale if not gammas.isdisjoint(tensors) else 0.0,
        norm_eps=NORM_EPS,
        text_norm_eps=BERT_EPS if relative == "none" else 0.0,
    )


def table_parts(rows: int, stored: int, origin: str) -> tuple[int, int]:
    """Side of the grid, and longest text, of a table with so many rows.

    Args:
        stored: rows of the text's (unused) absolute positions: fine-tuning cuts these, the table
            keeps the rows of pretraining.

    Raises:
        InputError: no longest text leaves a square number for the image.
    """
    for texts in (TEXT_ROWS, stored):
        image = rows - 3 - 2 - 2 * texts
        side = round(max(image, 0) ** 0.5)
        if image > 0 and side * side == image and side % 2:
            return (side + 1) // 2, texts
    raise InputError(
        f"{origin}: {TABLE} has {rows} rows: with texts of {TEXT_ROWS} or {stored} tokens none is "
        "left for a square picture"
    )


def embedding_rules(pixels: PixelScaling, absolute: bool) -> Iterator[Rule]:
    """Patches and [I_CLS], with the image's modality vector (row 1) worked into both."""
    yield from with_image_type(patch_rules(PATCH, pixels), CLS, TEXT.modality)
    if absolute:
        yield Rule(target="image.positions", sources=(POSITIONS,), make=lambda t: t[0])


def with_image_type(rules: Iterator[Rule], cls: str, types: str) -> Iterator[Rule]:
    """Patch rules and one for [I_CLS], plus a constant that the model adds to all image tokens.

    A masked patch would need it as well: it replaces the projection, bias included.
    """
    note = "the image's modality vector added"
    for rule in rules:
        yield rule if rule.target != "image.proj.bias" else added(rule, types, note)
    yield Rule(
        target="image.cls",
        sources=(cls, types),
        make=lambda vector, table: vector.flatten() + table[1],
        action="folded",
        note=note,
    )


def added(rule: Rule, types: str, note: str) -> Rule:
    """The rule's vector plus row 1 of a table of types."""
    inner = rule.make
    return Rule(
        target=rule.target,
        sources=(*rule.sources, types),
        make=lambda *given: inner(*given[:-1]) + given[-1][1],
        action="folded",
        note="; ".join(part for part in (rule.note, note) if part),
    )
