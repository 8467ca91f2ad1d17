"""Analyse pieces of a video: face mesh, head angles, sharpness, light."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from talkhead_cli import media
from talkhead_cli.contracts import FPS, Progress, TalkheadError
from talkhead_cli.jobs.check.report import Array, Finding, Report
from talkhead_cli.track import face, pose
from talkhead_cli.track.captions import CaptionFinder
from talkhead_cli.track.cuts import thumb

PIECE, MAX_PIECES = 10 * FPS, 6
MAX_SIDE = 1280
FACE_PX = 220  # face height at which sharpness is measured: as in training at 512 px
SHOWN_PX = 180  # height of the pictures that a page shows


@dataclass(frozen=True)
class Piece:
    """At most ten seconds: first frame, mesh (T, 478, 3) in pixels of the analysed pictures, found
    (T,), angles (T, 3) of the head (yaw, pitch, roll) in degrees, NaN if it is found for less than
    1 s, sharpness (T,), light (T, 2) mean and burnt share, thumbs, a picture for the page.
    """

    first: int
    mesh: Array
    found: NDArray[np.bool_]
    angles: Array
    sharpness: Array
    light: Array
    thumbs: Array
    shown: NDArray[np.uint8]

    @property
    def seconds(self) -> Array:
        return (self.first + np.arange(len(self.found))) / FPS


def pieces_of(
    report: Report,
    video: Path,
    seconds: float,
    roi: tuple[int, int, int, int],
    captions: CaptionFinder,
    progress: Progress,
) -> list[Piece]:
    """Analyse the pieces; pictures that end before the declared duration become a finding."""
    pieces: list[Piece] = []
    for first, n in spread(seconds):
        end = first
        try:
            pieces.append(_look(video, first, n, roi, captions, progress))
            end += len(pieces[-1].found)
        except TalkheadError:
            if not pieces:
                raise
        if end < first + n:
            if seconds - end / FPS > 1:
                report.findings.append(
                    Finding(
                        "picture",
                        "warn",
                        f"none from {end / FPS:.0f} s on, of {seconds:.0f} s",
                        "copy the file anew from the camera, if it should be whole",
                    )
                )
            break
    return pieces


def spread(seconds: float) -> list[tuple[int, int]]:
    """Return the first frame and the number of frames of each piece."""
    total = int(seconds * FPS)
    if total <= PIECE * MAX_PIECES:
        return [(a, min(PIECE, total - a)) for a in range(0, total, PIECE)]
    starts = np.linspace(0, total - PIECE, MAX_PIECES).astype(int)
    return [(int(a), PIECE) for a in starts]


def _look(
    video: Path,
    first: int,
    n: int,
    roi: tuple[int, int, int, int],
    captions: CaptionFinder,
    progress: Progress,
) -> Piece:
    shrink = min(1.0, MAX_SIDE / max(roi[2], roi[3]))
    size = (max(2, round(roi[2] * shrink)), max(2, round(roi[3] * shrink)))
    progress.stage(f"frames from {first / FPS:.0f} s on", n)
    rows: dict[str, list[Any]] = {k: [] for k in ("mesh", "sharp", "light", "thumb")}
    blank = np.full((face.N_MESH, 3), np.nan, np.float32)
    shown = np.zeros((SHOWN_PX, SHOWN_PX, 3), np.uint8)
    with face.FaceMesh() as mesh:
        for rgb in _frames(video, first, n, roi, size):
            seen = mesh(rgb)
            captions.see(rgb)
            rows["mesh"].append(blank if seen is None else seen)
            rows["thumb"].append(thumb(rgb))
            if len(rows["thumb"]) in (1, n // 2):
                width = round(SHOWN_PX * rgb.shape[1] / rgb.shape[0])
                shown = cv2.resize(rgb, (width, SHOWN_PX), interpolation=cv2.INTER_AREA)
            rows["sharp"].append(np.nan if seen is None else _sharpness(rgb, seen))
            rows["light"].append((np.nan, np.nan) if seen is None else _light(rgb, seen))
            progress.advance()
    if not rows["mesh"]:
        raise TalkheadError(f"{video.name} cannot be read from {first / FPS:.0f} s on")
    points = np.stack(rows["mesh"])
    found = ~np.isnan(points[:, 0, 0])
    return Piece(
        first,
        points,
        found,
        _angles(points, found, size),
        np.array(rows["sharp"]),
        np.array(rows["light"]),
        np.stack(rows["thumb"]),
        shown,
    )


def _angles(points: Array, found: NDArray[np.bool_], size: tuple[int, int]) -> Array:
    if found.sum() < FPS:
        return np.full((len(points), 3), np.nan)
    head = pose.fit_head(face.fill_gaps(points, found), found, size)
    return Rotation.from_matrix(head.rotation).as_euler("yxz", degrees=True)


def _frames(
    video: Path, first: int, n: int, roi: tuple[int, int, int, int], size: tuple[int, int]
) -> Iterator[NDArray[np.uint8]]:
    return media.frames(video, start_s=first / FPS, n_frames=n, crop=roi, size=size)


def _sharpness(rgb: NDArray[np.uint8], mesh: Array) -> float:
    """Return the share of fine detail in the contrast of eyes and mouth; 0 is blurred."""
    height = float(face.face_height(mesh[:, :2]))
    points = face.to_68(mesh)[36:68, :2]
    low, high = points.min(0) - 0.05 * height, points.max(0) + 0.05 * height
    x0, y0 = np.maximum(low.astype(int), 0)
    x1, y1 = np.minimum(high.astype(int) + 1, rgb.shape[1::-1])
    if x1 - x0 < 8 or y1 - y0 < 8:
        return 0.0
    grey = cv2.cvtColor(np.ascontiguousarray(rgb[y0:y1, x0:x1]), cv2.COLOR_RGB2GRAY)
    scale = FACE_PX / height
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=way).astype(np.float32)
    fine = grey - cv2.GaussianBlur(grey, (0, 0), 1.2)
    return float(fine.std() / max(grey.std(), 1e-3))


def _light(rgb: NDArray[np.uint8], mesh: Array) -> tuple[float, float]:
    """Return the mean brightness of the face, 0 to 255, and its share of burnt-out pixels."""
    low, high = mesh[:, :2].min(0).astype(int).clip(0), mesh[:, :2].max(0).astype(int)
    part = rgb[low[1] : high[1] : 2, low[0] : high[0] : 2]
    if part.size == 0:
        return 0.0, 0.0
    return float(part.mean()), float((part >= 252).all(-1).mean())
