"""The film cropped to the head, with mattes, skin maps, shoulders and background."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from talkhead_cli import media
from talkhead_cli.contracts import TalkheadError, followed
from talkhead_cli.jobs import backends
from talkhead_cli.jobs.holdout import MAX_HOLDOUT, split
from talkhead_cli.jobs.stages.material import Material
from talkhead_cli.store import FILM_PX
from talkhead_cli.store.pictures import write_png
from talkhead_cli.track import matte, pose
from talkhead_cli.track.captions import CaptionFinder

THUMB = (matte.MAP_PX, matte.MAP_PX)
N_PLATE, N_PLATE_LATE = 25, 8  # frames whose median is the background, see `_plate_frames`
N_EVIDENCE = 40  # frames used to separate hair from torso by motion
RESTLESS = 4.0  # of 255; a still background changes by 1 to 2, by noise and shadows


def run(material: Material) -> None:
    """Save the cropped video, mattes, skin maps, shoulder registration and plate."""
    n_frames, kept = material.n_frames, np.flatnonzero(material.kept)
    mesh = material.crop.fractions(material.faces.points)
    reference = _reference_frame(mesh, material.faces.found)
    skin_model = matte.SkinModel.fit(material.space.load("shots")["skin"])
    plate_at, late_at = _plate_frames(kept, material.usable)
    thumbs_at = np.unique(np.append(_spread(kept, N_EVIDENCE), reference))
    plate_frames, plate_mattes, thumbs = [], [], []
    warps = np.tile(np.eye(2, 3), (n_frames, 1, 1))
    tracked = np.zeros(n_frames, bool)
    parse = backends.parser_of(material.chosen["labels"])
    captions = CaptionFinder()
    first_picture = next(material.cropped(1, reference))
    material.progress.stage("crop, matte, shoulders", n_frames)
    with (
        matte.Segmenter() as segment,
        media.VideoWriter(
            material.space.video, (FILM_PX, FILM_PX), crf=10, preset="ultrafast", intra=True
        ) as out,
        material.space.pieces("maps") as maps,
    ):
        person = cv2.resize(segment(first_picture), THUMB)
        prior = matte.torso_prior(mesh[reference])
        shoulders = matte.BodyTracker(first_picture, (person * prior).astype(np.uint8))
        stream = material.cropped(n_frames)
        for index, rgb in enumerate(followed(material.progress, stream)):
            out.write(rgb)
            captions.see(rgb)
            mask = segment(rgb)
            parsed = {} if parse is None else {"parsed": parse(rgb)}
            maps.add(matte=mask, skin=skin_model(rgb), **parsed)
            warp = shoulders(rgb)
            if warp is not None and material.kept[index]:
                warps[index], tracked[index] = warp, True
            if index in plate_at or index in late_at:
                plate_frames.append(rgb)
                plate_mattes.append(mask)
            if index in thumbs_at:
                thumbs.append(cv2.resize(rgb, THUMB, interpolation=cv2.INTER_AREA))
        n_read = out.n_frames
    if n_read != n_frames:
        raise TalkheadError(
            f"{material.name} gave {n_read} frames, and {n_frames} when faces were looked "
            "for; run the command again, or convert the video first"
        )
    if captions.lines is not None:
        top, bottom = captions.lines
        material.progress.note(
            f"captions are burnt into the picture, {top:.0%} to {bottom:.0%} of the way down; "
            "they will be learnt as if they were part of the person: take the video without them"
        )
    furniture = matte.fixtures(plate_mattes)
    plate_mattes = [matte.without(mask, furniture) for mask in plate_mattes]
    _plate(material, plate_frames, plate_mattes, len(plate_at))
    material.space.save(
        "film",
        {
            "warps": warps,
            "tracked": tracked,
            "thumbs": np.stack(thumbs),
            "thumbs_at": thumbs_at,
            "reference": np.array(reference),
            "furniture": furniture,
        },
    )


def _plate(
    material: Material,
    frames: list[NDArray[np.uint8]],
    mattes: list[NDArray[np.uint8]],
    n_first: int,
) -> None:
    """Save the background behind the person, estimated by `matte.make_plate`."""
    plate, _ = matte.make_plate(frames, mattes, n_first)
    background_change = matte.background_change(frames, mattes, plate)
    if background_change > RESTLESS:
        material.progress.note(
            f"the background moves (by {background_change:.0f} of 255); videos show it still, "
            "as it is on average (render --background gives them another)"
        )
    write_png(material.space.plate_file, plate)


def _plate_frames(
    kept: NDArray[np.integer[Any]], usable: NDArray[np.bool_]
) -> tuple[set[int], set[int]]:
    """Return the frames that show the background: those before any frame that a preset may hold
    out, so that what is scored was not looked at, and a few after, for what these never show."""
    rows = np.flatnonzero(usable)
    n_train = len(rows) - split(len(rows), MAX_HOLDOUT)
    end = rows[n_train] if n_train < len(rows) else len(usable)
    early, late = kept[kept < end], kept[kept >= end]
    return set(_spread(early, N_PLATE).tolist()), set(_spread(late, N_PLATE_LATE).tolist())


def _spread(rows: NDArray[np.integer[Any]], n: int) -> NDArray[np.integer[Any]]:
    """Return at most n of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]


def _reference_frame(mesh: NDArray[np.float32], found: NDArray[np.bool_]) -> int:
    """Return the found frame whose rigid points are nearest to their median position."""
    rigid = mesh[:, pose.RIGID].reshape(len(mesh), -1)
    distance = np.linalg.norm(rigid - np.median(rigid[found], 0), axis=1)
    return int(np.argmin(np.where(found, distance, np.inf)))
