"""Detection of burnt-in captions: text that appears at once, always in the same few lines."""

from __future__ import annotations

from collections import deque
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE_PX = 128  # side of the grey pictures compared
# of 255: a point pops if it changes by over POP in one frame, and by under CALM before and after
POP, CALM = 22, 7
MIN_POINTS = 40  # popping points that a frame needs ...
MIN_LINES, MAX_LINES, MIN_WIDTH = 2, 12, 10  # ... nearly all of them in a low, wide box
MIN_POPS, PER_POP = 4, 250  # boxes needed: so many, and one per PER_POP frames ...
APART = 3  # ... whose middles lie within so many lines of one box's
EDGE = 4  # lines ignored at the picture's lower edge, where hands come and go
RIM = 5  # percent of the popping points that may lie outside the box, on each side


class CaptionFinder:
    """Caption detector, fed with frames of one size one by one.

    Hands and heads change a picture over several frames and over more of its height.  In films
    that repeat frames they change at once too, but not within a few lines.
    """

    def __init__(self) -> None:
        self._last: deque[NDArray[np.int16]] = deque(maxlen=4)
        self._boxes: list[tuple[float, float]] = []  # first and last line
        self._n_seen = 0

    def see(self, rgb: NDArray[np.uint8]) -> None:
        """Process the next frame (H, W, 3)."""
        grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        small = cv2.resize(grey, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        self._last.append(small.astype(np.int16))
        self._n_seen += 1
        if len(self._last) < 4:
            return
        before, change, after = np.abs(np.diff(np.stack(self._last), axis=0))
        line, column = np.nonzero((change > POP) & (before < CALM) & (after < CALM))
        if len(line) < MIN_POINTS:
            return
        (top, bottom), (left, right) = (
            np.percentile(at, [RIM, 100 - RIM]) for at in (line, column)
        )
        low_and_wide = MIN_LINES <= bottom - top < MAX_LINES and right - left >= MIN_WIDTH
        if low_and_wide and bottom < SIDE_PX - EDGE:
            self._boxes.append((float(top), float(bottom)))

    @property
    def lines(self) -> tuple[float, float] | None:
        """Top and bottom of the captions as fractions of the picture height, or None."""
        boxes: NDArray[Any] = np.array(sorted(self._boxes, key=sum)).reshape(-1, 2)
        middle = boxes.mean(1)
        first = np.searchsorted(middle, middle - APART, "left")
        count = np.searchsorted(middle, middle + APART, "right") - first
        most = int(count.argmax()) if len(boxes) else 0
        if not len(boxes) or count[most] < max(MIN_POPS, self._n_seen / PER_POP):
            return None
        top, bottom = np.median(boxes[first[most] : first[most] + count[most]], axis=0)
        return float(top) / SIDE_PX, float(bottom + 1) / SIDE_PX
