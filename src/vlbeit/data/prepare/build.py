"""From a plan (which images, which captions) to a checked dataset folder.

Every image is opened before it is written, so what training will skip is known beforehand and
by name. The folder is built beside its place and renamed when it is complete: there is never
half a dataset.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.prepare.locate import BadPlace, Place
from vlbeit.data.prepare.overlap import EvalImages, Print, Seen, fingerprint
from vlbeit.data.prepare.rows import Bad
from vlbeit.data.records import ShardWriter
from vlbeit.data.transforms import BadImage, decode_image
from vlbeit.draws import Draws, key_of
from vlbeit.errors import ConfigError, DataBudgetError, InputError, SaveError, StopRequested

T = TypeVar("T")
R = TypeVar("R")

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


def describe(bad: Bad) -> str:
    """A line for the terminal; what a stranger named may not move its cursor."""
    line = f"{bad.where}: {bad.name or 'row'}: {bad.reason}: {bad.detail}"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)


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


class Sink:
    """Shards of one dataset folder, by source, stream and split; without a folder it counts."""

    def __init__(self, folder: Path | None, per_shard: int, report: Report) -> None:
        self._folder = folder
        self._per_shard = per_shard
        self._report = report
        self._shards: dict[tuple[str, str, str], list[str]] = {}
        self._open: dict[tuple[str, str, str], tuple[ShardWriter, set[str]]] = {}

    def add(
        self, source: str, stream: str, split: str, name: str, members: Mapping[str, bytes]
    ) -> None:
        """A record; its key is made from its name."""
        place = (source, stream, split)
        self._report.records[" ".join(place)] += 1
        if self._folder is None:
            return
        if place in self._open and len(self._open[place][1]) >= self._per_shard:
            self._open.pop(place)[0].__exit__(None, None, None)
        if place not in self._open:
            shards = self._shards.setdefault(place, [])
            shards.append(f"{source}-{split}-{len(shards):05d}.tar")
            self._open[place] = (ShardWriter(self._folder / shards[-1]).__enter__(), set())
        writer, keys = self._open[place]
        key = plain = record_key(name)
        while key in keys:  # a.jpg beside a.png
            key = f"{plain}-{len(keys)}"
        keys.add(key)
        writer.add(key, members)

    def close(self) -> list[SourceInfo]:
        """Completes the last shards. (When a command fails, its whole folder is removed.)"""
        for writer, _ in self._open.values():
            writer.__exit__(None, None, None)
        return [
            SourceInfo(
                source, stream, split, shards, self._report.records[f"{source} {stream} {split}"]
            )
            for (source, stream, split), shards in sorted(self._shards.items())
        ]


def record_key(name: str) -> str:
    """A tar key from a file name: ASCII, no dots, short; a changed name gets part of its hash."""
    name = name.encode("utf-8", "backslashreplace").decode()
    stem = name.rpartition(".")[0] or name
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_/") else "_" for c in stem)
    if plain == stem and len(plain) <= 80 and "//" not in "/" + plain:
        return plain
    plain = plain.replace("/", "_")
    return f"{plain[-60:]}-{key_of('record', name) % 2**64:016x}"


def refuse_existing(out: Path) -> None:
    """Raises ConfigError when there is something at `out` already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists already; remove it or choose another folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, else vanishes."""
    refuse_existing(out)
    temporary = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise SaveError(f"{temporary}: cannot be created ({error.strerror})") from None
    for old in out.parent.glob(f".{out.name}.part-*"):
        if old != temporary:
            print(f"{old}: of another prepare, or of one that was killed", file=sys.stderr)
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _stop) if main_thread else None
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> None:
    raise StopRequested("stopped; nothing was written, and the same command starts again")


def ordered_map(
    function: Callable[[T], R], values: Iterable[T], workers: int
) -> Iterator[tuple[T, R]]:
    """Results in the order of the values, computed by threads a little ahead of their use.

    Threads are enough: Pillow and hashlib release the interpreter lock where the time goes.
    """
    if workers <= 1:
        for value in values:
            yield value, function(value)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[T, Future[R]]] = deque()
        try:
            for value in values:
                waiting.append((value, pool.submit(function, value)))
                if len(waiting) >= 4 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class Progress:
    """A line on standard error every ten seconds."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._start = self._last = time.monotonic()
        self._done = 0

    def step(self, bad: int) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last >= 10:
            self._last = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            print(
                f"{self._done:,} of {self._total:,}, {rate:,.0f}/s, {left:,.0f} s left, {bad} bad",
                file=sys.stderr,
                flush=True,
            )


class Examined(NamedTuple):
    data: bytes
    suffix: str
    size: tuple[int, int]
    """Height and width in pixels, upright, before any shrinking."""
    print: Print


FORMATS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def image_suffix(data: bytes) -> str:
    """The suffix an image deserves by its first bytes; names lie (ImageNet has PNG as .JPEG)."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for start, suffix in FORMATS if data.startswith(start)), "jpg")


def examine(item: Item, max_size: int, looks: bool) -> Examined | Bad:
    """Opens one image, as training will, and makes it smaller when that is asked for."""
    try:
        data = item.place.read()
        pixels = decode_image(data)
    except (BadPlace, BadImage) as error:
        return Bad(item.where, item.name, error.reason, error.detail)
    suffix = image_suffix(data)
    print_ = fingerprint(data, pixels if looks else None)
    height, width = pixels.shape[:2]
    if 0 < max_size < min(height, width):
        data, suffix = _smaller(pixels, max_size, lossless=suffix in ("png", "gif", "bmp"))
    return Examined(data, suffix, (height, width), print_)


def _smaller(pixels: np.ndarray, side: int, *, lossless: bool) -> tuple[bytes, str]:
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    file = BytesIO()
    if lossless:
        picture.save(file, "PNG")
        return file.getvalue(), "png"
    picture.save(file, "JPEG", quality=90)
    return file.getvalue(), "jpg"


def build(plan: Plan, options: Options) -> Report:
    """Checks every image of the plan and, unless only checking, writes the dataset folder.

    Raises:
        DataBudgetError: more bad records than the budget, or none that is good.
        ConfigError: the folder to write is there already.
    """
    start = time.monotonic()
    account = Account(options, len(plan.items) + len(plan.bad))
    account.report.notes = plan.notes
    evaluation = EvalImages(options.eval_against)
    if evaluation.unreadable:
        plan.notes.append(f"{evaluation.unreadable:,} evaluation images cannot be read")
    if options.out is None:
        _records(plan, options, account, evaluation, None)
        account.report.seconds = time.monotonic() - start
    else:
        with new_folder(options.out) as folder:
            sources = _records(plan, options, account, evaluation, folder)
            account.report.seconds = time.monotonic() - start
            account.report.out = str(options.out)
            account.write(folder)
            facts = plan.facts | {"prepared": account.report.facts()}
            Dataset.write(folder, options.name, sources, facts)
    return account.report


def _records(
    plan: Plan, options: Options, account: Account, evaluation: EvalImages, folder: Path | None
) -> list[SourceInfo]:
    report = account.report
    for absent in plan.absent:
        account.absent(absent)
    for same in plan.held_out:
        report.seen += 1
        account.overlap(same, drop=True)
    for bad in plan.bad:
        account.skip(bad)
    sink = Sink(folder, options.per_shard, report)
    progress = Progress(len(plan.items))
    looks = evaluation.looks_count
    for item, found in ordered_map(
        lambda item: examine(item, options.max_size, looks),
        in_writing_order(plan.items, options.name),
        options.workers,
    ):
        progress.step(account.bad)
        if isinstance(found, Bad):
            account.skip(found)
            continue
        report.seen += 1
        split = item.split or split_by_content(found.print.digest, options.val_fraction)
        if split != "train":
            evaluation.add(found.print, Seen(split, f"{options.name} {split}: {item.name}"))
        elif match := evaluation.match(found.print):
            kind, seen = match
            same = Overlap(item.name, item.where, kind, seen.label)
            account.overlap(same, drop=options.drop_overlap)
            if options.drop_overlap:
                continue
        fields = {**item.fields, "image": item.name}
        if plan.stream == "pair":
            report.captions += len(item.fields["captions"])
        members = {
            found.suffix: found.data,
            "json": json.dumps(fields, ensure_ascii=False).encode("utf-8", errors="replace"),
        }
        sink.add(options.name, plan.stream, split, item.name, members)
    sources = sink.close()
    account.close()
    return sources


def in_writing_order(items: list[Item], name: str) -> Iterator[Item]:
    """Test, then val, then train; each in an order drawn by the dataset's name.

    Evaluation images come first so that training images can be compared with them. The order
    is drawn because class folders come sorted, and training shuffles within a few shards only.
    """
    rank = {"test": 0, "val": 1}
    drawn = Draws("prepare", name, len(items)).permutation(len(items))
    ranks = np.array([rank.get(item.split, 2) for item in items], dtype=np.int8)
    for index in drawn[np.argsort(ranks[drawn], kind="stable")]:
        yield items[int(index)]


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
