"""Head pose over a whole clip: one focal length, one rigid shape, temporally smooth poses.

The fit is a maximum a posteriori bundle adjustment by block coordinate descent.  Given
shape and focal length, all poses are one banded least-squares problem (Gauss-Newton on
the reprojection error, second differences of the pose as the prior), solved exactly in
O(T).  Given poses, the shape is a 3x3 problem per point.  A per-frame PnP has no such
prior and jitters: that jitter is what viewers notice first in this field's results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solveh_banded
from scipy.spatial.transform import Rotation

from talkhead_cli.contracts import FPS
from talkhead_cli.track.face import CHIN, TOP, face_height, fill_gaps

Array = NDArray[np.float64]

LEFT_EAR, RIGHT_EAR = 234, 454  # mesh points nearest to the ears, sides as in the picture
MIRRORED = ((33, 263), (133, 362), (234, 454), (61, 291), (127, 356), (50, 280))
# Forehead, nose bridge, eye corners, temples and cheekbones: bone under thin skin.  Without eye
# corners and cheeks, which expressions move, the reprojection error is lower, but renders of two
# people were 0.15 dB worse and the synthetic speaker's pose no more accurate.
RIGID = np.array(
    [10, 67, 109, 338, 297, 54, 103, 284, 332, 21, 251, 151, 108, 337, 9, 8, 168, 6, 197, 195, 5]
    + [4, 1, 33, 133, 263, 362, 127, 356, 162, 389, 234, 454, 93, 323, 50, 280, 117, 346, 118, 347]
    + [123, 352, 116, 345, 143, 372, 34, 264, 139, 368, 71, 301, 245, 465, 188, 412, 122, 351]
)
SHAPE_FRAMES = 300  # about so many frames are used to fit shape and focal length
BLOCK = 2048  # frames per block, to bound the memory of derivatives
# Half-amplitude frequency of the smoothness prior per pose parameter; depth is the worst determined
# and the slowest.  At about 0.8, 1, 1.2 and 1.6 times these, held-out face PSNR of a lively clip is
# best here by 0.1 dB (one seed: 28.44 to 28.60, 28.56 to 28.72, 28.64 and 28.45 dB; another: 28.36,
# 28.50 and 28.46 for the first three); a calm clip is no better (32.60 and 32.63 at 0.8, 32.46 and
# 32.73 here), nor is the synthetic speaker's pose more accurate.
CUTOFF_HZ = np.array([5.0, 5.0, 5.0, 6.0, 6.0, 2.5])
# Weight of a pixel of error in the mesh's relative depth against one across the picture.  Mesh
# points move less across the picture than those of the turning head: by a third on the synthetic
# speaker, whose truth is known, by a tenth to a quarter on four real people, if depth is right.  Of
# weights from 0 to 3, 0.1 and 0.2 came closest to the truth (rotation error 1.45 degrees, 1.9
# without depth), with 1/15 more reprojection error.
DEPTH_WEIGHT = 0.2
DEPTH_HOLD = 0.005  # face heights; prior deviation of the fitted shape's depth from the mesh's


@dataclass(frozen=True)
class HeadTrack:
    """The head's pose and rigid shape over T frames of a film.

    rotation (T, 3, 3), translation (T, 3) head to camera, face heights · focal_px, centre_px
    (2,) of the picture · shape (478, 3) rigid mesh in head space · residual_px (T,) RMS
    reprojection error of the rigid points, NaN where no face was found
    """

    rotation: Array
    translation: Array
    focal_px: float
    centre_px: Array
    shape: Array
    residual_px: Array

    def part(self, rows: slice) -> HeadTrack:
        """Return the track of some of the frames."""
        return replace(
            self,
            rotation=self.rotation[rows],
            translation=self.translation[rows],
            residual_px=self.residual_px[rows],
        )

    def project(self, points: Array) -> Array:
        """Project points in head space, (n, 3) or (T, n, 3), to pixels (T, n, 2)."""
        camera = (
            np.einsum(
                "tij,...nj->tni" if points.ndim == 2 else "tij,tnj->tni", self.rotation, points
            )
            + self.translation[:, None]
        )
        return self.focal_px * camera[..., :2] / camera[..., 2:] + self.centre_px

    def lift(self, pixels: Array, points: NDArray[np.integer[Any]]) -> Array:
        """Lift mesh points with indices `points` from pixels (T, n, 2) to head space (T, n, 3).

        Each point is placed on its viewing ray at the depth of the rigid shape's point.
        """
        depth = (self.rotation @ self.shape[points].T)[:, 2] + self.translation[:, 2:]
        ray = np.concatenate(
            [(pixels - self.centre_px) / self.focal_px, np.ones_like(pixels[..., :1])], -1
        )
        return np.einsum(
            "tji,tnj->tni", self.rotation, ray * depth[..., None] - self.translation[:, None]
        )

    @property
    def pose(self) -> Array:
        """Rotation vectors (rad) and translations (face heights), (T, 6)."""
        return np.concatenate(
            [Rotation.from_matrix(self.rotation).as_rotvec(), self.translation], -1
        )


def fit_head(
    points: NDArray[np.floating[Any]], found: NDArray[np.bool_], size: tuple[int, int]
) -> HeadTrack:
    """Fit the head track to a mesh seen in a picture of `size` (width, height).

    points (T, 478, 3) in pixels with MediaPipe's relative depth; rows not `found` lie evenly
    between those around them.
    """
    width, height = size
    centre = np.array([width / 2, height / 2])
    shape, rotation = _procrustes_shape(points, np.flatnonzero(found))
    unit = np.linalg.norm((rotation @ (shape[TOP] - shape[CHIN]))[..., :2], axis=-1)
    scale_px = face_height(points[found, :, :2]) / unit
    # Start at 47 degrees over the long side (phones, webcams: 50 to 65); depth follows from scale.
    focal = 1.15 * max(width, height)
    n_frames = len(points)
    pose = np.full((n_frames, 6), np.nan)
    depth = focal / scale_px
    origin_px = (points[found, LEFT_EAR, :2] + points[found, RIGHT_EAR, :2]) / 2
    pose[found] = np.concatenate(
        [
            Rotation.from_matrix(rotation).as_rotvec(),
            (origin_px - centre) * (depth / focal)[:, None],
            depth[:, None],
        ],
        -1,
    )
    pose = fill_gaps(pose, found)

    prior_shape = shape.copy()
    weight = np.zeros((n_frames, len(RIGID)))
    weight[found] = 1.0
    targets = np.nan_to_num(points[:, RIGID]).astype(np.float64)
    targets[..., 2] -= targets[..., 2].mean(1, keepdims=True)
    few = np.flatnonzero(found)[:: max(1, int(found.sum()) // SHAPE_FRAMES)]
    whole = points[few, :, :2].astype(np.float64)
    for iteration in range(12):
        pose = _solve_poses(pose, shape, focal, centre, targets, weight)
        shape, focal = _solve_shape(
            pose, few, shape, prior_shape, focal, centre, whole, tune_focal=iteration >= 4
        )
        shape, pose = _normalise(shape, pose)
        prior_shape, _ = _normalise(prior_shape, pose)
        size_px = _misses(pose, shape[RIGID], focal, centre, targets[..., :2])
        limit = 2.0 * np.median(size_px[found])
        weight[found] = np.minimum(1.0, limit / np.maximum(size_px[found], 1e-9))
    # The prior goes on as evenly as it can: beyond the ends, and in long gaps, out of the picture.
    pose = fill_gaps(pose, found)
    return HeadTrack(
        rotation=Rotation.from_rotvec(pose[:, :3]).as_matrix(),
        translation=pose[:, 3:],
        focal_px=float(focal),
        centre_px=centre,
        shape=shape,
        residual_px=np.where(found, np.sqrt((size_px**2).mean(-1)), np.nan),
    )


def _misses(
    pose: Array, shape: Array, focal: float, centre: Array, targets: NDArray[np.floating[Any]]
) -> Array:
    """Return reprojection errors (T, n) of the shape's points (n, 3), pixels."""
    parts = []
    for first in range(0, len(pose), BLOCK):
        rows = slice(first, first + BLOCK)
        turn = Rotation.from_rotvec(pose[rows, :3]).as_matrix()
        camera = np.moveaxis(turn @ shape.T, 1, 2) + pose[rows, None, 3:]
        pixels = focal * camera[..., :2] / camera[..., 2:] + centre
        parts.append(np.linalg.norm(pixels - targets[rows], axis=-1))
    return np.concatenate(parts)


def _procrustes_shape(
    meshes: NDArray[np.floating[Any]], rows: NDArray[np.integer[Any]]
) -> tuple[Array, Array]:
    """Mean shape (478, 3) in head axes, one face height tall, and rotations of `rows` (n, 3, 3)."""
    few = meshes[rows[:: max(1, len(rows) // 200)]]
    mean = _upright(few[len(few) // 2])
    for _ in range(5):
        rotation, scale, origin = _align(few, mean)
        mean = (
            np.einsum("tji,tnj->tni", rotation, few - origin[:, None]) / scale[:, None, None]
        ).mean(0)
        mean = _upright(mean)
    turns = [_align(meshes[rows[a : a + BLOCK]], mean)[0] for a in range(0, len(rows), BLOCK)]
    return mean, np.concatenate(turns)


def _align(meshes: NDArray[np.floating[Any]], shape: Array) -> tuple[Array, Array, Array]:
    """Similarity that maps shape to each mesh over the rigid points (Umeyama 1991, eq. 40-43)."""
    rigid = shape[RIGID]
    local = rigid - rigid.mean(0)
    centre = meshes[:, RIGID].mean(1)
    moved = meshes[:, RIGID] - centre[:, None]
    u, s, vt = np.linalg.svd(np.einsum("tni,nj->tij", moved, local))
    sign = np.sign(np.linalg.det(u @ vt))
    u[:, :, 2] *= sign[:, None]
    s[:, 2] *= sign
    rotation = u @ vt
    scale = s.sum(-1) / (local**2).sum()
    origin = centre - scale[:, None] * (rotation @ rigid.mean(0))
    return rotation, scale, origin


def _axes(shape: Array) -> tuple[Array, Array, float]:
    """Head axes as columns (3, 3), origin (3,) and face height of a shape (478, 3)."""
    right = sum(shape[b] - shape[a] for a, b in MIRRORED)
    right = right / np.linalg.norm(right)
    down = shape[CHIN] - shape[TOP]
    down = down - right * (down @ right)
    height = float(face_height(shape))
    down = down / np.linalg.norm(down)
    axes = np.stack([right, down, np.cross(right, down)], -1)
    return axes, shape[[LEFT_EAR, RIGHT_EAR]].mean(0), height


def _upright(shape: Array) -> Array:
    axes, origin, height = _axes(shape)
    return (shape - origin) @ axes / height


def _normalise(shape: Array, pose: Array) -> tuple[Array, Array]:
    """Re-express shape and poses in head axes; their projections stay the same."""
    axes, origin, height = _axes(shape)
    rotation = Rotation.from_rotvec(pose[:, :3]).as_matrix()
    moved = pose.copy()
    moved[:, 3:] = (pose[:, 3:] + rotation @ origin) / height
    moved[:, :3] = Rotation.from_matrix(rotation @ axes).as_rotvec()
    return (shape - origin) @ axes / height, moved


def _solve_poses(
    pose: Array,
    shape: Array,
    focal: float,
    centre: Array,
    targets: NDArray[np.floating[Any]],
    weight: Array,
) -> Array:
    """One Gauss-Newton step on all poses at once, under the smoothness prior."""
    n_frames = len(pose)
    rotation = Rotation.from_rotvec(pose[:, :3])
    blocks = [
        _normal_equations(
            pose[a : a + BLOCK], shape, focal, centre, targets[a : a + BLOCK], weight[a : a + BLOCK]
        )
        for a in range(0, n_frames, BLOCK)
    ]
    normal, right = (np.concatenate(part) for part in zip(*blocks, strict=True))

    # Rotation increments are composed on the left, so the prior's second differences are
    # taken on the current estimate, unwrapped from frame to frame.
    lam = 1.0 / (2 * np.sin(np.pi * CUTOFF_HZ / FPS)) ** 4
    strength = lam * np.median(np.einsum("tii->ti", normal)[weight.any(-1)], axis=0)
    band = np.zeros((6 * 2 + 6, 6 * n_frames))  # lower form: band[i - j, j] = A[i, j]
    for i in range(6):
        for j in range(i + 1):
            band[i - j, j::6] = normal[:, i, j]
    stencil = np.array([1.0, -2.0, 1.0])
    current = _unwrapped(pose)
    curvature = np.zeros_like(pose)
    if n_frames >= 3:
        second = current[:-2] - 2 * current[1:-1] + current[2:]
        for a in range(3):
            span = slice(a, a + n_frames - 2)
            curvature[span] += stencil[a] * second
            for b in range(a, 3):
                add = np.zeros((n_frames, 6))
                add[span] = stencil[a] * stencil[b] * strength
                band[6 * (b - a)] += add.ravel()
    band[0] += 1e-9 * strength.max()
    step = solveh_banded(band, (right - strength * curvature).ravel(), lower=True).reshape(-1, 6)
    largest = np.linalg.norm(step[:, :3], axis=-1, keepdims=True)
    step[:, :3] *= np.minimum(1.0, 0.3 / np.maximum(largest, 1e-9))
    turned_by = Rotation.from_rotvec(step[:, :3]) * rotation
    return np.concatenate([turned_by.as_rotvec(), pose[:, 3:] + step[:, 3:]], -1)


def _normal_equations(
    pose: Array,
    shape: Array,
    focal: float,
    centre: Array,
    targets: NDArray[np.floating[Any]],
    weight: Array,
) -> tuple[Array, Array]:
    """Return normal matrices (T, 6, 6) and right-hand sides (T, 6) of the rigid points' errors
    against targets (T, n, 3), across the picture and in depth."""
    turned = np.moveaxis(Rotation.from_rotvec(pose[:, :3]).as_matrix() @ shape[RIGID].T, 1, 2)
    camera = turned + pose[:, None, 3:]
    x, y, z = np.moveaxis(camera, -1, 0)
    # The mesh's depth is in pixels too, under weak perspective and relative to its own mean.
    scale = (focal / pose[:, 5])[:, None]
    deep = turned[..., 2] * scale
    told = np.stack(
        [focal * x / z + centre[0], focal * y / z + centre[1], deep - deep.mean(1, keepdims=True)],
        -1,
    )
    error = targets - told
    zero = np.zeros_like(x)
    # d pixel / d camera point, then d camera point / d (left rotation increment, translation)
    du = np.stack([focal / z, zero, -focal * x / z**2], -1)
    dv = np.stack([zero, focal / z, -focal * y / z**2], -1)
    dw = np.stack([zero, zero, np.broadcast_to(scale, x.shape)], -1)
    deeper = np.concatenate([np.cross(turned, dw), np.zeros_like(dw)], -1)
    jacobian = np.stack(
        [
            *(np.concatenate([np.cross(turned, d), d], -1) for d in (du, dv)),
            deeper - deeper.mean(1, keepdims=True),
        ],
        -2,
    )
    # (T, n, 3, 6)
    strength = np.sqrt([1.0, 1.0, DEPTH_WEIGHT])
    jacobian, error = jacobian * strength[:, None], error * strength
    weighted = jacobian * weight[..., None, None]
    return (
        np.einsum("tnki,tnkj->tij", weighted, jacobian),
        np.einsum("tnki,tnk->ti", weighted, error),
    )


def _unwrapped(pose: Array) -> Array:
    """Pose whose rotation part is the running sum of left increments between frames."""
    rotation = Rotation.from_rotvec(pose[:, :3])
    between = (rotation[1:] * rotation[:-1].inv()).as_rotvec()
    path = np.concatenate([pose[:1, :3], pose[:1, :3] + np.cumsum(between, 0)])
    return np.concatenate([path, pose[:, 3:]], -1)


def _solve_shape(
    pose: Array,
    rows: NDArray[np.integer[Any]],
    shape: Array,
    prior_shape: Array,
    focal: float,
    centre: Array,
    targets: Array,
    *,
    tune_focal: bool,
) -> tuple[Array, float]:
    """Refine every mesh point (3x3 Gauss-Newton each) and the focal length, on some rows.

    targets (len(rows), 478, 2).  Depths pose[:, 5] are scaled in place with the focal length.
    """
    rotation = Rotation.from_rotvec(pose[rows, :3]).as_matrix()
    camera = np.moveaxis(rotation @ shape.T, 1, 2) + pose[rows, None, 3:]
    x, y, z = np.moveaxis(camera, -1, 0)
    error = targets - (focal * camera[..., :2] / z[..., None] + centre)
    zero = np.zeros_like(x)
    du = np.stack([focal / z, zero, -focal * x / z**2], -1) @ rotation
    dv = np.stack([zero, focal / z, -focal * y / z**2], -1) @ rotation
    normal = np.einsum("tni,tnj->nij", du, du) + np.einsum("tni,tnj->nij", dv, dv)
    right = np.einsum("tni,tn->ni", du, error[..., 0]) + np.einsum("tni,tn->ni", dv, error[..., 1])
    # Depth is observable only through rotation: pull it to the mesh's own (landmark error 1.5 px).
    hold = (1.5 / DEPTH_HOLD) ** 2 * np.eye(3)
    hold[:2, :2] = (1.5 / 0.03) ** 2 * 0.05 * np.eye(2)
    right += (prior_shape - shape) @ hold
    shape = shape + np.linalg.solve(normal + hold, right[..., None])[..., 0]
    if tune_focal:
        # Scale focal length and depth together: the size stays, only perspective changes.
        slope = _focal_slope(pose[rows], rotation, shape[RIGID], focal)
        gain = np.einsum("tnk,tnk->", error[:, RIGID], slope)
        information = (slope**2).sum() + (1.5 / 0.15) ** 2 * len(rows)
        log_step = float(np.clip(gain / information, -0.1, 0.1))
        focal = float(focal * np.exp(log_step))
        pose[:, 5] *= np.exp(log_step)
    return shape, focal


def _focal_slope(pose: Array, rotation: Array, shape: Array, focal: float) -> Array:
    """d pixel / d log focal while depth scales along, (T, n, 2)."""
    turned = np.moveaxis(rotation @ shape.T, 1, 2)
    camera = turned + pose[:, None, 3:]
    z = camera[..., 2:]
    # p = f X / (dz + t_z) with t_z proportional to f: d p / d log f = p (1 - t_z / z)
    return focal * camera[..., :2] / z * (1 - pose[:, None, 5:6] / z)
