"""FLAVA's image encoder or text encoder, each by itself.

Attention is not shared between FLAVA's encoders, so one folder has a place here and not three: the
image encoder fills the path of images, the text encoder that of texts. The multimodal encoder has
no place.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlbeit.config import ModelConfig
from vlbeit.convert.beit import layer_rules, patch_rules, pretrained
from vlbeit.convert.bert_text import BertText, with_positions
from vlbeit.convert.blocks import block_rules, count_blocks, shape_of, square_side
from vlbeit.convert.hf_encoder import KEY_BIAS, POOLER, POSITION_IDS, encoder_block
from vlbeit.convert.hf_folder import CONFIG, HfConfig, read_hf_config
from vlbeit.convert.layouts import Found, Request
from vlbeit.convert.pixels import PixelScaling
from vlbeit.convert.rewriting import Plan, Rule, flat
from vlbeit.convert.vocabulary import bert_rows, find_bert_vocabulary
from vlbeit.errors import InputError
from vlbeit.jsonfile import read_json
from vlbeit.types import Modality

PREFIX = "encoder.layer.{}."
IMAGE, TEXT_ONLY = "flava_image_model", "flava_text_model"
TEXT = BertText(
    words="embeddings.word_embeddings.weight",
    types="embeddings.token_type_embeddings.weight",
    positions="embeddings.position_embeddings.weight",
    norm="embeddings.LayerNorm",
)
POSITIONS, PATCH = "embeddings.position_embeddings", "embeddings.patch_embeddings.projection"
DROPS = (KEY_BIAS, POOLER, POSITION_IDS)


def canonical(name: str) -> str:
    """The name as it is."""
    return name


def plan(tensors: Mapping[str, Tensor], request: Request) -> Found:
    """Raises InputError for a folder that is not one of FLAVA's two unimodal encoders."""
    place = request.place if request.place.is_dir() else request.place.parent
    kind = read_json(place / CONFIG).get("model_type")
    if kind not in (IMAGE, TEXT_ONLY):
        raise InputError(
            f"{place / CONFIG}: model_type is {kind!r}; FLAVA's encoders do not share attention, "
            "so one is taken at a time: save model.flava.image_model or .text_model in a folder of "
            "its own and convert that"
        )
    config = read_hf_config(place, str(kind))
    config.expect("hidden_act", "gelu")
    return (
        image_plan(tensors, request, config)
        if kind == IMAGE
        else text_plan(tensors, request, config)
    )


def image_plan(tensors: Mapping[str, Tensor], request: Request, config: HfConfig) -> Found:
    """The path of images; with --copy-experts the L- and VL-experts too."""
    origin = str(request.place)
    asked = config.completed(request)
    width, _, patch, _ = shape_of(tensors, f"{PATCH}.weight", 4, origin)
    grid = square_side(shape_of(tensors, POSITIONS, 3, origin)[1] - 1, POSITIONS, origin)
    model = ModelConfig(
        width=width,
        layers=count_blocks(tensors, PREFIX, origin),
        heads=config.whole("num_attention_heads"),
        ffn=config.whole("intermediate_size"),
        vl_layers=request.vl_layers or 0,
        image_size=(grid * patch, grid * patch),
        patch=patch,
        vocab=request.tokenizer.size,
        text_positions=request.text_positions,
        layer_scale=0.0,
        norm_eps=config.number("layer_norm_eps", 1e-12),
    )
    rules = [
        *patch_rules(PATCH, asked.pixels or PixelScaling()),
        Rule(target="image.cls", sources=("embeddings.cls_token",), make=flat),
        Rule(target="image.positions", sources=(POSITIONS,), make=lambda t: t[0]),
        *encoder_rules(model, request, Modality.IMAGE),
    ]
    if "embeddings.mask_token" in tensors:
        rules.append(
            Rule(target="image.masked_patch", sources=("embeddings.mask_token",), make=flat)
        )
    found = Plan(config=pretrained("hf-flava", model), rules=rules, drops=DROPS)
    return Found(plan=found, tokenizer=request.tokenizer)


def text_plan(tensors: Mapping[str, Tensor], request: Request, config: HfConfig) -> Found:
    """The path of texts; the image side is the default one (224 px, patches of 16), fresh."""
    origin = str(request.place)
    tokenizer, rows = bert_rows(find_bert_vocabulary(request.place, request.vocabulary))
    eps = config.number("layer_norm_eps", 1e-12)
    texts, width = shape_of(tensors, TEXT.positions, 2, origin)
    model = ModelConfig(
        width=width,
        layers=count_blocks(tensors, PREFIX, origin),
        heads=config.whole("num_attention_heads"),
        ffn=config.whole("intermediate_size"),
        vl_layers=request.vl_layers or 0,
        vocab=tokenizer.size,
        text_positions=texts,
        layer_scale=0.0,
        norm_eps=eps,
        text_norm_eps=eps,
    )
    rules = [*with_positions(TEXT, rows), *encoder_rules(model, request, Modality.TEXT)]
    found = Plan(config=pretrained("hf-flava", model), rules=rules, drops=DROPS)
    return Found(plan=found, tokenizer=tokenizer)


def encoder_rules(model: ModelConfig, request: Request, own: Modality) -> list[Rule]:
    """Blocks and final norm, the feed-forward layers as the experts of one modality."""
    rules = layer_rules("layernorm", "backbone.norm")
    block = encoder_block(PREFIX, own)
    experts = {own: own}
    if request.copy_experts:
        experts |= {Modality.IMAGE: own, Modality.TEXT: own}
    for layer in range(model.layers):
        if request.copy_experts and layer >= model.layers - model.vl_layers:
            experts[Modality.FUSED] = own
        rules += block_rules(block, layer, experts)
    return rules
