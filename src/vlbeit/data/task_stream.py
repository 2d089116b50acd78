"""Samples of a downstream task: a visit becomes pixels, words and targets, without torch's help.

A sample is a pure function of (seed, stream, source, epoch, index), as in pretraining; the index
counts a source's samples, which may be several a record (questions).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from vlbeit.config import FinetuneConfig
from vlbeit.data.collate import Stacked, pad_words, stack_filled
from vlbeit.data.dataset import Dataset, open_sources
from vlbeit.data.loader import StepLoader
from vlbeit.data.order import SourceOrder, Visit
from vlbeit.data.randaugment import rand_augment
from vlbeit.data.records import BadSample, Record, RecordSource
from vlbeit.data.streams import depth_draws, encode_text
from vlbeit.data.transforms import BadImage, BadText, augment, clean_text, decode_image, plain
from vlbeit.draws import Draws
from vlbeit.errors import DataBudgetError, InputError
from vlbeit.tokens.text import TextTokenizer
from vlbeit.types import TaskBatch

PROBED = 64
"""Samples of a source, spread over it, that may all be bad before it counts as unusable."""


ABOUT = ("json", "txt")
"""Members of a record that `TaskData.about` sees."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How a record's picture becomes pixels: augmented for training, else whole and squashed."""

    image_size: tuple[int, int]
    config: FinetuneConfig
    training: bool

    def pixels(self, data: bytes, draws: Draws) -> np.ndarray:
        """Encoded bytes to (3, height, width) uint8: crop, flip, jitter, RandAugment.

        Raises:
            BadImage: the picture cannot be decoded.
        """
        image = decode_image(data)
        if not self.training:
            return plain(image, self.image_size)
        given = self.config.input
        pixels = augment(image, draws, self.image_size, given.crop)
        return rand_augment(pixels, draws, given.rand_augment)


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a task makes of one visit.

    Shapes: pixels (I, 3, height, width) uint8 or None; targets without the batch dimension. Bytes
    of samples of different sizes are filled up with 255; all else has the same shape in every
    sample of the task.
    """

    pixels: np.ndarray | None = None
    text: str | None = None
    """As stored; the stream cleans it and turns it into tokens."""
    targets: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Items:
    """The samples of a source, in the order of its records.

    Shapes: all (samples,) int64. `record` is the record's index and must not fall, `number` says
    which of the record's samples it is, `length` is that of the text in characters (0: no text),
    by which a step is sorted before it is cut into micro-batches.
    """

    record: np.ndarray
    number: np.ndarray
    length: np.ndarray

    @staticmethod
    def one_each(source: RecordSource) -> "Items":
        """One sample a record, no text."""
        none = np.zeros(len(source), dtype=np.int64)
        return Items(np.arange(len(source), dtype=np.int64), none, none)

    @staticmethod
    def of_text(source: RecordSource, name: str) -> "Items":
        """One sample a record, whose text is the member `name` of its JSON object."""

        def length(index: int) -> int:
            try:
                return len(read_field(source.read(index, only=("json",)), name, str))
            except BadSample:
                return 0  # named and counted when the loader meets it

        return Items.of((index, 0, length(index)) for index in range(len(source)))

    @staticmethod
    def of(rows: Iterable[tuple[int, int, int]]) -> "Items":
        """From (record, number, length) rows."""
        table = np.array(list(rows), dtype=np.int64).reshape(-1, 3)
        return Items(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())


class TaskData(Protocol):
    """The data side of a task (tasks/__init__.py): plain Python, so a worker may hold it."""

    @property
    def stream(self) -> str:
        """ "task:NAME", as in dataset.json."""

    def items(self, source: RecordSource, training: bool) -> Items:
        """The samples of a source. A record that cannot be read is one sample (number 0): it is
        skipped by name when its turn comes."""

    def example(
        self, source: RecordSource, record: int, number: int, pictures: Pictures, draws: Draws
    ) -> Example:
        """One sample. All that is random comes from `draws`, and nothing is random unless
        `pictures.training`.

        Raises:
            BadSample, BadImage, BadText: it cannot be made.
        """

    def about(self, record: Record, number: int) -> dict[str, Any]:
        """What `figures` wants to know of a sample beside the prediction; JSON, no pixels. The
        record holds its ABOUT members only."""


@dataclass(frozen=True, kw_only=True)
class TaskSample:
    """One sample, ready to be stacked."""

    visit: Visit
    pixels: np.ndarray | None
    words: np.ndarray | None
    targets: dict[str, np.ndarray]
    depth_draws: np.ndarray | None


class TaskStream:
    """The stream of a task over some sources."""

    def __init__(
        self,
        task: TaskData,
        sources: Sequence[RecordSource],
        tokenizer: TextTokenizer,
        config: FinetuneConfig,
        *,
        training: bool,
        passes: int = 1,
    ) -> None:
        """
        Args:
            passes: forward passes of a sample, for the draws of stochastic depth.

        Raises:
            InputError: a source has no sample.
        """
        self._task = task
        self._sources = {source.name: source for source in sources}
        self._tokenizer = tokenizer
        self._seed = config.seed
        self._text_length = config.input.text_length
        self._pictures = Pictures(
            image_size=config.model.image_size, config=config, training=training
        )
        drops = training and config.model.drop_path > 0
        self._depth_shape = (passes, 2 * config.model.layers) if drops else None
        self._items = {source.name: task.items(source, training) for source in sources}
        for name, items in self._items.items():
            if len(items.record) == 0:
                raise InputError(
                    f"source {name}: none of its {len(self._sources[name])} records holds a sample "
                    f"of {task.stream}; prepare it anew or leave it out of --data"
                )

    @property
    def stream(self) -> str:
        return self._task.stream

    @property
    def records(self) -> dict[str, int]:
        """Samples of each source."""
        return {name: len(items.record) for name, items in self._items.items()}

    def place(self, visit: Visit) -> tuple[RecordSource, int, int]:
        """Source, record and number of a visit's sample."""
        items = self._items[visit.source]
        return (
            self._sources[visit.source],
            int(items.record[visit.index]),
            int(items.number[visit.index]),
        )

    def sample(self, visit: Visit) -> TaskSample:
        source, record, number = self.place(visit)
        words = None
        try:
            draws = Draws(self._seed, "crop", self.stream, *visit)
            example = self._task.example(source, record, number, self._pictures, draws)
            if example.text is not None:
                words = encode_text(self._tokenizer, clean_text(example.text), self._text_length)
        except (BadImage, BadText) as bad:
            found = source.read(record)
            member = found.key if number == 0 else f"{found.key} (sample {number + 1})"
            raise BadSample(found.shard, member, bad.reason, bad.detail) from None
        return TaskSample(
            visit=visit,
            pixels=example.pixels,
            words=words,
            targets=example.targets,
            depth_draws=depth_draws(self._seed, self.stream, visit, self._depth_shape),
        )

    def about(self, visit: Visit) -> dict[str, Any]:
        """What is known of a sample beside what the model sees."""
        source, record, number = self.place(visit)
        found = source.read(record, only=ABOUT)  # the pictures were read when it was predicted
        return {"record": f"{source.name}:{record}", **self._task.about(found, number)}

    def stack(self, samples: Sequence[TaskSample]) -> Stacked:
        arrays: dict[str, np.ndarray] = {}
        for name in ("pixels", "depth_draws"):
            rows = [getattr(sample, name) for sample in samples]
            if rows[0] is not None:
                arrays[name] = stack_filled(rows)
        words = [sample.words for sample in samples if sample.words is not None]
        if words:
            arrays["words"], arrays["word_valid"] = pad_words(words, self._text_length)
        for name in samples[0].targets:
            arrays[f"targets.{name}"] = stack_filled([s.targets[name] for s in samples])
        return {
            "stream": self.stream,
            "sample_ids": tuple(sample.visit.sample_id for sample in samples),
            "arrays": arrays,
        }

    def batch(self, stacked: Stacked) -> TaskBatch:
        tensors = {name: torch.from_numpy(array) for name, array in stacked["arrays"].items()}
        targets = {
            name.removeprefix("targets."): tensors.pop(name)
            for name in list(tensors)
            if name.startswith("targets.")
        }
        return TaskBatch(
            stream=self.stream, sample_ids=stacked["sample_ids"], targets=targets, **tensors
        )

    def lengths(self, visits: Sequence[Visit]) -> np.ndarray | None:
        if self._text_length == 0:
            return None
        return np.array([self._items[v.source].length[v.index] for v in visits], dtype=np.int64)

    def orders(self, window: int, bucket: int) -> list[SourceOrder]:
        """Not by length, other than captions: questions of like length ask for like things, and a
        step of one kind of question teaches badly. `lengths` sorts within the step.

        `window` counts records: a window of as many questions would be one shard of a thousand
        scenes, and the steps would go through the shards one by one, whatever each holds.
        """
        made = []
        for name, source in self._sources.items():
            record = self._items[name].record
            shard = np.searchsorted(np.cumsum(source.sizes), record, side="right")
            sizes = np.bincount(shard, minlength=len(source.sizes))
            samples = max(window, window * len(record) // len(source))
            made.append(SourceOrder(name, sizes[sizes > 0], self._seed, samples))
        return made

    def check(self) -> None:
        """Make samples of every source until one is usable.

        Raises:
            DataBudgetError: 64 samples spread over a source (all, if there are fewer) are bad;
                names the source, the first reason and what to do.
        """
        for name, count in self.records.items():
            tried = min(PROBED, count)
            first: BadSample | None = None
            for place in range(tried):
                try:
                    self.sample(Visit(name, 0, place * count // tried))
                    break
                except BadSample as bad:
                    first = first or bad
            else:
                raise DataBudgetError(
                    f"no usable sample in source {name} of {self.stream}: all of {tried} tried are "
                    f"bad, the first: {first}; check it with `vlbeit verify`"
                )


def read_object(record: Record) -> dict[str, Any]:
    """The record's JSON object.

    Raises:
        BadSample: no_json, bad_json.
    """
    if "json" not in record.members:
        found = ", ".join(record.members) or "nothing"
        raise BadSample(record.shard, record.key, "no_json", f"it has {found}")
    try:
        value = json.loads(record.members["json"])
    except (ValueError, RecursionError) as error:
        raise BadSample(record.shard, f"{record.key}.json", "bad_json", str(error)[:200]) from None
    if not isinstance(value, dict):
        detail = f"expected an object, found {type(value).__name__}"
        raise BadSample(record.shard, f"{record.key}.json", "bad_json", detail)
    return value


def read_field(record: Record, name: str, kind: type | tuple[type, ...]) -> Any:
    """One member of the record's JSON object.

    Raises:
        BadSample: bad_json, with the name, what was expected and what was found.
    """
    value = read_object(record).get(name)
    if not isinstance(value, kind) or isinstance(value, bool) and kind is int:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        detail = f'"{name}": expected {wanted}, found {value!r}'[:200]
        raise BadSample(record.shard, f"{record.key}.json", "bad_json", detail)
    return value


def open_task(data: Sequence[str], stream: str, split: str) -> list[RecordSource]:
    """The sources of a task in some prepared folders.

    Raises:
        InputError: a folder is not prepared, or none has such a source; names what they have.
    """
    sources = open_sources(data, stream, split)
    if not sources:
        found = sorted(
            {f"{s.stream} ({s.split})" for folder in data for s in Dataset.open(folder).sources}
        )
        raise InputError(
            f"no {stream} source of the {split} split in {', '.join(data) or 'no data folder'}; "
            f"there is {', '.join(found) or 'nothing'}. Prepare one with `vlbeit prepare`, or name "
            "another folder or split"
        )
    return sources


def facts_of(data: Sequence[str], name: str) -> list[str]:
    """A list of names that dataset.json holds under `facts`, such as "classes" or "answers".

    Of several folders the first one's list, then what the others add. Empty where there is none.

    Raises:
        InputError: the fact is no list of distinct strings.
    """
    merged: dict[str, None] = {}
    for folder in data:
        dataset = Dataset.open(folder)
        found = dataset.facts.get(name, [])
        strings = isinstance(found, list) and all(isinstance(item, str) for item in found)
        if not strings or len(set(found)) != len(found):
            raise InputError(
                f"{dataset.folder / 'dataset.json'}: facts.{name} must be a list of distinct "
                f"strings, found {str(found)[:80]}; prepare the folder again"
            )
        merged |= dict.fromkeys(found)
    return list(merged)


def task_loader(
    config: FinetuneConfig,
    stream: TaskStream,
    *,
    rank: int = 0,
    world: int = 1,
    aligned: bool = False,
) -> StepLoader[TaskBatch]:
    """The loader of one rank; `aligned` as in `StepLoader`."""
    given = config.input
    return StepLoader(
        [stream],
        {stream.stream: config.batch.size},
        micro=config.batch.micro,
        window=given.shuffle_window,
        weights=given.weights,
        rank=rank,
        world=world,
        parts=config.runtime.exact,
        aligned=aligned,
        workers=given.workers,
        timeout=given.loader_timeout,
    )
