"""Keeping freed memory instead of giving it back to the system after every picture and step.

glibc hands large freed blocks back at once and asks for them again at the next picture, gradient
or activation; each time the system clears the pages anew: about a tenth of a `base` step
(docs/notebook.md). Called by processes that are ours alone (a run, a loader worker, a benchmark),
never by importing the package: the setting is the process's.
"""

import ctypes
import os
import platform

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

KEPT = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1}
"""Bytes: blocks below 1 GiB come from the heap, which shrinks when 2 GiB lie free at its end."""

OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""With one of these in the environment somebody has set the allocator already."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed.

    Returns:
        False where there is no glibc or the environment sets it (`OWN`): nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OWN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(name, value) == 1 for name, value in KEPT.items()]
    return all(taken)
