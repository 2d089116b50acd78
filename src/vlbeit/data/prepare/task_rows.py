"""Rows of a task's own files: what they say is taken out by name, and what is wrong is named."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlbeit.data.prepare.locate import BadPlace, Pictures, Place
from vlbeit.data.prepare.pairs import TABLES, rows_of
from vlbeit.data.prepare.plan import Options, Plan, require, split_of_file
from vlbeit.data.prepare.rows import Bad, Row
from vlbeit.data.transforms import BadText, clean_text
from vlbeit.errors import InputError

Columns = Sequence[str]
"""Names under which a value is looked for, in this order."""


class BadRow(Exception):
    """A row that says something wrong or too little."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class TaskRow:
    """One row; every `take_` removes what it returns, so that `rest` is what nobody asked for."""

    def __init__(self, row: Row, pictures: Pictures) -> None:
        self.where = row.where
        self.name = ""
        """Of the first picture, once it is taken."""
        self.rest = row.values
        self._pictures = pictures

    def take(self, columns: Columns) -> Any:
        """The first value that is there and not null; None when there is none."""
        return next(
            (v for v in (self.rest.pop(c) for c in columns if c in self.rest) if v is not None),
            None,
        )

    def take_text(self, columns: Columns, reason: str) -> str:
        """A cleaned text. Raises BadRow(reason) when there is none, BadText for an empty one."""
        found = self.take(columns)
        if not isinstance(found, str):
            raise BadRow(reason, self._missing(columns, "a text", found))
        return clean_text(found)

    def take_place(self, columns: Columns, shard: str | None) -> Place:
        """Where a file lies that the row names, in the archive `shard` if that is given.

        Raises BadRow (no_image) and BadPlace (no_image, unsafe_name).
        """
        name = self.take(columns)
        if not isinstance(name, str) or not name:
            raise BadRow("no_image", self._missing(columns, "a file name", name))
        self.name = self.name or name
        return self._pictures.find(name, shard)

    def take_shard(self, *columns: str) -> str | None:
        """The archive that a row names itself."""
        found = self.take(columns)
        return None if found is None else str(found)

    def _missing(self, columns: Columns, what: str, found: object) -> str:
        wanted = " or ".join(map(repr, columns))
        if found is not None:
            return f"{wanted} is {str(found)[:80]!r}, expected {what}"
        there = ", ".join(self.rest) or "nothing else"
        return f"no {wanted} (found: {there}); is this the right file?"


def each_row(
    plan: Plan,
    sources: Sequence[str],
    images: Sequence[Path],
    options: Options,
    use: Callable[[TaskRow, str], None],
) -> None:
    """Calls `use(row, split)` for every row of the files; what it raises makes the row a bad one.

    Args:
        images: folders and archives of the pictures; without any, they lie beside the file.

    Raises:
        InputError: a file that is missing, of another kind or without rows.
    """
    count = 0
    for source in sources:
        table = require(Path(source), "a .jsonl, .csv, .tsv or .json file of rows")
        if table.suffix not in TABLES:
            raise InputError(
                f"{table}: expected one of {', '.join(TABLES)} (images go to --images)"
            )
        pictures = Pictures(
            list(images) or [table.parent],
            shards=table.parent,
            allow_absolute=options.allow_absolute,
        )
        count += use_rows(plan, rows_of(table), pictures, options, use, split_of_file(table))
    if not count:
        raise InputError(f"no row found in {', '.join(sources)}")


def use_rows(
    plan: Plan,
    rows: Iterator[Row | Bad],
    pictures: Pictures,
    options: Options,
    use: Callable[[TaskRow, str], None],
    named: str | None,
) -> int:
    """As `each_row`, for the rows of one file whose split is `named` unless a row says its own;
    returns how many there are."""
    count = 0
    for found in rows:
        count += 1
        if isinstance(found, Bad):
            plan.bad.append(found)
            continue
        row = TaskRow(found, pictures)
        said = row.take(("split",))
        split = plan.split_of(named if said is None else said, row.where, "", options)
        if split is None:
            continue
        try:
            use(row, split)
        except (BadRow, BadPlace, BadText) as error:
            plan.bad.append(Bad(row.where, row.name, error.reason, error.detail))
    return count


def class_of(value: object, names: Sequence[str], where: str = "label") -> int:
    """The number of a class that a row calls by number or by name (any case).

    Raises BadRow (no_label, bad_label).
    """
    if value is None or value == "":
        raise BadRow("no_label", f"no {where}; classes: {', '.join(names)}")
    lower = [name.lower() for name in names]
    if isinstance(value, str) and value.lower() in lower:
        return lower.index(value.lower())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    raise BadRow(
        "bad_label",
        f"{where} {value!r} is none of {', '.join(names)} and no number from 0 to {len(names) - 1}",
    )
