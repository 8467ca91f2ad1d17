"""Make an avatar from one picture, or a few, with a prior; nothing is trained."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from talkhead_cli import __version__, march
from talkhead_cli.avatars import avatar_class
from talkhead_cli.contracts import Camera, MisuseError, Portrait, Progress, TalkheadError
from talkhead_cli.jobs import drive as drives
from talkhead_cli.jobs import photo, portraits, views
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs import prior as priors
from talkhead_cli.jobs.drive import MotionOptions
from talkhead_cli.jobs.photo import Photo
from talkhead_cli.jobs.player import DRIVEN
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.jobs.runs import box_for, build_avatar, enrolled, save_avatar, speech_shape_of
from talkhead_cli.store import Run, Workspace, check_id
from talkhead_cli.store.files import sha256_of
from talkhead_cli.store.pictures import write_png

SIDES_DEG = (-14.0, -5.0, 5.0, 14.0)  # yaw of the views that seed the occupancy grid


def enroll(
    images: Sequence[Path],
    priors_home: Path,
    home: Path,
    preset_names: Sequence[str],
    progress: Progress,
    *,
    prior: str | None = None,
    which_face: str = "largest",
    device: str = "auto",
) -> tuple[Workspace, Run]:
    """Make the person in some pictures an identity of `home`, with a finished run; the first
    picture is the main one.

    The prior is one of `priors_home`, by default the newest that fits the presets; the run takes
    over its preset.  Nothing is trained.
    """
    asked = presets.load(preset_names)
    method = asked.method
    if not avatar_class(method).needs_portrait:
        raise MisuseError(
            f"preset {method} learns a person from footage, not from a picture; use -p s3d, or "
            "preprocess a video"
        )
    began = time.monotonic()
    sized = asked if len(preset_names) > 1 else None  # else a prior of any size will do
    if prior is None:
        prior = priors.newest(priors_home, method, sized)
        progress.note(f"prior: {prior}")
    start = priors.named_prior(priors_home, prior, method)
    if sized is not None:
        priors.refuse_unfit(start, sized)
    text = start.preset_text()
    assert text is not None
    preset = presets.from_yaml(text)
    seen = [
        photo.portrait_of(image, preset.data.size_px, progress, which_face=which_face)
        for image in images
    ]
    space = Workspace(home, id_of(images))
    if space.exists():
        raise TalkheadError(f"there is somebody '{space.id}' already; rename the picture")
    run = Run.named(space.runs, f"{method}+from-{start.name}")
    run.write_preset(text)
    _keep(run, seen, start)
    where = march.device_of(device)
    _build(run, preset, start, [one.portrait for one in seen], where)
    source = _source(images)
    run.write_meta(
        identity=space.id, version=__version__, method=method, speech=start.meta()["speech"],
        prior={"name": start.name, "key": start.meta()["key"],
               "n_people": len(start.meta()["people"]), "knew_person": None},
        source=source, consent=[], steps=0, finished=True, finished_at=time.time(),
        seconds=round(time.monotonic() - began, 2), device=march.device_name(where),
    )  # fmt: skip
    space.note(finished=True, version=__version__, source=source, has_audio=False)
    return space, run


def id_of(images: Sequence[Path]) -> str:
    """Return the id of the person in pictures: the first one's file name, as far as it can be."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", images[0].stem).strip("-_")[:64]
    return check_id(name or "person")


def _keep(run: Run, seen: Sequence[Photo], start: Run) -> None:
    """Save the portrait, the background and a drive of a single frame."""
    main, signals = seen[0], seen[0].portrait.signals
    run.save_portrait(portraits.to_arrays(portraits.joined([one.portrait for one in seen])))
    write_png(run.plate_file, main.plate)
    run.save_drive(
        {
            **{key: getattr(signals, key).numpy() for key in DRIVEN},
            "k": main.k,
            "usable": np.array([True]),
            **start.drive(),
        }
    )


def _build(
    run: Run, preset: Preset, start: Run, seen: Sequence[Portrait], where: torch.device
) -> None:
    """Save the prior's network, and a marcher whose occupancy is seeded with the person: mouths
    from shut to wide open, at SIDES_DEG and from the cameras of the further pictures."""
    signals = seen[0].signals
    aabb = box_for(preset, signals.camera)
    avatar, marcher, _ = build_avatar(preset, speech_shape_of(start), aabb.to(where), where)
    priors.load_prior(avatar, start)
    avatar.eval()
    marcher.eval()
    speaker = enrolled(avatar, run, where)
    rows = views.opening_mouths(speaker, signals, len(SIDES_DEG))
    cameras = [
        drives.make(run.drive(), 1, MotionOptions(pose="still", yaw_deg=yaw)).camera(
            signals.pose.numpy(), preset.data.size_px, np.zeros(1)
        )
        for yaw in SIDES_DEG
    ]
    views.rebuild_from_views(speaker, marcher, rows.with_(camera=_together(cameras)), where)
    if further := [one.signals.camera for one in seen[1:]]:
        rows = views.opening_mouths(speaker, signals, len(further))
        views.open_views(speaker, marcher, rows.with_(camera=_together(further)), where)
    save_avatar(run, avatar, marcher)


def _together(cameras: Sequence[Camera]) -> Camera:
    return Camera(
        torch.cat([c.c2w for c in cameras]), torch.cat([c.k for c in cameras]), cameras[0].size_px
    )


def _source(images: Sequence[Path]) -> dict[str, Any]:
    first, *further = [{"name": i.name, "sha256": sha256_of(i)} for i in images]
    return {**first, "seconds": 0.0, "further": further}
