"""A first look at the film: how many faces, and the part of the picture to follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.track.face import FaceDetector

FACES = ("largest", "left", "right")


@dataclass(frozen=True)
class Scene:
    """Faces present for a fair part of the film, and the region (x, y, w, h) of the chosen one."""

    n_faces: int
    roi: tuple[int, int, int, int]


def scout(
    frames: Iterable[NDArray[np.uint8]], size: tuple[int, int], which: str = "largest"
) -> Scene:
    """Look at a few frames (of any one size) of a film of `size` (width, height), or at a picture.

    Faces are linked between frames by place.  `which`: largest, left or right.
    """
    if which not in FACES:
        raise MisuseError(f"--face must be {', '.join(FACES)}, not '{which}'")
    tracks: list[list[NDArray[np.float32]]] = []
    n_frames = 0
    with FaceDetector() as detect:
        for rgb in frames:
            n_frames += 1
            shape = np.array([rgb.shape[1], rgb.shape[0]] * 2, np.float32)
            for box in detect(rgb):
                _link(tracks, box / shape)
    whole = (0, 0, size[0], size[1])
    if not tracks:
        # the mesh has a detector of its own and gets the last word
        return Scene(0, whole)
    area = [sum(float((b[2] - b[0]) * (b[3] - b[1])) for b in t) for t in tracks]
    lasting = [
        t for t, a in zip(tracks, area, strict=True)
        if len(t) >= 0.3 * n_frames and a >= 0.1 * max(area)
    ] or [tracks[int(np.argmax(area))]]  # fmt: skip
    middle = [float(np.median([b[0] + b[2] for b in t])) for t in lasting]
    pick = {
        "largest": int(np.argmax([sum((b[2] - b[0]) * (b[3] - b[1]) for b in t) for t in lasting])),
        "left": int(np.argmin(middle)),
        "right": int(np.argmax(middle)),
    }[which]
    if len(lasting) == 1:
        return Scene(1, whole)
    return Scene(len(lasting), _region(lasting, pick, size))


def _link(tracks: list[list[NDArray[np.float32]]], box: NDArray[np.float32]) -> None:
    centre, width = box[[0, 1]] + box[[2, 3]], box[2] - box[0]
    for track in tracks:
        last = track[-1]
        if np.abs(last[[0, 1]] + last[[2, 3]] - centre).max() < 1.2 * max(width, last[2] - last[0]):
            track.append(box)
            return
    tracks.append([box])


def _region(
    tracks: list[list[NDArray[np.float32]]], pick: int, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The chosen face's surroundings, cut half-way to its neighbours, in pixels."""
    chosen = np.stack(tracks[pick])
    low, high = chosen[:, :2].min(0), chosen[:, 2:].max(0)
    grow = 1.2 * (chosen[:, 2:] - chosen[:, :2]).max(0)
    left, top = np.maximum(low - grow, 0)
    right, bottom = np.minimum(high + grow, 1)
    for index, other in enumerate(tracks):
        if index == pick:
            continue
        boxes = np.stack(other)
        if boxes[:, 0].mean() > chosen[:, 0].mean():
            right = min(right, (high[0] + boxes[:, 0].min()) / 2)
        else:
            left = max(left, (low[0] + boxes[:, 2].max()) / 2)
    if right - left < 0.8 * (high[0] - low[0]):
        raise TalkheadError(
            "two faces cover each other; use a part, of the film or of the picture, in which they "
            "stay apart"
        )
    x, y = int(left * size[0]), int(top * size[1])
    return x, y, int(right * size[0]) - x, int(bottom * size[1]) - y
