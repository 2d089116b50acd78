"""The books of one `prepare`: what came in is a record, left out by name, or absent."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlbeit.data.prepare.plan import Options, Overlap
from vlbeit.data.prepare.rows import Bad
from vlbeit.errors import DataBudgetError


@dataclass
class Report:
    """What was written and what was left out; `records + skipped + dropped + absent == seen`."""

    name: str
    seen: int = 0
    records: Counter[str] = field(default_factory=Counter)
    """By "source stream split"."""
    captions: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    absent: int = 0
    overlap: Counter[str] = field(default_factory=Counter)
    """Training images that are an evaluation image too, by "file" or "look"."""
    dropped: int = 0
    """Of those, how many were left out."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    out: str = ""
    failure: DataBudgetError | None = None
    """What a check found wrong with the whole."""

    def to_dict(self) -> dict[str, Any]:
        """What is printed with --json."""
        return self.facts() | {"out": self.out, "seconds": round(self.seconds, 2)}

    def facts(self) -> dict[str, Any]:
        """What dataset.json keeps: the same command gives the same bytes anywhere."""
        return {
            "name": self.name,
            "seen": self.seen,
            "records": dict(self.records),
            "captions": self.captions,
            "skipped": dict(self.skipped),
            "absent": self.absent,
            "overlap": dict(self.overlap),
            "dropped": self.dropped,
            "notes": self.notes,
        }

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        yield from self.notes
        for place, count in sorted(self.records.items()):
            yield f"{count:>10,} records  {place}"
        if self.captions:
            yield f"{self.captions:>10,} captions"
        if self.absent:
            yield f"{self.absent:>10,} rows have no image file (no_image; not counted as bad)"
        for reason, count in self.skipped.most_common():
            yield f"{count:>10,} left out: {reason}"
        for kind, count in self.overlap.most_common():
            how = {"file": "the same file as", "look": "looks just like"}.get(
                kind, f"same {kind} as"
            )
            yield f"{count:>10,} training images: {how} an evaluation image"
        if self.dropped:
            yield f"{self.dropped:>10,} of those left out"
        goal = f"written to {self.out}" if self.out else "checked, nothing written"
        yield f"{self.seen:>10,} seen in {self.seconds:.1f} s; {goal}"


class Account:
    """Keeps the books of one `prepare`: bad records by name, the budget, the evaluation images."""

    def __init__(self, options: Options, expected: int | None) -> None:
        self.options = options
        self.report = Report(options.name)
        self._expected = expected
        """Records that will be seen; None: known only at the end."""
        self._skips: list[Bad] = []
        self._overlaps: list[Overlap] = []
        self.bad = 0

    def skip(self, bad: Bad) -> None:
        """Counts a bad record; over the budget it ends the command, except when checking."""
        self.bad += 1
        self.report.seen += 1
        self.report.skipped[bad.reason] += 1
        self._skips.append(bad)
        if self.options.out is None:
            print(describe(bad), file=sys.stderr)
        elif self._expected is not None and self.bad > self.options.budget * self._expected:
            # Whatever comes, it will not be less; a few more make the message telling.
            if self.bad >= 10 + self.options.budget * self._expected:
                raise self.over_budget()

    def absent(self, bad: Bad) -> None:
        self.report.seen += 1
        self.report.absent += 1
        self._skips.append(bad)

    def overlap(self, found: Overlap, *, drop: bool) -> None:
        """Notes a training image that an evaluation uses too."""
        self.report.overlap[found.same] += 1
        self.report.dropped += drop
        self._overlaps.append(found)

    def over_budget(self) -> DataBudgetError:
        reasons = ", ".join(f"{c} {r}" for r, c in self.report.skipped.most_common(5))
        total = self._expected or self.report.seen
        text = (
            f"{self.options.name}: {self.bad} bad records ({reasons}) in the first "
            f"{self.report.seen} of {total}; the budget {self.options.budget:g} allows "
            f"{int(self.options.budget * total)}. Nothing was written."
        )
        if self.options.out is None:
            return DataBudgetError(text)
        bad = [skip for skip in self._skips if skip.reason in self.report.skipped][:10]
        examples = "".join(f"\n  {describe(skip)}" for skip in bad)
        return DataBudgetError(
            f"{text} Mend the files (--check lists every bad record) or raise --budget.{examples}"
        )

    def close(self) -> None:
        """When too much was bad or nothing was good: raises, or notes it when only checking."""
        total = self._expected if self._expected is not None else self.report.seen
        if self.bad > self.options.budget * total:
            self.report.failure = self.over_budget()
        elif not self.report.records:
            self.report.failure = DataBudgetError(
                f"{self.options.name}: no usable record among {self.report.seen}; "
                "nothing was written"
            )
        if self.report.failure is not None and self.options.out is not None:
            raise self.report.failure

    def write(self, folder: Path) -> None:
        """skips.jsonl and overlap.jsonl, when there is something to say."""
        rows: tuple[tuple[str, list[dict[str, Any]]], ...] = (
            ("skips.jsonl", [bad._asdict() for bad in self._skips]),
            ("overlap.jsonl", [overlap._asdict() for overlap in self._overlaps]),
        )
        for name, values in rows:
            if values:
                text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
                (folder / name).write_bytes(text.encode("utf-8", errors="replace"))


def describe(bad: Bad) -> str:
    """A line for the terminal; what a stranger named may not move its cursor."""
    line = f"{bad.where}: {bad.name or 'row'}: {bad.reason}: {bad.detail}"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
