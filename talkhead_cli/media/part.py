"""A part of a film: its frames and its sound, counted from where the part begins."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from talkhead_cli.media.audio import Samples, sound
from talkhead_cli.media.video import Picture, frames


@dataclass(frozen=True)
class Part:
    """Frames `first` ... of a film at 25 a second; at most `n_frames` of them, if that is given."""

    path: Path
    first: int = 0
    n_frames: int | None = None

    def frames(
        self, *, first: int = 0, n_frames: int | None = None, stride: int = 1, **options: Any
    ) -> Generator[Picture, None, None]:
        """As `media.frames` yields them, from frame `first` of the part on."""
        left = None if self.n_frames is None else math.ceil((self.n_frames - first) / stride)
        limits = [n for n in (left, n_frames) if n is not None]
        return frames(
            self.path, start_s=(self.first + first) / FPS, n_frames=min(limits, default=None),
            stride=stride, **options,
        )  # fmt: skip

    def sound(self, n_samples: int, *, late_s: float = 0.0) -> Samples:
        """(n_samples,) from `late_s` after the part's beginning on; silent where there is none."""
        first = self.first * SAMPLES_PER_FRAME + round(late_s * SAMPLE_RATE_HZ)
        samples = sound(self.path, n_samples=max(0, first + n_samples))[max(0, first) :]
        return np.pad(samples, (n_samples - len(samples), 0))
