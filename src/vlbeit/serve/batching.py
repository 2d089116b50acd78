"""The queue before the model: bounded, with deadlines, and asked in batches by one thread.

The thread takes the oldest request and every other that waits with the same key, up to a limit,
and asks for them together. While it works the next ones gather, so a batch grows with the load and
nothing waits for company unless a window is set.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from vlbeit.errors import VLBeitError
from vlbeit.serve.api_errors import ApiError, busy
from vlbeit.serve.metrics import Metrics

log = logging.getLogger("vlbeit.serve")

Outcome = Any | BaseException
Ask = Callable[[Hashable, Sequence[Any]], Sequence[Any]]
"""(key, rows) to an answer for each row; called in the thread."""


@dataclass(eq=False)
class Waiting:
    """One request in the queue."""

    key: Hashable
    label: str
    most: int
    row: Any
    deadline: float
    """On the clock of time.monotonic()."""
    answer: asyncio.Future[Any]


class Batcher:
    """One thread that asks `ask`; every other method belongs to the event loop's thread."""

    def __init__(
        self, ask: Ask, metrics: Metrics, *, queue: int, batch: int, window: float = 0.0
    ) -> None:
        """
        Args:
            queue: requests that may wait.
            batch: most rows of one call of `ask`.
            window: seconds that a batch which is not full waits for more.
        """
        self._ask = ask
        self._metrics = metrics
        self._most_waiting = queue
        self._batch = batch
        self._window = window
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vlbeit-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """End the thread when its batch is done; False: it takes longer than this."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def __len__(self) -> int:
        return len(self._waiting)

    def check_room(self) -> None:
        """Raises ApiError 503 if the queue is full."""
        if len(self._waiting) >= self._most_waiting:
            raise busy(
                "queue_full",
                f"{len(self._waiting)} requests wait, the most is {self._most_waiting}; come again",
            )

    async def answer(
        self, key: Hashable, row: Any, *, label: str, seconds: float, together: bool = True
    ) -> Any:
        """The answer to a row.

        Args:
            key: rows are asked together only if theirs are equal.
            label: of the batch in the metrics.
            seconds: until the deadline.
            together: False: always asked alone.

        Raises:
            ApiError: 503 the queue is full, 504 the deadline passed, 422 what `ask` refused, 500
                any other failure.
        """
        waiting = Waiting(
            key=key,
            label=label,
            most=self._batch if together else 1,
            row=row,
            deadline=time.monotonic() + seconds,
            answer=asyncio.get_running_loop().create_future(),
        )
        with self._changed:
            self.check_room()
            self._waiting.append(waiting)
            self._metrics.queue_length.set(len(self._waiting))
            self._changed.notify()
        return await self._outcome(waiting, seconds)

    async def ahead(self, key: Hashable, *, seconds: float) -> Any:
        """The answer to a row (None) that goes before all others and counts in no limit."""
        waiting = Waiting(
            key=key,
            label="probe",
            most=1,
            row=None,
            deadline=time.monotonic() + seconds,
            answer=asyncio.get_running_loop().create_future(),
        )
        with self._changed:
            self._waiting.appendleft(waiting)
            self._changed.notify()
        return await self._outcome(waiting, seconds)

    async def _outcome(self, waiting: Waiting, seconds: float) -> Any:
        try:
            async with asyncio.timeout(seconds):
                return await waiting.answer
        except TimeoutError:
            raise late(seconds) from None

    # ---- in the thread

    def _run(self) -> None:
        while batch := self._next_batch():
            began = time.perf_counter()
            outcomes = self._outcomes(batch)
            self._metrics.batch_size.labels(batch[0].label).observe(len(batch))
            self._metrics.model_seconds.labels(batch[0].label).observe(time.perf_counter() - began)
            # One wake-up of the event loop for all of them.
            loop = batch[0].answer.get_loop()
            try:
                loop.call_soon_threadsafe(_deliver, batch, outcomes)
            except RuntimeError:  # the loop was closed: nobody waits any more
                return

    def _next_batch(self) -> list[Waiting]:
        """The oldest request and those that go with it; empty: stop."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._stopping:
                        return []
                    self._changed.wait()
                first = self._waiting[0]
                if self._window and first.most > 1:
                    self._gather(first)
                if taken := self._take(first):
                    return taken

    def _take(self, first: Waiting) -> list[Waiting]:
        """Out of the queue: what goes with the first, and who has been told 504 or has left."""
        taken: list[Waiting] = []
        left: deque[Waiting] = deque()
        now = time.monotonic()
        for one in self._waiting:
            if one.answer.done() or one.deadline <= now:
                continue
            if one.key == first.key and len(taken) < first.most:
                taken.append(one)
            else:
                left.append(one)
        self._waiting = left
        self._metrics.queue_length.set(len(left))
        return taken

    def _gather(self, first: Waiting) -> None:
        until = time.monotonic() + self._window
        while (
            sum(one.key == first.key for one in self._waiting) < first.most
            and (rest := until - time.monotonic()) > 0
            and not self._stopping
        ):
            self._changed.wait(rest)

    def _outcomes(self, batch: Sequence[Waiting]) -> list[Outcome]:
        """An answer or an exception for each. If a batch fails, each is asked alone, so that one
        bad row is the failure of its own request only."""
        try:
            found = self._ask(batch[0].key, [one.row for one in batch])
            if len(found) != len(batch):
                raise RuntimeError(f"{len(found)} answers to {len(batch)} requests")
            return list(found)
        except Exception as error:
            if len(batch) == 1:
                return [error]
        return [self._outcomes([one])[0] for one in batch]


def _deliver(batch: Sequence[Waiting], outcomes: Sequence[Outcome]) -> None:
    for one, outcome in zip(batch, outcomes, strict=True):
        if one.answer.done():
            continue
        if isinstance(outcome, BaseException):
            one.answer.set_exception(refused(outcome))
        else:
            one.answer.set_result(outcome)


def refused(error: BaseException) -> ApiError:
    """What the client is told: a user's error in its words, a fault of ours without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, VLBeitError):
        return ApiError(422, "unusable", str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal", "the server failed on this request; its log says how")


def late(seconds: float) -> ApiError:
    return ApiError(
        504, "deadline", f"no answer within {seconds:g} s, the server's limit; come again later"
    )
