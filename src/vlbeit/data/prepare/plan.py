"""What a family of data sets found, before an image is opened: items, bad rows, splits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

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


class Picture(NamedTuple):
    """A picture of a record."""

    place: Place
    member: str = ""
    """Its name in the record where there are several: "left" is stored as left.jpg."""
    box: tuple[int, int, int, int] | None = None
    """Cut out of the file and stored alone: left, top, right and bottom in pixels."""


class ClassMap(NamedTuple):
    """The class of every pixel of a record's picture, in a file of its own."""

    place: Place
    classes: int | None
    """Number of classes, so that values that are none can be refused; None: not known."""
    ignore: int | None
    """Value in the file of pixels that belong to no class. It is stored as 255, and the values
    above it move down by one (ADE20K's 0 and 1 ... 150 become 255 and 0 ... 149)."""


class Item(NamedTuple):
    """Pictures with what is known about them: a record to be."""

    split: str
    """Empty: to be drawn from the content."""
    name: str
    where: str
    pictures: tuple[Picture, ...]
    fields: dict[str, Any]
    class_map: ClassMap | None = None


class Summary(Protocol):
    """What is to be said about all records together, computed while they are written."""

    def add(self, split: str, fields: Mapping[str, Any], pixels: np.ndarray | None) -> None:
        """A record that was written. `pixels`: (256,) int64, how often each value of its class
        map occurs; None without a map."""
        ...

    def facts(self) -> dict[str, Any]:
        """For dataset.json; `counts` and `baselines` are told on the terminal too."""
        ...


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

    stream: str
    """"image", "pair" or "task:NAME"."""
    serves: str = ""
    """"retrieval" or "classification": a task that reads the same shards as a further source."""
    summary: Summary | None = None
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
