"""Rules from foreign names to ours: how each tensor of the model is made, and the account of it.

A layout lists a rule for every tensor of ours that it has something for, and names what it leaves
out. `carry_out` holds it to that: a tensor that a rule asks for and the file lacks, a tensor of the
file that nobody asked for, a shape that does not fit and a tensor of the model without a rule are
all found before anything is read, and nothing is partial unless it was accepted by name.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vlbeit.config import FinetuneConfig, PretrainConfig
from vlbeit.errors import ConfigError, InputError

Action = Literal["copied", "renamed", "folded", "tiled", "interpolated", "initialised", "dropped"]
ACTIONS: dict[Action, str] = {
    "copied": "same name, same numbers",
    "renamed": "same numbers under our name; also joined, split or flattened",
    "folded": "a constant of the foreign model is worked into it; the function stays the same",
    "tiled": "the same numbers in more than one place",
    "interpolated": "a table of positions at another size: an approximation",
    "initialised": "nothing in the file for it: as in a fresh model",
    "dropped": "in the file, without a place in the model",
}
"""What can become of a tensor."""
WORTH_SAYING: tuple[Action, ...] = (
    "folded",
    "tiled",
    "interpolated",
    "initialised",
    "dropped",
)
PROBLEMS_SHOWN = 12


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one tensor of ours is made.

    target   our name
    sources  foreign names, the arguments of `make`
    make     the foreign tensors to ours; it must also work without numbers (meta tensors)
    fresh    a part of the target that has no source and starts as in a fresh model, as
             "target:part", to be accepted by that name; "": none
    """

    target: str
    sources: tuple[str, ...]
    make: Callable[..., Tensor] = as_it_is
    action: Action = "renamed"
    note: str = ""
    fresh: str = ""


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Foreign tensors that have no place in the model.

    pattern  of their names (fnmatch); it may match none
    """

    pattern: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a layout found in a file: the model that fits, and where each of its tensors is from.

    config  the settings of the result, a pretrained or a fine-tuned run
    facts   task.json of a fine-tuned run; None for a pretrained one
    """

    config: PretrainConfig | FinetuneConfig
    rules: Sequence[Rule]
    drops: Sequence[Drop] = ()
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the receipt. `target` is empty for what was dropped, `sources` for what is new."""

    action: Action
    target: str = ""
    sources: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of every tensor, foreign and ours."""

    layout: str
    origin: str
    entries: Sequence[Entry] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Tensors by action, in the order of ACTIONS."""
        found = Counter(entry.action for entry in self.entries)
        return {action: found[action] for action in ACTIONS if found[action]}

    def named(self, action: Action) -> list[Entry]:
        """The entries of one action, in the order of the model's tensors."""
        return [entry for entry in self.entries if entry.action == action]

    def to_json(self) -> dict[str, Any]:
        """receipt.json."""
        return {
            "layout": self.layout,
            "origin": self.origin,
            "counts": self.counts(),
            "tensors": [
                {
                    name: list(value) if isinstance(value, tuple) else value
                    for name, value in vars(entry).items()
                    if value or name == "action"
                }
                for entry in self.entries
            ],
        }

    def describe(self) -> list[str]:
        """For a terminal: the counts, then what was not simply taken, grouped over the blocks."""
        counts = ", ".join(f"{count} {action}" for action, count in self.counts().items())
        lines = [f"{len(self.entries)} tensors: {counts}"]
        for action in WORTH_SAYING:
            groups: dict[tuple[str, str], int] = {}
            for entry in self.named(action):
                name = entry.target if entry.target else ", ".join(entry.sources)
                key = (over_blocks(name), entry.note)
                groups[key] = groups.get(key, 0) + 1
            for (name, note), count in groups.items():
                often = f" x {count}" if count > 1 else ""
                lines.append(f"  {action:<12} {name}{often}" + (f": {note}" if note else ""))
        return lines


def over_blocks(name: str) -> str:
    """The name with a star for the number of a block.

    >>> over_blocks("backbone.blocks.11.gamma_1")
    'backbone.blocks.*.gamma_1'
    """
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def acceptance(names: Iterable[str]) -> list[str]:
    """Patterns that accept these names, one for all blocks and both leaves of a layer.

    >>> acceptance(["heads.mlm.weight", "heads.mlm.bias", "text.positions"])
    ['heads.mlm.*', 'text.positions']
    """
    found: dict[str, None] = {}
    for name in names:
        pattern = over_blocks(name)
        if pattern.endswith((".weight", ".bias")):
            pattern = pattern.rsplit(".", 1)[0] + ".*"
        pattern = re.sub(r"(\.experts\.\w+)\..*", r"\1.*", pattern)
        found[pattern] = None
    return list(found)


def carry_out(
    plan: Plan,
    source: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor] | None,
    *,
    layout: str,
    origin: str,
    accepted: Sequence[str] = (),
) -> tuple[dict[str, Tensor], Receipt]:
    """The model's tensors by the plan, and the receipt.

    With meta tensors for `source` and `fresh` it checks everything and reads nothing.

    Args:
        source: the foreign tensors.
        fresh: every tensor of the model, as initialised; None where the targets are another
            library's and the rules alone say what there is.
        accepted: names (or patterns) of what may stay as initialised.

    Raises:
        InputError: a tensor is missing, unknown, or does not fit; all are listed.
        ConfigError: something stays as initialised that was not accepted, or a name in `accepted`
            matches nothing.
    """
    problems: list[str] = []
    entries: list[Entry] = []
    made: dict[str, Tensor] = {}
    left_fresh: list[str] = []
    used: set[str] = set()
    for rule in plan.rules:
        used.update(rule.sources)
        missing = [name for name in rule.sources if name not in source]
        problems += [f"missing {name} (for {rule.target})" for name in missing]
        if fresh is not None and rule.target not in fresh:
            raise ValueError(f"{layout}: a rule for {rule.target}, which the model does not have")
        if missing:
            continue
        try:
            value = rule.make(*(source[name] for name in rule.sources))
        except (RuntimeError, IndexError, ValueError) as error:
            problems.append(f"{_shapes(rule, source)} cannot become {rule.target}: {error}")
            continue
        wanted = value if fresh is None else fresh[rule.target]
        if value.shape != wanted.shape:
            problems.append(
                f"{_shapes(rule, source)} becomes {tuple(value.shape)}; {rule.target} has "
                f"{tuple(wanted.shape)}"
            )
            continue
        made[rule.target] = value.to(wanted.dtype).contiguous()
        same = rule.action == "renamed" and rule.sources == (rule.target,)
        entries.append(
            Entry(
                action="copied" if same else rule.action,
                target=rule.target,
                sources=rule.sources,
                shape=tuple(value.shape),
                note=rule.note,
            )
        )
        if rule.fresh:
            left_fresh.append(rule.fresh)
            entries.append(Entry(action="initialised", target=rule.fresh))
    for name in source:
        if name in used:
            continue
        reason = next((d.reason for d in plan.drops if fnmatch.fnmatchcase(name, d.pattern)), None)
        if reason is None:
            problems.append(f"unknown {name} {tuple(source[name].shape)}")
        else:
            entries.append(Entry(action="dropped", sources=(name,), note=reason))
    if problems:
        shown = "; ".join(dict.fromkeys(problems[:PROBLEMS_SHOWN]))
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" * (len(problems) > PROBLEMS_SHOWN)
        raise InputError(
            f"{origin}: not a whole file of the layout {layout}: {shown}{more}. Nothing was "
            "written; `vlbeit convert --help` lists the layouts"
        )
    targets = {rule.target for rule in plan.rules}
    for name, value in (fresh or {}).items():
        if name not in targets:
            left_fresh.append(name)
            made[name] = value
            entries.append(Entry(action="initialised", target=name, shape=tuple(value.shape)))
    check_accepted(left_fresh, accepted, origin)
    entries.sort(key=lambda entry: (entry.target == "", entry.target, entry.sources))
    return made, Receipt(layout=layout, origin=origin, entries=entries)


def check_accepted(left_fresh: Sequence[str], accepted: Sequence[str], origin: str) -> None:
    """Raise ConfigError unless each name is accepted, and each acceptance is of use."""
    surprising = [
        name for name in left_fresh if not any(fnmatch.fnmatchcase(name, p) for p in accepted)
    ]
    if surprising:
        words = " ".join(f"'{pattern}'" for pattern in acceptance(surprising))
        raise ConfigError(
            f"{origin}: {len(surprising)} tensors of the model have no source and would stay as "
            f"initialised. If that is meant, accept them by name: --fresh {words}"
        )
    for pattern in accepted:
        if not fnmatch.filter(left_fresh, pattern):
            raise ConfigError(
                f"--fresh {pattern!r}: nothing of that name stays as initialised here"
                + (f" (what does: {', '.join(acceptance(left_fresh))})" if left_fresh else "")
            )


def _shapes(rule: Rule, source: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(source[name].shape)}" for name in rule.sources)


def with_result(rule: Rule, change: Callable[[Tensor], Tensor], action: Action, note: str) -> Rule:
    """The rule, with its result changed once more."""
    make = rule.make
    notes = "; ".join(part for part in (rule.note, note) if part)
    return replace(rule, make=lambda *given: change(make(*given)), action=action, note=notes)


# ---- rewrites that more than one layout needs (docs/convert.md)


def flat(tensor: Tensor) -> Tensor:
    """(1, 1, D) to (D,)."""
    return tensor.flatten()


def flat_patch(weight: Tensor) -> Tensor:
    """A convolution (D, 3, patch, patch) to a projection of flattened patches (D, 3 patch^2)."""
    return weight.flatten(1)


def stacked(*rows: Tensor) -> Tensor:
    """Query, key and value weights (D, D) one below the other, (3 D, D)."""
    return torch.cat(rows)


def with_text_rows(image_rows: Tensor, text_positions: int) -> Tensor:
    """A BEiT table (image rows, 3 of [I_CLS]) with zeros for cross and text rows: a fresh bias."""
    blank = image_rows.new_zeros(2 + 2 * text_positions, image_rows.shape[1])
    return torch.cat((image_rows, blank))
