"""Face mesh (478 points), face boxes, and measures derived from the mesh.

The mesh is MediaPipe's attention mesh (468 points and 10 of the irises).  "left" and
"right" in names are as seen in the picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import FPS, TalkheadError
from talkhead_cli.track.spans import spans

Array = NDArray[np.floating[Any]]

N_MESH = 478
# Mesh points that stand for the 68 iBUG landmarks, in iBUG order.
MESH_TO_68 = np.array(
    [162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389]  # jaw
    + [71, 63, 105, 66, 107, 336, 296, 334, 293, 301]  # brows
    + [168, 197, 5, 4, 75, 97, 2, 326, 305]  # nose
    + [33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380]  # eyes
    + [61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181]  # outer lips
    + [78, 82, 13, 312, 308, 317, 14, 87]  # inner lips
)
FACE_OVAL = np.array(
    [10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377]
    + [152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109]
)
INNER_LIPS = np.array(
    [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95]
)
# Per eye: outer corner, inner corner, three pairs (upper lid, lower lid), iris centre.
EYES = (
    (33, 133, ((160, 144), (159, 145), (158, 153)), 468),
    (263, 362, ((387, 373), (386, 374), (385, 380)), 473),
)
BROWS = ((70, 63, 105, 66, 107), (300, 293, 334, 296, 336))
TOP, CHIN = 10, 152
UPPER_LIP, LOWER_LIP = 13, 14


@dataclass(frozen=True)
class Faces:
    """The mesh of one face over T frames.

    points (T, 478, 3) x, y in pixels of the picture the mesh was found in, z in the same
    unit, negative towards the camera; interpolated where no face was found · found (T,) bool
    """

    points: NDArray[np.float32]
    found: NDArray[np.bool_]


class FaceMesh:
    """Tracker of one face through consecutive frames. Use as a context manager."""

    def __init__(self) -> None:
        import mediapipe as mp

        self._mesh = mp.solutions.face_mesh.FaceMesh(
            max_num_faces=1, refine_landmarks=True, min_tracking_confidence=0.5
        )

    def __enter__(self) -> FaceMesh:
        return self

    def __exit__(self, *_: object) -> None:
        self._mesh.close()

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """rgb (H, W, 3) -> mesh (478, 3) in pixels, or None where no face is found."""
        faces = self._mesh.process(rgb).multi_face_landmarks
        return _in_pixels(faces[0].landmark, rgb) if faces else None


class TaskMesh:
    """Same as FaceMesh, with a model bundle of the newer MediaPipe Tasks given by the user."""

    def __init__(self, bundle: Path) -> None:
        from mediapipe.tasks.python import BaseOptions, vision

        try:
            # as bytes: the library resolves paths relative to its own files
            self._mesh = vision.FaceLandmarker.create_from_options(
                vision.FaceLandmarkerOptions(
                    base_options=BaseOptions(model_asset_buffer=bundle.read_bytes()),
                    running_mode=vision.RunningMode.VIDEO,
                )
            )
        except (RuntimeError, ValueError) as error:
            raise TalkheadError(
                f"{bundle.name} is no face landmarker of MediaPipe; fetch the file again"
            ) from error
        self._n_seen = 0

    def __enter__(self) -> TaskMesh:
        return self

    def __exit__(self, *_: object) -> None:
        self._mesh.close()

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """rgb (H, W, 3) -> mesh (478, 3) in pixels, or None where no face is found."""
        import mediapipe as mp

        picture = mp.Image(mp.ImageFormat.SRGB, np.ascontiguousarray(rgb))
        result = self._mesh.detect_for_video(picture, round(1000 * self._n_seen / FPS))
        self._n_seen += 1
        return _in_pixels(result.face_landmarks[0], rgb) if result.face_landmarks else None


class FaceDetector:
    """Boxes of all faces in a picture, largest first."""

    def __init__(self) -> None:
        import mediapipe as mp

        self._detector = mp.solutions.face_detection.FaceDetection(
            model_selection=1, min_detection_confidence=0.5
        )

    def __enter__(self) -> FaceDetector:
        return self

    def __exit__(self, *_: object) -> None:
        self._detector.close()

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """rgb (H, W, 3) -> boxes (n, 4) x0 y0 x1 y1 in pixels, largest first."""
        return self.scored(rgb)[0]

    def scored(self, rgb: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the boxes, and the confidence (n,) of each in [0, 1]."""
        height, width = rgb.shape[:2]
        found = self._detector.process(rgb).detections or []
        boxes, scores = [], []
        for detection in found:
            b = detection.location_data.relative_bounding_box
            boxes.append((b.xmin, b.ymin, b.xmin + b.width, b.ymin + b.height))
            scores.append(detection.score[0])
        array = np.array(boxes, np.float32).reshape(-1, 4) * np.array(
            [width, height, width, height], np.float32
        )
        area = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
        order = np.argsort(-area)
        return array[order], np.array(scores, np.float32)[order]


def _in_pixels(points: Iterable[Any], rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scale MediaPipe's relative points (x and z by width, y by height) to pixels (478, 3)."""
    height, width = rgb.shape[:2]
    found = np.array([(p.x, p.y, p.z) for p in points], np.float32)
    return found * np.array([width, height, width], np.float32)


def to_68(mesh: Array) -> Array:
    """mesh (..., 478, k) -> iBUG landmarks (..., 68, k)."""
    return mesh[..., MESH_TO_68, :]


def lip_aperture(mesh: Array) -> Array:
    """mesh (..., 478, >=2) -> inner lip gap over face height (...,)."""
    gap = np.linalg.norm(mesh[..., UPPER_LIP, :2] - mesh[..., LOWER_LIP, :2], axis=-1)
    return gap / face_height(mesh[..., :2])


def lid_gap(mesh: Array) -> Array:
    """mesh (..., 478, >=2) -> mean lid gap over eye width, per eye (..., 2)."""
    gaps = []
    for outer, inner, lids, _ in EYES:
        width = np.linalg.norm(mesh[..., outer, :2] - mesh[..., inner, :2], axis=-1)
        height = np.mean(
            [np.linalg.norm(mesh[..., u, :2] - mesh[..., d, :2], axis=-1) for u, d in lids], axis=0
        )
        gaps.append(height / np.maximum(width, 1e-6))
    return np.stack(gaps, -1)


def n_blinks(gap: Array) -> int:
    """Count how often the lids shut: gap (T,) of an eye, or the mean of both."""
    return len(spans(gap < 0.5 * np.median(gap)))


def face_height(mesh: Array) -> Array:
    """mesh (..., 478, d) -> distance from the top of the forehead to the chin (...)."""
    return np.linalg.norm(mesh[..., TOP, :] - mesh[..., CHIN, :], axis=-1)


@dataclass(frozen=True)
class EyeScale:
    """Lid gaps that count as shut (0) and open (1) for one person, per eye (2,)."""

    shut: Array
    open: Array

    def openness(self, gap: Array) -> Array:
        """Lid gap (T, 2) -> openness (T, 2) in [0, 1.2]; wide eyes exceed 1."""
        return np.clip((gap - self.shut) / (self.open - self.shut), 0.0, 1.2)


def fit_eye_scale(gap: Array) -> EyeScale:
    """Fit the eye scale of a person to lid gaps (T, 2).

    Open is the upper quartile.  Shut is the deepest blink of the clip, but at most 0.45
    of open, the average ratio of closed lids of the mesh: some people never blink in
    their clip.
    """
    wide = np.percentile(gap, 75, axis=0)
    deepest = np.percentile(gap, 0.5, axis=0) if len(gap) >= 200 else gap.min(axis=0)
    return EyeScale(shut=np.minimum(deepest, 0.45 * wide), open=wide)


def gaze(mesh: Array) -> Array:
    """mesh (T, 478, >=2) -> iris offset from the eye's middle, mean of both, eye widths (T, 2)."""
    offsets = []
    for outer, inner, _, iris in EYES:
        corners = mesh[..., [outer, inner], :2]
        width = np.linalg.norm(corners[..., 0, :] - corners[..., 1, :], axis=-1, keepdims=True)
        offsets.append((mesh[..., iris, :2] - corners.mean(-2)) / np.maximum(width, 1e-6))
    return np.mean(offsets, axis=0)


def brow_height(head_mesh: Array) -> Array:
    """Mesh in head space (T, 478, 3) -> height of each brow over its eye (T, 2)."""
    heights = []
    for points, (outer, inner, _, _) in zip(BROWS, EYES, strict=True):
        eye_y = head_mesh[:, [outer, inner], 1].mean(-1)
        heights.append(eye_y - head_mesh[:, points, 1].mean(-1))
    return np.stack(heights, -1)


def fill_gaps(values: Array, found: NDArray[np.bool_]) -> Array:
    """Interpolate rows of values (T, ...) that are not `found` in time; ends are held.

    Returns `values` itself, not a copy, when nothing is missing: an hour of meshes is half a
    gigabyte.
    """
    if not found.any():
        raise TalkheadError("no face was found in any frame; film one person facing the camera")
    if found.all():
        return values
    seen, lost = np.flatnonzero(found), np.flatnonzero(~found)
    after = np.searchsorted(seen, lost)
    left, right = seen[np.maximum(after - 1, 0)], seen[np.minimum(after, len(seen) - 1)]
    share = np.clip((lost - left) / np.maximum(right - left, 1), 0, 1)
    share = share.reshape(-1, *[1] * (values.ndim - 1)).astype(values.dtype)
    filled = values.copy()
    filled[lost] = (1 - share) * values[left] + share * values[right]
    return filled
