"""Memory of a training step: the most a process had, and what a forward pass leaves behind."""

import ctypes
import functools
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def memory_mb(device: torch.device) -> int:
    """Peak memory in MiB: of the GPU if there is one, else resident memory of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h: bytes, but for three counts."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _mallinfo2() -> Callable[[], _Mallinfo2] | None:
    """glibc's own count; None where the C library has none (macOS, musl, glibc before 2.33)."""
    try:
        found = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    found.restype = _Mallinfo2
    return found


def held_bytes(device: torch.device) -> int | None:
    """Bytes in live tensors now: of PyTorch's allocator on a GPU, of malloc on a CPU, where the
    rest of the process counts too. None: nothing here counts them.

    Unlike resident memory, what was freed and kept for later is not in it. No kernel is waited for.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    count = _mallinfo2()
    if count is None:
        return None
    found = count()
    return int(found.uordblks + found.hblkhd)


class ActivationMemory:
    """What forward passes leave to their backward passes, by stream: the most of any micro-batch.

        held = ActivationMemory(device)
        with held.forward("pair"):
            loss = ...
        loss.backward()

    That is the activations at their peak: the backward pass frees them layer by layer. Its own
    scratch (the gradient of the logits before all) comes on top.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bytes: dict[str, int] = {}

    @contextmanager
    def forward(self, stream: str) -> Iterator[None]:
        """Around one forward pass. One that raises is not counted."""
        before = held_bytes(self.device)
        yield
        after = held_bytes(self.device)
        if before is not None and after is not None:
            self._bytes[stream] = max(self._bytes.get(stream, 0), after - before)

    def mb(self) -> dict[str, float]:
        """MiB by stream; empty where nothing counts them."""
        return {stream: round(count / 2**20, 1) for stream, count in self._bytes.items()}
