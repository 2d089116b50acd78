"""Checkpoints of other models, made here: tiny, random, in the container and names of each layout.

No weight is zero or one: peers start biases, gammas, tables and mask vectors at a constant, which
would hide a tensor that is wired wrongly.
"""

import argparse
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlbeit.convert.importing import Converted, convert
from vlbeit.convert.layouts import LAYOUTS, Request
from vlbeit.errors import ConfigError
from vlbeit.nn.model import VLBeit
from vlbeit.tasks import build_task
from vlbeit.tokens.text import special_tokens_only

WIDTH, LAYERS, HEADS, FFN, PATCH, GRID, CODES, CLASSES = 16, 3, 2, 24, 8, 4, 20, 5
SIDE = PATCH * GRID
TABLE_ROWS = (2 * GRID - 1) ** 2 + 3
TEXTS, WORDS = 12, 30
PIECES = [f"w{number}" for number in range(WORDS - 5)]
VOCABULARY = ["[PAD]", *PIECES[:9], "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES[9:]]
"""Special tokens in the middle, as in bert-base-uncased: our ids are others than the file's."""


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> dict[str, Tensor]:
    """Normal with deviation 0.1; the weights of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        found[name] = torch.randn(shape, generator=generator) * 0.1
        if "norm" in name.lower() and name.endswith("weight"):
            found[name] += 1.0
    return found


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention_shapes(block: str, gammas: bool = True) -> dict[str, tuple[int, ...]]:
    """What BEiT and VLMo have alike."""
    shapes = norm(f"{block}.norm1") | linear(f"{block}.attn.proj", WIDTH, WIDTH)
    shapes |= {f"{block}.attn.qkv.weight": (3 * WIDTH, WIDTH)}
    shapes |= {f"{block}.attn.{part}_bias": (WIDTH,) for part in "qv"}
    return shapes | ({f"{block}.gamma_{n}": (WIDTH,) for n in (1, 2)} if gammas else {})


def feed_forward_shapes(block: str, suffix: str = "") -> dict[str, tuple[int, ...]]:
    return {
        **norm(f"{block}.norm2{suffix}"),
        **linear(f"{block}.mlp{suffix}.fc1", FFN, WIDTH),
        **linear(f"{block}.mlp{suffix}.fc2", WIDTH, FFN),
    }


def beit_tensors(kind: str = "pretrained", layers: int = LAYERS) -> dict[str, Tensor]:
    """unilm's BEiT: "pretrained" (shared table, mask token, lm_head) or "classifier"."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, WIDTH)}
    shapes["patch_embed.proj.weight"] = (WIDTH, 3, PATCH, PATCH)
    shapes["patch_embed.proj.bias"] = (WIDTH,)
    for layer in range(layers):
        shapes |= attention_shapes(f"blocks.{layer}") | feed_forward_shapes(f"blocks.{layer}")
    table = "relative_position_bias_table"
    if kind == "pretrained":
        shapes |= {"mask_token": (1, 1, WIDTH), f"rel_pos_bias.{table}": (TABLE_ROWS, HEADS)}
        shapes |= norm("norm") | linear("lm_head", CODES, WIDTH)
    else:
        shapes |= {f"blocks.{i}.attn.{table}": (TABLE_ROWS, HEADS) for i in range(layers)}
        shapes |= norm("fc_norm") | linear("head", CLASSES, WIDTH)
    found = random_tensors(shapes)
    index = torch.zeros(GRID * GRID + 1, GRID * GRID + 1, dtype=torch.long)
    places = (
        ["rel_pos_bias"] if kind == "pretrained" else [f"blocks.{i}.attn" for i in range(layers)]
    )
    return found | {f"{place}.relative_position_index": index for place in places}


def vlmo_tensors(absolute: bool = False) -> dict[str, Tensor]:
    """VLMo with a VL-expert in its top block: base and large, or base-plus (`absolute`)."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.cls_token": (1, 1, WIDTH)}
    shapes["transformer.patch_embed.proj.weight"] = (WIDTH, 3, PATCH, PATCH)
    shapes["transformer.patch_embed.proj.bias"] = (WIDTH,)
    for layer in range(LAYERS):
        block = f"transformer.blocks.{layer}"
        shapes |= attention_shapes(block, gammas=not absolute)
        for suffix in ("_text", "_imag", *(["_vl"] if layer == LAYERS - 1 else [])):
            shapes |= feed_forward_shapes(block, suffix)
    shapes |= norm("transformer.norm") | norm("text_embeddings.LayerNorm")
    shapes |= {
        "text_embeddings.word_embeddings.weight": (WORDS, WIDTH),
        "text_embeddings.position_embeddings.weight": (TEXTS, WIDTH),
        "text_embeddings.token_type_embeddings.weight": (2, WIDTH),
        "token_type_embeddings.weight": (2, WIDTH),
    }
    if absolute:
        shapes["transformer.pos_embed"] = (1, GRID * GRID + 1, WIDTH)
    else:
        shapes["relative_position_bias_table"] = (TABLE_ROWS + 2 + 2 * TEXTS, LAYERS * HEADS)
    shapes |= linear("pooler.dense", WIDTH, WIDTH) | linear("itm_score.fc", 2, WIDTH)
    shapes |= linear("mlm_score.transform.dense", WIDTH, WIDTH)
    shapes |= norm("mlm_score.transform.LayerNorm")
    shapes |= {"mlm_score.decoder.weight": (WORDS, WIDTH), "mlm_score.bias": (WORDS,)}
    for name in ("itc_text_proj", "itc_image_proj", "itc_vl_text_proj", "itc_vl_image_proj"):
        shapes[f"{name}.fc.weight"] = (WIDTH, WIDTH)
    shapes |= {"logit_scale": (), "logit_vl_scale": ()}
    found = random_tensors(shapes)
    found["text_embeddings.position_ids"] = torch.arange(TEXTS)[None]
    if not absolute:
        found["relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
        found["text_relative_position_index"] = torch.zeros(12, 12, dtype=torch.long)
        found["text_imag_relative_position_index"] = torch.zeros(29, 29, dtype=torch.long)
    return found


def beit3_tensors() -> dict[str, Tensor]:
    """BEiT-3 of two blocks, named as torchscale saves it."""
    shapes: dict[str, tuple[int, ...]] = {
        "beit3.text_embed.weight": (40, WIDTH),
        "beit3.vision_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "beit3.vision_embed.proj.bias": (WIDTH,),
        "beit3.vision_embed.cls_token": (1, 1, WIDTH),
        "beit3.vision_embed.mask_token": (1, 1, WIDTH),
        "beit3.encoder.embed_positions.A.weight": (GRID * GRID + 3, WIDTH),
        "beit3.encoder.embed_positions.B.weight": (1024, WIDTH),
    }
    for layer in range(2):
        block = f"beit3.encoder.layers.{layer}"
        for way in "AB":
            for part in "qkv":
                shapes |= linear(f"{block}.self_attn.{part}_proj.{way}", WIDTH, WIDTH)
            shapes |= linear(f"{block}.self_attn.out_proj.{way}", WIDTH, WIDTH)
            shapes |= norm(f"{block}.self_attn.inner_attn_ln.{way}")
            shapes |= norm(f"{block}.self_attn_layer_norm.{way}")
            shapes |= linear(f"{block}.ffn.{way}.fc1", FFN, WIDTH)
            shapes |= linear(f"{block}.ffn.{way}.fc2", WIDTH, FFN)
            shapes |= norm(f"{block}.ffn.{way}.ffn_layernorm", FFN)
            shapes |= norm(f"{block}.final_layer_norm.{way}")
    for way in "AB":
        shapes |= norm(f"beit3.encoder.layer_norm.{way}")
    return random_tensors(shapes | linear("mlm_head", 40, WIDTH) | linear("mim_head", 20, WIDTH))


def save_training_file(path: Path, tensors: Mapping[str, Tensor], container: str) -> Path:
    """As unilm and DeepSpeed save: weights under a key, beside optimizer and command line."""
    weights = OrderedDict(tensors)
    more: dict[str, Any] = {
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(4)}}, "param_groups": [{}]},
        "epoch": 7,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(model="beit_base", lr=1.5e-3, opt_betas=[0.9, 0.98]),
    }
    torch.save({container: weights, **more} if container else weights, path)
    return path


def write_vocabulary(folder: Path) -> Path:
    """BERT's vocab.txt beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return path


def bert_ids(words: Tensor) -> Tensor:
    """Our ids of a text to the ids of VOCABULARY."""
    ours = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
    return torch.tensor([VOCABULARY.index(piece) for piece in ours])[words]


def request(place: Path, **more: Any) -> Request:
    return Request(place=place, **{"tokenizer": special_tokens_only(), **more})


def imported(
    layout: str, place: Path, *, resized: Mapping[str, int] = {}, **more: Any
) -> Converted:
    """The file, read; whatever has no source is accepted."""
    accepted: tuple[str, ...] = ("*",)
    try:
        convert(layout, request(place, **more), accepted=(), dry=True)
        accepted = ()  # nothing needs it, and a pattern without use is refused
    except ConfigError:
        pass
    return convert(layout, request(place, **more), accepted=accepted, **resized)


def model_of(converted: Converted) -> VLBeit:
    """The converted model, in memory."""
    model = VLBeit(converted.plan.config.model, seed=None)
    if converted.plan.facts is not None:
        task = build_task(converted.plan.config, converted.plan.facts)
        model.put_on(task.head(model, 0))
    model.load_tensors(dict(converted.tensors), "converted")
    return model.eval()


def mapped(converted: Converted, peer: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A peer's tensors (weights, or gradients) under our names, by the rules of the conversion."""
    spelled = {LAYOUTS[layout].canonical(name): tensor for name, tensor in peer.items()}
    return {
        rule.target: rule.make(*(spelled[source] for source in rule.sources))
        for rule in converted.plan.rules
    }


def save_peer(peer: torch.nn.Module, folder: Path, **preprocessor: Any) -> Path:
    """A model of transformers as it saves itself, with a preprocessor's file if one is given."""
    peer.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
