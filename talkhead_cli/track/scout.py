"""First pass over a film: count the faces and choose the region of the picture to track."""

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
# Width of a face, as a share of the picture's longer side, below which only its surroundings are
# searched: the mesh's own detector, made for selfies, finds no face of 0.09 in a whole picture.
SMALL = 0.15


@dataclass(frozen=True)
class Scene:
    """Number of lasting faces (the chosen one and those seen beside it), the chosen one's region
    (x, y, w, h), and indices of the frames in which it was found."""

    n_faces: int
    roi: tuple[int, int, int, int]
    seen_in: frozenset[int] = frozenset()


def scout(
    frames: Iterable[NDArray[np.uint8]],
    size: tuple[int, int],
    which: str = "largest",
    detector: Callable[[], AbstractContextManager[Any]] | None = None,
    *,
    narrow: bool = True,
) -> Scene:
    """Choose the face to track from a few frames (of any one size) of a film, or from a picture.

    size: (width, height) of the film · which: largest, left or right · detector: by default
    MediaPipe's · narrow: only the surroundings of a small face are its region.  Faces are linked
    between frames by position.
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
                _link(tracks, box / shape, n_frames - 1, tall=rgb.shape[0] / rgb.shape[1])
    whole = (0, 0, size[0], size[1])
    if not tracks:
        # the face mesh has a detector of its own, which decides
        return Scene(0, whole)
    most = max(track.area for track in tracks)
    lasting = [t for t in tracks if len(t.boxes) >= 0.3 * n_frames and t.area >= 0.1 * most]
    lasting = lasting or [max(tracks, key=lambda track: track.area)]
    chosen = {
        "largest": max(lasting, key=lambda track: track.area),
        "left": min(lasting, key=lambda track: track.middle),
        "right": max(lasting, key=lambda track: track.middle),
    }[which]
    # faces that never appear beside the chosen one need no separation
    others = [t for t in lasting if t is not chosen and t.frames & chosen.frames]
    if not others:
        if narrow and chosen.share_of(size) < SMALL:
            alone = [t for t in tracks if t is chosen or not t.frames & chosen.frames]
            boxes = [box for track in alone for box in track.boxes]  # wherever the person goes
            whole = _region(_Face(boxes), [], size)
        return Scene(1, whole, frozenset(chosen.frames))
    return Scene(1 + len(others), _region(chosen, others, size), frozenset(chosen.frames))


@dataclass
class _Face:
    """One face: its boxes (x0, y0, x1, y1) in fractions of the picture, and their frames."""

    boxes: list[NDArray[np.float32]] = field(default_factory=list)
    frames: set[int] = field(default_factory=set)

    @property
    def area(self) -> float:
        return sum(float((b[2] - b[0]) * (b[3] - b[1])) for b in self.boxes)

    @property
    def middle(self) -> float:
        return float(np.median([b[0] + b[2] for b in self.boxes]))

    def share_of(self, size: tuple[int, int]) -> float:
        """Return the face's width as a share of the longer side of pictures (width, height)."""
        return float(np.median([b[2] - b[0] for b in self.boxes])) * size[0] / max(size)

    def add(self, box: NDArray[np.float32], frame: int) -> None:
        self.boxes.append(box)
        self.frames.add(frame)


def _link(tracks: list[_Face], box: NDArray[np.float32], frame: int, *, tall: float) -> None:
    """Add the box to the track of the face that was last near it; tall: height over width."""
    unit = np.array([1.0, tall], np.float32)  # lengths are compared in widths of the picture
    for track in tracks:
        last = track.boxes[-1]
        moved = np.abs((last[:2] + last[2:] - box[:2] - box[2:]) * unit).max()
        if moved < 1.2 * max(float(((b[2:] - b[:2]) * unit).prod()) for b in (box, last)) ** 0.5:
            track.add(box, frame)
            return
    tracks.append(_Face([box], {frame}))


def _region(face: _Face, others: list[_Face], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the region around the chosen face, cut half-way to its neighbours, in pixels."""
    chosen = np.stack(face.boxes)
    # the detector's boxes of faces at the edge extend beyond the picture
    low, high = chosen[:, :2].min(0).clip(0, 1), chosen[:, 2:].max(0).clip(0, 1)
    grow = 1.2 * (chosen[:, 2:] - chosen[:, :2]).max(0)
    first, end = np.maximum(low - grow, 0), np.minimum(high + grow, 1)
    for other in others:
        boxes = np.stack(other.boxes)
        lowest, highest = boxes[:, :2].min(0), boxes[:, 2:].max(0)
        # separate the faces along the axis with the larger gap between them
        gaps = np.maximum(lowest - high, low - highest)
        axis = int((gaps * size).argmax())
        if boxes[:, axis].mean() > chosen[:, axis].mean():
            end[axis] = min(end[axis], (high[axis] + lowest[axis]) / 2)
        else:
            first[axis] = max(first[axis], (low[axis] + highest[axis]) / 2)
    if (np.minimum(end, high) - np.maximum(first, low) < 0.8 * (high - low)).any():
        raise TalkheadError(
            "two faces cover each other; use a part, of the video or of the picture, in which they "
            "stay apart"
        )
    (x, y), (right, bottom) = ((corner * size).astype(int).tolist() for corner in (first, end))
    return x, y, right - x, bottom - y
