"""How the process keeps memory."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 512 << 20
LARGEST = 32 << 20  # more than that glibc refuses


def keep_freed_memory() -> bool:
    """Let glibc reuse freed arrays; whether it is there and agreed.

    By default it gives arrays of some megabytes back to the kernel, which clears them page by
    page when the next operation asks for as many: a seventh of the field's time on two cores.
    At most `KEEP` bytes stay with the process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, KEEP))
