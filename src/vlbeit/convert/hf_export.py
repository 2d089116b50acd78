"""Our runs as a folder of transformers' BEiT: masked image modelling, classifier, segmentation.

Shared attention and V-experts are a BEiT; text, L- and VL-experts stay behind. The folder's config
sets what the two libraries have different defaults for: LayerNorm's eps and mean pooling
(docs/convert.md). Square pictures only: on others transformers reads the relative table
transposed (T4).

A segmentation head taps the trunk after its last block, and transformers cannot name that place:
it counts the embedding as state 0 and has no number for the state behind the last block. So one
block of LayerScale 0 is added, which changes nothing and has a number in front of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlbeit.checkpoint import TASK_FILE, Checkpoint, find_checkpoint
from vlbeit.config import (
    ClassificationRun,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    SegmentationRun,
    finetune_config,
    from_dict,
)
from vlbeit.convert.folder import RECEIPT, check_out
from vlbeit.convert.hf_beit import HF, INERT, segmentation_names
from vlbeit.convert.hf_folder import CONFIG, PREPROCESSOR
from vlbeit.convert.rewriting import Drop, Plan, Receipt, Rule, carry_out
from vlbeit.convert.weightfile import FOLDER_FILES
from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.jsonfile import read_json
from vlbeit.nn.upernet import POOLS
from vlbeit.tasks.segmentation import tap_layers
from vlbeit.tensorfile import write_tensors
from vlbeit.types import Modality

TABLE = "backbone.relative_bias.table"
ARCHITECTURES = {
    PretrainConfig: "BeitForMaskedImageModeling",
    ClassificationRun: "BeitForImageClassification",
    SegmentationRun: "BeitForSemanticSegmentation",
}
"""By the kind of run."""
OTHER_PATHS = "transformers' BEiT reads pictures only"
DROPS = (
    Drop(pattern="text.*", reason=OTHER_PATHS),
    Drop(pattern="heads.mlm.*", reason=OTHER_PATHS),
    Drop(pattern="*.experts.l.*", reason=OTHER_PATHS),
    Drop(pattern="*.experts.vl.*", reason=OTHER_PATHS),
)
UNUSED_NORM = Drop(
    pattern="backbone.norm.*", reason="a fine-tuned head reads the trunk before its final norm"
)


def export_hf_beit(place: Path, out: Path) -> Receipt:
    """Write a run's image path as a folder that `transformers` loads; returns the receipt.

    Raises:
        InputError: no checkpoint, or one for a task that BEiT does not have.
        ConfigError: pictures that are not square, or a segmentation head that BEiT cannot have.
        SaveError: `out` is not empty, or cannot be written.
    """
    check_out(out)
    checkpoint = find_checkpoint(place, print)
    config = config_of(checkpoint)
    facts = read_json(checkpoint.folder / TASK_FILE) if isinstance(config, FinetuneConfig) else {}
    plan, extra = export_plan(config, facts)
    tensors, receipt = carry_out(
        plan, checkpoint.model_tensors(), None, layout="hf-beit", origin=str(checkpoint.folder)
    )
    tree = hf_config(config, facts) | extra
    files = {CONFIG: tree, PREPROCESSOR: preprocessor(config.model), RECEIPT: receipt.to_json()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_tensors(out / FOLDER_FILES[0], tensors)
        for name, content in files.items():
            (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{error.filename or out}: cannot write ({error.strerror})") from None
    return receipt


def config_of(checkpoint: Checkpoint) -> PretrainConfig | FinetuneConfig:
    """The settings of a run that can be exported.

    Raises:
        InputError: it was fine-tuned for a task with words.
    """
    if "task" not in checkpoint.config:
        return from_dict(PretrainConfig, checkpoint.config)
    config = finetune_config(checkpoint.config)
    if type(config) not in ARCHITECTURES:
        raise InputError(
            f"{checkpoint.folder}: fine-tuned for {config.task}, which transformers' BEiT does not "
            "have; pretrained, classification and segmentation runs can be exported"
        )
    return config


def export_plan(
    config: PretrainConfig | FinetuneConfig, facts: Mapping[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """Rules from our names to those of transformers, and what they need in config.json.

    Raises:
        ConfigError: as `export_hf_beit`.
    """
    model = config.model
    if model.image_size[0] != model.image_size[1]:
        raise ConfigError(
            f"model.image_size {model.image_size}: transformers' BEiT reads the relative table of "
            "a grid that is not square transposed; square pictures can be exported"
        )
    rules = trunk_rules(model)
    extra: dict[str, Any] = {}
    if isinstance(config, PretrainConfig):
        rules += layer_rules("backbone.norm", HF.norm) + layer_rules("heads.mim", HF.mim)
        return Plan(config=config, rules=rules, drops=DROPS), extra
    if isinstance(config, ClassificationRun):
        rules += layer_rules("task.norm", HF.pooled_norm)
        rules += layer_rules("task.linear", HF.classifier)
    elif isinstance(config, SegmentationRun):
        rules += segmentation_rules(config)
        taps = config.segmentation.taps or tuple(tap_layers(model.layers))
        if len(set(taps)) < len(taps):
            raise ConfigError(
                f"segmentation.taps {tuple(taps)} name a block twice, which transformers refuses; "
                "a trunk of six blocks or more has four different ones"
            )
        extra = {"out_indices": [tap + 1 for tap in taps]}
        if taps[-1] == model.layers:
            rules += inert_rules(model)
            extra |= {INERT: 1, "num_hidden_layers": model.layers + 1}
    return Plan(config=config, rules=rules, drops=(*DROPS, UNUSED_NORM), facts=facts), extra


def layer_rules(ours: str, theirs: str) -> list[Rule]:
    """Weight and bias of a layer under its foreign name."""
    return [
        Rule(target=f"{theirs}.{leaf}", sources=(f"{ours}.{leaf}",)) for leaf in ("weight", "bias")
    ]


def trunk_rules(model: ModelConfig) -> list[Rule]:
    """Embedding, blocks and tables under transformers' names."""
    patch = model.patch
    rules = [
        Rule(
            target=f"{HF.patch}.weight",
            sources=("image.proj.weight",),
            make=lambda weight: weight.reshape(-1, 3, patch, patch),
        ),
        Rule(target=f"{HF.patch}.bias", sources=("image.proj.bias",)),
        Rule(target=HF.cls, sources=("image.cls",), make=lambda v: v[None, None]),
        Rule(target=HF.masked, sources=("image.masked_patch",), make=lambda v: v[None, None]),
    ]
    if model.absolute_positions:
        rules.append(
            Rule(target=HF.positions, sources=("image.positions",), make=lambda t: t[None])
        )
    for layer in range(model.layers):
        rules += block_rules(model, layer)
    if model.relative_bias != "none":
        rules += table_rules(model)
    return rules


def block_rules(model: ModelConfig, layer: int) -> list[Rule]:
    """A block with its V-expert."""
    ours, theirs = f"backbone.blocks.{layer}.", HF.block.prefix.format(layer)
    rules = []
    for here, there in HF.block.shared.items():
        for part, name in enumerate(there):
            several = len(there) > 1
            rules.append(
                Rule(
                    target=theirs + name,
                    sources=(ours + here,),
                    make=lambda t, part=part, several=several: t.chunk(3)[part] if several else t,
                    note="its third of query, key and value" if several else "",
                )
            )
    for here, name in HF.block.experts[Modality.IMAGE].items():
        rules.append(Rule(target=theirs + name, sources=(f"{ours}experts.v.{here}",)))
    for number, name in enumerate(HF.gammas, start=1):
        if model.layer_scale:
            rules.append(Rule(target=theirs + name, sources=(f"{ours}gamma_{number}",)))
        else:
            rules.append(constant(theirs + name, (model.width,), 1.0, "no LayerScale here"))
    return rules


def table_rules(model: ModelConfig) -> list[Rule]:
    """The image's rows of the relative table, one table or one a block."""
    grid = model.image_size[0] // model.patch
    rows = (2 * grid - 1) ** 2 + 3
    note = "the rows of pictures"
    if model.relative_bias == "shared":
        return [Rule(target=HF.shared_table, sources=(TABLE,), make=lambda t: t[:rows], note=note)]
    return [
        Rule(
            target=HF.layer_table.format(layer),
            sources=(TABLE,),
            make=lambda t, layer=layer: t[:rows].split(model.heads, dim=1)[layer],
            note=note,
        )
        for layer in range(model.layers)
    ]


def constant(target: str, shape: tuple[int, ...], value: float, note: str) -> Rule:
    """A tensor that our model has no need of."""
    return Rule(
        target=target,
        sources=(),
        make=lambda: torch.full(shape, value),
        action="initialised",
        note=f"{value:g}: {note}",
    )


def inert_rules(model: ModelConfig) -> list[Rule]:
    """A block behind the last that adds nothing: all of it is 0, LayerScale too."""
    prefix, width, hidden = HF.block.prefix.format(model.layers), model.width, model.ffn
    shapes: dict[str, tuple[int, ...]] = {}
    for here, there in HF.block.shared.items():
        square = here in ("attention.qkv.weight", "attention.proj.weight")
        shapes |= dict.fromkeys(there, (width, width) if square else (width,))
    sizes = {
        "norm.weight": (width,), "norm.bias": (width,),
        "fc1.weight": (hidden, width), "fc1.bias": (hidden,),
        "fc2.weight": (width, hidden), "fc2.bias": (width,),
    }  # fmt: skip
    for here, name in HF.block.experts[Modality.IMAGE].items():
        shapes[name] = sizes[here]
    shapes |= dict.fromkeys(HF.gammas, (width,))
    found = {prefix + name: shape for name, shape in shapes.items()}
    if model.relative_bias == "per_layer":
        rows = (2 * (model.image_size[0] // model.patch) - 1) ** 2 + 3
        found[HF.layer_table.format(model.layers)] = (rows, model.heads)
    note = "a block that does nothing, so that the last tap has a number"
    return [constant(name, shape, 0.0, note) for name, shape in found.items()]


def segmentation_rules(config: SegmentationRun) -> list[Rule]:
    """The head under transformers' names.

    Raises:
        ConfigError: group norm, or another width than the trunk's.
    """
    given = config.segmentation
    for name, value in {"norm": "batch", "channels": config.model.width}.items():
        if getattr(given, name) != value:
            raise ConfigError(
                f"segmentation.{name} is {getattr(given, name)!r}; transformers' BEiT has "
                f"{value!r} there. Fine-tune with that setting to export"
            )
    return [
        Rule(target=theirs, sources=(ours,))
        for ours, theirs in segmentation_names(given.auxiliary > 0).items()
    ]


def hf_config(config: PretrainConfig | FinetuneConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of transformers' BEiT."""
    model = config.model
    tree: dict[str, Any] = {
        "architectures": [ARCHITECTURES[type(config)]],
        "model_type": "beit",
        "vocab_size": model.codes,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.ffn,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm_eps,
        "image_size": model.image_size[0],
        "patch_size": model.patch,
        "num_channels": 3,
        "use_mask_token": True,
        "use_absolute_position_embeddings": model.absolute_positions,
        "use_relative_position_bias": model.relative_bias == "per_layer",
        "use_shared_relative_position_bias": model.relative_bias == "shared",
        "layer_scale_init_value": model.layer_scale or 1.0,
        "drop_path_rate": model.drop_path,
        "use_mean_pooling": True,
        "pool_scales": list(POOLS),
        "use_auxiliary_head": False,
        "auxiliary_channels": 256,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
    }
    if isinstance(config, SegmentationRun):
        given = config.segmentation
        tree |= {
            "use_auxiliary_head": given.auxiliary > 0,
            "auxiliary_loss_weight": given.auxiliary,
            "auxiliary_channels": given.auxiliary_channels,
        }
    names = facts.get("classes")
    if names:
        tree["id2label"] = {str(number): name for number, name in enumerate(names)}
        tree["label2id"] = {name: number for number, name in enumerate(names)}
    return tree


def preprocessor(model: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json: pixels to [-1, 1], pictures squashed to the model's size."""
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"height": model.image_size[0], "width": model.image_size[1]},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
