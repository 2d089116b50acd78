"""ViLT of `transformers`: one feed-forward layer where we have experts, so they begin tied.

The joint pass of a pair is exact. The trunk of every head is taken; the heads are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from vlbeit.config import ModelConfig
from vlbeit.convert.beit import layer_rules, patch_rules, pretrained
from vlbeit.convert.bert_text import BertText, with_positions
from vlbeit.convert.blocks import block_rules, count_blocks, shape_of, square_side
from vlbeit.convert.hf_encoder import KEY_BIAS, POOLER, POSITION_IDS, encoder_block
from vlbeit.convert.hf_folder import read_hf_config
from vlbeit.convert.layouts import Found, Request
from vlbeit.convert.pixels import PixelScaling
from vlbeit.convert.rewriting import Drop, Plan, Rule
from vlbeit.convert.vlmo import with_image_type
from vlbeit.convert.vocabulary import bert_rows, find_bert_vocabulary
from vlbeit.types import Modality

BLOCK = encoder_block("encoder.layer.{}.", Modality.IMAGE)
TEXT = BertText(
    words="embeddings.text_embeddings.word_embeddings.weight",
    types="embeddings.text_embeddings.token_type_embeddings.weight",
    positions="embeddings.text_embeddings.position_embeddings.weight",
    norm="embeddings.text_embeddings.LayerNorm",
    modality="embeddings.token_type_embeddings.weight",
)
PATCH, CLS, POSITIONS = (
    f"embeddings.{name}"
    for name in ("patch_embeddings.projection", "cls_token", "position_embeddings")
)
DROPS = (
    KEY_BIAS,
    POOLER,
    POSITION_IDS,
    Drop(pattern="mlm_score.*", reason="ViLT's word head has a layer more than ours"),
    Drop(pattern="classifier.*", reason="a head of fine-tuning, which reads ViLT's pooler"),
    Drop(pattern="rank_output.*", reason="a head of fine-tuning, which reads ViLT's pooler"),
)


def canonical(name: str) -> str:
    """The name of a bare trunk; a model with a head has "vilt." before it."""
    return re.sub(r"^vilt\.", "", name)


def plan(tensors: Mapping[str, Tensor], request: Request) -> Found:
    """Raises InputError for a folder without config.json or vocab.txt, or that is no ViLT."""
    config = read_hf_config(request.place, "vilt")
    config.expect("hidden_act", "gelu")
    asked = config.completed(request)
    origin = str(request.place)
    tokenizer, rows = bert_rows(find_bert_vocabulary(request.place, request.vocabulary))
    width, _, patch, _ = shape_of(tensors, f"{PATCH}.weight", 4, origin)
    grid = square_side(shape_of(tensors, POSITIONS, 3, origin)[1] - 1, POSITIONS, origin)
    eps = config.number("layer_norm_eps", 1e-12)
    model = ModelConfig(
        width=width,
        layers=count_blocks(tensors, BLOCK.prefix, origin),
        heads=config.whole("num_attention_heads"),
        ffn=config.whole("intermediate_size"),
        vl_layers=request.vl_layers or 0,
        image_size=(grid * patch, grid * patch),
        patch=patch,
        vocab=tokenizer.size,
        text_positions=shape_of(tensors, TEXT.positions, 2, origin)[0],
        layer_scale=0.0,
        norm_eps=eps,
        text_norm_eps=eps,
    )
    rules = [
        *with_image_type(patch_rules(PATCH, asked.pixels or PixelScaling()), CLS, TEXT.modality),
        Rule(target="image.positions", sources=(POSITIONS,), make=lambda t: t[0]),
        *with_positions(TEXT, rows),
        *layer_rules("layernorm", "backbone.norm"),
    ]
    experts = dict.fromkeys((Modality.IMAGE, Modality.TEXT), Modality.IMAGE)
    for layer in range(model.layers):
        if layer >= model.layers - model.vl_layers:
            experts[Modality.FUSED] = Modality.IMAGE
        rules += block_rules(BLOCK, layer, experts)
    found = Plan(config=pretrained("hf-vilt", model), rules=rules, drops=DROPS)
    return Found(plan=found, tokenizer=tokenizer)
