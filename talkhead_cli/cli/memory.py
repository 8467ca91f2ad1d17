"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 512 << 20
LARGEST = 32 << 20  # the most that glibc accepts


def keep_freed_memory() -> bool:
    """Let glibc reuse the memory of freed arrays; return whether glibc accepted the settings.

    By default it returns arrays of some megabytes to the kernel, which clears them page by page
    at the next allocation of that size: a seventh of the field's time on two cores.
    At most `KEEP` bytes of freed memory stay with the process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, KEEP))
