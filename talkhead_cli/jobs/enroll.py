"""One picture -> an avatar: what a prior knows of people, and whom the picture shows."""

from __future__ import annotations

import re
import time
from pathlib import Path

import cv2
import numpy as np

from talkhead_cli import __version__, march
from talkhead_cli.avatars import avatar_class
from talkhead_cli.contracts import MisuseError, Progress
from talkhead_cli.jobs import photo, player, portraits
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs import prior as priors
from talkhead_cli.store import Run, Workspace, check_id
from talkhead_cli.store.files import atomic, sha256_of


def enroll(
    image: Path, priors_home: Path, home: Path, method: str, progress: Progress, *,
    prior: str | None = None, which_face: str = "largest", device: str = "auto",
) -> tuple[Workspace, Run]:  # fmt: skip
    """Make the person of a picture an identity of `home`, with a run that renders.

    The prior is one of `priors_home`, the newest of the method by default; its preset is the
    run's.  Nothing is trained.
    """
    if not avatar_class(method).needs_portrait:
        raise MisuseError(
            f"preset {method} learns a person from footage, not from a picture; use -p s3d, or "
            "preprocess a video"
        )
    began = time.monotonic()
    if prior is None:
        prior = priors.newest(priors_home, method)
        progress.note(f"prior: {prior}")
    start = priors.fitting(priors_home, prior, method)
    text = start.preset_text()
    assert text is not None
    preset = presets.from_yaml(text)
    seen = photo.portrait_of(image, preset.data.size_px, progress, which_face=which_face)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", image.stem).strip("-")[:64]
    space = Workspace(home, check_id(name or "person"))
    run = Run.named(space.runs, f"{method}+from-{start.name}")
    where = march.device_of(device)
    speech = start.meta()["speech"]
    aabb = player.box_for(preset, seen.portrait.signals.camera)
    avatar, marcher, _ = player.build(preset, speech["n_features"], aabb.to(where), where)
    priors.begin_from(avatar, start)
    run.write_preset(text)
    run.save_portrait(portraits.to_arrays(seen.portrait))
    avatar.eval()
    marcher.eval()
    speaker = player.person(avatar, run, where)
    player.discover(speaker, marcher, player.mouthing(speaker, seen.portrait.signals), where)
    player.save(run, avatar, marcher)
    with atomic(run.plate_file) as part:
        cv2.imwrite(str(part), seen.plate[..., ::-1])
    signals = seen.portrait.signals
    run.save_drive({
        **{key: getattr(signals, key).numpy() for key in player.DRIVEN},
        "k": seen.k, "usable": np.array([True]), **start.drive(),
    })  # fmt: skip
    source = {"name": image.name, "sha256": sha256_of(image), "seconds": 0.0}
    run.write_meta(
        identity=space.id, version=__version__, prior=start.name, method=method, speech=speech,
        source=source, consent=[], steps=0, finished=True, finished_at=time.time(),
        seconds=round(time.monotonic() - began, 2), device=march.device_name(where),
    )  # fmt: skip
    space.note(finished=True, version=__version__, source=source, has_audio=False)
    return space, run
