"""LokiTalk's geometry and gates, on numbers that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from talkhead_cli import march
from talkhead_cli.avatars.lokitalk import (
    EYES,
    LIPS,
    LokiTalk,
    region_masks,
    relief_of,
    rotations,
    shoulders_in_head,
)
from talkhead_cli.contracts import Signals, SilentProgress
from talkhead_cli.jobs import footage
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.store import Workspace


@pytest.fixture(scope="module")
def clip(speaker_home: Path) -> Footage:
    data = presets.load(["lokitalk", "tiny"], ["data.size_px=64"]).data
    return footage.load(Workspace.open(speaker_home, "speaker"), data, SilentProgress())


@pytest.fixture(scope="module")
def avatar(clip: Footage) -> LokiTalk:
    torch.manual_seed(0)
    made = LokiTalk.build("tiny", n_steps=33, n_features=clip.signals.audio.shape[2], px=64)
    box = footage.box_of(clip.signals.camera[clip.train])
    made.calibrate(clip.signals[clip.train], clip.mesh, box)
    return made.eval()


def test_rotations_agree_with_quarter_turns() -> None:
    turn = rotations(torch.tensor([[0.0, 0.0, torch.pi / 2]]))[0]
    assert torch.allclose(turn @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)


def test_shoulders_stay_where_they_are_at_rest() -> None:
    rest = torch.tensor([0.1, -0.2, 0.05, 0.1, 0.2, 4.0])
    carry = shoulders_in_head(rest[None], torch.zeros(1, 4), rest)
    point = torch.tensor([0.3, 1.0, 0.1])
    assert torch.allclose(carry[0, :, :3] @ point + carry[0, :, 3], point, atol=1e-5)


def test_shoulders_do_not_turn_with_the_head() -> None:
    """A point fixed in front of the camera is carried to one place, however the head turns."""
    rest = torch.tensor([0.0, 0, 0, 0, 0, 4.0])
    poses = torch.tensor([[0.3, 0.1, 0, 0.05, 0, 4.1], [-0.2, 0.4, 0.1, 0, 0.1, 3.9]])
    in_camera = torch.tensor([0.2, 1.2, 4.2])
    turn = rotations(poses[:, :3])
    in_head = (turn.transpose(1, 2) @ (in_camera - poses[:, 3:])[..., None])[..., 0]
    carry = shoulders_in_head(poses, torch.zeros(2, 4), rest)
    landed = (carry[:, :, :3] @ in_head[..., None])[..., 0] + carry[:, :, 3]
    assert torch.allclose(landed[0], landed[1], atol=1e-5)
    assert torch.allclose(landed[0], in_camera - rest[3:], atol=1e-5)


def test_shoulders_follow_their_own_motion() -> None:
    rest = torch.tensor([0.0, 0, 0, 0, 0, 4.0])
    body = torch.tensor([[0.1, -0.05, 0.0, 0.0]])
    carry = shoulders_in_head(rest[None], body, rest)
    seen = torch.tensor([0.3 + 0.1, 1.0 - 0.05, 0.0])
    landed = carry[0, :, :3] @ seen + carry[0, :, 3]
    assert torch.allclose(landed, torch.tensor([0.3, 1.0, 0.0]), atol=1e-5)


def test_relief_passes_through_the_face(clip: Footage, avatar: LokiTalk) -> None:
    side = float(avatar.aabb[[0, 1, 3, 4]].abs().max())
    relief = relief_of(clip.mesh, side)
    nose = clip.mesh[4]
    found = torch.nn.functional.grid_sample(
        relief.permute(2, 0, 1)[None], (nose[:2] / side)[None, None, None], align_corners=True
    ).flatten()
    assert abs(float(found[0] - nose[2])) < 0.03 and found[1] > 0.95
    assert relief[0, 0, 1] < 0.2 and relief[0, 0, 0].abs() < 0.05


def test_listening_writes_mouths_that_read_back_as_the_same_code(
    clip: Footage, avatar: LokiTalk
) -> None:
    heard = avatar.listen(clip.signals[clip.held])
    with torch.no_grad():
        code = avatar.speech(heard.audio) * avatar.lip_gain
    assert torch.allclose(avatar.lips_of(heard), code, atol=1e-3)
    others = [i for i in range(68) if i not in (*range(4, 13), *range(48, 68))]
    assert torch.allclose(heard.landmarks[:, others], avatar.neutral[others].expand(
        len(heard), -1, -1))  # fmt: skip


def test_the_code_keeps_the_mouth_and_ignores_the_eyes(clip: Footage, avatar: LokiTalk) -> None:
    rows = clip.signals[clip.train]
    moved = rows.landmarks.clone()
    moved[:, 36:48, 1] += 0.05
    assert torch.allclose(avatar.lips_of(rows), avatar.lips_of(rows.with_(landmarks=moved)))
    mouth = avatar.lips_of(rows) * avatar.lip_scale @ avatar.lip_basis.T
    truth = (rows.landmarks - avatar.neutral)[:, [*range(4, 13), *range(48, 68)]].flatten(1)
    assert (mouth - truth).square().sum() < 0.1 * truth.square().sum()


def masks_at(signals: Signals, pixel: torch.Tensor) -> torch.Tensor:
    rays = march.pixel_rays(
        signals.camera, torch.zeros(len(pixel), dtype=torch.long), pixel,
        torch.tensor([-2.0, -2, -1, 2, 2, 1]),
    )  # fmt: skip
    return region_masks(signals, rays, torch.zeros(len(pixel), 6))


def test_region_masks_lie_on_their_regions(clip: Footage) -> None:
    one = clip.signals[int(clip.train[0])]
    marks = one.landmarks_px[0] * 64
    lips, left_eye, forehead = marks[LIPS].mean(0), marks[EYES[0]].mean(0), marks[27] - 14
    masks = masks_at(one, torch.stack([lips, left_eye, forehead]))
    assert masks[0, 0] > 0.95 and masks[1, 1] > 0.95
    assert masks[0, 1] < 0.1 and masks[1, 0] < 0.1 and masks[2, 0] < 0.05


def test_signals_move_only_their_region(clip: Footage, avatar: LokiTalk) -> None:
    """A changed mouth changes the field at the mouth, and nothing at the forehead or shoulder."""
    row = clip.signals[int(clip.train[0])]
    moved = row.landmarks.clone()
    moved[:, 57:60, 1] += 0.1
    moved[:, 65:68, 1] += 0.1
    places = torch.stack(
        [avatar.neutral[LIPS].mean(0), avatar.neutral[27] - torch.tensor([0, 0.35, 0]),
         avatar.neutral[8] + torch.tensor([0.6, 0.5, 0.4])]
    )  # fmt: skip
    zero = torch.zeros(3, dtype=torch.long)
    look = torch.tensor([[0.0, 0, 1]]).expand(3, 3)
    with torch.no_grad():
        _, still = avatar.condition(row)(places, look, zero)
        _, other = avatar.condition(row.with_(landmarks=moved))(places, look, zero)
    change = (still - other)[:, :3].abs().amax(1)
    assert change[0] > 10 * change[1:].max()


def test_every_part_learns_and_only_named_parts_move(clip: Footage, avatar: LokiTalk) -> None:
    named = {id(p) for name in avatar.parts() for p in avatar.part(name)}
    frozen = {id(p) for p in avatar.speech.linear.parameters()}
    assert named | frozen == {id(p) for p in avatar.parameters()}
    assert not named & frozen
