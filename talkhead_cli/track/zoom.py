"""Zooms between shots of one picture: films zoom in between sentences, by camera or in editing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Box = tuple[float, float, float, float]  # left, top, right, bottom

# A zoom is accepted if so many corners of the picture, and such a share of them, agree with it
MIN_POINTS, MIN_SHARE = 20, 0.1
MAX_TURN = 0.02  # radians of rotation
ROOM = 0.95  # face heights around the face's middle that a shot must show


@dataclass(frozen=True)
class Zoom:
    """Zoom of a shot: it shows point p of another shot at scale * p + shift, in pixels."""

    scale: float
    shift: tuple[float, float]

    def undone(self, points: Array) -> Array:
        """Map points (..., >=2) of the shot to the other shot; depths are divided by scale too."""
        back: Array = points / self.scale
        back[..., :2] -= np.array(self.shift) / self.scale
        return back

    def in_pixels(self, scale: float, offset: tuple[float, float]) -> Zoom:
        """Return the same zoom with both shots in coordinates scale * p + offset."""
        x, y = (
            scale * shift + (1 - self.scale) * start
            for shift, start in zip(self.shift, offset, strict=True)
        )
        return Zoom(self.scale, (x, y))

    def window(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of the other shot in view at `size` (w, h): left, top, right, bottom."""
        x, y = (-shift / self.scale for shift in self.shift)
        return x, y, x + size[0] / self.scale, y + size[1] / self.scale


STILL = Zoom(1.0, (0.0, 0.0))


def measure_zoom(
    seen: NDArray[np.uint8], known: NDArray[np.uint8], face: Array, known_face: Array, same: float
) -> Zoom | None:
    """Measure the zoom at which `known` appears as `seen` (both grey, of one size), or None.

    RANSAC over corners of the whole picture, face and shoulders included, as the background may
    be plain.  Faces are x, y, height in pixels; their ratio of heights is the initial guess.
    same: largest median difference, of 255, between the pictures once aligned.
    """
    guess = float(face[2] / known_face[2])
    first = _matrix(guess, face[:2] - guess * known_face[:2])
    size, how = known.shape[::-1], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    back = cv2.warpAffine(seen, first, size, flags=how)
    inside = cv2.warpAffine(np.full_like(seen, 255), first, size, flags=how)
    corners = cv2.goodFeaturesToTrack(known, 400, 0.01, 5, mask=inside)
    if corners is None:
        return None
    moved, followed, _ = cv2.calcOpticalFlowPyrLK(known, back, corners, None)
    followed = followed[:, 0] > 0
    if followed.sum() < MIN_POINTS:
        return None
    step, agree = cv2.estimateAffinePartial2D(
        corners[followed], moved[followed], method=cv2.RANSAC, ransacReprojThreshold=1.0
    )
    if step is None or agree.sum() < max(MIN_POINTS, MIN_SHARE * len(corners)):
        return None
    if abs(np.arctan2(step[1, 0], step[0, 0])) > MAX_TURN:
        return None
    scale = guess * float(np.hypot(step[0, 0], step[1, 0]))
    # drop the small rotation, about the middle of the face
    middle = known_face[:2]
    there = first[:, :2] @ (step[:, :2] @ middle + step[:, 2]) + first[:, 2]
    shift = there - scale * middle
    back = cv2.warpAffine(seen, _matrix(scale, shift), size, flags=how)
    off = np.abs(back.astype(np.float32) - known)[inside > 0]
    if np.median(off) > same:
        return None
    x, y = shift + 0.5 * (1 - scale)  # from pixel indices to coordinates (centres at +0.5)
    return Zoom(scale, (float(x), float(y)))


def _matrix(scale: float, shift: Array) -> Array:
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])


def shows_head(window: Box, face: Array) -> bool:
    """Return whether the window has room for the head around a face (x, y, height)."""
    x, y, room = face[0], face[1], ROOM * face[2]
    left, top, right, bottom = window
    return bool(left <= x - room and top <= y - room and x + room <= right and y + room <= bottom)


def common_window(zooms: Sequence[Zoom], size: tuple[int, int]) -> Box:
    """Return the region that all of several shots of `size` (w, h) show."""
    left, top, right, bottom = np.array([zoom.window(size) for zoom in zooms]).T
    return left.max(), top.max(), right.min(), bottom.min()
