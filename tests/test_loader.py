"""The global batch follows from the cursors; ranks, workers and resumes change nothing in it."""

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toy_records import CONFIG, image_source, pair_source, text_source, toy_sources, toy_tokenizer
from vlbeit.config import InputConfig, PretrainConfig
from vlbeit.data import loader as loader_module
from vlbeit.data.loader import (
    Cursors,
    SkipBudget,
    StepData,
    StepLoader,
    build_loader,
    build_streams,
)
from vlbeit.data.probe import check_sources
from vlbeit.data.records import RecordSource
from vlbeit.data.streams import SampleStream
from vlbeit.data.workers import ProcessBackground
from vlbeit.errors import ConfigError, DataBudgetError, InputError, LostWorkerError
from vlbeit.tokens.text import TextTokenizer
from vlbeit.types import Batch, Stream


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return toy_tokenizer()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def streams(
    tokenizer: TextTokenizer, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[SampleStream]:
    sources = toy_sources(tmp_path_factory.mktemp("toy"))
    return build_streams(CONFIG, sources, tokenizer, cache=cache)


def with_input(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    return replace(config, input=replace(config.input, **changes))


def run(
    streams: list[SampleStream],
    steps: int,
    *,
    first: int = 1,
    cursors: Cursors | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> list[StepData]:
    config = with_input(CONFIG, workers=workers)
    with build_loader(config, streams, rank=rank, world=world) as loader:
        return list(loader.steps(cursors or loader.start_cursors(), first, first + steps - 1))


def rows(batches: list[Batch]) -> dict[str, dict[str, torch.Tensor]]:
    """Every sample by its id, padding cut off."""
    found = {}
    for batch in batches:
        for place, name in enumerate(batch.sample_ids):
            tensors = {k: v[place] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
            if "word_valid" in tensors:
                valid = tensors.pop("word_valid")
                for word in ("words", "words_given", "word_masked"):
                    tensors[word] = tensors[word][valid]
            found[name] = tensors
    return found


def identical(one: Batch, two: Batch) -> bool:
    tensors = {k: v for k, v in vars(one).items() if isinstance(v, torch.Tensor)}
    others = {k: v for k, v in vars(two).items() if isinstance(v, torch.Tensor)}
    return (
        one.stream == two.stream
        and one.sample_ids == two.sample_ids
        and tensors.keys() == others.keys()
        and all(torch.equal(value, others[name]) for name, value in tensors.items())
    )


def flat(data: list[StepData]) -> list[Batch]:
    return [batch for step in data for part in step.batches.values() for batch in part]


def ids(ledger: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    return [name for sources in ledger.values() for part in sources.values() for name in part]


def test_a_step_holds_the_counts_of_the_config(streams: list[SampleStream]) -> None:
    for data in run(streams, 4):
        assert {k: sum(map(len, v)) for k, v in data.batches.items()} == {
            "image": 6,
            "text": 5,
            "pair": 8,
        }
        assert max(len(b) for part in data.batches.values() for b in part) == CONFIG.batch.micro
        assert data.skips == []
        assert {k: sum(v.values()) for k, v in data.visits.items()} == {
            "image": 6,
            "text": 5,
            "pair": 8,
        }


def test_the_ledger_names_what_the_batches_hold(streams: list[SampleStream]) -> None:
    for data in run(streams, 3):
        held = [name for b in flat([data]) for name in b.sample_ids]
        assert sorted(held) == sorted(ids(data.ledger))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_one_global_step_whatever_their_number(
    streams: list[SampleStream], world: int
) -> None:
    alone = run(streams, 3)
    ranks = [run(streams, 3, rank=rank, world=world) for rank in range(world)]
    for step, whole in enumerate(alone):
        for data in ranks:
            assert data[step].ledger == whole.ledger
            assert data[step].cursors == whole.cursors
        shared = [rows(flat([data[step]])) for data in ranks]
        assert sum(map(len, shared)) == len(ids(whole.ledger)), "each sample on one rank only"
        everything = {k: v for part in shared for k, v in part.items()}
        expected = rows(flat([whole]))
        assert everything.keys() == expected.keys()
        for name, tensors in expected.items():
            assert all(torch.equal(v, everything[name][k]) for k, v in tensors.items()), name


def test_a_run_resumed_from_any_cursor_goes_on_with_the_same_batches(
    streams: list[SampleStream],
) -> None:
    whole = run(streams, 8)
    for stop in (1, 4, 7):
        rest = run(streams, 8 - stop, first=stop + 1, cursors=whole[stop - 1].cursors)
        assert [d.step for d in rest] == list(range(stop + 1, 9))
        assert [d.ledger for d in rest] == [d.ledger for d in whole[stop:]]
        assert all(map(identical, flat(rest), flat(whole[stop:])))


def test_the_cursors_are_all_the_state_there_is(streams: list[SampleStream]) -> None:
    """2 -> 1 -> 3 ranks with other workers, each time from nothing but the cursors."""
    whole = run(streams, 6)
    cursors: Cursors | None = None
    ledgers = []
    for part, world in enumerate([2, 1, 3]):
        first = 1 + 2 * part
        data = run(streams, 2, first=first, cursors=cursors, rank=world - 1, world=world)
        ledgers += [d.ledger for d in data]
        cursors = data[-1].cursors
    assert ledgers == [d.ledger for d in whole]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_processes_make_bit_identical_batches(
    streams: list[SampleStream], workers: int
) -> None:
    in_thread, in_processes = run(streams, 6), run(streams, 6, workers=workers)
    assert len(flat(in_thread)) == len(flat(in_processes)) == 6 * (2 + 2 + 3)
    assert all(map(identical, flat(in_thread), flat(in_processes)))
    other = run(streams, 6, cursors=in_thread[0].cursors)
    assert not all(map(identical, flat(in_thread), flat(other))), "identical() can say no"


@pytest.mark.slow
def test_workers_that_cannot_be_forked_are_spawned(
    streams: list[SampleStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_thread = run(streams, 2)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert all(map(identical, flat(in_thread), flat(run(streams, 2, workers=1))))


def test_a_new_walk_through_the_steps_ends_the_one_before(streams: list[SampleStream]) -> None:
    loader = build_loader(CONFIG, streams)
    old = loader.steps(loader.start_cursors(), 1, 100)
    first = next(old)
    new = loader.steps(loader.start_cursors(), 1, 3)
    again = next(new)
    old.close()
    assert all(map(identical, flat([first]), flat([again])))
    assert [data.step for data in new] == [2, 3]


def test_pairs_are_cut_by_length_so_that_little_is_padded(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    source = pair_source(tmp_path, records=384)
    config = replace(CONFIG, batch=replace(CONFIG.batch, images=0, texts=0, pairs=128, micro=8))
    loader = build_loader(config, build_streams(config, {"pair": [source]}, tokenizer))
    data = list(loader.steps(loader.start_cursors(), 1, 3))  # one epoch
    valid = [batch.word_valid for batch in flat(data) if batch.word_valid is not None]
    # Of the whole sequence with the paper's 196 patches and [I_CLS]: the design allows 3 %.
    filled = sum(v.numel() - int(v.sum()) for v in valid)
    tokens = sum(v.numel() + len(v) * 197 for v in valid)
    assert filled / tokens < 0.03
    # By the longest caption of the source instead of the micro-batch it would be more.
    widest = max(v.shape[1] for v in valid)
    assert sum((widest - v.shape[1]) * len(v) for v in valid) > filled / 2
    visited = [name for step in data for name in step.ledger["pair"]["captioned"]]
    in_batches = [name for batch in flat(data) for name in batch.sample_ids]
    assert sorted(visited) == sorted(in_batches) and visited != in_batches


@pytest.mark.parametrize(("groups", "mixed"), [(16, True), (1, False)])
def test_a_step_mixes_captions_of_all_lengths(
    tokenizer: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: int,
    mixed: bool,
) -> None:
    monkeypatch.setattr(loader_module, "BUCKETS_A_STEP", groups)
    source = pair_source(tmp_path, records=384)
    config = replace(CONFIG, batch=replace(CONFIG.batch, images=0, texts=0, pairs=32, micro=32))
    loader = build_loader(config, build_streams(config, {"pair": [source]}, tokenizer))
    steps = [
        np.concatenate([b.word_valid.sum(1) for b in flat([data]) if b.word_valid is not None])
        for data in loader.steps(loader.start_cursors(), 1, 12)
    ]
    spread_of_means = np.std([lengths.mean() for lengths in steps])
    # Sixteen groups drawn by lot have means that spread a quarter as far as the lengths do.
    assert (spread_of_means < 0.4 * np.std(np.concatenate(steps))) == mixed


def test_an_epoch_of_steps_uses_every_record_once(streams: list[SampleStream]) -> None:
    data = run(streams, 20)
    seen = [name for step in data for name in step.ledger["pair"]["captioned"]]
    first_epoch = [name for name in seen if name.split(":")[1] == "0"]
    assert len(first_epoch) == len(set(first_epoch)) == 48


def test_bad_samples_are_left_out_by_name_and_nothing_takes_their_place(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    bad = {3, 11, 12, 30}
    sources: dict[Stream, list[RecordSource]] = {"image": [image_source(tmp_path, bad=bad)]}
    config = replace(CONFIG, batch=replace(CONFIG.batch, images=10, texts=0, pairs=0))
    streams = build_streams(config, sources, tokenizer)
    for world in (1, 2):
        used, skipped = [], []
        for rank in range(world):
            loader = build_loader(config, streams, rank=rank, world=world)
            for data in loader.steps(loader.start_cursors(), 1, 4):
                used += [name for b in flat([data]) for name in b.sample_ids]
                skipped += data.skips
        assert {row["sample_id"] for row in skipped} == {f"photos:0:{i}" for i in bad}
        assert sorted(used) == sorted(f"photos:0:{i}" for i in set(range(40)) - bad)
        row = next(row for row in skipped if row["sample_id"] == "photos:0:3")
        assert row["reason"] == "not_an_image" and row["member"] == "0003"
        assert row["stream"] == "image" and row["source"] == "photos" and 1 <= row["step"] <= 4
        assert row["shard"].endswith("photos-00000.tar")


def test_a_source_without_a_usable_sample_is_named_before_training(tmp_path: Path) -> None:
    good, bad = image_source(tmp_path), image_source(tmp_path, "dead", 100, bad=range(100))
    started = time.perf_counter()
    with pytest.raises(DataBudgetError, match=r"no usable sample in source dead.*64 x not_an_im"):
        check_sources({"image": [good, bad]})
    assert time.perf_counter() - started < 5
    check_sources({"image": [good]})


def test_a_stream_without_source_and_an_unknown_weight_are_refused(
    streams: list[SampleStream],
) -> None:
    with pytest.raises(InputError, match=r"3 of the pair stream.*batch.pairs to 0"):
        StepLoader(streams[:1], {"pair": 3}, micro=1, window=10)
    with pytest.raises(ConfigError, match="input.weights names the source 'fotos'"):
        build_loader(with_input(CONFIG, weights={"fotos": 0.5}), streams)
    with pytest.raises(ConfigError, match="batch.micro 0"):
        StepLoader(streams, {"image": 3}, micro=0, window=10)
    loader = build_loader(CONFIG, streams)
    with pytest.raises(InputError, match="resume with the same"):
        loader.plan(1, {"image": {"photos": 0}})


def test_weights_set_the_shares_of_sources(streams: list[SampleStream]) -> None:
    loader = build_loader(with_input(CONFIG, weights={"drawings": 0.5}), streams)
    cursors: Any = loader.start_cursors()
    for step in range(10):
        cursors = loader.plan(step, cursors).cursors
    assert cursors["image"] == {"photos": 30, "drawings": 30}


# ------------------------------------------------------------------ skip budget


def feed(budget: SkipBudget, seen: int, bad: int) -> None:
    budget.add(
        {"image": {"photos": seen}},
        [{"stream": "image", "source": "photos", "reason": "truncated_image"}] * bad,
    )


def test_half_a_per_cent_goes_on_and_five_stop() -> None:
    good, poor = SkipBudget(0.01), SkipBudget(0.01)
    with pytest.raises(DataBudgetError) as stopped:
        for step in range(1, 101):
            feed(good, 20, step % 10 == 0)  # 1 of 200
            good.check()
            feed(poor, 20, 1)  # 1 of 20
            poor.check()
    assert step * 20 < 1000
    assert "image/photos" in str(stopped.value) and "truncated_image" in str(stopped.value)
    for step in range(100):
        feed(good, 20, step % 10 == 0)
        good.check()


def test_counts_survive_a_resume_without_being_doubled() -> None:
    whole, budget = SkipBudget(0.01), SkipBudget(0.01)
    for step in range(30):
        feed(whole, 20, step % 7 == 0)
        feed(budget, 20, step % 7 == 0)
        if step in (3, 17):
            budget = SkipBudget(0.01, budget.state())
    assert budget.state() == whole.state()
    assert budget.skipped == 5


def test_a_budget_of_zero_stops_at_the_first() -> None:
    budget = SkipBudget(0.0)
    feed(budget, 10, 0)
    budget.check()
    feed(budget, 10, 1)
    with pytest.raises(DataBudgetError, match="allows 0.00%"):
        budget.check()


# ------------------------------------------------------------------ lost workers


def endless(streams: list[SampleStream], **changes: Any) -> tuple[StepLoader, Iterator[StepData]]:
    loader = build_loader(with_input(CONFIG, **changes), streams)
    return loader, loader.steps(loader.start_cursors(), 1, 10**9)


def loader_children() -> list[Any]:
    return [p for p in multiprocessing.active_children() if p.name.startswith("vlbeit-loader")]


@pytest.mark.fault
def test_a_killed_worker_ends_the_run_with_its_number_and_signal(
    streams: list[SampleStream],
) -> None:
    _, steps = endless(streams, workers=2)
    next(steps)
    started = time.perf_counter()
    os.kill(loader_children()[0].pid, signal.SIGKILL)
    with pytest.raises(LostWorkerError, match=r"loader worker \d \(pid \d+\) ended by signal 9"):
        for _ in itertools.islice(steps, 50):
            pass
    assert time.perf_counter() - started < 10
    assert loader_children() == []


@pytest.mark.fault
def test_a_stopped_worker_is_ended_after_the_loader_timeout(streams: list[SampleStream]) -> None:
    _, steps = endless(streams, workers=2, loader_timeout=1.0)
    next(steps)
    for child in loader_children():
        os.kill(child.pid, signal.SIGSTOP)
    started = time.perf_counter()
    with pytest.raises(LostWorkerError, match="gave nothing for 1 s"):
        for _ in itertools.islice(steps, 50):
            pass
    assert time.perf_counter() - started < 6
    assert loader_children() == []


def big_items(number: int) -> Iterator[bytes]:
    """More than a pipe takes at once: the worker waits in the middle of sending."""
    while True:
        yield bytes(1_000_000)


@pytest.mark.fault
def test_a_worker_stopped_in_the_middle_of_a_batch_is_ended_after_the_loader_timeout() -> None:
    background = ProcessBackground(big_items, workers=1, timeout=2.0)
    rounds = background.rounds()
    next(rounds)
    time.sleep(0.5)  # the next item fills the pipe, and the worker waits for room
    (worker,) = loader_children()
    os.kill(worker.pid, signal.SIGSTOP)
    started = time.perf_counter()
    with pytest.raises(LostWorkerError, match=r"gave nothing for 2 s \(input.loader_timeout\)"):
        next(rounds)
    assert time.perf_counter() - started < 7
    assert not loader_children()


@pytest.mark.fault
def test_workers_leave_when_the_trainer_is_killed(streams: list[SampleStream]) -> None:
    ours, theirs = multiprocessing.Pipe()

    def train() -> None:
        _, steps = endless(streams, workers=2)
        next(steps)
        theirs.send([child.pid for child in loader_children()])
        time.sleep(60)

    trainer = multiprocessing.get_context("fork").Process(target=train, daemon=False)
    trainer.start()
    pids = ours.recv()
    assert len(pids) == 2
    trainer.kill()
    trainer.join()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_request_to_stop_does_not_reach_the_workers(streams: list[SampleStream]) -> None:
    loader, steps = endless(streams, workers=1)
    next(steps)
    (child,) = loader_children()
    os.kill(child.pid, signal.SIGTERM)
    os.kill(child.pid, signal.SIGINT)
    for _ in itertools.islice(steps, 20):
        pass
    loader.close()
    assert loader_children() == []


def busy(number: int) -> Iterator[tuple[int, float]]:
    """What a worker makes with torch: its threads, and a sum that several would share."""
    yield torch.get_num_threads(), float(torch.ones(1 << 20).add(1).sum())


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores for a pool of threads")
def test_a_worker_forked_from_a_trainer_with_threads_can_use_torch() -> None:
    """OpenMP's pool is lost in a fork: a worker that asked for it would wait for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        next(busy(0))  # the pool is there now
        background = ProcessBackground(busy, 2, timeout=20.0)
        assert list(background.rounds()) == [[(1, 2.0 * (1 << 20))] * 2]
        background.close()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_source_reaches_the_trainer(
    streams: list[SampleStream],
    tokenizer: TextTokenizer,
    cache: Path,
    tmp_path: Path,
    workers: int,
) -> None:
    config = replace(CONFIG, batch=replace(CONFIG.batch, images=0, pairs=0))
    built = build_streams(config, {"text": [text_source(tmp_path)]}, tokenizer, cache=cache)

    def broken(visit: object) -> object:
        raise ZeroDivisionError("for the test")

    built[0].sample = broken  # type: ignore[method-assign,assignment]
    with pytest.raises((ZeroDivisionError, RuntimeError), match="for the test"):
        run_config = with_input(config, workers=workers)
        loader = build_loader(run_config, built)
        next(loader.steps(loader.start_cursors(), 1, 3))
    assert loader_children() == []


def test_a_thread_that_gives_nothing_counts_as_lost(
    tokenizer: TextTokenizer, cache: Path, tmp_path: Path
) -> None:
    config = with_input(
        replace(CONFIG, batch=replace(CONFIG.batch, images=0, pairs=0)), loader_timeout=0.3
    )
    built = build_streams(config, {"text": [text_source(tmp_path)]}, tokenizer, cache=cache)
    good = built[0].sample

    def slow(visit: Any) -> Any:
        time.sleep(1.0)
        return good(visit)

    built[0].sample = slow  # type: ignore[method-assign]
    loader = build_loader(config, built)
    with pytest.raises(LostWorkerError, match=r"gave nothing for 0.3 s"):
        next(loader.steps(loader.start_cursors(), 1, 3))


def test_the_default_loader_runs_in_process() -> None:
    assert InputConfig().workers == 0


# ------------------------------------------------------------------------------- parts of a step


def plans(world: int, streams, counts, **how):
    """The micro-batches of step 3 by part, over all ranks, and the ledger."""
    parts: dict[int, list] = {}
    for rank in range(world):
        loader = StepLoader(streams, counts, window=64, rank=rank, world=world, **how)
        cursors = loader.start_cursors()
        for step in (1, 2, 3):
            plan = loader.plan(step, cursors)
            cursors = plan.cursors
        for part, name, visits in plan.micro_batches:
            parts.setdefault(part, []).append((name, visits))
    return parts, plan.ledger


def test_parts_of_a_step_hold_the_same_micro_batches_on_any_number_of_ranks(streams):
    counts = {"image": 6, "text": 5, "pair": 9}
    alone, ledger = plans(1, streams, counts, micro=2, parts=4)
    assert set(alone) == {0, 1, 2, 3}
    for world in (2, 4):
        assert plans(world, streams, counts, micro=2, parts=4) == (alone, ledger)
    # Without parts the ranks' own slices decide, so the micro-batches are others.
    assert plans(1, streams, counts, micro=2)[0] != plans(2, streams, counts, micro=2)[0]
    with pytest.raises(ConfigError, match="3 processes cannot share 4 parts"):
        plans(3, streams, counts, micro=2, parts=4)


def test_aligned_ranks_have_equally_many_micro_batches_of_each_stream(streams):
    counts = {"image": 5, "text": 2, "pair": 9}
    for world in (2, 3, 4):
        ragged, ledger = plans(world, streams, counts, micro=2)
        even, same = plans(world, streams, counts, micro=2, aligned=True)
        names = {tuple(name for name, _ in micro) for micro in even.values()}
        assert len(names) == 1 and same == ledger
        assert len({len(micro) for micro in ragged.values()}) > 1 or world == 2
        for part, micro in even.items():  # nothing but empty ones was added
            assert [m for m in micro if m[1]] == ragged.get(part, [])
