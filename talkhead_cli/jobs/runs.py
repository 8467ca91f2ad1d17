"""Runs on disk and the avatars in them: which run is meant, building, saving, enrolling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from talkhead_cli import march
from talkhead_cli.avatars import avatar_class
from talkhead_cli.avatars.base import Avatar, Speaker
from talkhead_cli.blocks.planes import why_no_triton
from talkhead_cli.contracts import Camera, MisuseError, Progress, TalkheadError
from talkhead_cli.jobs import footage, portraits
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.store import Run, Workspace, finished_runs


def pick_run(space: Workspace, name: str | None, progress: Progress) -> Run:
    """Return the named finished run, else the newest, which is noted, and if its training was
    made shorter: it may have been a quick look."""
    runs = finished_runs(space.runs)
    if not runs:
        raise TalkheadError(
            f"'{space.id}' has no finished run; train one with: talkhead finetune --id {space.id}"
        )
    if name is None:
        settings = runs[0].meta().get("asked", {}).get("settings", [])
        scaled = [setting for setting in settings if setting.startswith("train.scale=")]
        hint = f" (-s {scaled[-1]}; --run chooses another)" if scaled else ""
        progress.note(f"run: {runs[0].name}{hint}")
        return runs[0]
    return _only([run for run in runs if run.name == name], space, name)


def pick_by_beginning(space: Workspace, word: str) -> Run:
    """Return the finished run of that name, else the newest whose name begins with that word, if
    possible with whole parts of the name (lokitalk+tiny)."""
    runs = finished_runs(space.runs)
    exact = [r for r in runs if r.name == word]
    parts = [r for r in runs if r.name.startswith(f"{word}+")]
    letters = [r for r in runs if r.name.startswith(word)]
    return _only(exact or parts or letters, space, word)


def _only(found: Sequence[Run], space: Workspace, name: str) -> Run:
    """Return the first run found; TalkheadError if there is none."""
    if not found:
        known = ", ".join(run.name for run in finished_runs(space.runs)) or "none"
        raise TalkheadError(f"'{space.id}' has no finished run '{name}'; it has: {known}")
    return found[0]


def box_for(preset: Preset, camera: Camera) -> Tensor:
    """Return the box (6,) of the method's field: its own, or what the cameras see of the person."""
    own = avatar_class(preset.method).box
    return footage.box_of(camera) if own is None else torch.tensor(own)


def speech_shape_of(run: Run) -> tuple[int, int]:
    """Return the shape (W, A) of the speech windows that a run or prior was trained on."""
    speech = run.meta()["speech"]
    if "n_steps" not in speech:
        raise TalkheadError(
            f"'{run.name}' was trained by an older version, which heard speech otherwise; train it "
            "again with --fresh"
        )
    return speech["n_steps"], speech["n_features"]


def build_avatar(
    preset: Preset,
    speech_shape: Sequence[int],
    aabb: Tensor,
    device: torch.device,
    n_people: int = 1,
) -> tuple[Avatar, march.Marcher, str]:
    """Build avatar, marcher and a line on why this marcher; speech_shape (W, A): of the windows."""
    n_steps, n_features = speech_shape
    method, generator = avatar_class(preset.method), preset.avatar.generator
    if generator is not None and generator not in method.generators:
        raise MisuseError(f"preset {preset.method} does not begin with a generator: {generator}")
    avatar = method.build(
        preset.avatar.size,
        n_steps=n_steps,
        n_features=n_features,
        px=preset.data.size_px,
        n_people=n_people,
        **({} if generator is None else {"borrowed": generator}),
    )
    on_gpu = device.type == "cuda"
    lacks = why_no_triton() if on_gpu else "there is no GPU"
    marcher, why = march.build(aabb, device, kernels=not lacks, **preset.march.of_marcher())
    if on_gpu and lacks:
        why += f"; planes and samples go through plain torch, more slowly ({lacks})"
    return avatar.to(device), marcher.to(device), why


def save_avatar(run: Run, avatar: Avatar, marcher: march.Marcher) -> None:
    """Save the weights of avatar and marcher."""
    tensors = {f"avatar.{k}": v for k, v in avatar.state_dict().items()}
    run.save_weights(tensors | {f"marcher.{k}": v for k, v in marcher.state_dict().items()})


@torch.no_grad()
def enrolled(avatar: Avatar, run: Run, device: torch.device) -> Speaker:
    """Return the run's person, enrolled from its portrait if the method needs one."""
    kept = run.portrait()
    if (kept is not None) != avatar.needs_portrait:
        lacks = "lacks the pictures it is made from" if kept is None else "holds a stray portrait"
        raise TalkheadError(f"run '{run.name}' {lacks} (portrait.npz); make it again")
    return avatar.enroll(None if kept is None else portraits.from_arrays(kept).to(device))
