"""The square crop around the head: one for the whole clip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import UnfitError
from talkhead_cli.track.face import face_height
from talkhead_cli.track.zoom import STILL, Box, Zoom

HEIGHTS_PER_SIDE = 2.3  # face heights per crop side: room for head, hair and shoulders
ABOVE_CENTRE = 0.08  # how far the face lies above the middle, as a fraction of the side
MIN_FACE_PX = 48


@dataclass(frozen=True)
class Crop:
    """A square in source pixels: left, top and side, all even, as most films hold colours of two
    by two pixels."""

    x: int
    y: int
    side: int

    def scale(self, size_px: int) -> float:
        """Output pixels per source pixel."""
        return size_px / self.side

    def fractions(self, points: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Convert points (..., >=2) in source pixels to x, y in fractions of the side."""
        found = np.asarray(points[..., :2] - np.array([self.x, self.y], np.float32), np.float32)
        found /= np.float32(self.side)
        return found

    def intrinsics(
        self, focal_px: float, centre_px: NDArray[np.floating[Any]], size_px: int
    ) -> NDArray[np.float64]:
        """Return the intrinsics (3, 3) of the square at `size_px`, from those of the source."""
        scale = self.scale(size_px)
        return np.array(
            [
                [focal_px * scale, 0, (centre_px[0] - self.x) * scale],
                [0, focal_px * scale, (centre_px[1] - self.y) * scale],
                [0, 0, 1],
            ]
        )

    def zoomed(self, zoom: Zoom, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the same square (x, y, w, h) in a zoomed shot of `size` (w, h)."""
        if zoom == STILL:
            return self.x, self.y, self.side, self.side
        side = min(round(zoom.scale * self.side), *size)
        x, y = (
            min(max(0, round(zoom.scale * start + shift)), whole - side) // 2 * 2
            for start, shift, whole in zip((self.x, self.y), zoom.shift, size, strict=True)
        )
        return x, y, side, side


def choose_crop(points: NDArray[np.float32], found: NDArray[np.bool_], bounds: Box) -> Crop:
    """Return the square around the head of mesh points (T, 478, >=2), inside `bounds`."""
    left, top, right, bottom = (
        *(math.ceil(edge / 2) * 2 for edge in bounds[:2]),
        *(math.floor(edge / 2) * 2 for edge in bounds[2:]),
    )
    seen = points[found]
    if len(seen) == 0:
        raise UnfitError("no face was found in any frame; film one person facing the camera")
    face_px = float(np.median(face_height(seen[..., :2])))
    if face_px < MIN_FACE_PX:
        raise UnfitError(
            f"the face is only {face_px:.0f} pixels tall; film closer, so that it is at least "
            f"{MIN_FACE_PX} (150 or more looks good)"
        )
    low = np.percentile(seen[..., :2].min(1), 2, axis=0)
    high = np.percentile(seen[..., :2].max(1), 98, axis=0)
    centre = (low + high) / 2
    side = max(HEIGHTS_PER_SIDE * face_px, 1.25 * float((high - low).max()))
    side = int(min(side, right - left, bottom - top)) // 2 * 2
    x = int(np.clip(centre[0] - side / 2, left, right - side)) // 2 * 2
    y = int(np.clip(centre[1] - side * (0.5 - ABOVE_CENTRE), top, bottom - side)) // 2 * 2
    return Crop(x, y, side)
