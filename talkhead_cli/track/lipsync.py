"""How late the sound of a film comes after its lips.

A linear map, trained on other people, says from log-mel how lips move; where in time what it
says agrees best with the lips that are seen, there the sound belongs.  Zero is the median of the
films it was trained on (benchmarks/offset.py, which also says how often it is right).
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
N_STEPS = 57  # rows of log-mel round a frame's middle: +- 280 ms
COUNTS = np.array([1.0, 0.5, 0.5])  # how much opening, width and jaw count
SLOW = 51  # frames; what moves slower than that is not speech
REACH = 15  # frames either way that are tried
NEAR = 3  # frames round the best shift that are the same peak
ROWS = 2048  # frames heard at once
MIN_SECONDS = 8.0  # shorter films cannot say
MIN_LEARN_SECONDS = 3.0  # of films that the map is trained on
SURE = 0.1  # margin from which on shifts were right; wrong sound reaches it in 4 % of 8 s


@dataclass(frozen=True)
class Offset:
    """sound_after_lips_s: how late the sound is, negative when early · agreement: weighted mean
    correlation of lips and sound there · margin: over the best agreement elsewhere, 0 where it is
    at the end of what was tried and may go on beyond."""

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
    """Frames in a row (T, 478, >=2) in pixels, gaps bridged -> (T, 3): opening, width and drop of
    the jaw against the distance of the eyes, without what moves slowly, each with deviation 1."""
    chosen = [face.MESH_TO_68[i] for i in (62, 66, 48, 54, 8, 33, 36, 45)]
    upper, lower, left, right, chin, nose, eye, other_eye = (
        mesh[:, i, :2].astype(np.float64) for i in chosen
    )
    eyes = np.linalg.norm(eye - other_eye, axis=1)
    parts = [np.linalg.norm(a - b, axis=1) / np.maximum(eyes, 1e-6)
             for a, b in ((upper, lower), (left, right), (chin, nose))]  # fmt: skip
    quick = without_slow(np.stack(parts, 1))
    return quick / np.maximum(quick.std(0), 1e-9)


def without_slow(values: Array) -> Array:
    """(T, K) less its running mean over SLOW frames."""
    found: Array = values - uniform_filter1d(values, SLOW, axis=0, mode="nearest")
    return found


def windows(stream: Array, frames: NDArray[Any], shift: int = 0) -> Array:
    """Standardised log-mel round the frames, heard `shift` rows of 10 ms later: (n, 57 x 40)."""
    mel = stream[:, : voice.N_MEL]
    rows = frames * (voice.RATE_HZ // FPS) + 2 + shift
    rows = rows[:, None] + np.arange(N_STEPS) - N_STEPS // 2
    found = mel[np.clip(rows, 0, len(mel) - 1)]
    return ((found - mel.mean(0)) / (mel.std(0) + 1e-3)).reshape(len(frames), -1)


@lru_cache(maxsize=1)
def shipped() -> NDArray[np.float32]:
    """The map (57 x 40, 3) that comes with the package."""
    weight: NDArray[np.float32] = np.load(WEIGHTS, allow_pickle=False).astype(np.float32)
    return weight


def measure(
    stream: Array, frames: NDArray[Any], lips: Array, weight: Array | None = None, *,
    min_seconds: float = MIN_SECONDS,
) -> Offset | None:  # fmt: skip
    """Of speech features (rows, A) and lips (n, 3), as `lip_motion` has them, seen in the frames
    (n,); None where fewer seconds, or a mouth that never moves, can say nothing.
    """
    weight = shipped() if weight is None else weight
    total = len(stream) * FPS // voice.RATE_HZ
    kept = (frames >= REACH) & (frames < total - REACH)
    if kept.sum() < min_seconds * FPS - 2 * REACH or lips[kept].std(0).min() < 1e-6:
        return None
    every = np.arange(total)
    said = np.concatenate([
        windows_of @ weight
        for a in range(0, total, ROWS)
        for windows_of in [windows(stream, every[a : a + ROWS])]
    ])  # fmt: skip
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
    """Where the top of the parabola through the best value and its neighbours lies, -0.5 to 0.5."""
    if not 0 < best < len(values) - 1:
        return 0.0
    before, top, after = values[best - 1 : best + 2]
    bend = before - 2 * top + after
    return float(0.5 * (before - after) / bend) if bend < 0 else 0.0


# -- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talk:
    """A film of one person: speech features (rows, A), lips (n, 3) in the frames (n,)."""

    stream: Array
    frames: NDArray[Any]
    lips: Array


def train(
    talks: Sequence[Talk], *, ridge: float = 6.0, rounds: int = 3
) -> tuple[NDArray[np.float32], Array]:
    """The map (57 x 40, 3), and where each film's sound lies against the median film's, seconds.

    Ridge regression over all films, each counting the same.  Their own offsets are not known:
    each film is shifted to where the map of the others puts it, and the map solved anew.
    """
    late = np.zeros(len(talks))
    for _ in range(rounds):
        sums = [_sums(t, round(s * voice.RATE_HZ)) for t, s in zip(talks, late, strict=True)]
        x_x, x_y = (sum(part) for part in zip(*sums, strict=True))
        found = []
        for talk, (own_x, own_y) in zip(talks, sums, strict=True):
            offset = measure(talk.stream, talk.frames, talk.lips,
                             _solved(x_x - own_x, x_y - own_y, ridge),
                             min_seconds=MIN_LEARN_SECONDS)  # fmt: skip
            found.append(0.0 if offset is None else offset.sound_after_lips_s)
        late = np.array(found) - np.median(found)
        late = late.clip(-0.2, 0.2)
    return _solved(x_x, x_y, ridge).astype(np.float32), late


def _sums(talk: Talk, shift: int) -> tuple[Array, Array]:
    x, y = windows(talk.stream, talk.frames, shift), talk.lips
    x, y = x - x.mean(0), y - y.mean(0)
    return x.T @ x / len(x), x.T @ y / len(x)


def _solved(x_x: Array, x_y: Array, ridge: float) -> Array:
    found: Array = solve(x_x + ridge * np.eye(len(x_x)), x_y, assume_a="pos")
    return found
