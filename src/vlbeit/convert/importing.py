"""From a foreign file to our tensors: open, check without numbers, read, write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlbeit.convert.folder import blank_model, check_out, fresh_model, write_run
from vlbeit.convert.geometry import at_size
from vlbeit.convert.layouts import LAYOUTS, Request
from vlbeit.convert.rewriting import Plan, Receipt, carry_out
from vlbeit.convert.weightfile import Weights, open_weights
from vlbeit.errors import InputError
from vlbeit.tokens.text import TextTokenizer
from vlbeit.validate import validate_model


class Renamed(Mapping[str, Tensor]):
    """Tensors under the layout's own spelling of their names."""

    def __init__(self, tensors: Mapping[str, Tensor], spelling: Mapping[str, str]) -> None:
        """`spelling`: our spelling to the file's."""
        self._tensors, self._spelling = tensors, spelling

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._spelling[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spelling)

    def __len__(self) -> int:
        return len(self._spelling)

    def __contains__(self, name: object) -> bool:
        return name in self._spelling


def spelled(weights: Weights, layout: str) -> dict[str, str]:
    """The layout's spelling of each name to the file's.

    Raises:
        InputError: two names are the same in that spelling.
    """
    found: dict[str, str] = {}
    for name in weights:
        ours = LAYOUTS[layout].canonical(name)
        if ours in found:
            raise InputError(f"{weights.path}: {name} and {found[ours]} are the same tensor")
        found[ours] = name
    return found


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A model that was read, or without `tensors` what reading it would give."""

    plan: Plan
    tokenizer: TextTokenizer
    receipt: Receipt
    tensors: Mapping[str, Tensor] | None


def convert(
    layout: str,
    request: Request,
    *,
    image_size: int | None = None,
    text_positions: int | None = None,
    accepted: Sequence[str] = (),
    dry: bool = False,
) -> Converted:
    """Read a file of a foreign layout.

    Everything is checked on names and shapes before the first tensor is read.

    Args:
        image_size, text_positions: of the result, where it is to differ from the file.
        accepted: names (or patterns) of what may stay as initialised.
        dry: stop after the check.

    Raises:
        UnsafeError: reading the file could run code, or it is beyond a limit.
        InputError: it is missing, damaged, or not wholly of that layout; all that is wrong is
            listed.
        ConfigError: something would stay as initialised that was not accepted, or a setting does
            not go with the file.
    """
    weights = open_weights(request.place)
    spelling = spelled(weights, layout)
    outline = Renamed(weights.outline(), spelling)
    found = LAYOUTS[layout].plan(outline, request)
    plan = at_size(found.plan, image_size, text_positions)
    validate_model(plan.config.model)
    said = {"layout": layout, "origin": str(weights.path)}
    _, receipt = carry_out(plan, outline, blank_model(plan).state_dict(), accepted=accepted, **said)
    if dry:
        return Converted(plan=plan, tokenizer=found.tokenizer, receipt=receipt, tensors=None)
    new = {entry.target for entry in receipt.named("initialised")}
    tensors, receipt = carry_out(
        plan,
        Renamed(weights, spelling),
        fresh_model(plan, new).state_dict(),
        accepted=accepted,
        **said,
    )
    return Converted(plan=plan, tokenizer=found.tokenizer, receipt=receipt, tensors=tensors)


def import_run(layout: str, request: Request, run_dir: Path | None, **settings: Any) -> Converted:
    """`convert`, and the result as a run folder; settings as there. A dry run needs no folder.

    Raises:
        as `convert`; SaveError: `run_dir` is not empty or cannot be written.
    """
    if run_dir is not None:
        check_out(run_dir)
    converted = convert(layout, request, **settings)
    if converted.tensors is not None and run_dir is not None:
        write_run(
            run_dir, converted.plan, converted.tensors, converted.tokenizer, converted.receipt
        )
    return converted
