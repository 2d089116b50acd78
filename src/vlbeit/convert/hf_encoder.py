"""The Transformer block of transformers' ViT family (ViLT, FLAVA), and what is dropped of it."""

from __future__ import annotations

from vlbeit.convert.blocks import BlockNames, feed_forward
from vlbeit.convert.rewriting import Drop
from vlbeit.types import Modality


def encoder_block(prefix: str, modality: Modality) -> BlockNames:
    """Names of a block under `prefix` (with {} for its number), its one feed-forward layer given to
    a modality."""
    attention = "attention.attention."
    return BlockNames(
        prefix=prefix,
        shared={
            "norm1.weight": ("layernorm_before.weight",),
            "norm1.bias": ("layernorm_before.bias",),
            "attention.qkv.weight": tuple(
                f"{attention}{part}.weight" for part in ("query", "key", "value")
            ),
            "attention.q_bias": (f"{attention}query.bias",),
            "attention.v_bias": (f"{attention}value.bias",),
            "attention.proj.weight": ("attention.output.dense.weight",),
            "attention.proj.bias": ("attention.output.dense.bias",),
        },
        experts={modality: feed_forward("layernorm_after", "intermediate.dense", "output.dense")},
    )


KEY_BIAS = Drop(
    pattern="*.attention.attention.key.bias",
    reason="adds the same to every score of a query, which softmax cancels",
)
POOLER = Drop(pattern="*pooler.*", reason="a pooler for heads that have no place here")
POSITION_IDS = Drop(pattern="*position_ids", reason="a buffer: 0, 1, 2, ...")
"""Of files that transformers 4.30 and older wrote."""
