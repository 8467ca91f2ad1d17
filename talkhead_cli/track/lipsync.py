"""Estimation of how late the sound of a film comes after its lips.

A linear map, trained on other people, predicts lip motion from log-mel; the offset is the time
shift at which the prediction agrees best with the tracked lips.  Zero is the median offset of the
training films (benchmarks/offset.py, which also measures how often the estimate is right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve
from scipy.ndimage import uniform_filter1d

from talkhead_cli.contracts import FPS
from talkhead_cli.track import face, voice

Array = NDArray[np.floating[Any]]

WEIGHTS = Path(__file__).with_name("lipsync.npy")
N_STEPS = 57  # rows of log-mel around a frame's middle: +- 280 ms
COUNTS = np.array([1.0, 0.5, 0.5])  # weights of opening, width and jaw in the agreement
SLOW = 51  # frames of the running mean removed: slower motion is not speech
REACH = 15  # largest shift tried, frames either way
NEAR = 3  # shifts this close to the best one, in frames, belong to its peak
ROWS = 2048  # frames predicted at once
MIN_SECONDS = 8.0  # shorter films give no estimate
MIN_LEARN_SECONDS = 3.0  # the same for training films
SURE = 0.1  # margin above which shifts were right; wrong sound reaches it in 4 % of 8 s pieces


@dataclass(frozen=True)
class Offset:
    """Estimate: sound_after_lips_s, how late the sound is, negative if early · agreement: mean of
    COUNTS times the correlations of lips and sound there · margin: agreement minus the best one
    elsewhere, 0 if the best shift is an end of the range tried, as the true one may lie beyond."""

    sound_after_lips_s: float
    agreement: float
    margin: float

    @property
    def is_sure(self) -> bool:
        return self.margin >= SURE

    def __str__(self) -> str:
        late = 1000 * self.sound_after_lips_s
        return f"{abs(late):.0f} ms {'after' if late > 0 else 'before'} the lips"


def lip_motion(mesh: Array) -> Array:
    """Mesh (T, 478, >=2) of consecutive frames, pixels, gaps filled -> (T, 3): opening, width, jaw
    drop, relative to the eye distance, without their slow part, each of standard deviation 1."""
    chosen = [face.MESH_TO_68[i] for i in (62, 66, 48, 54, 8, 33, 36, 45)]
    upper, lower, left, right, chin, nose, eye, other_eye = (
        mesh[:, i, :2].astype(np.float64) for i in chosen
    )
    eyes = np.linalg.norm(eye - other_eye, axis=1)
    parts = [
        np.linalg.norm(a - b, axis=1) / np.maximum(eyes, 1e-6)
        for a, b in ((upper, lower), (left, right), (chin, nose))
    ]
    quick = without_slow(np.stack(parts, 1))
    return quick / np.maximum(quick.std(0), 1e-9)


def without_slow(values: Array) -> Array:
    """Subtract from values (T, K) their running mean over SLOW frames."""
    return values - uniform_filter1d(values, SLOW, axis=0, mode="nearest")


def windows(stream: Array, frames: NDArray[Any], shift: int = 0) -> Array:
    """Return standardised log-mel (n, 57 x 40) around the frames, `shift` rows of 10 ms later."""
    mel = stream[:, : voice.N_MEL]
    rows = frames * (voice.RATE_HZ // FPS) + 2 + shift
    rows = rows[:, None] + np.arange(N_STEPS) - N_STEPS // 2
    found = mel[np.clip(rows, 0, len(mel) - 1)]
    return ((found - mel.mean(0)) / (mel.std(0) + 1e-3)).reshape(len(frames), -1)


@lru_cache(maxsize=1)
def shipped() -> NDArray[np.float32]:
    """Return the map (57 x 40, 3) that ships with the package."""
    return np.load(WEIGHTS, allow_pickle=False).astype(np.float32)


def measure(
    stream: Array,
    frames: NDArray[Any],
    lips: Array,
    weight: Array | None = None,
    *,
    min_seconds: float = MIN_SECONDS,
) -> Offset | None:
    """Estimate the offset from speech features (rows, A) and `lip_motion` (n, 3) of frames (n,).

    Returns None if less than `min_seconds` is usable or the mouth does not move.
    """
    weight = shipped() if weight is None else weight
    total = len(stream) * FPS // voice.RATE_HZ
    kept = (frames >= REACH) & (frames < total - REACH)
    if kept.sum() < min_seconds * FPS - 2 * REACH or lips[kept].std(0).min() < 1e-6:
        return None
    every = np.arange(total)
    said = np.concatenate(
        [
            windows_of @ weight
            for a in range(0, total, ROWS)
            for windows_of in [windows(stream, every[a : a + ROWS])]
        ]
    )
    said, seen, at = without_slow(said), lips[kept], frames[kept]
    agreed = np.array([_agreement(seen, said[at + s]) for s in range(-REACH, REACH + 1)])
    best = int(agreed.argmax())
    elsewhere = np.abs(np.arange(len(agreed)) - best) > NEAR
    return Offset(
        sound_after_lips_s=(best + _between(agreed, best) - REACH) / FPS,
        agreement=float(agreed[best]),
        margin=float(agreed[best] - agreed[elsewhere].max()) if 0 < best < 2 * REACH else 0.0,
    )


def _agreement(seen: Array, said: Array) -> float:
    a, b = seen - seen.mean(0), said - said.mean(0)
    scale = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return float((COUNTS * (a * b).sum(0) / np.maximum(scale, 1e-9)).mean())


def _between(values: Array, best: int) -> float:
    """Vertex of the parabola through the best value and its neighbours, -0.5 to 0.5."""
    if not 0 < best < len(values) - 1:
        return 0.0
    before, top, after = values[best - 1 : best + 2]
    bend = before - 2 * top + after
    return float(0.5 * (before - after) / bend) if bend < 0 else 0.0


# -- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talk:
    """Training film of one person: speech features (rows, A), lips (n, 3) of the frames (n,)."""

    stream: Array
    frames: NDArray[Any]
    lips: Array


def train(
    talks: Sequence[Talk], *, ridge: float = 6.0, rounds: int = 3
) -> tuple[NDArray[np.float32], Array]:
    """Return the map (57 x 40, 3), and each film's offset against the median film's, seconds.

    Ridge regression over all films, equally weighted.  Their offsets are not known: each film is
    shifted by what a map of the other films estimates (up to 0.2 s), and the map solved again.
    """
    late = np.zeros(len(talks))
    for _ in range(rounds):
        sums = [_sums(t, round(s * voice.RATE_HZ)) for t, s in zip(talks, late, strict=True)]
        x_x, x_y = (sum(part) for part in zip(*sums, strict=True))
        found = []
        for talk, (own_x, own_y) in zip(talks, sums, strict=True):
            offset = measure(
                talk.stream,
                talk.frames,
                talk.lips,
                _solved(x_x - own_x, x_y - own_y, ridge),
                min_seconds=MIN_LEARN_SECONDS,
            )
            found.append(0.0 if offset is None else offset.sound_after_lips_s)
        late = np.array(found) - np.median(found)
        late = late.clip(-0.2, 0.2)
    return _solved(x_x, x_y, ridge).astype(np.float32), late


def _sums(talk: Talk, shift: int) -> tuple[Array, Array]:
    x, y = windows(talk.stream, talk.frames, shift), talk.lips
    x, y = x - x.mean(0), y - y.mean(0)
    return x.T @ x / len(x), x.T @ y / len(x)


def _solved(x_x: Array, x_y: Array, ridge: float) -> Array:
    return solve(x_x + ridge * np.eye(len(x_x)), x_y, assume_a="pos")
