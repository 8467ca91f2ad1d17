"""Landmark tracks as files, to view, edit, and drive another face with.

A track is a .npz archive of plain arrays (no pickles):

    landmarks  (T, 68, 3) float  iBUG order, head space: x to the person's left, y down, z away
               from the camera, origin between the ears, in face heights; 25 rows a second
    neutral    (68, 3) float  the same face at rest; motion is the displacement from it, so that
               one person's track can drive another's face
    eye        (T, 2) float, optional  openness of the eyes on the picture's left and right,
               0 shut ... 1 open; used while --blink is at its default, and where lids are
               among the landmarks (method landmark)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import (
    FPS,
    JAWLINE,
    LIPS,
    LOWER_LIP,
    N_LANDMARKS,
    UPPER_LIP,
    TalkheadError,
)
from talkhead_cli.jobs.drive import EYE_ROOM
from talkhead_cli.store.files import read_arrays, write_arrays

MAX_AWAY = 1.0  # face heights from the neutral face; more than any jaw drops


@dataclass(frozen=True)
class LandmarkTrack:
    """landmarks (T, 68, 3) · neutral (68, 3) · eye (T, 2) or None."""

    landmarks: NDArray[np.float32]
    neutral: NDArray[np.float32]
    eye: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.landmarks)

    @property
    def lip_gap(self) -> NDArray[np.float32]:
        """Opening of the lips (T,), face heights."""
        return self.landmarks[:, LOWER_LIP, 1] - self.landmarks[:, UPPER_LIP, 1]

    def louder(self, lips: float, jaw: float) -> LandmarkTrack:
        """Scale the displacement of lips and jaw from the neutral face by these gains."""
        marks = self.landmarks.copy()
        for part, gain in ((LIPS, lips), (JAWLINE, jaw)):
            rest = self.neutral[part]
            marks[:, part] = rest + gain * (marks[:, part] - rest)
        return replace(self, landmarks=marks)

    def on(self, neutral: NDArray[Any]) -> LandmarkTrack:
        """Return the same motion on another neutral face (68, 3)."""
        marks = self.landmarks - self.neutral + neutral
        return replace(self, landmarks=marks.astype(np.float32), neutral=neutral)


def write(path: Path, track: LandmarkTrack) -> None:
    arrays = {"landmarks": track.landmarks, "neutral": track.neutral}
    write_arrays(path, arrays if track.eye is None else arrays | {"eye": track.eye}, compress=True)


def read(path: Path) -> LandmarkTrack:
    """Read a track from a file; TalkheadError if it is missing or invalid."""
    if not path.is_file():
        raise TalkheadError(f"--landmarks {path}: there is no such file")
    try:
        arrays = read_arrays(path)
    except TalkheadError as error:
        raise TalkheadError(
            f"--landmarks {path}: not a .npz archive of arrays; make one with: talkhead landmarks"
        ) from error
    marks = _array(path, arrays, "landmarks", (None, N_LANDMARKS, 3))
    neutral = _array(path, arrays, "neutral", (N_LANDMARKS, 3))
    eye = _array(path, arrays, "eye", (len(marks), 2)) if "eye" in arrays else None
    if eye is not None and (eye.min() < -EYE_ROOM or eye.max() > 1 + EYE_ROOM):
        raise TalkheadError(
            f"--landmarks {path}: 'eye' counts from 0 (shut) to 1 (open), not from {eye.min():g} "
            f"to {eye.max():g}"
        )
    away = float(np.abs(marks - neutral).max())
    if away > MAX_AWAY:
        raise TalkheadError(
            f"--landmarks {path}: landmarks lie up to {away:.3g} from the neutral face; they "
            "count in face heights, in head space"
        )
    return LandmarkTrack(marks, neutral, eye)


def _array(
    path: Path, arrays: dict[str, NDArray[Any]], name: str, shape: tuple[int | None, ...]
) -> NDArray[np.float32]:
    wanted = "(" + ", ".join("T" if n is None else str(n) for n in shape) + ")"
    found = arrays.get(name)
    if found is None:
        raise TalkheadError(f"--landmarks {path}: has no array '{name}' {wanted}")
    fits = found.ndim == len(shape) and all(
        n in (None, have) for n, have in zip(shape, found.shape, strict=True)
    )
    if not fits or not found.size or found.dtype.kind not in "fiu":
        raise TalkheadError(
            f"--landmarks {path}: '{name}' is {found.dtype} {found.shape}; it must be numbers "
            f"{wanted}"
        )
    if not np.isfinite(found).all():
        raise TalkheadError(f"--landmarks {path}: '{name}' holds values that are not numbers")
    return found.astype(np.float32)


def fits_film(track: LandmarkTrack, n_frames: int, path: Path) -> None:
    """Raise TalkheadError if track and speech differ in length by more than a frame."""
    if abs(len(track) - n_frames) > 1:
        raise TalkheadError(
            f"--landmarks {path} has {len(track)} rows ({len(track) / FPS:.2f} s) and the speech "
            f"{n_frames} frames ({n_frames / FPS:.2f} s); make the track from this speech"
        )
