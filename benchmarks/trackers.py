"""Accuracy of tracking: against the synthetic speaker's truth, and consistency on real films."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from talkhead_cli.contracts import LABELS
from talkhead_cli.jobs.stages import VERSIONS
from talkhead_cli.store import Workspace
from talkhead_cli.track import face, matte
from talkhead_cli.track.pose import RIGID

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from synthetic_speaker import Truth

Array = NDArray[np.floating[Any]]
SIZE_PX = 512  # of the speaker's film, and of all figures in pixels


def against_truth(space: Workspace, film: Path) -> dict[str, Any]:
    """Return errors of a workspace of the synthetic speaker's film; its truth lies beside it."""
    truth = Truth.load(film.with_suffix(".truth.npz"))
    tracks, crop = space.load("tracks"), space.manifest()["crop"]
    corner = [crop["x"], crop["y"]]
    seen = tracks["mesh_fractions"] * crop["side"] + corner
    top_chin = truth.landmarks_px[:, [face.TOP, face.CHIN]]
    height = float(np.linalg.norm(np.diff(top_chin, axis=1), axis=-1).mean())
    turned = _turned(Rotation.from_rotvec(tracks["pose"][:, :3]).as_matrix(), truth.rotation)
    # the rigid points projected by the pose: their mean measures the head's position, their
    # spread its distance
    ours = _projected(tracks, crop)
    true = truth.landmarks_px[:, RIGID]
    middle = ours.mean(1) - true.mean(1)
    apart = [np.linalg.norm(p - p.mean(1, keepdims=True), axis=-1).mean(1) for p in (ours, true)]
    away = apart[1] / apart[0]
    right, down, roll = truth.body.T
    columns = np.stack([tracks["body"][:, 0], tracks["body"][:, 2]], 1)
    columns = columns - columns.mean(0)
    lever = np.linalg.lstsq(columns, right - right.mean(), rcond=None)[0]
    return {
        "rotation_deg": _mean_and_worst(turned),
        "place_percent_of_head": _mean_and_worst(
            100 * np.linalg.norm(middle - middle.mean(0), axis=1) / height
        ),
        "distance_percent": _mean_and_worst(100 * np.abs(away / away.mean() - 1)),
        "landmarks_percent_of_head": _mean_and_worst(
            100 * np.linalg.norm(seen - truth.landmarks_px, axis=-1).mean(1) / height
        ),
        "mouth_r": _alike(face.lip_aperture(tracks["mesh_fractions"]), truth.mouth),
        "blink_r": _alike(tracks["eye"].mean(1), truth.eye),
        "mouth_r_of_68": _alike(_opening(tracks["landmarks"]), truth.mouth),
        "shoulders_r": [
            _alike(columns @ lever, right),
            _alike(tracks["body"][:, 1], down),
            _alike(tracks["body"][:, 2], roll),
        ],
        "labels_iou": _overlap(space, truth, crop),
    }


def against_itself(space: Workspace) -> dict[str, Any]:
    """Return the pose's reprojection error on a real film, and the jitter of mesh and pose."""
    tracks, crop = space.load("tracks"), space.manifest()["crop"]
    found = tracks["found"].astype(bool)
    scale = SIZE_PX / crop["side"]
    seen = tracks["mesh_fractions"][:, RIGID] * crop["side"] + [crop["x"], crop["y"]]
    steady = found[:-2] & found[1:-1] & found[2:]

    def shake(points: Array) -> float:
        second = np.linalg.norm(np.diff(points, n=2, axis=0), axis=-1).mean(1)
        return round(float(second[steady].mean()), 3)

    return {
        "frames": len(found),
        "found": round(float(found.mean()), 4),
        "reprojection_px_at_512": {
            "rms": round(float(tracks["residual_px"][found].mean()) * scale, 3),
            "mean": round(
                float(np.linalg.norm(_projected(tracks, crop) - seen, axis=-1)[found].mean())
                * scale,
                3,
            ),
        },
        "jitter_px_at_512": {
            "mesh": shake(tracks["mesh_fractions"][:, RIGID] * float(SIZE_PX)),
            "pose": shake(_projected(tracks, crop) * scale),
        },
        "backends": space.manifest()["backends"],
        "stages": VERSIONS,
    }


def _projected(tracks: dict[str, NDArray[Any]], crop: dict[str, int]) -> Array:
    """Return the rigid points (T, n, 2) projected by the pose, pixels of the film."""
    turn = Rotation.from_rotvec(tracks["pose"][:, :3]).as_matrix()
    camera = np.einsum("tij,nj->tni", turn, tracks["shape"][RIGID]) + tracks["pose"][:, None, 3:]
    pixel = camera @ tracks["k"].astype(float).T
    at = pixel[..., :2] / pixel[..., 2:] * crop["side"] / SIZE_PX
    return at + [crop["x"], crop["y"]]


def _turned(found: Array, true: Array) -> Array:
    """Return degrees (T,) between rotations (T, 3, 3), up to one constant rotation of the axes."""
    u, _, vt = np.linalg.svd(np.einsum("tji,tjk->ik", true, found))
    axes = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    between = np.einsum("tji,tjk->tik", true @ axes, found)
    degrees: Array = np.degrees(Rotation.from_matrix(between).magnitude())
    return degrees


def _opening(landmarks: Array) -> Array:
    """Return the gap (T,) of the inner lips of 68 landmarks (T, 68, 3)."""
    return landmarks[:, 66, 1] - landmarks[:, 62, 1]


def _overlap(space: Workspace, truth: Truth, crop: dict[str, int]) -> dict[str, float]:
    """Return the intersection over union of every label."""
    at = (np.arange(matte.MAP_PX) + 0.5) / matte.MAP_PX * crop["side"]
    n = truth.labels.shape[1]
    rows, columns = np.floor((np.stack([crop["y"] + at, crop["x"] + at])) * n / SIZE_PX).astype(int)
    true = truth.labels[:, rows[:, None], columns]
    found = np.stack([space.labels(i).argmax(0) for i in range(len(true))])
    shares = {}
    for k, name in enumerate(LABELS):
        here, there = true == k, found == k
        shares[name] = round(float((here & there).sum() / (here | there).sum()), 4)
    return shares


def _alike(a: Array, b: Array) -> float:
    return round(float(np.corrcoef(a, b)[0, 1]), 4)


def _mean_and_worst(errors: Array) -> dict[str, float]:
    return {"mean": round(float(errors.mean()), 3), "worst": round(float(errors.max()), 3)}
