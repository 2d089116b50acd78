"""Making things in the background, in one thread or in several processes.

Each worker runs its own iterator; the caller receives one item of each, round by round. Nothing
is sent to a worker, so nothing can be lost on the way or block on both sides.

The processes are started here and not by `torch.utils.data.DataLoader`: a lost worker must end
the run with its name and exit code 71 at the place where its work is awaited (DataLoader raises
from a signal handler, anywhere), a stopped one must not outlive the run, and items come through
pipes, so a small /dev/shm does no harm.
"""

import multiprocessing
import multiprocessing.util
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import torch

from vlbeit.allocator import keep_freed_memory
from vlbeit.errors import LostWorkerError, VLBeitError

T = TypeVar("T")

Produce = Callable[[int], Iterator[T]]
"""The iterator of worker 0, 1, ..."""

_ADVICE = "run the same command again to go on"


class Background(Protocol[T]):
    """Workers that make items ahead of their use."""

    def rounds(self) -> Iterator[list[T]]:
        """One item of each worker, until the first of them ends.

        Raises:
            LostWorkerError: a worker died or gave no item for `timeout` seconds.
        """

    def close(self) -> None:
        """End the workers, whatever they are doing. May be called twice."""


class ThreadBackground(Background[T]):
    """One worker in a thread; reading and decoding release the interpreter lock.

    Besides the item being made, one lies ready.
    """

    def __init__(self, produce: Produce[T], timeout: float) -> None:
        self._timeout = timeout
        self._ready: queue.Queue[tuple[T] | Exception | None] = queue.Queue(maxsize=1)
        self._closed = False
        # A daemon: a read that hangs must not keep the process from leaving with its code.
        self._thread = threading.Thread(
            target=self._serve, args=(produce,), name="vlbeit-loader", daemon=True
        )
        self._thread.start()

    def _serve(self, produce: Produce[T]) -> None:
        try:
            for item in produce(0):
                self._ready.put((item,))
                if self._closed:
                    return
        except Exception as error:
            self._ready.put(error)
        else:
            self._ready.put(None)

    def rounds(self) -> Iterator[list[T]]:
        while True:
            try:
                found = self._ready.get(timeout=self._timeout)
            except queue.Empty:
                raise LostWorkerError(
                    f"the loader thread gave nothing for {self._timeout:g} s "
                    "(input.loader_timeout); does the file system that holds the data answer?"
                ) from None
            if found is None:
                return
            if isinstance(found, Exception):
                raise found
            yield list(found)

    def close(self) -> None:
        self._closed = True
        deadline = time.monotonic() + 5.0
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)


class ProcessBackground(Background[T]):
    """Several workers in processes of their own.

    Besides the item being made, each has one ready and one on its way through the pipe.
    """

    def __init__(self, produce: Produce[T], workers: int, timeout: float) -> None:
        self._timeout = timeout
        self._pipes: list[Connection] = []
        self._workers: list[BaseProcess] = []
        # The interpreter waits for its children at exit, and a stopped one would keep it
        # waiting; this runs before.
        self._finalizer = multiprocessing.util.Finalize(
            self, _kill, (self._workers, self._pipes), exitpriority=10
        )
        forks = "fork" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        for number in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            self._pipes.append(ours)
            # A forked worker inherits our ends of the pipes. It closes them, so that writing
            # fails for every worker once this process is gone, however it went.
            worker = context.Process(
                target=_serve_pipe,
                args=(produce, number, theirs, list(self._pipes) if forks else []),
                name=f"vlbeit-loader-{number}",
                daemon=True,
            )
            worker.start()
            theirs.close()
            self._workers.append(worker)

    def rounds(self) -> Iterator[list[T]]:
        while True:
            items: list[T] = []
            for number in range(len(self._workers)):
                found = self._receive(number)
                if found is None:
                    return
                items += found
            yield items

    def _receive(self, number: int) -> tuple[T] | None:
        pipe, worker = self._pipes[number], self._workers[number]
        # A worker that is stopped in the middle of a message keeps `recv` waiting, and `poll` does
        # not tell: only its end ends the wait.
        late = threading.Event()

        def give_up() -> None:
            late.set()
            worker.kill()

        alarm = threading.Timer(self._timeout, give_up)
        alarm.daemon = True
        alarm.start()
        try:
            found: tuple[T] | Exception | None = pipe.recv()
        except (EOFError, OSError):
            worker.join(timeout=1.0)
            code = worker.exitcode
            how = f"ended by signal {-code}" if code is not None and code < 0 else f"left ({code})"
            self.close()
            if late.is_set():
                raise LostWorkerError(
                    f"loader worker {number} (pid {worker.pid}) gave nothing for "
                    f"{self._timeout:g} s (input.loader_timeout) and was ended; {_ADVICE}"
                ) from None
            raise LostWorkerError(
                f"loader worker {number} (pid {worker.pid}) {how}; {_ADVICE}, with fewer "
                "input.workers if memory was short"
            ) from None
        finally:
            alarm.cancel()
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        self._finalizer()


def _kill(workers: list[BaseProcess], pipes: list[Connection]) -> None:
    """Workers hold nothing that could be lost, and one that is stopped obeys no other signal."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=5.0)
    for pipe in pipes:
        pipe.close()


def _serve_pipe(
    produce: Produce[T], number: int, pipe: Connection, inherited: list[Connection]
) -> None:
    """A worker's life. Requests to stop concern the trainer, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep_freed_memory()
    # Torch resizes the pictures. Its pool of threads does not survive a fork, and a worker that
    # asks for it would wait for ever; a worker is one thread's work in any case.
    torch.set_num_threads(1)
    for other in inherited:
        other.close()
    # A thread writes, so that the next item is made while the last one waits to be fetched.
    ready: queue.Queue[tuple[T] | Exception | None] = queue.Queue(maxsize=1)

    def write() -> None:
        found: tuple[T] | Exception | None
        try:
            while isinstance(found := ready.get(), tuple):
                pipe.send(found)
            pipe.send(found)
        except OSError:
            gone.set()  # the trainer has left
            while isinstance(ready.get(), tuple):
                pass

    gone = threading.Event()
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        for item in produce(number):
            ready.put((item,))
            if gone.is_set():
                break
        ready.put(None)
    except VLBeitError as error:
        ready.put(error)
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        ready.put(RuntimeError(f"in loader worker {number}:\n{trace}"))
    writer.join()
