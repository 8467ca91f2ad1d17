"""Many people -> a prior: what they share, for new people to begin from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric

from talkhead_cli import __version__, march
from talkhead_cli.contracts import MisuseError, Progress, TalkheadError
from talkhead_cli.jobs import expert, fit, footage, looks, player, team
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.footage import Footage, SpeechStats
from talkhead_cli.jobs.preset import Preset, Train
from talkhead_cli.jobs.prior import speech_facts
from talkhead_cli.store import Run, Workspace, priors_folder
from talkhead_cli.store.files import digest

MIN_PEOPLE = 2
SURVEYED, MIN_SURVEYED = 40_000, 100  # rows of all people together, and of each, that are surveyed


def pretrain(
    home: Path,
    names: Sequence[str],
    out: str | None,
    progress: Progress,
    *,
    preset_names: Sequence[str] = ("lokitalk",),
    settings: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    fresh: bool = False,
    devices: int = 1,
    nodes: int = 1,
    stop_after: Callable[[fit.Place], bool] | None = None,
) -> Run:
    """Train what identities `names` share into the prior `out` of the home, by default "prior", and
    for a method that lives by priors the method's name.

    An identity that is missing, damaged or without sound is left out with a word.  A prior that
    was interrupted continues from its last save; a finished one is left as it is.  One of
    `devices` processes on each of `nodes` machines, if there are several (`team.run`).
    """
    preset = presets.load(preset_names, settings)
    if preset.pretrain is None:
        raise MisuseError(
            f"preset '{'+'.join(preset_names)}' has no stages to pretrain; use one that has, such "
            "as lokitalk"
        )
    if preset.avatar.generator is not None:
        raise MisuseError(
            "pretrain teaches a generator of its own; finetune begins a person with "
            f"{preset.avatar.generator}"
        )
    stages = preset.pretrain
    hears_alone = "speech" in preset.train.stages  # people learn their own pictures
    out = out or ("prior" if hears_alone else preset.method)
    prior = Run.named(priors_folder(home), out)
    chief = team.is_chief()
    with prior.locked() if chief else nullcontext():
        if fresh and chief:
            prior.clear()
        where = march.device_of(device)
        fabric = team.fabric(where, team.PRECISION[where.type], devices, nodes)
        fabric.barrier()
        if prior.is_finished and prior.meta()["method"] != preset.method:
            raise MisuseError(
                f"prior '{out}' is there already, of {prior.meta()['method']}; give another -o, or "
                "--fresh to replace it"
            )
        if prior.is_finished:
            progress.note(f"prior '{out}' is finished already; --fresh trains it anew")
        else:
            _train(prior, home, names, preset, stages, progress, fabric, seed, stop_after)
    return prior


def _train(
    prior: Run,
    home: Path,
    names: Sequence[str],
    preset: Preset,
    stages: Train,
    progress: Progress,
    fabric: Fabric,
    seed: int,
    stop_after: Callable[[fit.Place], bool] | None,
) -> None:
    """The stages over everybody who can be used."""
    began, where = time.monotonic(), fabric.device
    fabric.barrier()
    spaces = _openable(home, names, progress)
    with fabric.rank_zero_first():  # which caches the pixels
        people = _loaded(spaces, preset, stages, progress)
    if len(people) < MIN_PEOPLE:
        raise TalkheadError(
            f"a prior needs at least {MIN_PEOPLE} people with sound; {len(people)} of the "
            f"{len(names)} named can be used"
        )
    sources = {space.id: space.manifest()["source"]["sha256"] for space, _ in people}
    text = preset.model_copy(update={"train": stages, "pretrain": None}).to_yaml()
    clips = [clip for _, clip in people]
    hears = speech_facts(people[0][0], preset)
    judge = expert.asked(
        home, preset.method, stages, hears, progress, wanted=prior.meta().get("expert")
    )
    told = None if judge is None else judge.prior.meta()["key"]
    key = digest({"people": sources, "preset": text, "seed": seed, "judge": told})
    if prior.meta().get("key", key) != key:
        raise TalkheadError(
            f"prior '{prior.name}' was begun with other people or settings; pass --fresh to "
            "replace it"
        )
    fabric.barrier()
    if fabric.is_global_zero:
        prior.write_preset(text)
        prior.write_meta(
            version=__version__, people=sources, seed=seed, key=key,
            expert=None if judge is None else judge.name,
        )  # fmt: skip
    fabric.seed_everything(seed, verbose=False)
    boxes = torch.stack([player.box_for(preset, clip.signals.camera) for clip in clips])
    aabb = torch.cat([boxes[:, :3].amin(0), boxes[:, 3:].amax(0)])  # holds all of them
    avatar, marcher, why = player.build(
        preset, clips[0].signals.audio.shape[1:], aabb.to(where), where, len(clips)
    )
    progress.note(f"marching: {why}")
    looks.seat(avatar, judge, preset, stages, where, progress)
    rows = [clip.train[clip.heard[clip.train]] for clip in clips]
    few = max(SURVEYED // len(clips), MIN_SURVEYED)
    avatar.survey([
        clip.signals[own[:: -(-len(own) // few)]].to(where)
        for clip, own in zip(clips, rows, strict=True)
    ])  # fmt: skip
    for clip, own in zip(clips, rows, strict=True):
        avatar.calibrate(clip.signals[own].to(where), clip.mesh.to(where), aabb.to(where))
    set_up = time.monotonic() - began
    place = fit.fit(
        preset.model_copy(update={"train": stages}), avatar, marcher, clips, prior, fabric,
        progress, seed=seed, stop_after=stop_after,
    )  # fmt: skip
    if place.stage < len(stages.stages) or not fabric.is_global_zero:
        return
    prior.save_weights(avatar.common_state())
    # how a voice sounds of which too little is heard
    mean, std = (
        np.mean([getattr(clip.stats, name) for clip in clips], 0) for name in ("mean", "std")
    )
    prior.save_drive(SpeechStats(mean, std, hears["rate_hz"]).arrays())
    prior.write_meta(
        finished=True,
        finished_at=time.time(),
        seconds=round(set_up + place.seconds, 1),
        steps=place.total,
        figures=place.figures,
        method=preset.method,
        speech=hears,
        torch=torch.__version__,
    )


def _openable(home: Path, names: Sequence[str], progress: Progress) -> list[Workspace]:
    """Workspaces that can be used together; the others are left out with a word."""
    found = []
    for name in dict.fromkeys(names):
        try:
            space = Workspace.open(home, name)
            if not space.manifest()["has_audio"]:
                raise TalkheadError("it was preprocessed without sound")
            found.append(space)
        except TalkheadError as error:
            progress.note(f"'{name}' is left out: {error}")
    voices = Counter(space.manifest()["backends"]["voice"] for space in found)
    if len(voices) > 1:
        most, _ = voices.most_common(1)[0]
        for space in found:
            if space.manifest()["backends"]["voice"] != most:
                progress.note(f"'{space.id}' is left out: it hears by another backend than {most}")
        found = [s for s in found if s.manifest()["backends"]["voice"] == most]
    return found


def _loaded(
    spaces: list[Workspace], preset: Preset, stages: Train, progress: Progress
) -> list[tuple[Workspace, Footage]]:
    """Footage of each, all of it for training: nobody of a prior is scored."""
    data = preset.data.model_copy(update={"holdout": 0.0, "train_s": 0.0})
    pictures = any(stage.rays != "none" or stage.shown for stage in stages.stages.values())
    people: list[tuple[Workspace, Footage]] = []
    for space in spaces:
        try:
            clip = footage.load(space, data, progress, person=len(people), pictures=pictures)
            if not bool(clip.heard[clip.train].any()):
                raise TalkheadError("nothing is heard while a face is seen")
            people.append((space, clip))
        except TalkheadError as error:
            progress.note(f"'{space.id}' is left out: {error}")
    return people
