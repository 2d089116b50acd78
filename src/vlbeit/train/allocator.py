"""The C library's allocator, set for a process that trains on the CPU.

Every step asks for the same large blocks. glibc gives each of them back to the kernel and fetches
it again, page by page: about a tenth of a `base` step (docs/notebook.md). Here it is told to keep
them.
"""

import ctypes
import os
import platform

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
"""Names of the settings in glibc's malloc.h."""

KEEP = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 1 << 26}
"""Bytes: blocks below 1 GiB come from the heap, whose free end stays until it has 2 GiB; the heap
grows by 64 MiB at a time."""

OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Makes this process keep freed memory for the next step; returns whether it does now.

    For a command that trains, never at import: it holds for the whole process. Without glibc, and
    where the environment sets the allocator itself (any of `OWN`), nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OWN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(setting, value) == 1 for setting, value in KEEP.items()]
    return all(taken)
