"""The lip-sync expert: what it looks at, and what it makes of films whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import hearing

from talkhead_cli.blocks.sync import (
    CROP_PX,
    N_FRAMES,
    SyncExpert,
    agreement,
    lip_boxes,
    lip_crops,
    offset_of,
    runs_of,
    sync_losses,
)
from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs import expert, footage, shots
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.step import Step, UncastShots
from talkhead_cli.march import DenseMarcher
from talkhead_cli.store import Run, Workspace


def walk(n: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors (n, 16) that wander: neighbours are alike, strangers are not."""
    steps = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    kernel = torch.ones(16, 1, 3) / 3
    smooth = F.conv1d(steps.T[None], kernel, padding=1, groups=16)[0].T
    return F.normalize(smooth, dim=1)


@pytest.mark.parametrize("px", [256, 251, 767])
def test_a_crop_is_the_box_of_the_picture(px: int) -> None:
    """A ramp is read where the box lies: its value says its place."""
    ramp = (torch.arange(px) + 0.5) / px
    pictures = torch.stack([ramp.expand(px, px), ramp[:, None].expand(px, px)])[..., None]
    box = torch.tensor([[0.4, 0.6, 0.1]]).expand(2, 3)
    crops = lip_crops(pictures.expand(-1, -1, -1, 3), box)
    line = (torch.arange(CROP_PX) + 0.5) * 2 / CROP_PX - 1
    assert torch.allclose(crops[0], (0.4 + 0.1 * line).expand(CROP_PX, -1), atol=1e-4)
    assert torch.allclose(crops[1], (0.6 + 0.1 * line)[:, None].expand(-1, CROP_PX), atol=1e-4)


def test_boxes_move_and_grow_with_the_face() -> None:
    marks = torch.rand(3, 68, 2)
    boxes = lip_boxes(marks)
    assert torch.allclose(lip_boxes(0.5 * marks + 0.1)[:, :2], 0.5 * boxes[:, :2] + 0.1)
    assert torch.allclose(lip_boxes(0.5 * marks + 0.1)[:, 2], 0.5 * boxes[:, 2])


def test_runs_never_cross_a_gap() -> None:
    moments = torch.tensor([0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13])
    crops = moments.float()[:, None, None].expand(-1, 2, 2)
    runs, middle = runs_of(crops, moments)
    assert moments[middle].tolist() == [2, 3, 11]
    assert runs[:, :, 0, 0].tolist() == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [9, 10, 11, 12, 13]]
    few, none = runs_of(crops[: N_FRAMES - 1], moments[: N_FRAMES - 1])
    assert len(few) == len(none) == 0


@pytest.mark.parametrize("late", [-7, 0, 4])
def test_the_offset_is_found(late: int) -> None:
    lips = walk(200)
    sound = lips.roll(late, 0)
    shift, confidence = offset_of(lips, sound, torch.arange(200))
    assert abs(shift - late) < 0.2 and confidence > 0.5
    _, doubt = offset_of(lips, walk(200, seed=1), torch.arange(200))
    assert doubt < 0.2 < confidence


def test_agreement_of_equals_and_of_strangers() -> None:
    moments = torch.arange(120)
    same = agreement(walk(120), walk(120), moments)
    strange = agreement(walk(120), walk(120, seed=1), moments)
    assert float(same["found"]) > 0.99 and float(same["contrast"]) < 0.2
    assert abs(float(strange["found"]) - 0.5) < 0.1
    assert float(strange["contrast"]) > math.log(120) - 1.5


def test_near_moments_are_neither_right_nor_wrong() -> None:
    lips = F.normalize(torch.ones(6, 4), dim=1)  # all alike: every other moment is a tie
    assert float(agreement(lips, lips, torch.arange(6), near=9)["contrast"]) == pytest.approx(0)
    found = agreement(lips, lips, torch.arange(6), near=0)["contrast"]
    assert float(found) == pytest.approx(math.log(6))


def test_what_it_sees_does_not_hang_on_the_light() -> None:
    torch.manual_seed(0)
    net = SyncExpert(33, 12).eval()
    crops = torch.rand(2, N_FRAMES, CROP_PX, CROP_PX)
    seen = net.embed_lips(crops)
    assert torch.allclose(seen.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(net.embed_lips(0.6 * crops + 0.2), seen, atol=1e-4)


def test_drawn_lips_are_judged_where_five_rows_follow_each_other(speaker_home: Path) -> None:
    data = presets.load(["expert", "tiny"], ["data.size_px=128"]).data
    clip = footage.load(Workspace.open(speaker_home, "speaker"), data, SilentProgress())
    torch.manual_seed(0)
    net = SyncExpert(*clip.signals.audio.shape[1:]).eval().requires_grad_(False)
    rows = clip.train[10:16]
    pictures = torch.from_numpy(clip.pictures[rows.numpy()]).float() / 255
    drawn = pictures.clone().requires_grad_()
    found = sync_losses([net], drawn, clip.signals[rows])["sync"]
    found.backward()
    assert 0 <= float(found.detach()) <= 2 and drawn.grad is not None
    lips = clip.signals.landmarks_2d[rows, 62] * 128
    x, y = lips[0].long().tolist()
    assert drawn.grad[:, y - 2 : y + 3, x - 2 : x + 3].abs().max() > 0
    assert drawn.grad[:, :10].abs().max() == 0, "the forehead has no say"
    assert sync_losses([], pictures, clip.signals[rows]) == {}
    assert sync_losses([net], pictures[:4], clip.signals[rows[:4]]) == {}
    apart = clip.train[[0, 2, 4, 6, 8, 10]]
    assert sync_losses([net], pictures, clip.signals[apart]) == {}


def test_an_expert_is_asked_only_where_it_can_be_heard(tmp_path: Path) -> None:
    run = Run.named(tmp_path / "a" / "runs", "mine")
    hears: dict[str, object] = {}
    five = ["train.stages.upscale.n_frames=5", "train.stages.upscale.in_sequence=5"]
    weigh = ["train.stages.upscale.weights.sync=0.1"]
    progress = SilentProgress()
    plain = presets.load(["talk3d"])
    assert expert.of_run(run, tmp_path, "talk3d", plain.train, hears, progress, False) is None
    assert not progress.notes
    able = presets.load(["talk3d"], [*five, *weigh])
    assert expert.of_run(run, tmp_path, "talk3d", able.train, hears, progress, False) is None
    assert "pretrain --expert" in progress.notes[0]
    with pytest.raises(MisuseError, match="frames in a row"):
        expert.of_run(
            run, tmp_path, "talk3d", presets.load(["talk3d"], weigh).train, hears, progress, False
        )
    deaf = presets.load(["lokitalk"], ["train.stages.lips.weights.sync=0.1"])
    with pytest.raises(MisuseError, match="no loss 'sync'"):
        expert.of_run(run, tmp_path, "lokitalk", deaf.train, hears, progress, False)


def test_a_run_that_is_resumed_keeps_its_expert_or_does_without(tmp_path: Path) -> None:
    run, progress = Run.named(tmp_path / "a" / "runs", "mine"), SilentProgress()
    words = ["n_frames=5", "in_sequence=5", "weights.sync=0.1"]
    able = presets.load(["talk3d"], [f"train.stages.upscale.{word}" for word in words]).train
    run.write_meta(**expert.facts(None))
    assert expert.of_run(run, tmp_path, "talk3d", able, {}, progress, False) is None
    assert not progress.notes, "it was said when the run began"
    run.write_meta(expert="ear", expert_key="abc")
    with pytest.raises(TalkheadError, match="begun with the lip-sync expert 'ear', which is gone"):
        expert.of_run(run, tmp_path, "talk3d", able, {}, progress, False)
    assert expert.of_run(run, tmp_path, "talk3d", able, {}, progress, True) is None


def test_it_learns_whose_lips_go_with_which_sound(speaker_home: Path) -> None:
    """On the synthetic speaker, whose voice and lips are one: better than chance in a few steps."""
    preset = presets.load(["expert", "tiny"], ["data.size_px=128"])
    assert preset.pretrain is not None
    stage = preset.pretrain.stages["match"]
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    torch.manual_seed(0)
    net = expert.Expert.build("tiny", **hearing(clip.signals), px=128)
    step = Step(net, DenseMarcher(net.aabb, 2)).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(60):
        lost = step(UncastShots([shots.draw(clip, stage, 0, net.aabb, rng)]), {"contrast": 1.0})
        optimizer.zero_grad()
        lost.loss.backward()
        optimizer.step()
    assert lost.n_points == 0
    net.eval()
    rows = clip.held
    with torch.no_grad():
        shown = torch.from_numpy(clip.pictures[rows.numpy()]).float() / 255
        signals = clip.signals[rows]
        crops = net.crops(shown, signals.landmarks_2d)
        seen, heard, middle = net.embedded(crops, signals.audio, signals.moment)
        found = agreement(seen, heard, signals.moment[middle])["found"]
    assert float(found) > 0.6, float(found)
