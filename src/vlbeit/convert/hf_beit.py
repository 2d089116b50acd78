"""BEiT of `transformers`, read: masked image modelling, classifier, bare trunk.

On disk (4.x and 5.x alike) the names are those of 4.x; `torch.save(model.state_dict())` of 5.x has
the names of its memory. Both are taken (checkpoints.md T3). hf_export.py writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlbeit.convert.beit import INDEX, BeitNames, plan_of
from vlbeit.convert.blocks import BlockNames, feed_forward
from vlbeit.convert.hf_folder import HfConfig, read_hf_config
from vlbeit.convert.layouts import Found, Request
from vlbeit.convert.rewriting import Drop
from vlbeit.errors import InputError
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
    for pattern, spelling in _IN_MEMORY:
        name, count = re.subn(pattern, spelling, name)
        if count:
            break
    return name


def plan(tensors: Mapping[str, Tensor], request: Request) -> Found:
    """Raises InputError for a folder without config.json, or a BEiT without an exact place here."""
    config = read_hf_config(request.place, "beit")
    check(config, tensors)
    asked = config.completed(request)
    return plan_of(
        HF,
        "hf-beit",
        tensors,
        asked,
        norm_eps=config.number("layer_norm_eps", 1e-12),
        drops=DROPS,
        facts={"heads": config.whole("num_attention_heads"), "classes": config.classes()},
    )


def check(config: HfConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError for what this model does not have."""
    config.expect("hidden_act", "gelu")
    if "classifier.weight" in tensors:
        config.expect("use_mean_pooling", True)
    size: Any = config.tree.get("image_size")
    if isinstance(size, list) and size[0] != size[-1]:
        raise InputError(
            f"{config.path}: image_size {size}; transformers reads the relative table of a grid "
            "that is not square transposed, so only square ones are taken"
        )
