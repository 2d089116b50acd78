"""Laws of the feed, train/feed.py: what a GPU would get, by copies that a test can watch."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from vlbeit.data.loader import StepData
from vlbeit.errors import LostWorkerError
from vlbeit.train.feed import Copies, Fed, feed
from vlbeit.types import Batch, TaskBatch

CPU = torch.device("cpu")


def batch_of(value: int) -> Batch:
    words = torch.full((2, 5), value)
    return Batch(
        stream="text",
        sample_ids=("a", "b"),
        words=words,
        words_given=words + 1,
        word_masked=torch.tensor([[False, True, False, True, False]] * 2),
        word_valid=torch.tensor([[True] * 5, [True] * 4 + [False]]),
    )


def step_of(number: int) -> StepData[Batch]:
    parts: dict[int, list[Batch | None]] = {0: [batch_of(number), None], 1: [batch_of(-number)]}
    return StepData(
        step=number,
        batches={},
        parts=parts,
        ledger={},
        visits={},
        skips=[],
        cursors={"text": {"source": number}},
        waited=100.0,
    )


class WatchedSteps:
    """Steps 1..last; knows how many were made and whether the end was told."""

    def __init__(self, last: int, error: Exception | None = None) -> None:
        self.made, self.closed = 0, threading.Event()
        self._last, self._error = last, error

    def steps(self) -> Iterator[StepData[Batch]]:
        try:
            for number in range(1, self._last + 1):
                self.made = number
                yield step_of(number)
            if self._error is not None:
                raise self._error
        finally:
            self.closed.set()


class WatchedCopies(Copies):
    """Copies that fall due: until `ready`, a tensor holds zeros."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self._due: list[tuple[torch.Tensor, torch.Tensor]] = []

    def bring(self, batch):
        self.threads.add(threading.current_thread().name)

        def later(tensor: torch.Tensor) -> torch.Tensor:
            copy = torch.zeros_like(tensor)
            self._due.append((copy, tensor))
            return copy

        return batch.mapped(later).to(CPU)

    def mark(self) -> Callable:
        due, self._due = self._due, []

        def ready(batch):
            for copy, tensor in due:
                copy.copy_(tensor)
            return batch

        return ready


def content(fed: Fed[Batch]) -> list[object]:
    return [
        None
        if batch is None
        else [(k, v.tolist()) for k, v in vars(batch).items() if _is_tensor(v)]
        for part in fed.parts.values()
        for batch in part
    ]


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def test_copies_ahead_give_the_steps_that_the_loader_gave():
    plain = list(feed(WatchedSteps(5).steps(), CPU, 10))
    copies = WatchedCopies()
    ahead = [(fed, content(fed)) for fed in feed(WatchedSteps(5).steps(), CPU, 10, copies)]
    assert (
        [fed.data.step for fed, _ in ahead] == [fed.data.step for fed in plain] == [1, 2, 3, 4, 5]
    )
    assert [found for _, found in ahead] == [content(fed) for fed in plain]
    assert [fed.data.cursors for fed, _ in ahead] == [fed.data.cursors for fed in plain]
    assert copies.threads == {"vlbeit-loader"}


def test_the_next_step_is_brought_while_one_is_in_use_and_not_all_of_them():
    watched = WatchedSteps(50)
    feeding = feed(watched.steps(), CPU, 10, WatchedCopies())
    next(feeding)
    deadline = time.monotonic() + 5
    while watched.made < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert 2 <= watched.made <= 3
    feeding.close()


def test_waiting_is_that_of_the_training_and_not_of_the_thread():
    def slow() -> Iterator[StepData[Batch]]:
        yield step_of(1)
        time.sleep(0.4)
        yield step_of(2)

    first, second = feed(slow(), CPU, 10, WatchedCopies())
    assert first.data.waited < 0.3 < second.data.waited < 50


@pytest.mark.parametrize("copies", [None, WatchedCopies()], ids=["without", "with a thread"])
def test_the_loader_is_closed_when_the_training_leaves_in_the_middle(copies):
    watched = WatchedSteps(50)
    feeding = feed(watched.steps(), CPU, 10, copies)
    next(feeding)
    assert not watched.closed.is_set()
    feeding.close()
    assert watched.closed.wait(5)


def test_what_ends_the_loader_ends_the_training_after_the_steps_before_it():
    watched = WatchedSteps(2, LostWorkerError("loader worker 0 is gone"))
    seen = []
    with pytest.raises(LostWorkerError, match="worker 0"):
        for fed in feed(watched.steps(), CPU, 10, WatchedCopies()):
            seen.append(fed.data.step)
    assert seen == [1, 2]


def test_a_changed_batch_keeps_what_is_no_tensor_and_changes_targets_too():
    batch = TaskBatch(
        stream="vqa",
        sample_ids=("a",),
        words=torch.ones(1, 2),
        targets={"scores": torch.ones(1, 3)},
    )
    doubled = batch.mapped(lambda tensor: 2 * tensor)
    assert doubled.sample_ids == batch.sample_ids and doubled.pixels is None
    assert doubled.words.tolist() == [[2, 2]] and doubled.targets["scores"].tolist() == [[2, 2, 2]]


@pytest.mark.gpu
def test_copies_on_a_stream_of_their_own_are_whole_when_they_are_used():
    device = torch.device("cuda")
    plain = [content(fed) for fed in feed(WatchedSteps(20).steps(), CPU, 10)]
    moved = []
    for fed in feed(WatchedSteps(20).steps(), device, 10):
        torch.randn(4096, 4096, device=device) @ torch.randn(4096, 4096, device=device)
        assert all(b is None or b.words.is_cuda for part in fed.parts.values() for b in part)
        moved.append(content(fed))
    assert moved == plain
