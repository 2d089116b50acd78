"""What a family of data sets found, before an image is opened: items, bad rows, splits."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vlbeit.data.prepare.locate import Place
from vlbeit.data.prepare.rows import Bad
from vlbeit.errors import InputError

SPLITS = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Names of splits in the wild. `restval` is the part of COCO's val2014 that Karpathy's split
gives to training (VLMo trains on it)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every verb of `vlbeit prepare` can be told."""

    out: Path | None
    """Folder to write; None: only check."""
    name: str
    split: str = ""
    """Split of records whose own file names none, or one that is not train, val or test."""
    val_fraction: float = 0.0
    """Share of the records without a split that becomes val."""
    per_shard: int = 1000
    max_size: int = 0
    """Pixels of the shorter side above which an image is stored smaller; 0: stored as it is."""
    budget: float = 0.01
    workers: int = 1
    allow_absolute: bool = False
    eval_against: tuple[str, ...] = ()
    drop_overlap: bool = False


class Item(NamedTuple):
    """An image with what is known about it: a record to be."""

    split: str
    """Empty: to be drawn from the content."""
    name: str
    where: str
    place: Place
    fields: dict[str, Any]


class Overlap(NamedTuple):
    """A training image that is an evaluation image as well: a row of overlap.jsonl."""

    image: str
    where: str
    same: str
    """By what they are the same: file, look, coco_id."""
    evaluation: str


@dataclass
class Plan:
    """What a family found in the user's files."""

    stream: Literal["image", "pair"]
    items: list[Item] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    absent: list[Bad] = field(default_factory=list)
    """Rows whose image was never downloaded: listed and counted, but no fault of the data."""
    held_out: list[Overlap] = field(default_factory=list)
    """Images left out because another dataset evaluates on them."""
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def split_of(self, named: object, where: str, name: str, options: Options) -> str | None:
        """The split of a row that calls it `named`; None after noting the row as bad."""
        if named is None or named == "":
            return options.split or ("" if options.val_fraction else "train")
        split = SPLITS.get(str(named).lower())
        if split is None and options.split:
            return options.split
        if split is None:
            detail = f"split {named!r} is none of train, val, test; --split S puts such rows in S"
            self.bad.append(Bad(where, name, "bad_split", detail))
        return split


def split_by_content(digest: bytes, val_fraction: float) -> str:
    """The same content falls into the same split, whatever its name and whatever else is there."""
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def split_of_file(path: Path) -> str | None:
    """The split that a file is named after: `captions.val.jsonl`, `train.jsonl`."""
    last = path.stem.rpartition(".")[2]
    return last if last in SPLITS else None


def require(path: Path, what: str) -> Path:
    """`path` if it exists, else an InputError that says what should be there."""
    if not path.exists():
        raise InputError(f"{path}: missing; expected {what}")
    return path
