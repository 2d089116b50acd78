"""Strict filling of one of our networks from a file with other names: nothing left over."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlbeit.errors import InputError

SHOWN = 10


class Origin(NamedTuple):
    """Where a tensor of ours comes from."""

    name: str
    """In the foreign file."""
    shape: tuple[int, ...]
    """There; it has as many numbers as ours, in the same order."""


class Made(NamedTuple):
    """A tensor of ours that is not simply one of the file's."""

    tensor: Tensor
    note: str
    """What it is, in words."""
    source: str = ""
    """The file's tensor that it was worked out from; "": none."""


class TensorAccount(NamedTuple):
    """What became of one tensor. `tensor` is empty for what was dropped, `source` for what is
    new."""

    action: Literal["copied", "renamed", "folded", "initialised", "dropped"]
    tensor: str = ""
    source: str = ""
    note: str = ""


def fill_from_foreign(
    model: nn.Module,
    origins: Mapping[str, Origin],
    tensors: Mapping[str, Tensor],
    *,
    made: Mapping[str, Made] = {},
    dropped: Sequence[str] = (),
    origin: str,
) -> list[TensorAccount]:
    """Give every tensor of a model its numbers, in float32.

    Args:
        model: on any device, the meta device too.
        origins: for each tensor of the model that the file holds.
        made: the rest of them.
        dropped: names of the file that the model has no use for.
        origin: named in messages.

    Raises:
        InputError: a tensor that is missing, unknown, of another shape or not finite; all are
            listed.
    """
    own = model.state_dict()
    uncovered = own.keys() ^ (origins.keys() | made.keys())
    if uncovered:
        raise ValueError(f"the layout does not cover the model: {sorted(uncovered)}")
    used = {source.name for source in origins.values()}
    worked_in = {m.source for m in made.values() if m.source}
    problems = [f"missing {s.name}" for s in origins.values() if s.name not in tensors]
    problems += [f"unknown {n}" for n in tensors if n not in {*used, *worked_in, *dropped}]
    given = {name: tensors[name] for name in used if name in tensors}
    for source in origins.values():
        if source.name not in given:
            continue
        found = given[source.name]
        if tuple(found.shape) != source.shape:
            problems.append(f"{source.name} is {tuple(found.shape)}, expected {source.shape}")
        elif not found.is_floating_point():
            problems.append(f"{source.name} is {found.dtype}, expected floating point")
        elif not bool(torch.isfinite(found).all()):
            problems.append(f"{source.name} holds NaN or infinity")
    if problems:
        more = f"; and {len(problems) - SHOWN} more" * (len(problems) > SHOWN)
        raise InputError(f"{origin}: does not fit the layout: {'; '.join(problems[:SHOWN])}{more}")
    filled = {
        name: given[source.name].float().reshape(own[name].shape).clone()
        for name, source in origins.items()
    }
    filled |= {name: m.tensor for name, m in made.items()}
    model.load_state_dict(filled, assign=True)
    return [
        *(
            TensorAccount("copied" if name == source.name else "renamed", name, source.name)
            for name, source in origins.items()
        ),
        *(
            TensorAccount("folded" if m.source else "initialised", name, m.source, m.note)
            for name, m in made.items()
        ),
        *(TensorAccount("dropped", source=name) for name in tensors if name in dropped),
    ]


def size_of(tensors: Mapping[str, Tensor], name: str, dims: int, origin: str) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from.

    Raises:
        InputError: it is missing or has another number of dimensions.
    """
    if name not in tensors:
        raise InputError(f"{origin}: does not fit the layout: missing {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims:
        raise InputError(
            f"{origin}: does not fit the layout: {name} is {shape}, expected {dims} dimensions"
        )
    return shape
