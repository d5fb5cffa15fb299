"""Keeps the C library from giving memory back to the system between steps.

XLA's CPU backend allocates its temporaries anew for every execution. By default glibc takes large blocks straight from
the kernel and returns them when freed, so every step faults in (and the kernel zeroes) all its temporaries again. For a
small model that is a good part of the step.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h
_LARGEST = 2**31 - 1
_GROW = 256 * 2**20  # bytes by which the heap grows at a time


def keep_freed_memory() -> bool:
    """To be called before the first computation; whether this C library knows how (glibc does)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST, _TOP_PAD: _GROW}
    return all([mallopt(option, value) == 1 for option, value in options.items()])
