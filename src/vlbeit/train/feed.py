"""A step's micro-batches on the device, brought there while the step before is computed."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

import torch

from vlbeit.data.loader import StepData
from vlbeit.data.workers import ThreadBackground


class Movable(Protocol):
    """What the feed asks of a micro-batch."""

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with every tensor changed."""


B = TypeVar("B", bound=Movable)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Fed(Generic[B]):
    """A step's input: what the loader gave, and its micro-batches on the device."""

    data: StepData[B]
    parts: dict[int, list[B | None]]
    """`data.parts` on the device."""


class Copies(Protocol):
    """How micro-batches get to a device beside the work that goes on there."""

    def bring(self, batch: B) -> B:
        """Begin to copy; called in the feed's thread."""

    def mark(self) -> Callable[[B], B]:
        """After the copies of a step, in the feed's thread: what makes one of them ready for use,
        called where it is used."""


class CudaCopies(Copies):
    """Through page-locked memory and on a stream of their own: a copy from ordinary memory would
    keep the host waiting, and one on the stream of the computation the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def bring(self, batch: B) -> B:
        with torch.cuda.stream(self._stream):
            return batch.mapped(torch.Tensor.pin_memory).to(self._device)

    def mark(self) -> Callable[[B], B]:
        copied = self._stream.record_event()

        def ready(batch: B) -> B:
            using = torch.cuda.current_stream(self._device)
            using.wait_event(copied)

            def kept(tensor: torch.Tensor) -> torch.Tensor:
                tensor.record_stream(using)  # not given to another copy while still in use
                return tensor

            return batch.mapped(kept)

        return ready


def feed(
    steps: Iterator[StepData[B]],
    device: torch.device,
    timeout: float,
    copies: Copies | None = None,
) -> Iterator[Fed[B]]:
    """The steps with their micro-batches on the device.

    On a GPU the next step's are copied by a thread while this one is computed, so up to two
    steps more than the one in use are in the GPU's memory. `waited` is then the time that the
    training waited, and not the thread.

    Args:
        steps: of the loader; closed at the end, and by the feed's thread where it has one.
        timeout: seconds without a step after which the loader counts as lost. Twice that is waited
            for the thread: the loader, whose error says more, comes first.
        copies: how; None: `CudaCopies` on a GPU, and straight from the loader elsewhere.

    Raises:
        LostWorkerError: the loader's.
    """
    if copies is None and device.type == "cuda":
        copies = CudaCopies(device)
    if copies is None:
        for data in closing(steps):
            yield Fed(data=data, parts=over_parts(data.parts, lambda batch: batch.to(device)))
        return

    def copied(_: int) -> Iterator[tuple[Fed[B], Callable[[B], B]]]:
        for data in closing(steps):
            parts = over_parts(data.parts, copies.bring)
            yield Fed(data=data, parts=parts), copies.mark()

    background = ThreadBackground(copied, 2 * timeout)
    try:
        started = time.perf_counter()
        for ((fed, ready),) in background.rounds():
            data = replace(fed.data, waited=time.perf_counter() - started)
            yield Fed(data=data, parts=over_parts(fed.parts, ready))
            started = time.perf_counter()
    finally:
        background.close()


def over_parts(
    parts: dict[int, list[B | None]], change: Callable[[B], B]
) -> dict[int, list[B | None]]:
    """The same parts with every micro-batch changed, in their order."""
    return {
        number: [None if batch is None else change(batch) for batch in part]
        for number, part in parts.items()
    }


def closing(items: Iterator[T]) -> Iterator[T]:
    """The items; what makes them is closed however their use ends."""
    try:
        yield from items
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
