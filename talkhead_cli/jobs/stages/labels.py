"""Soft labels of every pixel: face, mouth, hair, torso, background."""

from __future__ import annotations

import numpy as np

from talkhead_cli.contracts import followed
from talkhead_cli.jobs.stages.material import Material
from talkhead_cli.track import matte


def run(material: Material) -> None:
    """Compute and save the soft labels of every frame."""
    film, tracks = material.space.load("film"), material.space.load("tracks")
    reference = int(film["reference"])
    mesh, body, pivot = tracks["mesh_fractions"], tracks["body_fractions"], tracks["body_pivot"]
    at = film["thumbs_at"]
    known = tracks["found"] & film["tracked"]  # else the shoulders' motion is unknown
    others = [i for i, frame in enumerate(at) if frame != reference and known[frame]]
    thumbs = film["thumbs"]
    odds = matte.motion_evidence(
        thumbs[int(np.flatnonzero(at == reference)[0])],
        [thumbs[i] for i in others],
        [mesh[at[i]] for i in others],
        mesh[reference],
        [film["warps"][at[i]] for i in others],
    )
    prior = matte.torso_prior(mesh[reference])
    logit = np.log((prior + 1e-3) / (1 - prior + 1e-3)) + np.clip(odds, -4, 4)
    maps = matte.RegionMaps(1 / (1 + np.exp(-logit)), mesh[reference])
    material.progress.stage("labels", material.n_frames)
    with material.space.pieces("labels") as labels:
        for row in followed(material.progress, range(material.n_frames)):
            seen = material.space.piece("maps", row)
            hair, torso = maps.moved(mesh[row], body[row] - body[reference], pivot)
            person = matte.without(seen["matte"], film["furniture"])
            own = matte.label_maps(mesh[row], person, seen["skin"], hair, torso)
            parsed = seen.get("parsed")
            labels.add(labels=own if parsed is None else matte.parsed_labels(parsed, own))
