"""How much of a clip is held out of training; apart from footage, since tracking does without
torch."""

from __future__ import annotations

from talkhead_cli.contracts import FPS

MIN_HOLDOUT = 4 * FPS
MAX_HOLDOUT = 0.25  # share of the usable frames; more is never held out


def split(n_frames: int, holdout: float) -> int:
    """Return how many frames at the end are held out: a share, at least 4 s, at most a quarter."""
    if holdout == 0:
        return 0
    return min(max(round(holdout * n_frames), MIN_HOLDOUT), int(MAX_HOLDOUT * n_frames))
