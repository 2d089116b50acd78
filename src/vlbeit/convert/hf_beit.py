"""BEiT of `transformers`, read: masked image modelling, classifier, segmentation, bare trunk.

On disk (4.x and 5.x alike) the names are those of 4.x; `torch.save(model.state_dict())` of 5.x has
the names of its memory. Both are taken (docs/convert.md). hf_export.py writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlbeit.config import SegmentationConfig, SegmentationRun, TaskBatchConfig
from vlbeit.convert.beit import BeitNames, class_names, plan_of
from vlbeit.convert.blocks import INDEX, BlockNames, count_blocks, feed_forward, shape_of
from vlbeit.convert.hf_folder import HfConfig, read_hf_config
from vlbeit.convert.layouts import Found, Request
from vlbeit.convert.rewriting import Drop, Plan, Rule
from vlbeit.errors import InputError
from vlbeit.nn.upernet import POOLS
from vlbeit.types import Modality

HF = BeitNames(
    patch="beit.embeddings.patch_embeddings.projection",
    cls="beit.embeddings.cls_token",
    masked="beit.embeddings.mask_token",
    positions="beit.embeddings.position_embeddings",
    block=BlockNames(
        prefix="beit.encoder.layer.{}.",
        shared={
            "norm1.weight": ("layernorm_before.weight",),
            "norm1.bias": ("layernorm_before.bias",),
            "attention.qkv.weight": tuple(
                f"attention.attention.{part}.weight" for part in ("query", "key", "value")
            ),
            "attention.q_bias": ("attention.attention.query.bias",),
            "attention.v_bias": ("attention.attention.value.bias",),
            "attention.proj.weight": ("attention.output.dense.weight",),
            "attention.proj.bias": ("attention.output.dense.bias",),
        },
        experts={
            Modality.IMAGE: feed_forward("layernorm_after", "intermediate.dense", "output.dense")
        },
    ),
    gammas=("lambda_1", "lambda_2"),
    shared_table="beit.encoder.relative_position_bias.relative_position_bias_table",
    layer_table=(
        "beit.encoder.layer.{}.attention.attention.relative_position_bias."
        "relative_position_bias_table"
    ),
    norm="layernorm",
    mim="lm_head",
    pooled_norm="beit.pooler.layernorm",
    classifier="classifier",
)

DROPS = (
    INDEX,
    # A bare trunk keeps the norm of its pooler, which only a classifier reads.
    Drop(pattern="beit.pooler.layernorm.*", reason="the norm of a classifier that is not there"),
)

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
INERT = "vlbeit_inert_blocks"
"""In a config.json that hf_export.py wrote: blocks at the end that do nothing."""


def segmentation_names(auxiliary: bool) -> dict[str, str]:
    """The head of segmentation: our names to those on disk."""
    layers = {
        "pyramid.up4.0": "fpn1.0",
        "pyramid.up4.3": "fpn1.3",
        "pyramid.up2": "fpn2.0",
        "upper.classifier": "decode_head.classifier",
    }
    norms = {"pyramid.up4.1": "fpn1.1"}
    convolutions = {
        "upper.bottleneck": "decode_head.bottleneck",
        "upper.fuse": "decode_head.fpn_bottleneck",
    }
    for i in range(len(POOLS)):
        convolutions[f"upper.pools.{i}"] = f"decode_head.psp_modules.{i}.1"
    for i in range(3):
        convolutions[f"upper.laterals.{i}"] = f"decode_head.lateral_convs.{i}"
        convolutions[f"upper.smooths.{i}"] = f"decode_head.fpn_convs.{i}"
    if auxiliary:
        layers["auxiliary.classifier"] = "auxiliary_head.classifier"
        convolutions["auxiliary.conv"] = "auxiliary_head.convs.0"
    found = {
        f"{ours}.{leaf}": f"{theirs}.{leaf}"
        for ours, theirs in layers.items()
        for leaf in ("weight", "bias")
    }
    for ours, theirs in convolutions.items():
        found[f"{ours}.conv.weight"] = f"{theirs}.conv.weight"
        norms[f"{ours}.norm"] = f"{theirs}.bn"
    for ours, theirs in norms.items():
        found |= {f"{ours}.{leaf}": f"{theirs}.{leaf}" for leaf in _NORM}
    return {f"task.{ours}": theirs for ours, theirs in found.items()}


_HEAD_IN_MEMORY = (
    (r"^fpn\.fpn1\.conv_transpose1\.", "fpn1.0."),
    (r"^fpn\.fpn1\.normalization\.", "fpn1.1."),
    (r"^fpn\.fpn1\.conv_transpose2\.", "fpn1.3."),
    (r"^fpn\.fpn2\.", "fpn2.0."),
    (r"^decode_head\.psp_modules\.blocks\.(\d+)\.conv\.convolution\.",
     r"decode_head.psp_modules.\1.1.conv."),
    (r"^decode_head\.psp_modules\.blocks\.(\d+)\.conv\.normalization\.",
     r"decode_head.psp_modules.\1.1.bn."),
    (r"^decode_head\.psp_bottleneck\.convolution\.", "decode_head.bottleneck.conv."),
    (r"^decode_head\.psp_bottleneck\.normalization\.", "decode_head.bottleneck.bn."),
    (r"^(decode_head|auxiliary_head)\.(.*)\.convolution\.", r"\1.\2.conv."),
    (r"^(decode_head|auxiliary_head)\.(.*)\.normalization\.", r"\1.\2.bn."),
)  # fmt: skip
_IN_MEMORY = (
    (r"\.shared_position_bias\.", ".encoder.relative_position_bias."),
    (r"\.layers\.(\d+)\.relative_position_bias\.",
     r".encoder.layer.\1.attention.attention.relative_position_bias."),
    (r"\.layers\.(\d+)\.attention\.q_proj\.", r".encoder.layer.\1.attention.attention.query."),
    (r"\.layers\.(\d+)\.attention\.k_proj\.", r".encoder.layer.\1.attention.attention.key."),
    (r"\.layers\.(\d+)\.attention\.v_proj\.", r".encoder.layer.\1.attention.attention.value."),
    (r"\.layers\.(\d+)\.attention\.o_proj\.", r".encoder.layer.\1.attention.output.dense."),
    (r"\.layers\.(\d+)\.mlp\.fc1\.", r".encoder.layer.\1.intermediate.dense."),
    (r"\.layers\.(\d+)\.mlp\.fc2\.", r".encoder.layer.\1.output.dense."),
    (r"\.layers\.(\d+)\.", r".encoder.layer.\1."),
)  # fmt: skip
"""Names of 5.x in memory to those on disk, the first that fits."""


def canonical(name: str) -> str:
    """The name on disk of a model with a head; a bare trunk has no "beit." before its own."""
    if re.match(r"(embeddings|encoder|layers|shared_position_bias|pooler)\.", name):
        name = "beit." + name
    for pattern, spelling in (*_IN_MEMORY, *_HEAD_IN_MEMORY):
        name, count = re.subn(pattern, spelling, name)
        if count:
            break
    return name


def plan(tensors: Mapping[str, Tensor], request: Request) -> Found:
    """Raises InputError for a folder without config.json, or a BEiT without an exact place here."""
    config = read_hf_config(request.place, "beit")
    check(config, tensors)
    inert = int(config.tree.get(INERT) or 0)
    blocks = count_blocks(tensors, HF.block.prefix, str(request.place))
    trunk = without_blocks(tensors, range(blocks - inert, blocks))
    found = plan_of(
        HF,
        "hf-beit",
        trunk,
        config.completed(request),
        norm_eps=config.number("layer_norm_eps", 1e-12),
        drops=(*DROPS, *(inert_block(block) for block in range(blocks - inert, blocks))),
        facts={"heads": config.whole("num_attention_heads"), "classes": config.classes()},
    )
    if "decode_head.classifier.weight" in tensors:
        return replace(found, plan=with_segmentation(found.plan, tensors, config, request))
    return found


def without_blocks(tensors: Mapping[str, Tensor], blocks: range) -> Mapping[str, Tensor]:
    """The tensors but for those of some blocks."""
    prefixes = tuple(HF.block.prefix.format(block) for block in blocks)
    return {name: value for name, value in tensors.items() if not name.startswith(prefixes)}


def inert_block(block: int) -> Drop:
    pattern = HF.block.prefix.format(block) + "*"
    return Drop(pattern=pattern, reason="a block of LayerScale 0, made for the last tap")


def with_segmentation(
    plan: Plan, tensors: Mapping[str, Tensor], config: HfConfig, request: Request
) -> Plan:
    """The trunk's plan as that of a segmentation run.

    Raises:
        InputError: a head that UPerNet here cannot be.
    """
    for name, value in {
        "pool_scales": list(POOLS),
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
    }.items():
        config.expect(name, value)
    taps = config.tree.get("out_indices")
    if not isinstance(taps, list) or len(taps) != 4 or not all(type(t) is int for t in taps):
        raise InputError(f"{config.path}: out_indices is {taps!r}, expected four block numbers")
    auxiliary = "auxiliary_head.classifier.weight" in tensors
    origin = str(request.place)
    count = shape_of(tensors, "decode_head.classifier.weight", 4, origin)[0]
    settings = SegmentationConfig(
        channels=plan.config.model.width,
        auxiliary=config.number("auxiliary_loss_weight", 0.4) if auxiliary else 0.0,
        auxiliary_channels=config.whole("auxiliary_channels"),
        norm="batch",
        # transformers counts the embedding as the first of its states.
        taps=tuple(tap - 1 for tap in taps),
    )
    run = SegmentationRun(
        recipe="hf-beit",
        model=plan.config.model,
        batch=TaskBatchConfig(size=16, micro=16),  # BEiT's; batch norm wants them equal
        segmentation=settings,
    )
    head = [
        Rule(target=ours, sources=(theirs,))
        for ours, theirs in segmentation_names(auxiliary).items()
    ]
    return Plan(
        config=run,
        rules=[*plan.rules, *head],
        drops=plan.drops,
        facts={
            "classes": class_names(count, request.classes or config.classes(), origin),
            "most_frequent": 0,
        },
    )


def check(config: HfConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError for what this model does not have."""
    config.expect("hidden_act", "gelu")
    if "classifier.weight" in tensors:
        config.expect("use_mean_pooling", True)
    for flag, name in (
        ("use_absolute_position_embeddings", HF.positions),
        ("use_shared_relative_position_bias", HF.shared_table),
        ("use_relative_position_bias", HF.layer_table.format(0)),
    ):
        # Positions are optional in a BEiT: without the flag a lost table would not be missed.
        if bool(config.tree.get(flag, False)) != (name in tensors):
            found = f"there is {name}" if name in tensors else f"missing {name}"
            raise InputError(
                f"{config.path}: {flag} is {config.tree.get(flag, False)!r}, but of the weights: "
                f"{found}; give the config.json that belongs to them"
            )
    size: Any = config.tree.get("image_size")
    if isinstance(size, list) and size[0] != size[-1]:
        raise InputError(
            f"{config.path}: image_size {size}; transformers reads the relative table of a grid "
            "that is not square transposed, so only square ones are taken"
        )
