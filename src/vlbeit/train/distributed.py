"""Processes of one run: torchrun's variables in, sums and shared decisions out.

What ranks tell each other is numbers (all-reduce) or JSON, never pickle. Every wait has an end:
a dead rank closes its sockets and the others get an error at once; a stopped one is given up
after the timeout. Both become LostWorkerError (exit code 71) with the rank named where its
process can be seen from here. torchrun itself leaves with 1 whatever its ranks say, and lists
their exit codes.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import vlbeit.errors
from vlbeit.errors import ConfigError, LostWorkerError, VLBeitError
from vlbeit.train.runfolder import process_start

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

ORPHAN_GRACE = 6.0
"""Seconds a rank may still save after its launcher died; then it ends."""

DYING = 2.0
"""Seconds in which a rank that has just died is looked for."""

_PR_SET_PDEATHSIG = 1

_LOST = (
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "timed out",
    "timeout",
    "gloo",
    "nccl",
)
"""What the messages of a failed collective hold; gloo raises plain RuntimeError."""


@dataclass(frozen=True)
class Peer:
    """Where a rank runs, so that the others can tell whether it still does."""

    rank: int
    host: str
    pid: int
    started: int | None


@dataclass(frozen=True)
class World:
    """This process among those of the run. One process alone needs no launcher and no sockets."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this host; they share its cores."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: float = 600.0
    """Seconds after which a collective gives up."""
    peers: tuple[Peer, ...] = ()

    @property
    def main(self) -> bool:
        """True at rank 0, which alone writes the run folder."""
        return self.rank == 0

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, and the tensor again.

        Raises:
            LostWorkerError: another rank is gone or silent.
        """
        if self.size > 1:
            with self.guard("adding over ranks"):
                dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank, at every rank.

        Raises:
            LostWorkerError: another rank is gone or silent.
        """
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.guard("gathering from ranks"):
            sizes = torch.zeros(self.size, dtype=torch.int64, device=self.device)
            sizes[self.rank] = len(data)
            dist.all_reduce(sizes)
            longest = int(sizes.max())
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(data)] = data
            pieces = [
                torch.zeros(longest, dtype=torch.uint8, device=self.device)
                for _ in range(self.size)
            ]
            dist.all_gather(pieces, padded.to(self.device))
        return [
            json.loads(bytes(piece[:size].cpu().numpy()))
            for piece, size in zip(pieces, sizes.tolist(), strict=True)
        ]

    def barrier(self) -> None:
        """Waits for all ranks.

        Raises:
            LostWorkerError: another rank is gone or silent.
        """
        self.sum_over_ranks(torch.zeros(1, device=self.device))

    def on_main(self, action: Callable[[], Any]) -> Any:
        """What `action` returns at rank 0 (a JSON value), at every rank.

        Opening the run folder, choosing a checkpoint and saving happen at rank 0 alone. When they
        fail there, every rank raises the same error, so that the job ends with one exit code and
        nobody waits.
        """
        answer: dict[str, Any] = {}
        if self.main:
            try:
                answer = {"value": action()}
            except VLBeitError as error:
                if self.size == 1:
                    raise
                answer = {"error": type(error).__name__, "message": str(error)}
        answer = self.gather_objects(answer)[0]
        if "error" in answer:
            raise getattr(vlbeit.errors, answer["error"])(answer["message"])
        return answer["value"]

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Turns a failed collective inside into LostWorkerError; other errors pass unchanged.

        Also for what calls collectives by itself: wrap the backward pass of a DDP model.
        """
        try:
            yield
        except RuntimeError as error:
            told = isinstance(error, dist.DistError) or any(
                sign in str(error).lower() for sign in _LOST
            )
            if self.size == 1 or not told:
                raise
            raise LostWorkerError(self._lost_message(doing, error)) from error

    def _lost_message(self, doing: str, error: RuntimeError) -> str:
        # A dying process closes its sockets a moment before it shows as dead.
        deadline = time.monotonic() + DYING
        while not (gone := [fate for peer in self.peers if (fate := self._fate(peer))]):
            if not self.peers or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        who = "; ".join(gone) or "which one cannot be seen from here; see the launcher's report"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"rank {self.rank} of {self.size} lost another rank while {doing} ({who}). Limit for "
            f"an answer: {self.timeout:.0f} s (runtime.step_timeout). {first}. The newest "
            "checkpoint is untouched; run the same command again."
        )

    def _fate(self, peer: Peer) -> str:
        """What happened to a peer, as far as /proc shows; empty while it runs or is elsewhere."""
        if peer.rank == self.rank or peer.host != socket.gethostname():
            return ""
        name = f"rank {peer.rank}, process {peer.pid},"
        if process_start(peer.pid) != peer.started:
            return f"{name} is gone"
        try:
            fields = Path(f"/proc/{peer.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return f"{name} is gone"
        if fields[0] in "ZX":  # dead, and the launcher has not yet asked how it ended
            status = int(fields[49])
            if os.WIFSIGNALED(status):
                return f"{name} was ended by {signal.Signals(os.WTERMSIG(status)).name}"
            return f"{name} ended with exit code {os.waitstatus_to_exitcode(status)}"
        if fields[0] in "Tt":
            return f"{name} is stopped"
        return ""

    def close(self) -> None:
        """Leaves the group in good order; not after a LostWorkerError, where it could wait."""
        if self.size > 1:
            leave_group()


def leave_group() -> None:
    """Ends this process's part in the group, and the threads behind it; without one, nothing.

    gloo's threads give a finished sum's tensor back a moment after its wait is over, and need the
    interpreter for that. One that comes while the interpreter is ending aborts the process
    (SIGABRT instead of the exit code). They end with the last reference to the group: the
    command calls this once more when every model that held one is gone.
    """
    if not dist.is_available():
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # a wrapped model and its hooks are a cycle that holds the group


def init_world(device: Literal["auto", "cpu", "cuda"], timeout: float) -> World:
    """Joins the ranks that torchrun started, or makes a world of one without it.

    gloo on the CPU, NCCL on CUDA. `timeout` in seconds holds for the meeting at the start and for
    every collective after it.

    Raises:
        ConfigError: CUDA is asked for and not there, or there are more ranks than GPUs.
        LostWorkerError: the other ranks did not come.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default)) if launched else int(default)
        for name, default in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_RANK", "0"),
            ("LOCAL_WORLD_SIZE", "1"),
        )
    )
    if launched:
        leave_with_parent()
    world = World(
        rank, size, local_rank, local_size, choose_device(device, local_rank, local_size), timeout
    )
    if size == 1:
        return world
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    # This module keeps the group there is at its import as a default argument, for ever; an
    # optimizer imports it. Before the group is made it keeps none, so that `leave_group` ends it.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group(
            "nccl" if world.device.type == "cuda" else "gloo",
            store=fresh_store(rank, size, timeout),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
            device_id=world.device if world.device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise LostWorkerError(
            f"rank {rank} of {size}: the ranks did not meet within {timeout:.0f} s "
            f"(runtime.step_timeout): {error}"
        ) from error
    pid = os.getpid()
    own = [rank, socket.gethostname(), pid, process_start(pid)]
    peers = tuple(Peer(*entry) for entry in world.gather_objects(own))
    return replace(world, peers=peers)


def fresh_store(rank: int, size: int, timeout: float) -> Store:
    """The launcher's store, under a name that only the ranks started together know.

    When torchrun starts the ranks again after one was lost, the store still holds where the ranks
    of the start before were listening (torch 2.13), and torchrun's count of starts is each host's
    own. So rank 0 gives this start a name, every rank answers with a word of its own, and each goes
    on when it finds its own word among those that rank 0 read.

    Raises:
        RuntimeError: not all ranks came within `timeout` seconds.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    limit = timedelta(seconds=timeout)
    store, _, _ = next(rendezvous("env://", rank, size, timeout=limit))
    own = uuid.uuid4().hex
    if rank == 0:
        answers = [f"{own}/{other}" for other in range(1, size)]
        store.set("start", own)
        store.wait(answers, limit)
        words = [store.get(answer).decode() for answer in answers]
        store.set(f"{own}/words", json.dumps(words))
        return PrefixStore(own, store)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if store.check(["start"]):
            start = store.get("start").decode()
            store.set(f"{start}/{rank}", own)
            words_key = f"{start}/words"
            if store.check([words_key]) and own in json.loads(store.get(words_key)):
                return PrefixStore(start, store)
        time.sleep(0.02)
    raise RuntimeError("rank 0 did not answer")


def choose_device(choice: str, local_rank: int, local_size: int) -> torch.device:
    """The device of one of `local_size` processes on this host."""
    count = torch.cuda.device_count() if choice != "cpu" else 0
    if choice == "cpu" or (choice == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError("device: cuda was asked for and torch finds no GPU; use --device cpu")
    if local_size > count:
        raise ConfigError(
            f"device: {local_size} ranks on this host and {count} GPUs; start at most {count} "
            "(--nproc-per-node) or use --device cpu"
        )
    return torch.device("cuda", local_rank)


def leave_with_parent() -> None:
    """Makes this rank end when its launcher does, however that ended.

    The kernel sends SIGTERM at once, so the loop saves and stops as for any SIGTERM. A rank that
    has not left after `ORPHAN_GRACE` seconds ends with 71: a hung one must not keep the run
    folder's lock.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        print(
            f"rank {os.environ.get('RANK', '0')}: the launcher (process {parent}) is gone; "
            f"leaving within {ORPHAN_GRACE:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(ORPHAN_GRACE)
        os._exit(LostWorkerError.exit_code)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def set_threads(threads: int, local_size: int) -> int:
    """Gives this rank its CPU threads and returns their number, which goes into the manifest.

    0: the cores this process may use, divided by the ranks on this host. torchrun's own default of
    one thread is not kept.
    """
    count = threads or max(1, len(os.sched_getaffinity(0)) // local_size)
    torch.set_num_threads(count)
    return count


def use_deterministic_kernels() -> None:
    """The same sums in the same order in every run with the same ranks and threads.

    Without it the CPU adds gradients of repeated rows (embeddings, picked rows) by atomics once
    there is more than one thread. Operations that have no such kernel on CUDA warn and run.
    """
    # cuBLAS reads it when it starts; nothing has used it yet.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory guards against reading it unset; it costs a pass over every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
