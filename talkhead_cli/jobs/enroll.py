"""One picture, or a few -> an avatar: what a prior knows of people, and whom the picture shows."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    images: Sequence[Path], priors_home: Path, home: Path, method: str, progress: Progress, *,
    prior: str | None = None, which_face: str = "largest", device: str = "auto",
) -> tuple[Workspace, Run]:  # fmt: skip
    """Make the person of some pictures an identity of `home`, with a run that renders; the first
    picture is the main one.

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
    seen = [
        photo.portrait_of(image, preset.data.size_px, progress, which_face=which_face)
        for image in images
    ]
    main, portrait = seen[0], portraits.joined([one.portrait for one in seen])
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", images[0].stem).strip("-")[:64]
    space = Workspace(home, check_id(name or "person"))
    run = Run.named(space.runs, f"{method}+from-{start.name}")
    where = march.device_of(device)
    speech = start.meta()["speech"]
    aabb = player.box_for(preset, portrait.signals.camera)
    avatar, marcher, _ = player.build(preset, speech["n_features"], aabb.to(where), where)
    priors.begin_from(avatar, start)
    run.write_preset(text)
    run.save_portrait(portraits.to_arrays(portrait))
    avatar.eval()
    marcher.eval()
    speaker = player.person(avatar, run, where)
    signals = main.portrait.signals
    player.discover(speaker, marcher, player.mouthing(speaker, signals), where)
    player.save(run, avatar, marcher)
    with atomic(run.plate_file) as part:
        cv2.imwrite(str(part), main.plate[..., ::-1])
    run.save_drive({
        **{key: getattr(signals, key).numpy() for key in player.DRIVEN},
        "k": main.k, "usable": np.array([True]), **start.drive(),
    })  # fmt: skip
    source: dict[str, Any] = {
        "name": images[0].name,
        "sha256": sha256_of(images[0]),
        "seconds": 0.0,
    }
    if len(images) > 1:
        source["further"] = [{"name": i.name, "sha256": sha256_of(i)} for i in images[1:]]
    run.write_meta(
        identity=space.id, version=__version__, prior=start.name, method=method, speech=speech,
        source=source, consent=[], steps=0, finished=True, finished_at=time.time(),
        seconds=round(time.monotonic() - began, 2), device=march.device_name(where),
    )  # fmt: skip
    space.note(finished=True, version=__version__, source=source, has_audio=False)
    return space, run
