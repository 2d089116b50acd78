"""The Transformer block, as every layout of the family has it under its own names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vlbeit.convert.rewriting import Drop, Rule, as_it_is, stacked
from vlbeit.errors import InputError, UnsafeError
from vlbeit.types import Modality

MOST_BLOCKS = 512
HEAD_WIDTH = 64
"""Of every BEiT, BEiT-3 and VLMo but base-plus; asked where nothing else tells the heads."""
UNILM_ATTENTION: Mapping[str, tuple[str, ...]] = {
    "norm1.weight": ("norm1.weight",),
    "norm1.bias": ("norm1.bias",),
    "attention.qkv.weight": ("attn.qkv.weight",),
    "attention.q_bias": ("attn.q_bias",),
    "attention.v_bias": ("attn.v_bias",),
    "attention.proj.weight": ("attn.proj.weight",),
    "attention.proj.bias": ("attn.proj.bias",),
}
"""unilm's names of attention and its norm inside a block, by ours; BEiT and VLMo have the same."""
INDEX = Drop(pattern="*relative_position_index", reason="a buffer that follows from the grid")


@dataclass(frozen=True, kw_only=True)
class BlockNames:
    """Foreign names inside a block, by our names.

    prefix   of block number {}, with the dot at its end
    shared   attention, its norm and LayerScale; several foreign names are joined row by row
    experts  by modality: the foreign names of norm, fc1 and fc2
    """

    prefix: str
    shared: Mapping[str, tuple[str, ...]]
    experts: Mapping[Modality, Mapping[str, str]] = field(default_factory=dict)


def feed_forward(norm: str, fc1: str, fc2: str) -> dict[str, str]:
    """Names of an expert's six tensors from those of its three layers."""
    layers = {"norm": norm, "fc1": fc1, "fc2": fc2}
    return {
        f"{ours}.{leaf}": f"{theirs}.{leaf}"
        for ours, theirs in layers.items()
        for leaf in ("weight", "bias")
    }


def block_rules(
    names: BlockNames, layer: int, experts: Mapping[Modality, Modality]
) -> Iterator[Rule]:
    """The rules of one block.

    Args:
        experts: of the model, each with the foreign expert that it takes; one that takes another
            modality's is a copy of it.
    """
    theirs, ours = names.prefix.format(layer), f"backbone.blocks.{layer}."
    for target, sources in names.shared.items():
        joined = len(sources) > 1
        yield Rule(
            target=ours + target,
            sources=tuple(theirs + source for source in sources),
            make=stacked if joined else as_it_is,
            note="query, key and value one below the other" if joined else "",
        )
    for modality, taken in experts.items():
        copied = modality != taken
        for leaf, source in names.experts[taken].items():
            yield Rule(
                target=f"{ours}experts.{modality.value}.{leaf}",
                sources=(theirs + source,),
                action="tiled" if copied else "renamed",
                note=f"a copy of the {taken.value}-expert" if copied else "",
            )


def count_blocks(names: Sequence[str] | Mapping[str, Tensor], prefix: str, origin: str) -> int:
    """How many blocks the names have, numbered from 0 without a gap.

    Raises:
        InputError: none, or a number is missing.
        UnsafeError: more than MOST_BLOCKS.
    """
    pattern = re.compile(re.escape(prefix).replace(r"\{\}", r"(\d{1,6})"))
    numbers = {int(match[1]) for match in map(pattern.match, names) if match}
    if len(numbers) > MOST_BLOCKS:
        raise UnsafeError(f"{origin}: {len(numbers)} blocks, the limit is {MOST_BLOCKS}")
    if not numbers or numbers != set(range(len(numbers))):
        found = ", ".join(map(str, sorted(numbers)[:20])) or "none"
        raise InputError(
            f"{origin}: blocks named {prefix!r} must be numbered from 0 on without a gap; found "
            f"{found}"
        )
    return len(numbers)


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, origin: str) -> tuple[int, ...]:
    """The shape of a tensor that the layout cannot do without.

    Raises:
        InputError: it is missing, or has another number of dimensions.
    """
    if name not in tensors:
        raise InputError(f"{origin}: missing {name}; it is not a file of this layout, or not whole")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims:
        raise InputError(f"{origin}: {name} has shape {shape}, expected {dims} dimensions")
    return shape


def square_side(count: int, what: str, origin: str) -> int:
    """The side of a square grid of so many places.

    Raises:
        InputError: it is no square.
    """
    side = round(math.sqrt(max(count, 0)))
    if side * side != count or side < 1:
        raise InputError(f"{origin}: {what} has {count} rows for patches, which is no square grid")
    return side
