"""A first look at the film: how many faces, and the part of the picture to follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.track.face import FaceDetector

FACES = ("largest", "left", "right")


@dataclass(frozen=True)
class Scene:
    """Faces present for a fair part of the film, the region (x, y, w, h) of the chosen one, and in
    which of the pictures looked at it was seen."""

    n_faces: int
    roi: tuple[int, int, int, int]
    seen_in: frozenset[int] = frozenset()


def scout(
    frames: Iterable[NDArray[np.uint8]], size: tuple[int, int], which: str = "largest",
    detector: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Scene:  # fmt: skip
    """Look at a few frames (of any one size) of a film of `size` (width, height), or at a picture.

    Faces are linked between frames by place.  `which`: largest, left or right.  `detector` finds
    them; by default MediaPipe's.
    """
    if which not in FACES:
        raise MisuseError(f"--face must be {', '.join(FACES)}, not '{which}'")
    tracks: list[_Face] = []
    n_frames = 0
    with (detector or FaceDetector)() as detect:
        for rgb in frames:
            n_frames += 1
            shape = np.array([rgb.shape[1], rgb.shape[0]] * 2, np.float32)
            for box in detect(rgb):
                _link(tracks, box / shape, n_frames - 1)
    whole = (0, 0, size[0], size[1])
    if not tracks:
        # the mesh has a detector of its own and gets the last word
        return Scene(0, whole)
    most = max(track.area for track in tracks)
    lasting = [t for t in tracks if len(t.boxes) >= 0.3 * n_frames and t.area >= 0.1 * most]
    lasting = lasting or [max(tracks, key=lambda track: track.area)]
    chosen = {
        "largest": max(lasting, key=lambda track: track.area),
        "left": min(lasting, key=lambda track: track.middle),
        "right": max(lasting, key=lambda track: track.middle),
    }[which]
    # faces of other shots stand in nobody's way
    others = [t for t in lasting if t is not chosen and t.frames & chosen.frames]
    if not others:
        return Scene(1, whole, frozenset(chosen.frames))
    return Scene(1 + len(others), _region(chosen, others, size), frozenset(chosen.frames))


@dataclass
class _Face:
    """One face: where it was (x0, y0, x1, y1) in shares of the picture, in which frames."""

    boxes: list[NDArray[np.float32]] = field(default_factory=list)
    frames: set[int] = field(default_factory=set)

    @property
    def area(self) -> float:
        return sum(float((b[2] - b[0]) * (b[3] - b[1])) for b in self.boxes)

    @property
    def middle(self) -> float:
        return float(np.median([b[0] + b[2] for b in self.boxes]))

    def add(self, box: NDArray[np.float32], frame: int) -> None:
        self.boxes.append(box)
        self.frames.add(frame)


def _link(tracks: list[_Face], box: NDArray[np.float32], frame: int) -> None:
    centre, width = box[[0, 1]] + box[[2, 3]], box[2] - box[0]
    for track in tracks:
        last = track.boxes[-1]
        if np.abs(last[[0, 1]] + last[[2, 3]] - centre).max() < 1.2 * max(width, last[2] - last[0]):
            track.add(box, frame)
            return
    tracks.append(_Face([box], {frame}))


def _region(face: _Face, others: list[_Face], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The chosen face's surroundings, cut half-way to its neighbours, in pixels."""
    chosen = np.stack(face.boxes)
    # a face at the edge reaches out of the picture, says the detector
    low, high = chosen[:, :2].min(0).clip(0, 1), chosen[:, 2:].max(0).clip(0, 1)
    grow = 1.2 * (chosen[:, 2:] - chosen[:, :2]).max(0)
    first, end = np.maximum(low - grow, 0), np.minimum(high + grow, 1)
    for other in others:
        boxes = np.stack(other.boxes)
        lowest, highest = boxes[:, :2].min(0), boxes[:, 2:].max(0)
        # beside, above or below: along the axis on which there is more between them
        gaps = np.maximum(lowest - high, low - highest)
        axis = int((gaps * size).argmax())
        if boxes[:, axis].mean() > chosen[:, axis].mean():
            end[axis] = min(end[axis], (high[axis] + lowest[axis]) / 2)
        else:
            first[axis] = max(first[axis], (low[axis] + highest[axis]) / 2)
    if (np.minimum(end, high) - np.maximum(first, low) < 0.8 * (high - low)).any():
        raise TalkheadError(
            "two faces cover each other; use a part, of the film or of the picture, in which they "
            "stay apart"
        )
    (x, y), (right, bottom) = ((corner * size).astype(int).tolist() for corner in (first, end))
    return x, y, right - x, bottom - y
