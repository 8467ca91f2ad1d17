"""Shot detection: cuts in a film, and shots that repeat the main shot's picture, also zoomed
(editors zoom in between sentences)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from talkhead_cli.track.face import CHIN, TOP
from talkhead_cli.track.zoom import STILL, Zoom, measure_zoom, shows_head

Array = NDArray[np.floating[Any]]

THUMB = (64, 36)  # width, height of the pictures compared
ZOOM_PX = 480  # width of the pictures in which zooms are measured
MIN_ZOOM, LEANT = 0.02, 0.08  # log scales that are no zoom; LEANT if only faces tell
# A cut: mean change, of 255, over JUMP and over OVER_USUAL times the usual change plus 4 ...
JUMP, OVER_USUAL = 18.0, 8.0
# ... or under JUMP if the face changes at once: its log size, or position in face heights
SIZE_JUMP, PLACE_JUMP = 0.05, 0.1
USUAL_OF = 50  # preceding frames whose median change is the usual one
SAME = 12.0  # of 255: largest median difference between takes of one picture
NEAR = 0.6  # face heights that the face may move between takes
# A shot fades in or out if its first or last frame differs from its median brightness by a factor
# over FADED; the fade lasts until within a factor LIT, as exposure drifts by a tenth anyway.
FADED, LIT = 1.4, 1.1
LONGEST_FADE = 75  # frames; a longer change is no fade but, say, a lamp switched on


def thumb(rgb: NDArray[np.uint8]) -> Array:
    """Return the small copy (36, 64, 3), 0 to 255, in which cuts are detected."""
    return cv2.resize(rgb, THUMB, interpolation=cv2.INTER_AREA).astype(np.float32)


def face_of(mesh: Array) -> Array:
    """mesh (478, >=2) -> x, y of the face's middle, and its height (3,)."""
    top, chin = mesh[TOP, :2], mesh[CHIN, :2]
    return np.array([*(top + chin) / 2, np.linalg.norm(top - chin)])


class CutFinder:
    """Cut detector, fed frame by frame: at a cut all of the picture changes at once."""

    def __init__(self) -> None:
        self._last: Array | None = None
        self._face: Array | None = None
        self._changes: deque[float] = deque(maxlen=USUAL_OF)

    def __call__(self, small: Array, face: Array | None = None) -> bool:
        """Return whether a frame, given by its `thumb` and face (x, y, height), begins a shot."""
        before, self._last = self._last, small
        leapt, self._face = _leapt(self._face, face), face
        if before is None:
            return False
        change = float(np.abs(small - before).mean())
        known = len(self._changes) >= 3
        usual = float(np.median(self._changes)) if known else 0.0
        cut = known and (change > JUMP or leapt) and change > OVER_USUAL * usual + 4
        if not cut:
            self._changes.append(change)
        return cut


def _leapt(before: Array | None, face: Array | None) -> bool:
    if before is None or face is None:
        return False
    size = abs(np.log(face[2] / before[2]))
    return bool(size > SIZE_JUMP or np.linalg.norm(face[:2] - before[:2]) > PLACE_JUMP * before[2])


@dataclass
class _Shot:
    """Frames first ... end (exclusive) of a shot, and sums over them."""

    first: int
    end: int
    picture: Array
    large: Array | None  # grey, ZOOM_PX wide; None once the shot is closed
    mean: NDArray[np.uint8] | None = None  # of `large`, once the shot is closed
    light: list[float] = field(default_factory=list)  # mean of every frame, 0 to 255
    n_faces: int = 0
    face: Array = field(default_factory=lambda: np.zeros(3))  # x, y, height, summed

    @property
    def mean_picture(self) -> Array:
        return self.picture / (self.end - self.first)

    @property
    def mean_large(self) -> NDArray[np.uint8]:
        if self.large is not None:
            return (self.large / (self.end - self.first)).astype(np.uint8)
        assert self.mean is not None
        return self.mean

    def close(self) -> None:
        """Keep only the mean of the large pictures, to save memory."""
        self.mean, self.large = self.mean_large, None

    @property
    def mean_face(self) -> Array:
        """Mean x, y, height of the face."""
        return self.face / self.n_faces

    def lit(self) -> tuple[int, int]:
        """Return first frame and end (exclusive) of the shot without its fades."""
        light = np.maximum(self.light, 1.0)
        usual_light = np.sort(light)[len(light) // 2]  # the value of a frame, not a mean of two
        off = np.abs(np.log(light / usual_light))
        usual = np.flatnonzero(off < np.log(LIT))
        begin, end = int(usual[0]), int(usual[-1]) + 1
        if off[0] < np.log(FADED) or begin > LONGEST_FADE:
            begin = 0
        if off[-1] < np.log(FADED) or len(light) - end > LONGEST_FADE:
            end = len(light)
        return self.first + begin, self.first + end


class Take(NamedTuple):
    """Frames first ... end (exclusive) that are kept, and their zoom against the main shot."""

    first: int
    end: int
    zoom: Zoom


class Takes(list[Take]):
    """The kept parts of a film, in order."""

    def in_pixels(self, scale: float, offset: tuple[float, float]) -> Takes:
        """Return the same takes in coordinates scale * p + offset."""
        return Takes(take._replace(zoom=take.zoom.in_pixels(scale, offset)) for take in self)

    def flags(self, n_frames: int, *, zoomed: bool = False) -> NDArray[np.bool_]:
        """Return which frames (n_frames,) are kept, or which of these are zoomed."""
        flags = np.zeros(n_frames, bool)
        for first, end, zoom in self:
            flags[first:end] = not zoomed or zoom != STILL
        return flags

    def undo(self, points: Array) -> None:
        """Map points (T, ..., >=2) of all frames to the main shot's coordinates, in place."""
        for first, end, zoom in self:
            if zoom != STILL:
                points[first:end] = zoom.undone(points[first:end])

    def spans(self, first: int, end: int) -> Iterator[Take]:
        """Yield frames first ... end in pieces of one zoom; between takes the previous holds."""
        begin, zoom = 0, self[0].zoom
        for start, next_zoom in [*((take.first, take.zoom) for take in self), (end, None)]:
            if next_zoom == zoom:
                continue
            piece = Take(max(begin, first), min(start, end), zoom)
            if piece.first < piece.end:
                yield piece
            if next_zoom is not None:
                begin, zoom = start, next_zoom

    def to_array(self) -> Array:
        """Return rows (n, 5): first, end, scale, shift x, shift y."""
        rows = [[first, end, zoom.scale, *zoom.shift] for first, end, zoom in self]
        return np.array(rows, np.float64).reshape(-1, 5)

    @classmethod
    def from_array(cls, rows: Array) -> Takes:
        """The inverse of `to_array`."""
        return cls(
            Take(int(first), int(end), Zoom(scale, (x, y)))
            for first, end, scale, x, y in rows.tolist()
        )


class Shots:
    """Splits a film into shots, frame by frame; keeps sums per shot, not the frames."""

    def __init__(self) -> None:
        self._cut = CutFinder()
        self._shots: list[_Shot] = []
        self._size, self._shrunk = (0, 0), 1.0  # frame size; scale down to ZOOM_PX

    def see(self, rgb: NDArray[np.uint8], mesh: Array | None) -> None:
        """Process the next frame, and its face mesh (478, >=2) in pixels, if found."""
        small = thumb(rgb)
        self._size, self._shrunk = (rgb.shape[1], rgb.shape[0]), ZOOM_PX / rgb.shape[1]
        size = (ZOOM_PX, max(1, round(rgb.shape[0] * self._shrunk)))
        large = cv2.resize(
            cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA
        )
        face = None if mesh is None else face_of(mesh)
        if self._cut(small, face) or not self._shots:
            index = self._shots[-1].end if self._shots else 0
            if self._shots:
                self._shots[-1].close()
            self._shots.append(
                _Shot(index, index, np.zeros_like(small), np.zeros(large.shape, np.float32))
            )
        shot = self._shots[-1]
        shot.end += 1
        shot.picture += small
        assert shot.large is not None
        shot.large += large
        shot.light.append(float(small.mean()))
        if face is not None:
            shot.n_faces += 1
            shot.face += face

    def edges(self) -> list[tuple[int, int]]:
        """Return first frame and end (exclusive) of each shot."""
        return [(shot.first, shot.end) for shot in self._shots]

    def faded(self) -> NDArray[np.bool_]:
        """Return which frames (T,) belong to a fade in or out."""
        flags = np.ones(self._shots[-1].end, bool)
        for shot in self._shots:
            flags[slice(*shot.lit())] = False
        return flags

    def kept(self, wanted: Iterable[int] = ()) -> Takes:
        """Return the main shot and the shots that repeat its picture.

        The main shot has most of the frames `wanted`, known to show the chosen face, then most
        frames with a face.  Repeats have the same picture with the face at the same place and
        size, or all of it zoomed with room for the head.  Frames beside a cut are left out,
        because trackers look across it.
        """
        known = np.array(sorted(wanted), int)

        def meant(shot: _Shot) -> tuple[int, int]:
            return int(((known >= shot.first) & (known < shot.end)).sum()), shot.n_faces

        main = max(self._shots, key=meant)
        takes = Takes()
        for shot in self._shots:
            zoom = STILL if shot is main else self._shown(shot, main)
            if zoom is not None:
                first = shot.first + (shot is not self._shots[0])
                end = shot.end - (shot is not self._shots[-1])
                if first < end:
                    takes.append(Take(first, end, zoom))
        return takes

    def _shown(self, shot: _Shot, main: _Shot) -> Zoom | None:
        """Return a shot's zoom against the main one, or None if it shows another picture."""
        if not shot.n_faces or not main.n_faces:
            return None
        shrunk = self._shrunk
        zoom = measure_zoom(
            shot.mean_large, main.mean_large, shot.mean_face * shrunk, main.mean_face * shrunk, SAME
        )
        size = shot.mean_face[2] / main.mean_face[2] if zoom is None else zoom.scale
        if _alike(shot, main) and abs(np.log(size)) < (LEANT if zoom is None else MIN_ZOOM):
            return STILL  # only the person moved
        if zoom is None:
            return None
        zoom = zoom.in_pixels(1 / shrunk, (0.0, 0.0))
        return zoom if shows_head(zoom.window(self._size), main.mean_face) else None


def _alike(shot: _Shot, main: _Shot) -> bool:
    change = np.abs(shot.mean_picture - main.mean_picture).mean(-1)
    if np.median(change) > SAME:
        return False
    here, there = shot.mean_face, main.mean_face
    return bool(np.linalg.norm(here[:2] - there[:2]) < NEAR * there[2])
