"""BEiT v2 of unilm: BEiT's names, and two blocks and a head that only pretraining used.

The main head's logits are exact. The branch that predicts codes from [I_CLS] and an early layer
(`cls_pt_*`) has no place here and is left out. Its visual tokenizer is a layout of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlbeit.convert.beit import UNILM, canonical, plan_of
from vlbeit.convert.blocks import INDEX
from vlbeit.convert.layouts import Found, Request
from vlbeit.convert.rewriting import Drop

DROPS = (
    INDEX,
    Drop(pattern="cls_pt_*", reason="the second branch of BEiT v2's pretraining"),
)

__all__ = ["canonical", "plan"]


def plan(tensors: Mapping[str, Tensor], request: Request) -> Found:
    """Raises InputError for a file that is no BEiT v2 of unilm."""
    return plan_of(UNILM, "beitv2", tensors, request, drops=DROPS)
