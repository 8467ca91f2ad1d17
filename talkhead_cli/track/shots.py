"""Cuts: where one shot of a film ends, and which shots show the same picture again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from talkhead_cli.track.face import CHIN, TOP

Array = NDArray[np.floating[Any]]

THUMB = (64, 36)  # width, height of what is compared
# of 255: a cut changes at least that much, and so many times more than is usual
JUMP, OVER_USUAL = 18.0, 8.0
USUAL_OF = 50  # frames before, whose changes are usual
SAME = 12.0  # of 255: half of the picture's points may differ by that much between takes
NEAR = 0.6  # face heights by which the face may have moved between takes
# A shot fades where it begins or ends darker or brighter than this many times its usual light, and
# until it is as light as usual but for so much: exposure drifts by a tenth, and is no fade.
FADED, LIT = 1.4, 1.1
LONGEST_FADE = 75  # frames; a lamp that is switched on later is no fade


def thumb(rgb: NDArray[np.uint8]) -> Array:
    """A picture as small as it takes to see a cut: (36, 64, 3), 0 to 255."""
    return cv2.resize(rgb, THUMB, interpolation=cv2.INTER_AREA).astype(np.float32)


class CutFinder:
    """Says of frame after frame whether it begins a shot: all of the picture changes at once."""

    def __init__(self) -> None:
        self._last: Array | None = None
        self._changes: deque[float] = deque(maxlen=USUAL_OF)

    def __call__(self, small: Array) -> bool:
        if self._last is None:
            self._last = small
            return False
        change = float(np.abs(small - self._last).mean())
        self._last = small
        known = len(self._changes) >= 3
        usual = float(np.median(self._changes)) if known else 0.0
        cut = known and change > JUMP and change > OVER_USUAL * usual + 4
        if not cut:
            self._changes.append(change)
        return cut


@dataclass
class _Shot:
    """Frames first ... end; sums over them."""

    first: int
    end: int
    picture: Array
    light: list[float] = field(default_factory=list)  # of every frame, 0 to 255
    n_faces: int = 0
    face: Array = field(default_factory=lambda: np.zeros(3))  # x, y, height, summed

    @property
    def mean_picture(self) -> Array:
        found: Array = self.picture / (self.end - self.first)
        return found

    def lit(self) -> tuple[int, int]:
        """First frame and end of what is as light as the shot mostly is."""
        light = np.maximum(self.light, 1.0)
        usual_light = np.sort(light)[len(light) // 2]  # that of some frame, not of two on average
        off = np.abs(np.log(light / usual_light))
        usual = np.flatnonzero(off < np.log(LIT))
        begin, end = int(usual[0]), int(usual[-1]) + 1
        if off[0] < np.log(FADED) or begin > LONGEST_FADE:
            begin = 0
        if off[-1] < np.log(FADED) or len(light) - end > LONGEST_FADE:
            end = len(light)
        return self.first + begin, self.first + end


class Shots:
    """Splits a film into shots while its frames go by, in memory that does not grow with length."""

    def __init__(self) -> None:
        self._cut = CutFinder()
        self._shots: list[_Shot] = []

    def see(self, rgb: NDArray[np.uint8], mesh: Array | None) -> None:
        """The next frame, and its face (478, >=2) in pixels, if there is one."""
        small = thumb(rgb)
        cut = self._cut(small)
        if cut or not self._shots:
            index = self._shots[-1].end if self._shots else 0
            self._shots.append(_Shot(index, index, np.zeros_like(small)))
        shot = self._shots[-1]
        shot.end += 1
        shot.picture += small
        shot.light.append(float(small.mean()))
        if mesh is not None:
            middle = (mesh[TOP, :2] + mesh[CHIN, :2]) / 2
            shot.n_faces += 1
            shot.face += [*middle, np.linalg.norm(mesh[TOP, :2] - mesh[CHIN, :2])]

    def edges(self) -> list[tuple[int, int]]:
        """First frame and end of each shot."""
        return [(shot.first, shot.end) for shot in self._shots]

    def faded(self) -> NDArray[np.bool_]:
        """(T,) frames in which a shot fades in or out."""
        flags = np.ones(self._shots[-1].end, bool)
        for shot in self._shots:
            flags[slice(*shot.lit())] = False
        return flags

    def kept(self, wanted: Iterable[int] = ()) -> NDArray[np.bool_]:
        """(T,) frames of the shot that shows most of the face, and of those that show the same:
        the picture where it was, the face where it was and as large.

        `wanted` are frames that are known to show the face that is meant.  Frames beside a cut are
        not kept: trackers look across.
        """
        known = np.array(sorted(wanted), int)

        def shows(shot: _Shot) -> tuple[int, int]:
            return int(((known >= shot.first) & (known < shot.end)).sum()), shot.n_faces

        main = max(self._shots, key=shows)
        flags = np.zeros(self._shots[-1].end, bool)
        for shot in self._shots:
            if shot is main or _alike(shot, main):
                flags[shot.first : shot.end] = True
        for shot in self._shots[1:]:
            flags[shot.first - 1 : shot.first + 1] = False
        return flags


def _alike(shot: _Shot, main: _Shot) -> bool:
    if not shot.n_faces or not main.n_faces:
        return False
    change = np.abs(shot.mean_picture - main.mean_picture).mean(-1)
    if np.median(change) > SAME:
        return False
    here, there = shot.face / shot.n_faces, main.face / main.n_faces
    moved = np.linalg.norm(here[:2] - there[:2]) / there[2]
    return bool(moved < NEAR and abs(np.log(here[2] / there[2])) < 0.25)
