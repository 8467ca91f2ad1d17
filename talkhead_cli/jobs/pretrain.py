"""Train a prior on many people: shared weights that new people start from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from talkhead_cli import march
from talkhead_cli.avatars import avatar_class
from talkhead_cli.contracts import MisuseError, Progress, TalkheadError
from talkhead_cli.jobs import expert, fit, footage, loss_networks, team
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.footage import Footage, SpeechStats
from talkhead_cli.jobs.preset import Preset, Train
from talkhead_cli.jobs.prior import speech_facts
from talkhead_cli.jobs.runs import box_for, build_avatar
from talkhead_cli.jobs.step import refuse_unknown
from talkhead_cli.jobs.training import Training
from talkhead_cli.store import Run, Workspace, priors_folder
from talkhead_cli.store.files import digest

MIN_PEOPLE = 2
SURVEYED, MIN_SURVEYED = 40_000, 100  # rows for `Avatar.survey`: total, least per person


def pretrain(
    home: Path,
    names: Sequence[str],
    out: str | None,
    progress: Progress,
    *,
    preset_names: Sequence[str] | None = None,
    settings: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    fresh: bool = False,
    devices: int = 1,
    nodes: int = 1,
    stop_after: Callable[[fit.Position], bool] | None = None,
) -> Run:
    """Train what identities `names` share into the prior `out` of the home; by default "prior", or
    the method's name if its fine-tuning has no stage `speech`.  preset_names: by default
    `presets.default_presets` of the device.

    An identity that is missing, damaged or without sound is left out with a note.  An interrupted
    prior resumes from its last save; a finished one is left as it is.  This is one of `devices`
    processes on each of `nodes` machines, if there are several (`team.run`).
    """
    where = march.device_of(device)
    preset_names = preset_names or presets.default_presets(where.type, progress)
    preset = presets.load(preset_names, settings)
    avatar_class(preset.method)  # refuses an unknown method before anything is read
    for setting in settings:
        if setting.startswith("train."):
            raise MisuseError(f"-s {setting} is read by finetune; say pre{setting}")
        if setting.startswith(("data.train_s", "data.holdout")):
            raise MisuseError(f"-s {setting} is read by finetune: a prior learns from all footage")
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
    finetunes_speech = "speech" in preset.train.stages  # else a person only enrolls
    out = out or ("prior" if finetunes_speech else preset.method)
    if out == "none":
        raise MisuseError("--prior none means no prior: none can be called that; give another -o")
    prior = Run.named(priors_folder(home), out)
    chief = team.is_chief(devices, nodes)
    with prior.locked() if chief else nullcontext():
        fabric = team.fabric(where, team.PRECISION[where.type], devices, nodes)
        fabric.barrier()
        asked = _asked_for(home, names, preset, stages, seed, progress)
        if not fresh:
            _refuse_another(prior, preset, asked.key)
        if prior.is_finished and not fresh:
            progress.note(f"prior '{out}' is finished already; --fresh trains it anew")
        else:
            training = Training(prior, fabric, progress, seed, fresh, stop_after)
            _train(training, home, asked, preset, stages)
    return prior


@dataclass(frozen=True)
class _Asked:
    """What a prior is trained on: usable workspaces, of how many identities that were named, the
    preset; key: a digest of people with their footage as tracked, preset and seed."""

    spaces: list[Workspace]
    n_named: int
    preset_text: str
    key: str


def _asked_for(
    home: Path, names: Sequence[str], preset: Preset, stages: Train, seed: int, progress: Progress
) -> _Asked:
    spaces = _openable(home, names, progress)
    if len(spaces) < MIN_PEOPLE:
        raise _too_few(len(spaces), len(set(names)))
    alone = preset.model_copy(update={"train": stages, "pretrain": None})
    footage = [[space.id, space.fingerprint] for space in spaces]
    # without defaults, so that an option added to presets later leaves existing keys as they are
    chosen = alone.model_dump(mode="json", exclude_defaults=True)
    key = digest({"people": footage, "preset": chosen, "seed": seed})
    return _Asked(spaces, len(set(names)), alone.to_yaml(), key)


def _refuse_another(prior: Run, preset: Preset, key: str) -> None:
    """Raise MisuseError if the prior was begun with other people, footage or settings."""
    known = prior.meta()
    if known.get("key", key) != key:
        method = known.get("method", preset.method)
        what = "other people, footage or settings" if method == preset.method else method
        raise MisuseError(
            f"prior '{prior.name}' is there already, of {what}; give another -o, or --fresh to "
            "replace it"
        )


def _too_few(n: int, n_named: int) -> TalkheadError:
    return TalkheadError(
        f"a prior needs at least {MIN_PEOPLE} people with sound; {n} of the {n_named} named "
        "can be used"
    )


def _train(training: Training, home: Path, asked: _Asked, preset: Preset, stages: Train) -> None:
    """Train the stages on all people whose footage can be used."""
    prior, progress, fabric = training.run, training.progress, training.fabric
    where = fabric.device
    if word := presets.warning_of_slow_training(preset, stages, where.type):
        progress.note(word)
    fabric.barrier()
    with fabric.rank_zero_first():  # the first process caches the pixels
        people = _loaded(asked.spaces, preset, stages, progress)
    if len(people) < MIN_PEOPLE:
        raise _too_few(len(people), asked.n_named)
    sources = {space.id: space.manifest()["source"]["sha256"] for space, _ in people}
    clips = [clip for _, clip in people]
    hears = speech_facts(people[0][0], preset)
    judge = expert.of_run(prior, home, preset.method, stages, hears, progress, training.fresh)
    fabric.seed_everything(training.seed, verbose=False)
    boxes = torch.stack([box_for(preset, clip.signals.camera[clip.train]) for clip in clips])
    aabb = torch.cat([boxes[:, :3].amin(0), boxes[:, 3:].amax(0)])  # holds all of them
    avatar, marcher, why = build_avatar(
        preset, clips[0].signals.audio.shape[1:], aabb.to(where), where, len(clips)
    )
    refuse_unknown(stages, avatar, preset.method)
    progress.note(f"marching: {why}")
    loss_networks.attach(avatar, judge, preset, stages, where, progress)
    training.begin(
        asked.preset_text,
        people=sources,
        key=asked.key,
        **expert.facts(judge),
    )
    rows = [clip.speaking for clip in clips]
    few = max(SURVEYED // len(clips), MIN_SURVEYED)
    avatar.survey(
        [
            clip.signals[own[:: -(-len(own) // few)]].to(where)
            for clip, own in zip(clips, rows, strict=True)
        ]
    )
    for clip, own in zip(clips, rows, strict=True):
        avatar.calibrate(clip.signals[own].to(where), clip.mesh.to(where), aabb.to(where))
        avatar.see(clip.signals[clip.train].to(where))
    trained = preset.model_copy(update={"train": stages})
    position = training.train(trained, avatar, marcher, clips)
    if position is None:
        return
    prior.save_weights(avatar.common_state())
    # statistics for a voice with too little sound to measure its own
    mean, std = (
        np.mean([getattr(clip.stats, name) for clip in clips], 0) for name in ("mean", "std")
    )
    prior.save_drive(SpeechStats(mean, std, hears["rate_hz"]).arrays())
    training.finish(position, method=preset.method, speech=hears)


def _openable(home: Path, names: Sequence[str], progress: Progress) -> list[Workspace]:
    """Open the workspaces that can be used together, sorted by name, so that people have the same
    numbers after a resume.  The others are left out with a note."""
    found = []
    for name in sorted(set(names)):
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
    """Load each footage, all of it for training, since a prior is not evaluated on its people."""
    data = preset.data.model_copy(update={"holdout": 0.0, "train_s": 0.0})
    pictures = any(stage.rays != "none" or stage.shown for stage in stages.stages.values())
    people: list[tuple[Workspace, Footage]] = []
    for space in spaces:
        try:
            clip = footage.load(space, data, progress, person=len(people), pictures=pictures)
            clip.refuse_mute(space.id)
            people.append((space, clip))
        except TalkheadError as error:
            progress.note(f"'{space.id}' is left out: {error}")
    return people
