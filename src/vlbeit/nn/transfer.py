"""Tensors of one model into another that differs in what fine-tuning may change."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.model import VLBeit
from vlbeit.nn.positions import resize_grid

PRETRAINING_HEADS = "heads."
TASK_HEAD = "task."
NAMES_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What became of every tensor; the names of each list are sorted as in the model."""

    taken: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    """"name (old shape to new shape)"."""
    fresh: list[str] = field(default_factory=list)
    """Tensors of the model that the checkpoint does not have: the new head's."""
    dropped: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that the model does not have: other heads'."""

    def describe(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.taken)} tensors taken"]
        for what, names in (
            ("resized", self.resized),
            ("fresh", self.fresh),
            ("dropped", self.dropped),
        ):
            if names:
                shown = ", ".join(names[:NAMES_SHOWN]) + ", ..." * (len(names) > NAMES_SHOWN)
                parts.append(f"{len(names)} {what}: {shown}")
        return "; ".join(parts)


def transfer(
    model: VLBeit, tensors: Mapping[str, Tensor], old_grid: tuple[int, int], origin: str
) -> Transfer:
    """Fill the trunk of `model`, and its task head where the names and shapes are the same.

    Position tables are resized: the image's bicubically from `old_grid` to the model's grid of
    patches (as VLBeit does for a picture of another size), the text's linearly when it grows and
    cut when it shrinks. Everything else must agree.

    Args:
        tensors: of a pretraining or fine-tuning checkpoint.
        old_grid: rows and columns of patches that its image positions belong to.
        origin: named in messages.

    Raises:
        InputError: a tensor of the trunk is missing, of another shape or unknown; all are listed.
        ConfigError: text positions change in a model with relative position bias.
    """
    own = model.state_dict()
    found = Transfer()
    filled: dict[str, Tensor] = {}
    problems: list[str] = []
    # A head is taken whole or not at all.
    head = {name: value.shape for name, value in own.items() if name.startswith(TASK_HEAD)}
    given = {name: value.shape for name, value in tensors.items() if name.startswith(TASK_HEAD)}
    same_head = head == given
    for name, value in own.items():
        if name.startswith(TASK_HEAD) and not same_head:
            found.fresh.append(name)
            continue
        if name not in tensors:
            problems.append(f"missing {name}")
            continue
        new = tensors[name]
        if new.shape != value.shape:
            resized = _resized(model, name, new, value, old_grid)
            if resized is None:
                problems.append(f"{name} is {_shape(new)}, the model has {_shape(value)}")
                continue
            found.resized.append(f"{name} ({_shape(new)} to {_shape(value)})")
            new = resized
        elif name == "image.positions" and old_grid != model.image.native_grid:
            # Another shape of picture with as many patches.
            new = _image_positions(new, old_grid, model.image.native_grid)
            found.resized.append(f"{name} (grid {old_grid} to {model.image.native_grid})")
        else:
            found.taken.append(name)
        filled[name] = new
    for name in tensors:
        if name in own and not (name.startswith(TASK_HEAD) and not same_head):
            continue
        if name.startswith((PRETRAINING_HEADS, TASK_HEAD)):
            found.dropped.append(name)
        else:
            problems.append(f"unknown {name}")
    if problems:
        shown = "; ".join(problems[:10])
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"{origin}: weights do not fit the model: {shown}{more}")
    with torch.no_grad():
        for name, new in filled.items():
            own[name].copy_(new)
    return found


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(side) for side in tensor.shape)


def _image_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1 + old places, D) to (1 + new places, D); the first row is [I_CLS]'s."""
    return torch.cat((table[:1], resize_grid(table[1:], old, new)))


def _resized(
    model: VLBeit, name: str, old: Tensor, own: Tensor, old_grid: tuple[int, int]
) -> Tensor | None:
    """The table in the model's size; None where the tensor is no position table that fits."""
    grid = model.image.native_grid
    if name == "image.positions" and len(old) == old_grid[0] * old_grid[1] + 1:
        return _image_positions(old, old_grid, grid)
    if name == "text.positions":
        if len(own) <= len(old):
            return old[: len(own)]
        line = F.interpolate(old.float().T[None], size=len(own), mode="linear", align_corners=True)
        return line[0].T.to(old.dtype)
    if name == "backbone.relative_bias.table" and model.backbone.relative_bias is not None:
        before, after = ((2 * rows - 1) * (2 * columns - 1) for rows, columns in (old_grid, grid))
        if len(old) - before != len(own) - after:
            raise ConfigError(
                "model.text_positions: a model with relative position bias keeps those of its "
                f"start; {len(old) - before} rows for text in the checkpoint, "
                f"{len(own) - after} asked for"
            )
        sides = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (old_grid, grid))
        return torch.cat((resize_grid(old[:before], *sides), old[before:]))
    return None
