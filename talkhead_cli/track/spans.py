"""Runs of True in flags of frames."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def spans(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the runs of True in flags (T,): first frame and the frame after the last, (n, 2)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return edges.reshape(-1, 2)


def in_words(flags: NDArray[np.bool_]) -> str:
    """Return the runs of True as "first-last, first-last"; empty if there is none."""
    return ", ".join(f"{first}-{end - 1}" for first, end in spans(flags))
