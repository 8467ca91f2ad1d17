"""The mesh of one face in every frame of a film, and which frames are kept."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import FPS, followed
from talkhead_cli.jobs import backends
from talkhead_cli.jobs.stages.material import Material
from talkhead_cli.track import face, matte
from talkhead_cli.track.cuts import Shots, Takes
from talkhead_cli.track.scout import Scene, scout
from talkhead_cli.track.spans import in_words
from talkhead_cli.track.zoom import STILL

MESH_MAX_SIDE = 1280
SKIN_EVERY = 10  # frames between samples of the skin colour
SCOUT_EVERY = FPS // 2  # frame stride of the search for faces


def run(material: Material, which_face: str) -> None:
    """Choose the face to follow, then track its mesh in every frame."""
    material.progress.stage("looking for faces")
    scene = scout(
        material.part.frames(max_side=640, stride=SCOUT_EVERY),
        material.size,
        which_face,
        lambda: backends.detector_of(material.chosen["detector"]),
    )
    if scene.n_faces > 1:
        material.progress.note(
            f"{scene.n_faces} faces are in the video; following the {which_face} one "
            "(--face left|right|largest chooses)"
        )
    material.space.save("mesh", _follow(material, scene) | {"n_faces": np.array(scene.n_faces)})


def _follow(material: Material, scene: Scene) -> dict[str, NDArray[Any]]:
    """Track the mesh in every frame; save which frames belong to the kept shots."""
    x, y, width, height = scene.roi
    shrink = min(1.0, MESH_MAX_SIDE / max(width, height))
    size = (max(2, round(width * shrink)), max(2, round(height * shrink)))
    scale = np.array([width / size[0], height / size[1], width / size[0]], np.float32)
    offset = np.array([x, y, 0], np.float32)
    skin: dict[int, NDArray[Any]] = {}
    shots = Shots()
    material.progress.stage("face mesh", material.n_declared)
    blank = np.full((face.N_MESH, 3), np.nan, np.float32)
    mark = backends.landmarks_of(material.chosen["landmarks"])
    marks = []
    # meshes are spooled to a file: concatenating a list would need twice the memory
    with (
        backends.mesh_of(material.chosen["mesh"]) as mesh,
        tempfile.TemporaryFile(dir=material.space.root) as spool,
    ):
        stream = material.part.frames(crop=scene.roi, size=size, on_warning=material.progress.note)
        for index, rgb in enumerate(followed(material.progress, stream)):
            seen = mesh(rgb)
            spool.write((blank if seen is None else seen * scale + offset).tobytes())
            shots.see(rgb, seen)
            if mark is not None:
                at = mark(rgb, seen) if seen is not None else np.full((68, 2), np.nan)
                marks.append((at * scale[:2] + offset[:2]).astype(np.float32))
            if seen is not None and (not skin or index >= next(reversed(skin)) + SKIN_EVERY):
                skin[index] = matte.skin_samples(rgb, seen)
        spool.seek(0)
        points = np.fromfile(spool, np.float32).reshape(-1, face.N_MESH, 3)
    found = ~np.isnan(points[:, 0, 0])
    takes = shots.kept(n * SCOUT_EVERY for n in scene.seen_in)
    takes = takes.in_pixels(float(scale[0]), (x, y))
    kept = _remaining(material, takes, shots.faded())
    takes.undo(points)
    placed = {"landmarks": np.stack(marks)} if marks else {}
    for of_film in placed.values():
        takes.undo(of_film)
    colours = [skin[index] for index in skin if kept[index]]
    material.space.save(
        "shots",
        {
            "kept": kept,
            "takes": takes.to_array(),
            "skin": np.concatenate(colours) if colours else np.zeros((0, 3), np.float32),
        },
    )
    return {"points": points, "found": found & kept, **placed}


def _remaining(material: Material, takes: Takes, faded: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which frames (T,) are kept, and note which are left out and why."""
    kept, zoomed = takes.flags(len(faded)), takes.flags(len(faded), zoomed=True)
    if not kept.all():
        material.progress.note(
            f"the video is cut: frames {in_words(~kept)} show another picture than "
            f"the one with most of the face, or lie at a cut, and are left out; "
            f"{kept.sum() / FPS:.1f} of {len(kept) / FPS:.1f} s remain (--face chooses whose)"
        )
    if (kept & faded).any():
        material.progress.note(
            f"the picture fades in or out in frames {in_words(kept & faded)}; they are left out"
        )
    if zoomed.any():
        times = sorted({f"{take.zoom.scale:.2f}" for take in takes if take.zoom != STILL})
        material.progress.note(
            f"frames {in_words(zoomed)} show the picture {', '.join(times)} times as "
            "large, which was undone"
        )
    return kept & ~faded
