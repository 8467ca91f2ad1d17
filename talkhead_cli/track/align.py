"""Sub-pixel head pose: align each frame's skin to the clip's mean face.

Landmarks of a network wander by a pixel; a field trained on them is blurred by as much.  After
the landmark fit, the rigid surface of the face is sampled in every frame, and the pose is
moved until the samples agree with their mean over the clip: Gauss-Newton on brightness, as in
direct image alignment (Baker and Matthews 2004, forward additive), held by the landmark pose.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Delaunay
from scipy.spatial.transform import Rotation

from talkhead_cli.track.face import EYES, MESH_TO_68

Array = NDArray[np.floating[Any]]

ALIGN_PX = 256  # side of the picture at which frames are compared
N_ITERATIONS = 5
# Standard deviations by which a pose may leave the landmarks' one: rad, face heights.
FREEDOM = np.array([0.02, 0.02, 0.02, 0.012, 0.012, 0.06])
NOISE = 0.5  # of brightness after normalising, per sample; neighbours are not independent
CUTOFF_HZ = 6.0  # of what is left to smooth


def rigid_surface(shape: Array) -> Array:
    """Points (N, 3) on the parts of the face (478, 3) that move with the skull."""
    skin = shape[:468]
    flat = skin[:, :2]
    triangles = Delaunay(flat).simplices
    corners = skin[triangles]
    points = np.concatenate([skin, corners.mean(1), *((corners[:, i] + corners[:, i - 1]) / 2
                                                     for i in range(3))])  # fmt: skip
    mouth = shape[MESH_TO_68[48:60], :2]
    keep = points[:, 1] < mouth[:, 1].min() - 0.02
    away = np.abs((points[:, :2] - mouth.mean(0)) / (1.1 * np.ptp(mouth[:, 0]), 0.22))
    keep &= (away**2).sum(1) > 1
    for outer, inner, _, _ in EYES:
        width = np.linalg.norm(shape[outer, :2] - shape[inner, :2])
        middle = shape[[outer, inner], :2].mean(0)
        keep &= (((points[:, :2] - middle) / (0.75 * width, 0.55 * width)) ** 2).sum(1) > 1
    low, high = np.percentile(flat[:, 0], [4, 96])
    keep &= (points[:, 0] > low) & (points[:, 0] < high)
    return np.unique(points[keep].round(4), axis=0)


def prepared(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """rgb (H, W, 3) -> (3, ALIGN_PX, ALIGN_PX): band-passed brightness and its slopes."""
    small = cv2.resize(rgb, (ALIGN_PX, ALIGN_PX), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    band = cv2.GaussianBlur(grey, (0, 0), 1.0) - cv2.GaussianBlur(grey, (0, 0), 9.0)
    slopes = [cv2.Sobel(band, cv2.CV_32F, 1 - i, i, ksize=3, scale=1 / 8) for i in (0, 1)]
    return np.stack([band, *slopes])


class Aligner:
    """Compares frames of one person; k (3, 3) are the intrinsics at ALIGN_PX."""

    def __init__(self, shape: Array, k: Array) -> None:
        self.points = rigid_surface(shape)
        self.k = k
        self._sum = np.zeros(len(self.points))
        self._n = 0

    def _project(self, pose: Array) -> tuple[Array, Array, Array]:
        """pose (6,) -> turned points (N, 3), camera points (N, 3), pixels (N, 2)."""
        turned = self.points @ Rotation.from_rotvec(pose[:3]).as_matrix().T
        camera = turned + pose[3:]
        pixel = camera[:, :2] / camera[:, 2:] * self.k[0, 0] + self.k[:2, 2]
        return turned, camera, pixel

    @staticmethod
    def _read(image: NDArray[np.float32], pixel: Array) -> Array:
        at = (pixel - 0.5).astype(np.float32)[None]
        return cv2.remap(image, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]

    def learn(self, frame: NDArray[np.float32], pose: Array) -> None:
        """Add a prepared frame, seen in `pose`, to the mean face."""
        seen = self._read(frame[0], self._project(pose)[2])
        self._sum += (seen - seen.mean()) / (seen.std() + 1e-6)
        self._n += 1

    def refine(self, frame: NDArray[np.float32], pose: Array) -> Array:
        """The pose (6,) near `pose` in which a prepared frame agrees best with the mean face."""
        template = self._sum / self._n
        start, pose = pose, pose.copy()
        hold = (NOISE / FREEDOM) ** 2
        for _ in range(N_ITERATIONS):
            turned, camera, pixel = self._project(pose)
            seen, slope_x, slope_y = (self._read(channel, pixel) for channel in frame)
            gain = 1 / (seen.std() + 1e-6)
            residual = template - (seen - seen.mean()) * gain
            weight = 1 / np.maximum(
                1, np.abs(residual) / (1.5 * np.median(np.abs(residual)) + 1e-6)
            )
            focal, z = self.k[0, 0], camera[:, 2]
            toward = gain * focal / z
            by_point = np.stack(
                [slope_x * toward, slope_y * toward,
                 -(slope_x * camera[:, 0] + slope_y * camera[:, 1]) * toward / z], -1
            )  # fmt: skip
            jacobian = np.concatenate([np.cross(turned, by_point), by_point], -1)
            weighted = jacobian * weight[:, None]
            off = pose - start
            normal = weighted.T @ jacobian + np.diag(hold)
            step = np.linalg.solve(normal, weighted.T @ residual - hold * off)
            turn = Rotation.from_rotvec(step[:3]) * Rotation.from_rotvec(pose[:3])
            pose = np.concatenate([turn.as_rotvec(), pose[3:] + step[3:]])
            if np.abs(step).max() < 2e-5:
                break
        return pose
