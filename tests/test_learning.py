"""The stages of every method teach each module of the parts that they say they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from talkhead_cli.avatars import METHODS, avatar_class
from talkhead_cli.contracts import SilentProgress
from talkhead_cli.jobs import footage, shots
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.runs import box_for, build_avatar
from talkhead_cli.jobs.step import Step, UncastShots
from talkhead_cli.store import Workspace

PX = 64


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("method", sorted(m for m in METHODS if not avatar_class(m).needs_portrait))
def test_stages_teach_all_that_they_name(speaker_home: Path, method: str, size: str) -> None:
    """Each stage something of every part, and all of them together every module: what a patch of
    the eyes does not show, a shoulder say, it cannot teach."""
    preset = presets.load([method, size], [f"data.size_px={PX}", "march.resolution=16"])
    preset = presets.adapted_to_start(preset, None, 20)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    rows = clip.signals[clip.train]
    aabb = box_for(preset, rows.camera)
    torch.manual_seed(0)
    avatar, marcher, _ = build_avatar(preset, rows.audio.shape[1:], aabb, torch.device("cpu"))
    avatar.calibrate(rows, clip.mesh, aabb)
    with torch.no_grad():  # what begins at zero hides what lies before it
        for parameter in avatar.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    step, rng = Step(avatar, marcher).train(), torch.Generator().manual_seed(0)
    module_of = {id(p): name.rpartition(".")[0] for name, p in avatar.named_parameters()}
    marcher.exploring = True
    taught: set[str] = set()
    for name, stage in preset.train.stages.items():
        avatar.noise = stage.noise
        shot = shots.draw(clip, stage, 600, avatar.aabb, rng, avatar.magnification)
        parts = {part: list(avatar.part(part)) for part in stage.learn}
        parameters = [p for part in parts.values() for p in part]
        loss = step(UncastShots([shot]), stage.weights).loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        heard = {
            id(p)
            for p, g in zip(parameters, gradients, strict=True)
            if g is not None and g.abs().max() > 0
        }
        for part, own in parts.items():
            assert any(id(p) in heard for p in own), (name, part)
        taught |= {module_of[number] for number in heard}
    named = {module_of[id(p)] for part in avatar.parts() for p in avatar.part(part)}
    assert taught == named
