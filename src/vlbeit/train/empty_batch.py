"""A micro-batch without a sample, for a rank that has none when all ranks must call the model.

A rank lacks one when every sample of a micro-batch was bad, or when a step's samples do not divide
evenly. Its passes then run on no row at all: they take part in what ranks tell each other, and add
exactly nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlbeit.train.distributed import World
from vlbeit.types import Batch, TaskBatch

B = TypeVar("B")

KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Batch, TaskBatch)}


def fill_gaps(
    parts: Mapping[int, Sequence[B | None]], world: World, aligned: bool
) -> dict[int, list[B]]:
    """The micro-batches of every part in their order.

    Where ranks are `aligned`, one that a rank lacks and another has is replaced by an empty one;
    else, and where no rank has it, it is left out.

    Raises:
        LostWorkerError: another rank is gone or silent.
    """
    slots = [batch for part in parts.values() for batch in part]
    lacking = torch.tensor([float(any(b is None for b in slots))], device=world.device)
    if aligned and world.size > 1 and world.sum_over_ranks(lacking).item():
        layouts = world.gather_objects([None if b is None else layout_of(b) for b in slots])
        for slot, batch in enumerate(slots):
            layout = next((rank[slot] for rank in layouts if rank[slot] is not None), None)
            if batch is None and layout is not None:
                slots[slot] = empty_batch(layout, world.device)
    remaining = iter(slots)
    return {
        number: [batch for _ in part if (batch := next(remaining)) is not None]
        for number, part in parts.items()
    }


def layout_of(batch: Any) -> dict[str, Any]:
    """Kind, stream, and type and shape of a sample of each tensor; JSON."""
    return {
        "kind": type(batch).__name__,
        "stream": batch.stream,
        "tensors": {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:])]
            for name, tensor in named_tensors(batch)
        },
    }


def named_tensors(batch: Any) -> list[tuple[str, Tensor]]:
    """A batch's tensors; those of its targets as "targets.NAME"."""
    found = [(name, value) for name, value in vars(batch).items() if isinstance(value, Tensor)]
    return found + [(f"targets.{k}", v) for k, v in getattr(batch, "targets", {}).items()]


def empty_batch(layout: Mapping[str, Any], device: torch.device) -> Any:
    """A batch of no sample with the layout of another rank's."""
    fields: dict[str, Any] = {}
    targets: dict[str, Tensor] = {}
    for name, (dtype, shape) in layout["tensors"].items():
        tensor = torch.empty(0, *shape, dtype=getattr(torch, dtype), device=device)
        if name.startswith("targets."):
            targets[name.removeprefix("targets.")] = tensor
        else:
            fields[name] = tensor
    kind = KINDS[layout["kind"]]
    if kind is TaskBatch:
        fields["targets"] = targets
    return kind(stream=layout["stream"], sample_ids=(), **fields)
