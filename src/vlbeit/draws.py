"""Random numbers that depend on their key alone.

Every random draw of a run (order, crop, flip, caption, mask, dropped path) comes from a stream
keyed by names and numbers such as (seed, epoch, source, sample). Nothing depends on the rank,
the worker, the wall clock or what was drawn before, so a run can stop at any step and go on
with another number of processes.

Only the raw 64-bit output of Philox is used: NumPy promises that it never changes, while the
methods of `numpy.random.Generator` may.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def key_of(*parts: int | str) -> int:
    """A 128-bit number made from the parts; ("a", 1) and ("a1",) differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


class Draws:
    """A stream of random numbers fixed by its key.

    >>> Draws(0, "crop", 17).uniform() == Draws(0, "crop", 17).uniform()
    True
    """

    def __init__(self, *key: int | str) -> None:
        self._bits = np.random.Philox(key=key_of(*key))

    def raw(self, count: int) -> np.ndarray:
        """(count,) uint64."""
        return self._bits.random_raw(count)

    def words(self, count: int) -> np.ndarray:
        """(count,) int32, every value as likely as the others: the halves of the raw numbers."""
        return self.raw((count + 1) // 2).astype("<u8", copy=False).view("<i4")[:count]

    def uniforms(self, count: int) -> np.ndarray:
        """(count,) float64 in [0, 1)."""
        return (self.raw(count) >> np.uint64(11)) * (1.0 / (1 << 53))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One float in [low, high)."""
        return low + (high - low) * float(self.uniforms(1)[0])

    def integer(self, low: int, high: int) -> int:
        """One int in [low, high)."""
        if high <= low:
            raise ValueError(f"no integer in [{low}, {high})")
        return low + int(self.uniform() * (high - low))

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        """(count,) int64 in [low, high)."""
        if high <= low:
            raise ValueError(f"no integer in [{low}, {high})")
        return low + (self.uniforms(count) * (high - low)).astype(np.int64)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each as likely as the others."""
        return items[self.integer(0, len(items))]

    def permutation(self, count: int) -> np.ndarray:
        """(count,) int64, the numbers 0..count-1 in random order."""
        return np.argsort(self.raw(count), kind="stable")
