"""From a plan (which images, which captions) to a checked dataset folder.

Every image is opened before it is written, so what training will skip is known beforehand and
by name. The folder is built beside its place and renamed when it is complete: there is never
half a dataset.
"""

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.prepare.account import Account, Report
from vlbeit.data.prepare.blind import told
from vlbeit.data.prepare.class_maps import BadMap, read_class_map
from vlbeit.data.prepare.folder import Sink, new_folder
from vlbeit.data.prepare.locate import BadPlace
from vlbeit.data.prepare.overlap import EvalImages, Print, Seen, fingerprint
from vlbeit.data.prepare.plan import Item, Options, Overlap, Picture, Plan, split_by_content
from vlbeit.data.prepare.rows import Bad
from vlbeit.data.transforms import BadImage, decode_image
from vlbeit.draws import Draws

T = TypeVar("T")
R = TypeVar("R")


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
        _records(plan, options, account, evaluation, Sink(None, options.per_shard, account.report))
        account.report.seconds = time.monotonic() - start
    else:
        with new_folder(options.out) as (folder, stop):
            sink = Sink(folder, options.per_shard, account.report, stop)
            sources = _records(plan, options, account, evaluation, sink)
            account.report.seconds = time.monotonic() - start
            account.report.out = str(options.out)
            account.write(folder)
            facts = plan.facts | {"prepared": account.report.facts()}
            Dataset.write(folder, options.name, sources, facts)
    return account.report


def _records(
    plan: Plan, options: Options, account: Account, evaluation: EvalImages, sink: Sink
) -> list[SourceInfo]:
    report = account.report
    for absent in plan.absent:
        account.absent(absent)
    for same in plan.held_out:
        report.seen += 1
        account.overlap(same, drop=True)
    for bad in plan.bad:
        account.skip(bad)
    progress = Progress(len(plan.items))
    unserved: Counter[str] = Counter()
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
        # The least of several: two pictures go together, whichever is the left one.
        digest = min(print_.digest for print_ in found.prints)
        split = item.split or split_by_content(digest, options.val_fraction)
        matches = [m for m in map(evaluation.match, found.prints) if m and split == "train"]
        if split != "train":
            for print_ in found.prints:
                evaluation.add(print_, Seen(split, f"{options.name} {split}: {item.name}"))
        elif matches:
            kind, seen = matches[0]
            same = Overlap(item.name, item.where, kind, seen.label)
            account.overlap(same, drop=options.drop_overlap)
            if options.drop_overlap:
                continue
        fields = {**item.fields, "image": item.name}
        if plan.stream == "pair":
            report.captions += len(item.fields["captions"])
        said = json.dumps(fields, ensure_ascii=False).encode("utf-8", errors="replace")
        sink.add(options.name, plan.stream, split, item.name, found.members | {"json": said})
        if plan.summary is not None:
            plan.summary.add(split, fields, found.pixels)
        if SERVED_BY.get(plan.serves, "image") not in fields:
            unserved[split] += 1
    sources = sink.close()
    account.close()
    if plan.summary is not None:
        plan.facts |= plan.summary.facts()
        plan.notes += told(plan.facts)
    return sources + _serving(plan, sources, unserved)


SERVED_BY = {"retrieval": "captions", "classification": "label"}
"""The entry that every record of a source must have to serve a task."""


def _serving(plan: Plan, sources: list[SourceInfo], unserved: Counter[str]) -> list[SourceInfo]:
    """The same shards once more, as sources of the task that the plan serves. They have names
    of their own, because two sources of one name would both be renamed when they are read."""
    found: list[SourceInfo] = []
    for source in sources:
        if plan.serves and unserved[source.split]:
            plan.notes.append(
                f"no {plan.serves} source for {source.split}: {unserved[source.split]:,} records "
                f"have no {SERVED_BY[plan.serves]}"
            )
        elif plan.serves:
            name, stream = f"{source.name}-{plan.serves}", f"task:{plan.serves}"
            found.append(replace(source, name=name, stream=stream))
            plan.notes.append(
                f"{name} {stream} {source.split}: the same {source.records:,} records"
            )
    return found


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


class Examined(NamedTuple):
    members: dict[str, bytes]
    """Pictures and maps of the record by extension."""
    prints: tuple[Print, ...]
    """Of each picture."""
    pixels: np.ndarray | None
    """(256,) int64: how often each value of the class map occurs."""


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
    """Opens the pictures of a record, as training will, and makes them smaller when that is
    asked for."""
    members: dict[str, bytes] = {}
    prints: list[Print] = []
    counts = None
    for picture in item.pictures:
        try:
            data = picture.place.read()
            pixels = decode_image(data)
            prints.append(fingerprint(data, pixels if looks else None))
            suffix, stored, size, data = _stored(picture, data, pixels, max_size)
            members[f"{picture.member}.{suffix}".removeprefix(".")] = data
            if item.class_map is not None:
                members["seg.png"], counts = read_class_map(item.class_map, size, stored)
        except (BadPlace, BadImage, BadMap) as error:
            which = f"{picture.member}: " if picture.member else ""
            return Bad(item.where, item.name, error.reason, which + error.detail)
    return Examined(members, tuple(prints), counts)


def _stored(
    picture: Picture, data: bytes, pixels: np.ndarray, max_size: int
) -> tuple[str, tuple[int, int], tuple[int, int], bytes]:
    """Suffix, stored size, size in the file (height and width, upright) and bytes of a picture:
    as it is, or cut out, or smaller."""
    suffix = image_suffix(data)
    size = stored = (pixels.shape[0], pixels.shape[1])
    image = None
    if picture.box is not None:
        left, top, right, bottom = picture.box
        if not (0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]):
            detail = f"box {picture.box} does not lie in a picture of {size[1]} x {size[0]} pixels"
            raise BadImage("bad_box", detail)
        image = Image.fromarray(pixels[top:bottom, left:right])
        stored = (bottom - top, right - left)
    if 0 < max_size < min(stored):
        scale = max_size / min(stored)
        stored = (max(max_size, round(stored[0] * scale)), max(max_size, round(stored[1] * scale)))
        image = image or Image.fromarray(pixels)
        image = image.resize(stored[::-1], Image.Resampling.BICUBIC)
    if image is None:
        return suffix, stored, size, data
    file = BytesIO()
    if suffix in ("png", "gif", "bmp"):
        image.save(file, "PNG")
        return "png", stored, size, file.getvalue()
    image.save(file, "JPEG", quality=90)
    return "jpg", stored, size, file.getvalue()


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
