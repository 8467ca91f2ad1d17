"""Train an avatar of one person from their workspace."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from talkhead_cli import march
from talkhead_cli.avatars import avatar_class, method_names
from talkhead_cli.avatars.base import Avatar
from talkhead_cli.contracts import FPS, MisuseError, Progress, TalkheadError
from talkhead_cli.jobs import (
    expert,
    fit,
    footage,
    generators,
    loss_networks,
    portraits,
    team,
    views,
)
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs import prior as priors
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.player import DRIVEN
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.jobs.prior import Start
from talkhead_cli.jobs.runs import box_for, build_avatar, enrolled, save_avatar
from talkhead_cli.jobs.step import refuse_unknown
from talkhead_cli.jobs.training import Training
from talkhead_cli.store import Run, Workspace, list_runs

N_PORTRAITS = 4  # of a new person, for `Avatar.meet` after a prior


def finetune(
    home: Path,
    name: str,
    progress: Progress,
    *,
    preset_names: Sequence[str] | None = None,
    settings: Sequence[str] = (),
    run_name: str | None = None,
    prior: str | None = None,
    device: str = "auto",
    seed: int = 0,
    fresh: bool = False,
    devices: int = 1,
    nodes: int = 1,
    stop_after: Callable[[fit.Position], bool] | None = None,
) -> Run:
    """Train the preset made of `preset_names` and `settings` on identity `name`; by default
    `presets.default_presets` of the device.

    prior: name of the prior to start from; by default the newest that fits, if there is one; "none"
    starts from nothing.  This is one of `devices` processes on each of `nodes` machines, if there
    are several (`team.run`).
    An interrupted run resumes from its last save; a finished one is left as it is.
    """
    where = march.device_of(device)
    preset_names = preset_names or presets.default_presets(where.type, progress)
    preset = presets.load(preset_names, settings)
    _refuse_untrainable(preset, settings)
    space = Workspace.open(home, name)
    _refuse_silent(space)
    asked = _Asked(home, space, preset, preset_names, settings, run_name, prior, fresh)
    hears = priors.speech_facts(space, preset)
    start = _start(asked, hears, progress)
    run = asked.run(start)
    if not fresh:
        preset = _as_begun(run, asked, progress)
    with space.locked() if team.is_chief(devices, nodes) else nullcontext():
        fabric = team.fabric(where, team.PRECISION[where.type], devices, nodes)
        fabric.barrier()
        if not fresh and _is_finished(run, preset, space, start, seed, progress):
            return run
        fabric.barrier()
        training = Training(run, fabric, progress, seed, fresh, stop_after)
        if word := presets.warning_of_slow_training(preset, preset.train, where.type):
            progress.note(word)
        fabric.seed_everything(seed, verbose=False)
        with fabric.rank_zero_first():  # the first process caches the pixels
            clip = footage.load(space, preset.data, progress)
        avatar, marcher, stages = _initialised(preset, name, clip, start, fabric.device, progress)
        judge = expert.of_run(run, home, preset.method, stages.train, hears, progress, fresh)
        loss_networks.attach(avatar, judge, stages, stages.train, fabric.device, progress)
        training.begin(
            preset.to_yaml(),
            identity=name,
            footage=space.fingerprint,
            asked=asked.options,
            prior=None if start is None else start.facts(),
            **generators.facts(preset.avatar.generator),
            **expert.facts(judge),
        )
        if avatar.needs_portrait:
            if training.is_chief:
                run.save_portrait(portraits.to_arrays(clip.portrait(clip.best_likeness())))
            fabric.barrier()
            _discover(avatar, marcher, clip, run, fabric.device)
        position = training.train(stages, avatar, marcher, [clip])
        if position is not None:
            progress.stage("views of held-out frames")
            _save(avatar, marcher, clip, run, space, fabric.device)
            training.finish(
                position,
                n_train=len(clip.train),
                n_held=len(clip.held),
                device=march.device_name(fabric.device),
                speech=hears,
                source=space.manifest()["source"],
                consent=space.manifest().get("consent", []),
            )
    return run


@dataclass(frozen=True)
class _Asked:
    """What one asked for; `finetune` says what the fields mean, whose defaults are filled in."""

    home: Path
    space: Workspace
    preset: Preset
    preset_names: Sequence[str]
    settings: Sequence[str]
    run_name: str | None
    prior: str | None
    fresh: bool

    @property
    def options(self) -> dict[str, list[str]]:
        """What a run records: with the same options the same command continues it."""
        return {"presets": list(self.preset_names), "settings": list(self.settings)}

    def run(self, start: Start | None) -> Run:
        """Return the run, called by default after its presets and the prior that it starts from."""
        own = presets.run_name(self.preset_names)
        told = own if start is None else f"{own}+from-{start.prior.name}"
        return Run.named(self.space.runs, self.run_name or told)


def _refuse_untrainable(preset: Preset, settings: Sequence[str]) -> None:
    """Raise an error unless the preset trains an avatar and the settings are of this command."""
    avatar_class(preset.method)  # which refuses one that nobody knows
    for setting in settings:
        if setting.startswith("pretrain."):
            raise MisuseError(f"-s {setting} is read by pretrain; say {setting[len('pre') :]}")
    if preset.method not in method_names():
        raise MisuseError(
            f"preset {preset.method} does not make avatars; train it with: talkhead pretrain -p "
            f"{preset.method}"
        )


def _refuse_silent(space: Workspace) -> None:
    """Raise TalkheadError if the identity has no footage with sound."""
    space.refuse_without_footage("learn from")
    if not space.manifest()["has_audio"]:
        raise TalkheadError(
            f"'{space.id}' was preprocessed without sound, so its speech cannot be learnt; "
            "preprocess a clip that has sound"
        )


def _start(asked: _Asked, hears: dict[str, Any], progress: Progress) -> Start | None:
    """Return the prior to start from, None to start from nothing: that of `prior`, else that of the
    run to continue, if there is one, else the newest that fits."""
    preset, prior = asked.preset, asked.prior
    cannot_without = avatar_class(preset.method).needs_portrait
    if preset.avatar.generator is not None:
        if prior not in (None, "none"):
            raise MisuseError(
                f"one begins with a prior or with {preset.avatar.generator}, not with both"
            )
        return None
    if prior == "none" and cannot_without:
        raise MisuseError(f"preset {preset.method} draws people by a prior; name one with --prior")
    if prior is None and not asked.fresh:
        prior = priors.prior_of_begun_run(
            list_runs(asked.space.runs),
            asked.run_name or presets.run_name(asked.preset_names),
            exactly=asked.run_name is not None,
        )
    if prior is None and cannot_without:
        prior = priors.newest(asked.home, preset.method, preset, hears)
    return priors.choose_start(asked.home, prior, preset, asked.space, hears, progress)


def _initialised(
    preset: Preset,
    name: str,
    clip: Footage,
    start: Start | None,
    where: torch.device,
    progress: Progress,
) -> tuple[Avatar, march.Marcher, Preset]:
    """Return avatar and marcher, initialised and calibrated, and the preset that applies."""
    aabb = box_for(preset, clip.signals.camera[clip.train]).to(where)
    avatar, marcher, why = build_avatar(preset, clip.signals.audio.shape[1:], aabb, where)
    progress.note(f"marching: {why}")
    if start is not None:
        priors.load_prior(avatar, start.prior)
        progress.note(_note_on_prior(start, name))
    if (generator := preset.avatar.generator) is not None:
        generators.load_generator(avatar, generator, progress)
    knows = start is not None or generator is not None
    seconds = len(clip.train) / FPS
    if knows and (share := presets.share_of_steps(preset, seconds)) < 1:
        progress.note(
            f"{seconds:.1f} s to learn from: training for {share:.0%} of the steps, since more "
            f"would overfit (-s train.scale={preset.train.scale / share:.3g} takes all)"
        )
    trained = avatar.common_parts() if start is not None else avatar.generator_parts
    stages = presets.adapted_to_start(preset, trained if knows else None, seconds)
    refuse_unknown(stages.train, avatar, preset.method)
    clip.refuse_mute(name)
    avatar.calibrate(clip.signals[clip.speaking].to(where), clip.mesh.to(where), aabb)
    avatar.see(clip.signals[clip.train].to(where))
    if start is not None:
        avatar.meet(clip.portrait(clip.best_likeness(N_PORTRAITS)).to(where))
    return avatar, marcher, stages


def _discover(
    avatar: Avatar, marcher: march.Marcher, clip: Footage, run: Run, where: torch.device
) -> None:
    """Show the marcher, before any training, where the enrolled person is."""
    avatar.eval()
    marcher.eval()
    speaker = enrolled(avatar, run, where)
    views.rebuild_from_views(speaker, marcher, clip.signals[clip.train], where)


def _save(
    avatar: Avatar,
    marcher: march.Marcher,
    clip: Footage,
    run: Run,
    space: Workspace,
    where: torch.device,
) -> None:
    """Save all that rendering the person needs."""
    avatar.finish()
    avatar.eval()
    marcher.eval()
    if len(clip.held):  # training never shows these poses, but films replay them
        speaker = enrolled(avatar, run, where)
        known = views.poses_of(clip.signals[clip.train])
        new = views.new_poses(views.poses_of(clip.signals[clip.held]), known, views.N_VIEWS)
        if new:
            views.open_views(speaker, marcher, clip.signals[clip.held[new]], where)
    if avatar.needs_portrait:  # nor were the others shown in training
        speaker = enrolled(avatar, run, where)
        views.open_views(speaker, marcher, clip.signals[clip.train], where)
    save_avatar(run, avatar, marcher)
    run.save_drive(_drive(space, clip))
    shutil.copyfile(space.plate_file, run.plate_file)


def refined(preset_names: Sequence[str], steps: int | None) -> list[str]:
    """Return the setting that `--refine` stands for."""
    if steps is None:
        return []
    if not preset_names or "refine" not in presets.load(preset_names).train.stages:
        raise MisuseError("--refine goes with a preset that enrolls people from pictures: -p s3d")
    return [f"train.stages.refine.steps={steps}"]


def _note_on_prior(start: Start, name: str) -> str:
    told = (
        f"prior: {start.prior.name}, of {start.n_people} people (--prior none trains from nothing)"
    )
    if start.knows:
        told += f"; '{name}' is one of them, so its held-out figures will be too good"
    return told


def _as_begun(run: Run, asked: _Asked, progress: Progress) -> Preset:
    """Return the preset saved in the run if the same options began it, else the one asked for."""
    text = run.preset_text()
    files = [name for name in asked.preset_names if presets.is_file(name)]
    if text is None or files or run.meta().get("asked") != asked.options:
        return asked.preset
    begun = presets.from_yaml(text)
    if begun != asked.preset:
        progress.note(
            f"talkhead's presets changed since run '{run.name}' was begun, which keeps its own "
            "(--fresh takes the new ones)"
        )
    return begun


def _is_finished(
    run: Run, preset: Preset, space: Workspace, start: Start | None, seed: int, progress: Progress
) -> bool:
    """Return whether nothing is left to do; TalkheadError if the run was begun with another preset,
    clip, prior or seed."""
    text = run.preset_text()
    if text is None:
        return False
    held = presets.from_yaml(text)
    if held != preset:
        raise TalkheadError(
            f"run '{run.name}' was begun with other settings ({presets.differences(held, preset)});"
            " pass --fresh to replace it, or --run NAME for a new one"
        )
    if run.meta().get("footage", space.fingerprint) != space.fingerprint:
        raise TalkheadError(
            f"run '{run.name}' was trained on an earlier preprocessing of '{space.id}'; pass "
            "--fresh to train it anew"
        )
    if run.meta().get("prior") != (None if start is None else start.facts()):
        own = (run.meta().get("prior") or {"name": "none"})["name"]
        raise TalkheadError(
            f"run '{run.name}' was begun from another prior ({own}); name it with --prior, pass "
            "--fresh to replace the run, or --run NAME for a new one"
        )
    if run.meta().get("seed", seed) != seed:
        raise TalkheadError(
            f"run '{run.name}' was begun with --seed {run.meta()['seed']}; pass --fresh to replace "
            "it, or --run NAME for a new one"
        )
    if run.is_finished:
        progress.note(f"run '{run.name}' is finished already; --fresh trains it anew")
    return run.is_finished


def _drive(space: Workspace, clip: Footage) -> dict[str, np.ndarray]:
    """Return what rendering needs of the footage."""
    tracks = space.load("tracks")
    kept = {name: tracks[name] for name in (*DRIVEN, "k", "usable")}
    trained = np.zeros(len(tracks["usable"]), bool)
    trained[clip.train.numpy()] = True
    return {**kept, "trained": trained, **clip.stats.arrays()}
