"""Keeping freed memory instead of giving it back to the system after every picture and step.

glibc hands large freed blocks back at once and asks for them again at the next picture, gradient
or activation; each time the system clears the pages anew. Called by processes that are ours alone
(a run, a loader worker, a benchmark), never by importing the package: the setting is the process's.
"""

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_KEPT_BYTES = 1 << 30
"""Blocks up to this size come from the heap, and the heap shrinks when more than this lies free
at its end."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; False where there is no glibc, and nothing is changed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, _KEPT_BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
