"""A part of a film: its frames and its sound, counted from where the part begins."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from talkhead_cli.media.audio import Samples, sound
from talkhead_cli.media.ffmpeg import probe
from talkhead_cli.media.video import Picture, frames

BACKWARDS = 16  # frames decoded forwards and buffered at a time for backward playback
MAX_HELD_BYTES = 2**29  # where a file has no index, and every block costs a decode from its start


@dataclass(frozen=True)
class Part:
    """Frames `first` ... of a film at 25 a second; at most `n_frames` of them, if that is given."""

    path: Path
    first: int = 0
    n_frames: int | None = None

    def frames(
        self, *, first: int = 0, n_frames: int | None = None, stride: int = 1, **options: Any
    ) -> Generator[Picture, None, None]:
        """Yield frames as `media.frames` does, from frame `first` of the part on."""
        left = None if self.n_frames is None else math.ceil((self.n_frames - first) / stride)
        limits = [n for n in (left, n_frames) if n is not None]
        return frames(
            self.path,
            start_s=(self.first + first) / FPS,
            n_frames=min(limits, default=None),
            stride=stride,
            **options,
        )

    def played(self, rows: NDArray[np.integer[Any]], **options: Any) -> Generator[Picture]:
        """Yield frames in the order of `rows` (n,), which may run backwards, in constant memory."""
        if not len(rows):
            return
        step = np.diff(rows)
        held_at_once = BACKWARDS
        if (step < 0).any() and not (about := probe(self.path)).has_index:
            # each block is decoded from the beginning of the file
            width, height = options.get("size") or (about.width, about.height)
            held_at_once = max(BACKWARDS, MAX_HELD_BYTES // (3 * width * height))
        for run in np.split(rows, np.flatnonzero(step[1:] != step[:-1]) + 2):
            first, n = int(run[0]), len(run)
            if n == 1 or run[1] == first + 1:
                yield from self.frames(first=first, n_frames=n, **options)
                continue
            if run[1] != first - 1:
                raise ValueError(f"rows {run[:3]} ... are not one after the other")
            for begin in range(0, n, held_at_once):
                block = run[begin : begin + held_at_once]
                held = list(self.frames(first=int(block[-1]), n_frames=len(block), **options))
                yield from reversed(held)

    def heard(self) -> Samples:
        """Return the sound of the part as far as there is any, whatever duration is declared."""
        first = self.first * SAMPLES_PER_FRAME
        if self.n_frames is None:
            return sound(self.path)[first:]
        return sound(self.path, n_samples=first + self.n_frames * SAMPLES_PER_FRAME)[first:]

    def sound(self, n_samples: int, *, late_s: float = 0.0) -> Samples:
        """Return (n_samples,) from `late_s` after the part's start on; silence beyond the film."""
        first = self.first * SAMPLES_PER_FRAME + round(late_s * SAMPLE_RATE_HZ)
        samples = sound(self.path, n_samples=max(0, first + n_samples))[max(0, first) :]
        return np.pad(samples, (n_samples - len(samples), 0))
