"""The pose of the head and all other signals of each frame."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.jobs.stages.material import Material
from talkhead_cli.store import FILM_PX
from talkhead_cli.track import face, matte, pose
from talkhead_cli.track.pose import HeadTrack

BLOCK = 2048  # frames per block, to bound memory


def run(material: Material) -> None:
    """Fit the head's pose, then compute and save all per-frame signals.

    In `tracks`, of T frames: pose (T, 6), rotation vector in rad and position in face heights ·
    k (3, 3) intrinsics of the crop · eye (T, 2) openness, 0 shut, 1 open, up to 1.2 wide open ·
    gaze, brow (T, 2) · landmarks (T, 68, 3) in head space · mesh_fractions (T, 478, 2) and
    body_fractions (T, 3) shift and turn of the shoulders about body_pivot (2,), in fractions of
    the crop · body (T, 4) the latter, shifts in face heights · shape (478, 3) the head at rest ·
    residual_px (T,) · found, usable (T,)
    """
    faces, crop = material.faces, material.crop
    material.progress.stage("head pose", None)
    head = pose.fit_head(faces.points, faces.found, material.size)
    mesh = crop.fractions(faces.points)
    film = material.space.load("film")
    k = crop.intrinsics(head.focal_px, head.centre_px, FILM_PX)
    seen = _face_signals(faces, head, _marks(material))
    eyes = face.fit_eye_scale(seen["gap"][faces.found])
    lost = 1 - float(film["tracked"][material.kept].mean())
    if lost > 0.2:
        material.progress.note(
            f"the shoulders could not be followed in {lost:.0%} of the frames (plain or dark "
            "clothes, or hardly in the picture); there they are taken to move on evenly, and "
            "may swim in videos"
        )
    reference = int(film["reference"])
    pivot = matte.body_pivot(mesh[reference])
    body = matte.body_motion(film["warps"], film["tracked"], pivot)
    to_heights = FILM_PX / k[0, 0] * float(np.median(head.translation[faces.found, 2]))
    material.space.save(
        "tracks",
        {
            "pose": head.pose.astype(np.float32),
            "k": k.astype(np.float32),
            "eye": eyes.openness(seen["gap"]).astype(np.float32),
            "gaze": seen["gaze"],
            "brow": seen["brow"] - seen["brow"][faces.found].mean(0),
            "landmarks": seen["landmarks"],
            "mesh_fractions": mesh,
            "body": np.concatenate(
                [body[:, :2] * to_heights, body[:, 2:], np.zeros((len(body), 1))], -1
            ).astype(np.float32),
            "body_fractions": body.astype(np.float32),
            "body_pivot": pivot.astype(np.float32),
            "shape": head.shape.astype(np.float32),
            "residual_px": head.residual_px.astype(np.float32),
            "found": faces.found,
            "usable": material.usable,
        },
    )


def _marks(material: Material) -> NDArray[np.float32]:
    """Return landmarks (T, 68, 2) in pixels of the source video, gaps interpolated."""
    stored = material.space.load("mesh")
    if "landmarks" not in stored:
        return face.to_68(material.faces.points)[..., :2]
    return face.fill_gaps(stored["landmarks"], np.isfinite(stored["landmarks"][:, 0, 0]))


def _face_signals(
    faces: face.Faces, head: HeadTrack, marks: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """Return per-frame signals: gap (T, 2) of the lids, gaze (T, 2), brow (T, 2) height of each,
    landmarks (T, 68, 3) in head space, lifted from `marks` (T, 68, 2) in pixels.
    """
    chosen = np.unique(np.concatenate([*face.BROWS, *(e[:2] for e in face.EYES)]))
    parts: dict[str, list[NDArray[Any]]] = {}
    for first in range(0, len(faces.found), BLOCK):
        rows = slice(first, first + BLOCK)
        pixels = faces.points[rows, :, :2].astype(np.float64)
        lifted = np.full((len(pixels), face.N_MESH, 3), np.nan)
        part = head.part(rows)
        lifted[:, chosen] = part.lift(pixels[:, chosen], chosen)
        for name, value in {
            "gap": face.lid_gap(pixels),
            "gaze": face.gaze(pixels),
            "brow": face.brow_height(lifted),
            "landmarks": part.lift(marks[rows].astype(np.float64), face.MESH_TO_68),
        }.items():
            parts.setdefault(name, []).append(value.astype(np.float32))
    return {name: np.concatenate(values) for name, values in parts.items()}
