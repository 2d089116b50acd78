"""BEiT of unilm: pretraining files and fine-tuned classifiers (docs/convert.md).

All of it has a place: the image path is exact at the file's own picture size. Texts, L- and
VL-experts have no source. `BeitNames` and `plan_of` also serve the layouts that differ in names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlbeit.config import (
    ClassificationRun,
    InputConfig,
    ModelConfig,
    PretrainConfig,
)
from vlbeit.convert.blocks import (
    HEAD_WIDTH,
    INDEX,
    UNILM_ATTENTION,
    BlockNames,
    block_rules,
    count_blocks,
    feed_forward,
    shape_of,
    square_side,
)
from vlbeit.convert.layouts import Found, Request
from vlbeit.convert.pixels import PixelScaling
from vlbeit.convert.rewriting import Drop, Plan, Rule, flat, with_text_rows
from vlbeit.errors import ConfigError, InputError
from vlbeit.types import Modality

NORM_EPS = 1e-6
"""unilm's; `transformers` has 1e-12 unless its config says otherwise (docs/convert.md)."""


@dataclass(frozen=True, kw_only=True)
class BeitNames:
    """Foreign names of a BEiT, those inside a block apart."""

    patch: str
    """Of the convolution, without .weight and .bias."""
    cls: str
    masked: str
    positions: str
    block: BlockNames
    gammas: tuple[str, str]
    shared_table: str
    layer_table: str
    """With {} for the number of the block."""
    norm: str
    mim: str
    pooled_norm: str
    """The LayerNorm after the mean over patches of a classifier."""
    classifier: str


UNILM = BeitNames(
    patch="patch_embed.proj",
    cls="cls_token",
    masked="mask_token",
    positions="pos_embed",
    block=BlockNames(
        prefix="blocks.{}.",
        shared=UNILM_ATTENTION,
        experts={Modality.IMAGE: feed_forward("norm2", "mlp.fc1", "mlp.fc2")},
    ),
    gammas=("gamma_1", "gamma_2"),
    shared_table="rel_pos_bias.relative_position_bias_table",
    layer_table="blocks.{}.attn.relative_position_bias_table",
    norm="norm",
    mim="lm_head",
    pooled_norm="fc_norm",
    classifier="head",
)


def canonical(name: str) -> str:
    """Files of several processes have "module." before every name."""
    return name.removeprefix("module.")


def plan(tensors: Mapping[str, Tensor], request: Request) -> Found:
    """Raises InputError for a file that is no BEiT of unilm."""
    return plan_of(UNILM, "beit", tensors, request, drops=(INDEX,))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the shapes of a file say of the model."""

    width: int
    layers: int
    heads: int
    ffn: int
    patch: int
    grid: int
    codes: int
    classes: int
    """0: no classifier."""
    masked: bool
    shared_table: bool
    layer_tables: bool
    positions: bool
    gammas: bool


def sizes_of(names: BeitNames, tensors: Mapping[str, Tensor], origin: str, heads: int = 0) -> Sizes:
    """Read the model off the shapes.

    Raises:
        InputError: something that every BEiT has is missing or of an impossible shape.
        ConfigError: nothing tells the number of heads.
    """
    width, channels, patch, patch_wide = shape_of(tensors, f"{names.patch}.weight", 4, origin)
    if channels != 3 or patch != patch_wide:
        raise InputError(
            f"{origin}: {names.patch}.weight is for {channels} channels and patches of {patch} x "
            f"{patch_wide}; this model reads RGB in square patches"
        )
    prefix = names.block.prefix
    fc1 = names.block.experts[Modality.IMAGE]["fc1.weight"]
    layers = count_blocks(tensors, prefix, origin)
    of_layers = [names.layer_table.format(layer) for layer in range(layers)]
    tables = [name for name in (names.shared_table, *of_layers) if name in tensors]
    shared = names.shared_table in tables
    if tables:
        rows, columns = shape_of(tensors, tables[0], 2, origin)
        side = square_side(rows - 3, "the table of relative positions", origin)
        grid, counted = (side + 1) // 2, columns
        if heads not in (0, counted):
            raise ConfigError(
                f"{origin}: {tables[0]} is for {counted} heads, --heads or config.json says {heads}"
            )
        heads = counted
    elif names.positions not in tensors:
        raise InputError(
            f"{origin}: missing {names.shared_table} (or {of_layers[0]}, or {names.positions})"
        )
    else:
        rows = shape_of(tensors, names.positions, 3, origin)[1]
        grid = square_side(rows - 1, names.positions, origin)
        heads = heads or width // HEAD_WIDTH
    if heads < 1 or width % heads:
        raise ConfigError(f"{origin}: width {width} in {heads} heads; give --heads")
    mim, classifier = f"{names.mim}.weight", f"{names.classifier}.weight"
    with_mim, with_classes = has_layer(tensors, names.mim), has_layer(tensors, names.classifier)
    gammas = {prefix.format(layer) + gamma for layer in range(layers) for gamma in names.gammas}
    return Sizes(
        width=width,
        layers=layers,
        heads=heads,
        ffn=shape_of(tensors, prefix.format(0) + fc1, 2, origin)[0],
        patch=patch,
        grid=grid,
        codes=shape_of(tensors, mim, 2, origin)[0] if with_mim else ModelConfig().codes,
        classes=shape_of(tensors, classifier, 2, origin)[0] if with_classes else 0,
        masked=names.masked in tensors,
        shared_table=shared,
        layer_tables=bool(tables) and not shared,
        positions=names.positions in tensors,
        gammas=not gammas.isdisjoint(tensors),
    )


def has_layer(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether weight or bias is there; the other one is then asked for by name."""
    return f"{name}.weight" in tensors or f"{name}.bias" in tensors


def model_config(sizes: Sizes, request: Request, norm_eps: float) -> ModelConfig:
    """The model that the sizes describe; texts are the request's."""
    bias = "none"
    if sizes.shared_table or sizes.layer_tables:
        bias = "per_layer" if sizes.layer_tables or request.per_layer_bias else "shared"
    return ModelConfig(
        width=sizes.width,
        layers=sizes.layers,
        heads=sizes.heads,
        ffn=sizes.ffn,
        vl_layers=request.vl_layers or 0,
        image_size=(sizes.grid * sizes.patch,) * 2,
        patch=sizes.patch,
        vocab=request.tokenizer.size,
        codes=sizes.codes,
        text_positions=request.text_positions,
        absolute_positions=sizes.positions,
        relative_bias=bias,  # type: ignore[arg-type]
        layer_scale=ModelConfig().layer_scale if sizes.gammas else 0.0,
        norm_eps=norm_eps,
    )


def plan_of(
    names: BeitNames,
    layout: str,
    tensors: Mapping[str, Tensor],
    request: Request,
    *,
    norm_eps: float = NORM_EPS,
    drops: Sequence[Drop] = (),
    facts: Mapping[str, Any] = {},
) -> Found:
    """The plan of a file with these names.

    Args:
        facts: what a config.json adds: "heads" and the "classes".

    Raises:
        InputError, ConfigError: as `sizes_of`; or class names that do not go with the classifier.
    """
    origin = str(request.place)
    sizes = sizes_of(names, tensors, origin, request.heads or facts.get("heads", 0))
    model = model_config(sizes, request, norm_eps)
    rules = list(trunk_rules(names, sizes, model, request))
    if sizes.classes:
        classes = class_names(sizes.classes, request.classes or facts.get("classes", ()), origin)
        found = Plan(
            config=ClassificationRun(recipe=layout, model=model),
            rules=[
                *rules,
                *layer_rules(names.pooled_norm, "task.norm"),
                *layer_rules(names.classifier, "task.linear"),
            ],
            drops=drops,
            facts={"classes": classes, "most_frequent": 0},
        )
        return Found(plan=found, tokenizer=request.tokenizer)
    with_head = has_layer(tensors, names.mim)
    if with_head or has_layer(tensors, names.norm):
        rules += layer_rules(names.norm, "backbone.norm")
    if with_head:
        rules += layer_rules(names.mim, "heads.mim")
    found = Plan(config=pretrained(layout, model), rules=rules, drops=drops)
    return Found(plan=found, tokenizer=request.tokenizer)


def pretrained(layout: str, model: ModelConfig) -> PretrainConfig:
    """The settings of a converted model that no task has: texts no longer than it reads."""
    plain = InputConfig()
    return PretrainConfig(
        recipe=layout,
        model=model,
        input=replace(
            plain,
            text_length=min(plain.text_length, model.text_positions),
            pair_text_length=min(plain.pair_text_length, model.text_positions),
        ),
    )


def class_names(count: int, given: Sequence[str], origin: str) -> list[str]:
    """Raises ConfigError when the names are not as many as the classes."""
    if not given:
        return [f"class {number}" for number in range(count)]
    if len(given) != count:
        raise ConfigError(f"{origin}: {count} classes, {len(given)} names of classes")
    return list(given)


def layer_rules(theirs: str, ours: str) -> list[Rule]:
    """Weight and bias of a layer under our name."""
    return [
        Rule(target=f"{ours}.{leaf}", sources=(f"{theirs}.{leaf}",)) for leaf in ("weight", "bias")
    ]


def trunk_rules(
    names: BeitNames, sizes: Sizes, model: ModelConfig, request: Request
) -> Iterator[Rule]:
    """Embedding, blocks and tables; without the final norm, which classifiers do not have."""
    yield from patch_rules(names.patch, request.pixels or PixelScaling())
    yield Rule(target="image.cls", sources=(names.cls,), make=flat)
    if sizes.masked:
        yield Rule(target="image.masked_patch", sources=(names.masked,), make=flat)
    if sizes.positions:
        yield Rule(target="image.positions", sources=(names.positions,), make=lambda t: t[0])
    experts = {Modality.IMAGE: Modality.IMAGE}
    if request.copy_experts:
        experts[Modality.TEXT] = Modality.IMAGE
    for layer in range(sizes.layers):
        if request.copy_experts and layer >= sizes.layers - model.vl_layers:
            experts[Modality.FUSED] = Modality.IMAGE
        yield from block_rules(names.block, layer, experts)
        for ours, theirs in zip(("gamma_1", "gamma_2"), names.gammas, strict=True):
            if sizes.gammas:
                yield Rule(
                    target=f"backbone.blocks.{layer}.{ours}",
                    sources=(names.block.prefix.format(layer) + theirs,),
                )
    if model.relative_bias != "none":
        yield table_rule(names, sizes, model)


def patch_rules(name: str, pixels: PixelScaling) -> Iterator[Rule]:
    """The convolution as a projection of flattened patches."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    if pixels.ours:
        yield Rule(target="image.proj.weight", sources=(weight,), make=pixels.weight)
        yield Rule(target="image.proj.bias", sources=(bias,))
        return
    note = f"pixels scaled by mean {pixels.mean}, std {pixels.std} there"
    yield Rule(
        target="image.proj.weight", sources=(weight,), make=pixels.weight, action="folded",
        note=note,
    )  # fmt: skip
    yield Rule(
        target="image.proj.bias", sources=(bias, weight), make=pixels.bias, action="folded",
        note=note,
    )  # fmt: skip


def table_rule(names: BeitNames, sizes: Sizes, model: ModelConfig) -> Rule:
    """Relative positions: the image's rows from the file, those of texts as in a fresh model."""
    target = "backbone.relative_bias.table"
    if sizes.layer_tables:
        return Rule(
            target=target,
            sources=tuple(names.layer_table.format(layer) for layer in range(sizes.layers)),
            make=lambda *tables: with_text_rows(torch.cat(tables, dim=1), model.text_positions),
            note="the tables of the blocks side by side",
            fresh=f"{target}:text",
        )
    times = sizes.layers if model.relative_bias == "per_layer" else 1
    return Rule(
        target=target,
        sources=(names.shared_table,),
        make=lambda table: with_text_rows(table.repeat(1, times), model.text_positions),
        action="tiled" if times > 1 else "renamed",
        note=f"one table for {times} blocks" if times > 1 else "",
        fresh=f"{target}:text",
    )
