"""The order is a pure function of seed and cursors, and every epoch is complete."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlbeit.data.order import SourceOrder, StreamOrder, source_weights
from vlbeit.errors import ConfigError, InputError

sizes_of_shards = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)


def caption_lengths(epoch: int, records: np.ndarray) -> np.ndarray:
    return (records * 7919 + epoch * 31) % 97


@given(
    sizes_of_shards, st.integers(1, 100), st.integers(0, 9), st.integers(0, 3), st.integers(0, 8)
)
@settings(deadline=None)
def test_an_epoch_visits_every_record_exactly_once(
    sizes: list[int], window: int, seed: int, epoch: int, bucket: int
) -> None:
    order = SourceOrder("s", sizes, seed, window, lengths=caption_lengths, bucket=bucket)
    assert sorted(order.ids(epoch * len(order), len(order))) == list(range(sum(sizes)))


@given(sizes_of_shards, st.integers(1, 100), st.lists(st.integers(0, 50), max_size=8))
@settings(deadline=None)
def test_the_order_does_not_depend_on_how_it_is_read(
    sizes: list[int], window: int, reads: list[int]
) -> None:
    whole = SourceOrder("s", sizes, 1, window).ids(5, sum(reads))
    order, position, parts = SourceOrder("s", sizes, 1, window), 5, [np.empty(0, dtype=np.int64)]
    for count in reads:
        parts.append(order.ids(position, count))
        order.ids(position * 3, 7)  # a look elsewhere changes nothing
        position += count
    assert (np.concatenate(parts) == whole).all()


def test_seed_name_and_epoch_each_change_the_order() -> None:
    def ids(name: str, seed: int, epoch: int) -> list[int]:
        return list(SourceOrder(name, [50, 50], seed, 64).ids(epoch * 100, 100))

    orders = [ids("a", 0, 0), ids("b", 0, 0), ids("a", 1, 0), ids("a", 0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert ids("a", 0, 0) == orders[0]


def test_a_window_smaller_than_a_shard_reads_few_shards_at_a_time() -> None:
    order = SourceOrder("s", [1000] * 100, 0, window=500)
    shards = order.ids(0, 100_000) // 1000
    per_window = [len(set(shards[i : i + 500])) for i in range(0, 100_000, 500)]
    assert max(per_window) <= 2
    assert list(dict.fromkeys(shards)) != list(range(100)), "the shards are shuffled too"


def test_ten_million_records_cost_no_more_than_a_window() -> None:
    started = time.perf_counter()
    order = SourceOrder("s", [1000] * 10_000, 0, window=4096)
    ids = order.ids(123_456_789, 2048)
    assert time.perf_counter() - started < 0.5
    assert len(set(ids)) == 2048
    assert sum(w.nbytes for w in order._windows.values()) < 1 << 20


def test_a_bucketed_order_pads_less_than_a_plain_one() -> None:
    def padded(bucket: int) -> float:
        order = SourceOrder("s", [5000], 0, 4096, lengths=caption_lengths, bucket=bucket)
        lengths = caption_lengths(0, order.ids(0, 4096)).reshape(-1, 32)
        return float(1 - lengths.sum() / (lengths.max(1) * 32).sum())

    assert padded(32) < 0.03
    assert padded(0) > 0.3


def test_a_source_without_records_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="source empty holds no record"):
        SourceOrder("empty", [0, 0], 0, 10)


def stream(weights: dict[str, float]) -> StreamOrder:
    return StreamOrder([SourceOrder(n, [37, 11], 3, 16) for n in weights], weights)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 100), min_size=1),
    st.lists(st.integers(0, 60), max_size=6),
)
@settings(deadline=None)
def test_a_stream_does_not_depend_on_the_size_of_its_steps(
    weights: dict[str, float], steps: list[int]
) -> None:
    whole, end = stream(weights).take(stream(weights).start(), sum(steps))
    parts, cursors = [], stream(weights).start()
    for count in steps:
        visits, cursors = stream(weights).take(cursors, count)  # a new object: no hidden state
        parts += visits
    assert parts == whole
    assert cursors == end
    for name in weights:  # every source goes on where it stood, none is lost or doubled
        own = [visit for visit in whole if visit.source == name]
        assert own == SourceOrder(name, [37, 11], 3, 16).visits(0, end[name])


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.05, 20), min_size=2), st.integers(0, 500)
)
@settings(deadline=None)
def test_shares_hold_at_every_moment(weights: dict[str, float], count: int) -> None:
    _, cursors = stream(weights).take(stream(weights).start(), count)
    total = sum(weights.values())
    for name, weight in weights.items():
        assert abs(cursors[name] - count * weight / total) < len(weights)


def test_cursors_of_other_sources_are_refused() -> None:
    with pytest.raises(InputError, match=r"sources are a, z.*data has a, b"):
        stream({"a": 1, "b": 1}).take({"a": 3, "z": 0}, 1)


def test_named_sources_get_their_share_and_the_others_split_the_rest_by_records() -> None:
    records = {"big": 900, "small": 100, "own": 5}
    assert source_weights(records, {}) == {
        name: pytest.approx(n / 1005) for name, n in records.items()
    }
    assert source_weights(records, {"own": 0.5, "of another stream": 9}) == {
        "big": pytest.approx(0.45),
        "small": pytest.approx(0.05),
        "own": 0.5,
    }
    assert source_weights({"a": 1, "b": 9}, {"a": 3, "b": 1}) == {"a": 3, "b": 1}
    with pytest.raises(ConfigError, match="leaves nothing for big, small"):
        source_weights(records, {"own": 1})
