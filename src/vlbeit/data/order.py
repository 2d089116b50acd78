"""Which record is visited when: a pure function of (seed, source, cursor).

A cursor counts the visits a source has had. Nothing else is state: ranks and workers only take
slices of the global order, so a run resumes at any step with another number of either.
Shuffling has two levels, shards and then a window of neighbouring records, so that a remote shard
is read in one go and ten million records cost no more memory than one window.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, InputError

Lengths = Callable[[int, np.ndarray], np.ndarray]
"""(epoch, (n,) record indices) -> (n,) lengths of what a visit of that epoch shows."""

_KEPT = 3
"""Windows and epochs kept: one in use, one read ahead, one of the step before."""


class Visit(NamedTuple):
    """One use of one record: the key of all its random draws."""

    source: str
    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a visit for

    @property
    def sample_id(self) -> str:
        """How the ledger and the skip list name it."""
        return f"{self.source}:{self.epoch}:{self.index}"


class SourceOrder:
    """The endless sequence of visits of one source; every epoch has each record once.

    Args:
        name: of the source; part of the key.
        sizes: records of each shard.
        seed: of the run.
        window: records shuffled together, after the shards were put in random order.
        lengths, bucket: with both given, the records of a window are sorted by length, cut into
            groups of `bucket` visits and the groups shuffled, so that neighbours in the order
            have like lengths and are padded little.

    Raises:
        InputError: the source has no record.
    """

    def __init__(
        self,
        name: str,
        sizes: Sequence[int] | np.ndarray,
        seed: int,
        window: int,
        *,
        lengths: Lengths | None = None,
        bucket: int = 0,
    ) -> None:
        self.name = name
        self._seed = seed
        if window < 1:
            raise ConfigError(f"input.shuffle_window is {window}; at least 1 record is needed")
        self._window = window
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._records = int(self._sizes.sum())
        if self._records == 0:
            raise InputError(
                f"source {name} holds no record in its {len(self._sizes)} shards; prepare it anew "
                "or leave it out of --data"
            )
        self._lengths = lengths if bucket > 1 else None
        self._bucket = bucket
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Records, which is visits of one epoch."""
        return self._records

    def ids(self, start: int, count: int) -> np.ndarray:
        """(count,) int64 record indices of the visits start, start + 1, ...

        The epoch of visit v is v // len(self).
        """
        parts: list[np.ndarray] = []
        position, end = start, start + count
        while position < end:
            epoch, place = divmod(position, self._records)
            number, offset = divmod(place, self._window)
            part = self._window_ids(epoch, number)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def visits(self, start: int, count: int) -> list[Visit]:
        """The visits start, start + 1, ... with their epochs."""
        found = self.ids(start, count).tolist()
        first = self._records
        return [Visit(self.name, (start + i) // first, index) for i, index in enumerate(found)]

    def _window_ids(self, epoch: int, number: int) -> np.ndarray:
        key = (epoch, number)
        if key not in self._windows:
            _forget_oldest(self._windows)
            self._windows[key] = self._shuffled_window(epoch, number)
        return self._windows[key]

    def _shuffled_window(self, epoch: int, number: int) -> np.ndarray:
        if epoch not in self._shards:
            _forget_oldest(self._shards)
            order = Draws(self._seed, "shards", self.name, epoch).permutation(len(self._sizes))
            self._shards[epoch] = (order, np.cumsum(self._sizes[order]))
        order, ends = self._shards[epoch]
        first = number * self._window
        place = np.arange(first, min(first + self._window, self._records))
        slot = np.searchsorted(ends, place, side="right")
        shard = order[slot]
        records: np.ndarray = self._starts[shard] + place - (ends[slot] - self._sizes[shard])
        draws = Draws(self._seed, "window", self.name, epoch, number)
        records = records[draws.permutation(len(records))]
        if self._lengths is None:
            return records
        by_length = records[np.argsort(self._lengths(epoch, records), kind="stable")]
        groups = [by_length[i : i + self._bucket] for i in range(0, len(records), self._bucket)]
        return np.concatenate([groups[g] for g in draws.permutation(len(groups))])


def _forget_oldest(kept: dict) -> None:  # type: ignore[type-arg]
    while len(kept) >= _KEPT:
        del kept[next(iter(kept))]


class StreamOrder:
    """Several weighted sources merged into one sequence, from their cursors alone.

    Stride scheduling: the next visit goes to the source that is furthest behind its weight, the
    one with the smallest (cursor + 1) / weight; of equals, to the first named. Shares hold at
    every moment to within one visit a source, and the sequence does not depend on how it is cut
    into steps.

    Args:
        orders: one per source, with distinct names.
        weights: a positive number for every source; only their proportions count.
    """

    def __init__(self, orders: Sequence[SourceOrder], weights: Mapping[str, float]) -> None:
        self._orders = {order.name: order for order in orders}
        if len(self._orders) != len(orders):
            raise InputError(f"two sources share a name: {', '.join(o.name for o in orders)}")
        self._weights = {name: float(weights[name]) for name in self._orders}
        for name, weight in self._weights.items():
            if not weight > 0:
                raise ConfigError(f"weight of source {name} is {weight}; it must be positive")

    @property
    def orders(self) -> Mapping[str, SourceOrder]:
        """The sources by name."""
        return self._orders

    def start(self) -> dict[str, int]:
        """The cursors of a new run."""
        return dict.fromkeys(self._orders, 0)

    def take(self, cursors: Mapping[str, int], count: int) -> tuple[list[Visit], dict[str, int]]:
        """The next `count` visits, and the cursors after them.

        Raises:
            InputError: `cursors` are those of other sources.
        """
        if set(cursors) != set(self._orders):
            raise InputError(
                f"the checkpoint's sources are {', '.join(sorted(cursors)) or 'none'}, the data "
                f"has {', '.join(sorted(self._orders))}; resume with the same --data"
            )
        names = list(self._orders)
        weights = [self._weights[name] for name in names]
        after = [cursors[name] for name in names]
        heap = [((c + 1) / w, i) for i, (c, w) in enumerate(zip(after, weights, strict=True))]
        heapq.heapify(heap)
        turns: list[int] = []
        for _ in range(count):
            source = heap[0][1]
            turns.append(source)
            after[source] += 1
            heapq.heapreplace(heap, ((after[source] + 1) / weights[source], source))
        queues = [
            iter(self._orders[name].visits(cursors[name], stop - cursors[name]))
            for name, stop in zip(names, after, strict=True)
        ]
        return [next(queues[source]) for source in turns], dict(zip(names, after, strict=True))


def source_weights(records: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, float]:
    """Weights of a stream's sources: named ones get their share, the others split the rest.

    Args:
        records: records of each source of the stream.
        shares: share of the stream by source name (`input.weights`); names of other streams'
            sources are ignored here. Where every source is named, only proportions count.

    Raises:
        ConfigError: the named shares leave nothing for a source that is not named.
    """
    named = {name: shares[name] for name in records if name in shares}
    others = {name: count for name, count in records.items() if name not in named}
    if not others:
        return dict(named)
    rest = 1.0 - sum(named.values())
    if rest <= 0:
        raise ConfigError(
            f"input.weights gives {sum(named.values()):g} of the stream to {', '.join(named)}, "
            f"which leaves nothing for {', '.join(others)}; lower the shares to a sum "
            "below 1, or name all sources"
        )
    total = sum(others.values())
    return {
        name: named[name] if name in named else rest * count / total
        for name, count in records.items()
    }
