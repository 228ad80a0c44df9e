"""One setting of the C library's allocator that makes training on a CPU an eighth faster (docs/benchmarks.md)."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the whole process; whether it could be set (elsewhere nothing is done).

    By default each tensor above 32 MB is mapped anew and unmapped at once, and the kernel clears every page of it again
    at first touch. A training step asks for the same sizes each time, so kept memory is simply used again; the
    peak was within 2 % of what it was.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return [mallopt(option, value) for option, value in settings] == [1, 1, 1]
