"""From cursors to the micro-batches of a step.

The visits of a global step follow from the cursors alone. Each rank takes its slice of them, cuts
it into micro-batches and makes these in the background: in a thread, one step ahead, or in
`workers` processes. What comes out does not depend on which.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from vlbeit.config import PretrainConfig
from vlbeit.data.collate import Sample, Stacked
from vlbeit.data.dataset import open_sources
from vlbeit.data.order import StreamOrder, Visit, source_weights
from vlbeit.data.records import BadSample, RecordSource
from vlbeit.data.remote import cache_folder
from vlbeit.data.stored_codes import SourceCodes
from vlbeit.data.streams import ImageStream, PairStream, PictureSettings, SampleStream, TextStream
from vlbeit.data.textpack import pack_text
from vlbeit.data.workers import Background, ProcessBackground, ThreadBackground
from vlbeit.errors import ConfigError, DataBudgetError, InputError
from vlbeit.tokens.text import TextTokenizer
from vlbeit.types import Batch, Stream

B = TypeVar("B")

Cursors = dict[str, dict[str, int]]
"""Visits had, by stream and source: all the state of the data order. Plain JSON."""

BUCKET = 64
"""Most pairs of like caption length that stay together in the order. A number of its own and not
`batch.micro`, which a resume may change: the order of a run must not move with it."""
BUCKETS_A_STEP = 16
"""Least number of such groups in a step. Captions of one length are captions of one kind: when
64 pairs of `tiny` were one group, its steps pulled to and fro and it learned at about half the
speed (docs/notebook.md)."""

JUDGED_FROM = 200
"""Visits of a source before its share of bad samples is judged."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What a step visits: a pure function of the cursors, the rank and the world size."""

    step: int
    micro_batches: list[tuple[int, str, list[Visit]]]
    """Those of this rank, in the order of training: the part of the step, the stream, the visits.
    Without visits: other ranks have a micro-batch in this place (`aligned`)."""
    ledger: dict[str, dict[str, list[str]]]
    """Sample ids of the GLOBAL step by stream and source, in order; the same on every rank."""
    visits: dict[str, dict[str, int]]
    """How many of them, by stream and source."""
    cursors: Cursors
    """The cursors after the step."""


@dataclass(frozen=True, kw_only=True)
class StepData(Generic[B]):
    """A step's input for this rank."""

    step: int
    batches: dict[str, list[B]]
    """Micro-batches by stream. Bad samples are missing from them, and a micro-batch without a
    good one is left out: the lists of two ranks may differ in length, or be empty."""
    parts: dict[int, list[B | None]]
    """The same by part of the step, in the order of training, with None for those left out."""
    ledger: dict[str, dict[str, list[str]]]
    visits: dict[str, dict[str, int]]
    skips: list[dict[str, Any]]
    """Samples that THIS rank could not make: step, stream, source, sample_id, shard, member,
    reason, detail (rows of skips.jsonl)."""
    cursors: Cursors
    """The cursors after the step: what its checkpoint holds."""
    waited: float
    """Seconds the caller waited for it."""


class StepLoader(Generic[B]):
    """The input of every step for one rank.

    >>> with build_loader(config, sources, tokenizer, rank=0, world=1) as loader:
    ...     for data in loader.steps(cursors, first=step + 1, last=config.max_steps):
    ...         train(data.batches)

    Not for two threads at once: with `workers=0` a background thread reads the sources while
    `steps` is running.
    """

    def __init__(
        self,
        streams: Sequence[SampleStream[Any, B]],
        counts: Mapping[str, int],
        *,
        micro: int,
        window: int,
        weights: Mapping[str, float] | None = None,
        rank: int = 0,
        world: int = 1,
        parts: int = 0,
        aligned: bool = False,
        workers: int = 0,
        timeout: float = 60.0,
    ) -> None:
        """
        Args:
            streams: one for each stream whose count is not 0.
            counts: samples of each stream in a step, over all ranks; a step's micro-batches come
                in this order of streams.
            micro: most samples of a micro-batch.
            window: records shuffled together.
            weights: share of a source in its stream, by name (order.source_weights).
            rank, world: which slice to make.
            parts: into how many parts a step is cut before the ranks share them, a multiple of
                `world`; 0: one a rank. Micro-batches are cut within a part, so with the same parts
                they are the same on any number of ranks.
            aligned: give every rank equally many micro-batches of each stream, the last of them
                perhaps without visits: for models whose ranks must call each other in step.
            workers: processes; 0 makes the samples in a thread of this one.
            timeout: seconds without a batch before a loader counts as lost.

        Raises:
            ConfigError: a weight names no source, or numbers are out of range.
            InputError: a stream has no source, or a source no record.
        """
        if micro < 1 or world < 1 or not 0 <= rank < world or workers < 0 or not timeout > 0:
            raise ConfigError(
                f"batch.micro {micro}, rank {rank} of {world}, input.workers {workers}, "
                f"input.loader_timeout {timeout}: out of range"
            )
        self.parts = parts or world
        if self.parts % world:
            raise ConfigError(f"{world} processes cannot share {parts} parts of a step evenly")
        share = self.parts // world
        self.own_parts = range(rank * share, (rank + 1) * share)
        self._streams = {stream.stream: stream for stream in streams}
        self._counts = dict(counts)
        known = {source for stream in streams for source in stream.records}
        for name in weights or {}:
            if name not in known:
                raise ConfigError(
                    f"input.weights names the source {name!r}; the data has "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        self._orders: dict[str, StreamOrder] = {}
        for name, count in self._counts.items():
            if count == 0:
                continue
            stream = self._streams.get(name)
            if stream is None or not stream.records:
                raise InputError(no_source(name, count))
            orders = stream.orders(window, min(BUCKET, max(1, count // BUCKETS_A_STEP)))
            shares = source_weights(stream.records, weights or {})
            self._orders[name] = StreamOrder(orders, shares)
        self._micro, self.aligned = micro, aligned
        self._workers, self._timeout = workers, timeout
        self._background: Background[_Part] | None = None
        self._stopping = False

    def start_cursors(self) -> Cursors:
        """The cursors of a new run."""
        return {name: order.start() for name, order in self._orders.items()}

    def plan(self, step: int, cursors: Mapping[str, Mapping[str, int]]) -> StepPlan:
        """What the step that begins at `cursors` visits."""
        if set(cursors) != set(self._orders):
            raise InputError(
                f"the checkpoint's streams are {', '.join(cursors) or 'none'}, this run's are "
                f"{', '.join(self._orders)}; resume with the same batch counts"
            )
        ledger: dict[str, dict[str, list[str]]] = {}
        counted: dict[str, dict[str, int]] = {}
        after: Cursors = {}
        sorted_visits: dict[str, list[Visit]] = {}
        for name, order in self._orders.items():
            visits, after[name] = order.take(cursors[name], self._counts[name])
            ledger[name] = {source: [] for source in order.orders}
            for visit in visits:
                ledger[name][visit.source].append(visit.sample_id)
            counted[name] = {source: len(ids) for source, ids in ledger[name].items()}
            lengths = self._streams[name].lengths(visits)
            if lengths is not None:
                visits = [visits[i] for i in lengths.argsort(kind="stable").tolist()]
            sorted_visits[name] = visits
        micro_batches = [
            (part, name, micro)
            for part in self.own_parts
            for name, visits in sorted_visits.items()
            for micro in self._cut(visits, part)
        ]
        return StepPlan(
            step=step, micro_batches=micro_batches, ledger=ledger, visits=counted, cursors=after
        )

    def _cut(self, visits: list[Visit], part: int) -> list[list[Visit]]:
        """The micro-batches of one part of a stream's visits."""
        start, stop = (len(visits) * edge // self.parts for edge in (part, part + 1))
        cut = [
            visits[first : min(first + self._micro, stop)]
            for first in range(start, stop, self._micro)
        ]
        if self.aligned:
            largest = -(-len(visits) // self.parts)
            cut += [[]] * (-(-largest // self._micro) - len(cut))
        return cut

    def steps(
        self, cursors: Mapping[str, Mapping[str, int]], first: int, last: int
    ) -> Iterator[StepData[B]]:
        """The input of the steps first..last; `cursors` are those before step `first`.

        Raises:
            LostWorkerError: a loader died or stopped answering.
        """
        self.close()
        workers = max(self._workers, 1)
        produce = functools.partial(
            self._parts, {k: dict(v) for k, v in cursors.items()}, first, last, workers
        )
        self._stopping = False
        background: Background[_Part]
        if self._workers == 0:
            background = ThreadBackground(produce, self._timeout)
        else:
            background = ProcessBackground(produce, workers, self._timeout)
        self._background = background
        try:
            tasks = 0
            started = time.perf_counter()
            for parts in background.rounds():
                plan = parts[0].plan
                assert plan is not None
                queues = [iter(part.made) for part in parts]
                batches: dict[str, list[B]] = {name: [] for name in self._orders}
                made_parts: dict[int, list[B | None]] = {part: [] for part in self.own_parts}
                skips: list[dict[str, Any]] = []
                for number, name, _ in plan.micro_batches:
                    made = next(queues[tasks % workers])
                    tasks += 1
                    batch = None
                    if made.stacked is not None:
                        batch = self._streams[name].batch(made.stacked)
                        batches[name].append(batch)
                    made_parts[number].append(batch)
                    skips += [{"step": plan.step, **skip} for skip in made.skips]
                yield StepData(
                    step=plan.step,
                    batches=batches,
                    parts=made_parts,
                    ledger=plan.ledger,
                    visits=plan.visits,
                    skips=skips,
                    cursors=plan.cursors,
                    waited=time.perf_counter() - started,
                )
                started = time.perf_counter()
        finally:
            if self._background is background:
                self.close()

    def _parts(
        self, cursors: Cursors, first: int, last: int, workers: int, number: int
    ) -> "Iterator[_Part]":
        """What worker `number` makes: of all micro-batches, counted through, every n-th."""
        tasks = 0
        for step in range(first, last + 1):
            plan = self.plan(step, cursors)
            cursors = plan.cursors
            mine = [
                task
                for place, task in enumerate(plan.micro_batches, tasks)
                if place % workers == number
            ]
            tasks += len(plan.micro_batches)
            yield _Part(plan if number == 0 else None, [self._make(*task[1:]) for task in mine])

    def _make(self, name: str, visits: Sequence[Visit]) -> "_Made":
        samples, skips = [], []
        for visit in visits:
            if self._stopping:
                break  # nobody will ask for it
            try:
                samples.append(self._streams[name].sample(visit))
            except BadSample as bad:
                skips.append(
                    {
                        "stream": name,
                        "source": visit.source,
                        "sample_id": visit.sample_id,
                        "shard": bad.shard,
                        "member": bad.member,
                        "reason": bad.reason,
                        "detail": bad.detail,
                    }
                )
        return _Made(self._streams[name].stack(samples) if samples else None, skips)

    def close(self) -> None:
        """End the background thread or the worker processes."""
        self._stopping = True
        if self._background is not None:
            self._background.close()
            self._background = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Made(NamedTuple):
    """A micro-batch as a worker hands it over."""

    stacked: Stacked | None
    """None: every sample was bad."""
    skips: list[dict[str, Any]]


class _Part(NamedTuple):
    """One worker's part of a step."""

    plan: StepPlan | None
    """From the first worker only: the plans of all are the same."""
    made: list[_Made]


class SkipBudget:
    """Counts visits and bad samples of every source over the whole run.

    The counts are part of the checkpoint's state, so a resumed run counts nothing twice. Every
    rank must be given the same global rows; then all ranks stop in the same step.
    """

    def __init__(self, limit: float, state: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            limit: `input.skip_budget`.
            state: what `state()` gave.
        """
        self._limit = limit
        self._visits: dict[str, int] = dict((state or {}).get("visits", {}))
        self._reasons: dict[str, dict[str, int]] = {
            key: dict(reasons) for key, reasons in (state or {}).get("reasons", {}).items()
        }

    def add(
        self,
        visits: Mapping[str, Mapping[str, int]],
        skips: Sequence[Mapping[str, Any]],
    ) -> None:
        """Count a step: `StepData.visits`, and the skips of ALL ranks."""
        for stream, sources in visits.items():
            for source, count in sources.items():
                key = f"{stream}/{source}"
                self._visits[key] = self._visits.get(key, 0) + count
        for skip in skips:
            reasons = self._reasons.setdefault(f"{skip['stream']}/{skip['source']}", {})
            reasons[skip["reason"]] = reasons.get(skip["reason"], 0) + 1

    @property
    def skipped(self) -> int:
        """Bad samples so far."""
        return sum(sum(reasons.values()) for reasons in self._reasons.values())

    def check(self) -> None:
        """Stop a run whose data is worse than allowed.

        After 200 visits of a source its bad samples must not exceed the budget by more than
        three standard errors, so that a cluster of them in a good source does not stop a run. A
        budget of 0 stops at the first.

        Raises:
            DataBudgetError: names source, share, budget and the most frequent reasons.
        """
        for key, reasons in self._reasons.items():
            seen, bad = self._visits.get(key, 0), sum(reasons.values())
            allowed = self._limit * seen
            judged = seen >= JUDGED_FROM or self._limit == 0
            if judged and bad > allowed + 3 * allowed**0.5:
                raise DataBudgetError(
                    f"source {key}: {bad} of {seen} samples were bad ({_most_frequent(reasons)}), "
                    f"a share of {bad / seen:.2%}; input.skip_budget allows {self._limit:.2%}. "
                    "skips.jsonl names each; raise the budget to go on, or repair the source and "
                    "begin anew with another run_dir"
                )

    def state(self) -> dict[str, Any]:
        """For the checkpoint; plain JSON."""
        return {
            "visits": dict(self._visits),
            "reasons": {key: dict(reasons) for key, reasons in self._reasons.items()},
        }


def _most_frequent(reasons: Mapping[str, int]) -> str:
    top = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:5]
    return ", ".join(f"{count} x {reason}" for reason, count in top)


PretrainingStream = SampleStream[Sample, Batch]
"""One of the three masked streams."""


def stream_counts(config: PretrainConfig) -> dict[Stream, int]:
    """Samples of each stream in a step, over all ranks."""
    batch = config.batch
    return {"image": batch.images, "text": batch.texts, "pair": batch.pairs}


def open_streams(config: PretrainConfig, split: str) -> dict[Stream, list[RecordSource]]:
    """The sources of every stream that the batch asks for.

    Raises:
        InputError: a data folder is not prepared, or a shard is missing.
    """
    return {
        stream: open_sources(
            config.data, stream, split, images_from_pairs=config.input.images_from_pairs
        )
        for stream, count in stream_counts(config).items()
        if count > 0
    }


def build_streams(
    config: PretrainConfig,
    sources: Mapping[Stream, Sequence[RecordSource]],
    tokenizer: TextTokenizer,
    *,
    cache: Path | None = None,
    codes: Mapping[str, Mapping[str, SourceCodes]] = MappingProxyType({}),
    log: Callable[[str], None] = lambda message: None,
) -> list[PretrainingStream]:
    """The streams of a run, those with a batch count of 0 left out.

    Args:
        sources: of each stream (`dataset.open_sources`).
        cache: where packed text is kept; None: `remote.cache_folder()`.
        codes: stored codes by stream and source; a stream left out has none.
        log: is told when text is packed, which takes a while for a large corpus.

    Raises:
        DataBudgetError, InputError, SaveError: see `pack_text`.
    """
    model, given, masking = config.model, config.input, config.masking
    seed = config.seed
    streams: list[PretrainingStream] = []

    def depth(views: int) -> tuple[int, int] | None:
        return (views, 2 * model.layers) if model.drop_path > 0 else None

    if config.batch.images > 0:
        pictures = PictureSettings(
            image_size=model.image_size, patch=model.patch, crop=given.images, masking=masking
        )
        streams.append(
            ImageStream(
                sources.get("image", ()),
                seed=seed,
                pictures=pictures,
                depth_shape=depth(1),
                codes=codes.get("image", {}),
            )
        )
    if config.batch.texts > 0:
        packed = [
            pack_text(
                source,
                tokenizer,
                cache or cache_folder(),
                skip_budget=given.skip_budget,
                log=log,
            )
            for source in sources.get("text", ())
        ]
        streams.append(
            TextStream(
                packed,
                tokenizer,
                seed=seed,
                text_length=given.text_length,
                masking=masking,
                depth_shape=depth(1),
            )
        )
    if config.batch.pairs > 0:
        pictures = PictureSettings(
            image_size=model.image_size, patch=model.patch, crop=given.pairs, masking=masking
        )
        streams.append(
            PairStream(
                sources.get("pair", ()),
                tokenizer,
                seed=seed,
                pictures=pictures,
                text_length=given.pair_text_length,
                depth_shape=depth(2 if config.objective.mvlm == "two_views" else 1),
                codes=codes.get("pair", {}),
            )
        )
    return streams


def no_source(stream: str, count: int) -> str:
    """What to say when a step wants `count` samples of a stream that nothing feeds."""
    return (
        f"the batch asks for {count} of the {stream} stream, but no source in --data feeds it; "
        f"prepare one, or set batch.{stream}s to 0"
    )


def check_fed(config: PretrainConfig, sources: Mapping[Stream, Sequence[RecordSource]]) -> None:
    """Refuse a step that no data feeds; asked before the tokenizers, which may take hours.

    Raises:
        InputError: a stream whose count is not 0 has no source.
    """
    for stream, count in stream_counts(config).items():
        if count and not sources.get(stream):
            raise InputError(no_source(stream, count))


def build_loader(
    config: PretrainConfig, streams: Sequence[PretrainingStream], *, rank: int = 0, world: int = 1
) -> StepLoader[Batch]:
    """The loader of one rank."""
    batch, given = config.batch, config.input
    return StepLoader(
        streams,
        {str(name): count for name, count in stream_counts(config).items()},
        micro=batch.micro,
        window=given.shuffle_window,
        weights=given.weights,
        rank=rank,
        world=world,
        parts=config.runtime.exact,
        aligned=config.runtime.sharding == "full",
        workers=given.workers,
        timeout=given.loader_timeout,
    )
