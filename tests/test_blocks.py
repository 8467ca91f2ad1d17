"""Blocks: planes, encodings, speech maps, losses."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from solids import ray
from torchmetrics.functional.image import structural_similarity_index_measure

from talkhead_cli.blocks import regions
from talkhead_cli.blocks.light import Shading
from talkhead_cli.blocks.loss import gradient_difference, solid_losses, ssim
from talkhead_cli.blocks.mlp import Mlp, by_row
from talkhead_cli.blocks.planes import TriPlanes, frequencies
from talkhead_cli.blocks.regions import Relief
from talkhead_cli.blocks.remember import constant, remembered
from talkhead_cli.blocks.rigid import (
    PoseCorrection,
    after,
    moved,
    rotations,
    shoulders_in_head,
    undone,
)
from talkhead_cli.blocks.speech import SpeechEncoder, ridge_by_blocks, ridge_map
from talkhead_cli.contracts import Camera, Frame, Rendered, Signals


@pytest.mark.parametrize("index", [2, -2, np.int64(2), np.array(-2), torch.tensor(2)])
def test_one_row_of_signals_is_a_row(index: Any) -> None:
    """However the number is held, and counted from the end if it is negative."""
    camera = Camera(torch.eye(4).repeat(4, 1, 1), torch.eye(3).repeat(4, 1, 1), 32)
    rest = {f.name: torch.arange(4.0)[:, None] for f in fields(Signals)} | {"camera": camera}
    row, picture = Signals(**rest)[index], torch.arange(4.0).view(4, 1, 1, 1)
    assert len(row) == len(row.camera.c2w) == 1 and row.pose.item() == 2
    assert Frame(picture, picture, picture, {})[index].rgb.tolist() == [[[[2]]]]
    with pytest.raises(IndexError):
        Signals(**rest)[4]


def test_planes_are_bilinear_and_keep_their_axes() -> None:
    planes = TriPlanes((5,), 1)
    ramp = torch.linspace(-0.8, 0.8, 5)  # texel centres of five texels in [-1, 1]
    with torch.no_grad():
        for index in range(3):  # first named axis runs along the columns
            planes.levels[0][index, 0] = ramp.expand(5, 5)
    x = torch.tensor([[0.3, -0.5, 0.7], [0.0, 0.1, -0.2]])
    assert torch.allclose(planes(x), x[:, [0, 0, 1]], atol=1e-6)
    assert torch.allclose(planes(torch.tensor([[9.0, 0, 0]]))[:, 0], ramp[-1:])


def test_planes_roughness_is_zero_only_when_flat() -> None:
    planes = TriPlanes((4, 8), 2, spread=0.1)
    assert planes.roughness() > 0
    plain = torch.stack(
        [
            (p[..., 1:, :] - p[..., :-1, :]).square().mean()
            + (p[..., 1:] - p[..., :-1]).square().mean()
            for p in planes.levels
        ]
    ).mean()
    torch.testing.assert_close(planes.roughness(), plain)
    levels = list(planes.levels)
    torch.testing.assert_close(
        torch.autograd.grad(planes.roughness(), levels), torch.autograd.grad(plain, levels)
    )
    with torch.no_grad():
        for level in planes.levels:
            level.fill_(0.3)
    assert planes.roughness() == 0


def test_frequencies_keep_the_input_and_have_the_octaves() -> None:
    x = torch.tensor([[0.25, -0.5]])
    encoded = frequencies(x, 3)
    assert encoded.shape == (1, 2 * (1 + 2 * 3))
    assert torch.equal(encoded[:, :2], x)
    wanted = [math.sin(math.pi * 2**k * 0.25) for k in range(3)]
    assert torch.allclose(encoded[0, 2:5], torch.tensor(wanted), atol=1e-6)


def test_small_last_layer_starts_near_zero() -> None:
    x = torch.randn(64, 8)
    assert Mlp(8, 32, 3, 3, last_scale=0.01)(x).abs().mean() < 0.02


def test_codes_join_a_net_as_if_they_had_been_its_inputs() -> None:
    """Three rows' codes, weighted at each point, against a net that reads them with x."""
    torch.manual_seed(0)
    x, weight, codes = torch.randn(50, 4), torch.rand(50, 2), torch.randn(3, 2, 5)
    row = torch.randint(3, (50,))
    net, plain = Mlp(4, 16, 2, 3), Mlp(4 + 5, 16, 2, 3)
    plain.load_state_dict(net.state_dict() | {"0.weight": torch.randn(16, 9)})
    first = plain[0].weight
    with torch.no_grad():
        net[0].weight.copy_(first[:, :4])
    own = (weight[:, :, None] * codes[row]).sum(1)
    for n_rows in (3, 1):
        if n_rows == 1:
            row, codes = torch.zeros_like(row), codes[:1]
            own = (weight[:, :, None] * codes[row]).sum(1)
        spread = by_row(weight, row, n_rows)
        made = net(x, (spread, codes.flatten(0, 1) @ first[:, 4:].T))
        assert torch.allclose(made, plain(torch.cat([x, own], 1)), atol=1e-5)


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


def test_motions_compose_and_invert() -> None:
    torch.manual_seed(0)
    a, b = (torch.cat([rotations(torch.randn(3, 3)), torch.randn(3, 3, 1)], 2) for _ in range(2))
    x, row = torch.randn(7, 3), torch.randint(3, (7,))
    assert torch.allclose(moved(moved(x, a, row), b, row), moved(x, after(b, a), row), atol=1e-5)
    assert torch.allclose(moved(moved(x, a, row), undone(a), row), x, atol=1e-5)
    one = torch.zeros_like(row)
    assert torch.allclose(moved(x, a[:1], one), moved(x, a, one), atol=1e-6)


def test_pose_correction_finds_a_habit_of_the_tracker() -> None:
    """A tracker that understates pitch by a tenth is put right from points it misplaces."""
    torch.manual_seed(0)
    pitch = 0.2 * torch.randn(200, 1)
    truth, tracked = (rotations(torch.cat([s * pitch, torch.zeros(200, 2)], 1)) for s in (1.0, 0.9))
    points = torch.randn(200, 3)
    seen = (truth.transpose(1, 2) @ points[:, :, None])[:, :, 0]
    wrong = (tracked.transpose(1, 2) @ points[:, :, None])[:, :, 0]
    net = PoseCorrection(1)
    assert torch.allclose(moved(wrong, net(pitch), torch.arange(200)), wrong)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(400):
        loss = (moved(wrong, net(pitch), torch.arange(200)) - seen).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4 * (wrong - seen).square().mean()
    assert net.linear.weight[0, 0].item() * 0.02 == pytest.approx(-0.1, abs=0.005)


def test_shading_of_small_turns_holds_for_large_ones() -> None:
    """A matt ball, lit from one side, is seen while it turns a little, then while it turns far."""
    torch.manual_seed(0)
    place = F.normalize(torch.randn(400, 3), dim=1)
    lamp = torch.tensor([-0.8, 0.0, -0.6])

    def logits(turn: torch.Tensor) -> torch.Tensor:
        normal = (rotations(turn) @ place[:, :, None])[:, :, 0]
        return (0.5 + 0.3 * normal @ lamp).logit()[:, None].expand(-1, 3)

    def missed(shading: Shading, yaw: torch.Tensor) -> torch.Tensor:
        """Mean square of what is not told of the change, over all of it."""
        turn = F.pad(yaw, (1, 1))
        shade = moved(place, shading(F.pad(turn / 0.1, (0, 3))), torch.arange(len(place)))
        change = logits(turn) - logits(torch.zeros_like(turn))
        return (shade - change).square().mean() / change.square().mean()

    shading = Shading()
    assert missed(shading, 0.1 * torch.randn(400, 1)).item() == pytest.approx(1.0)
    optimizer = torch.optim.Adam(shading.parameters(), 0.03)
    for _ in range(300):
        loss = missed(shading, 0.1 * torch.randn(400, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert missed(shading, torch.full((400, 1), 0.35)) < 0.1


def test_ridge_finds_a_linear_map_and_shrinks() -> None:
    x, truth = torch.randn(200, 12), torch.randn(12, 3)
    y = x @ truth + 0.7
    weight, bias = ridge_map(x, y, 1e-6)
    assert torch.allclose(weight, truth, atol=1e-3) and torch.allclose(
        bias, torch.full((3,), 0.7), atol=1e-3
    )
    shrunk, _ = ridge_map(x, y, 1e4)
    assert shrunk.norm() < 0.2 * truth.norm()


@pytest.mark.parametrize("n", [5, 12, 40])
def test_both_forms_of_the_ridge_are_one(n: int) -> None:
    """More rows than columns, as many, and fewer: the normal equations hold."""
    x, y = torch.randn(n, 12, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    weight, bias = ridge_map(x, y, 0.3)
    off = x @ weight + bias - y
    assert off.mean(0).abs().max() < 1e-9
    assert torch.allclose((x - x.mean(0)).T @ off, -0.3 * weight, atol=1e-9)


def test_block_validation_of_few_rows_still_compares() -> None:
    """With less than a second of rows, gaps as long as those of more would leave a fold nothing."""
    torch.manual_seed(0)
    x, noise = torch.randn(30, 20), torch.randn(30, 1)
    ridge, guess = ridge_by_blocks(x, noise, (1e-2, 1e5))
    assert ridge == 1e5 and guess.isfinite().all()


def test_block_validation_prefers_shrinking_when_there_is_nothing_to_learn() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(150, 80), torch.randn(150, 1)
    strong, guess = ridge_by_blocks(x, noise, (1e-2, 1e5))
    assert strong == 1e5 and guess.shape == noise.shape
    weak, guess = ridge_by_blocks(x, x[:, :1] * 2, (1e-2, 1e5))
    assert weak == 1e-2 and torch.corrcoef(torch.cat([guess, x[:, :1]], 1).T)[0, 1] > 0.99


@pytest.mark.parametrize("make", [SpeechEncoder.of_windows, SpeechEncoder.of_sequences])
def test_speech_encoder_is_quiet_in_eval_and_noisy_in_training(make: Any) -> None:
    torch.manual_seed(0)
    encoder = make(33, 10, 4)
    heard = signals_of(torch.randn(6, 33, 10))
    encoder.eval()
    assert torch.equal(encoder(heard), encoder(heard)) and encoder(heard).shape == (6, 4)
    encoder.train()
    assert not torch.equal(encoder.net_predictions(heard), encoder.net_predictions(heard))


def test_nets_of_the_speech_encoder_hear_noise_of_their_own() -> None:
    """Equal nets, equal rows: votes on a row are as unlike as votes on two rows."""
    torch.manual_seed(0)
    encoder = SpeechEncoder.of_windows(33, 10, 4)
    first, *others = encoder.nets
    for net in others:
        net.load_state_dict(first.state_dict())
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    net_predictions = encoder.net_predictions(signals_of(torch.zeros(64, 33, 10))).detach()
    by_net, by_row = net_predictions.std(0).mean(), net_predictions.std(1).mean()
    assert by_row > 1e-3 and by_net == pytest.approx(float(by_row), rel=0.2)


def test_the_linear_map_of_speech_is_a_ridge_solution() -> None:
    torch.manual_seed(0)
    encoder = SpeechEncoder.of_windows(5, 4, 2)
    heard = signals_of(torch.randn(300, 5, 4))
    told = 30 * torch.nn.Linear(20, 2).requires_grad_(False)(heard.audio.flatten(1))
    encoder.solve([(heard, told)])
    line = encoder.linear(heard.audio.flatten(1))
    assert (line - told).square().mean() < 0.5 * told.var()
    encoder.solve([(heard[:150], told[:150]), (heard[150:], told[150:])])
    assert torch.allclose(encoder.linear(heard.audio.flatten(1)), line, atol=1e-3)


def test_the_less_is_heard_of_a_person_the_more_others_are_believed() -> None:
    """Known is what came from others; a person's own rows count by how many there are."""
    torch.manual_seed(0)
    encoder = SpeechEncoder.of_windows(17, 4, 2).eval()
    others = signals_of(torch.randn(400, 17, 4))
    encoder.solve([(others, torch.randn(400, 2).cumsum(0) / 20)])
    said = encoder(others)
    encoder.freeze_as_prior()
    assert encoder.known is not None and torch.equal(encoder.known(others), said)
    few, many = (signals_of(torch.randn(n, 17, 4)) for n in (100, 600))
    for rows, trust in ((few, 0.2), (many, 0.9)):
        encoder.solve([(rows, encoder.known(rows) + 5.0)])
        assert float(encoder.trust) == pytest.approx(trust)
        nets = encoder.net_predictions(rows).mean(0)
        own = 0.5 * (encoder.known(rows) + 5.0) + 0.5 * nets
        whole = (1 - trust) * encoder.known(rows) + trust * own
        assert torch.allclose(encoder(rows), whole, atol=1e-2)
    plain = SpeechEncoder.of_windows(17, 4, 2).eval()
    plain.load_state_dict(encoder.state_dict())
    assert torch.equal(plain(few), encoder(few))
    assert plain.known is not None and not any(p.requires_grad for p in plain.known.parameters())


def signals_of(audio: torch.Tensor) -> Signals:
    """Signals (T, W, A) of which only the sound matters."""
    n = len(audio)
    camera = Camera(torch.eye(4).repeat(n, 1, 1), torch.eye(3).repeat(n, 1, 1), 64)
    rest = {f.name: torch.zeros(n, 1) for f in fields(Signals)}
    who, moment = torch.zeros(n, dtype=torch.long), torch.arange(n)
    return Signals(**rest | {"audio": audio, "camera": camera, "moment": moment, "person": who})


def test_ssim_is_one_for_equals_and_falls_with_noise() -> None:
    torch.manual_seed(0)
    a = torch.rand(2, 24, 24, 3)
    assert torch.allclose(ssim(a, a), torch.ones(2), atol=1e-5)
    noisy = (a + 0.2 * torch.randn_like(a)).clamp(0, 1)
    reference = structural_similarity_index_measure(
        a.permute(0, 3, 1, 2),
        noisy.permute(0, 3, 1, 2),
        data_range=1.0,
        gaussian_kernel=False,
        kernel_size=7,
    )
    assert abs(float(ssim(a, noisy).mean()) - float(reference)) < 0.03


def rendered(opacity: float | torch.Tensor, away: float = 0.0) -> Rendered:
    solid = opacity * torch.ones(1, 1)
    return Rendered(torch.zeros(1, 4), solid, away * solid, 0 * solid, torch.tensor(1))


def test_losses_of_solidity_have_their_values() -> None:
    def lost(opacity: float, matte: float, face: float) -> dict[str, float]:
        found = solid_losses(rendered(opacity), torch.tensor([[matte]]), torch.tensor([[face]]))
        return {name: float(value) for name, value in found.items()}

    assert lost(0.5, 1.0, face=1.0)["matte"] == pytest.approx(0.25)
    assert lost(0.5, 1.0, face=0.0)["matte"] == pytest.approx(0.05)
    assert lost(0.5, 1.0, face=1.0)["entropy"] == pytest.approx(math.log(2))
    assert 0 < lost(0.99, 1.0, face=1.0)["entropy"] < 0.1


def test_relief_pulls_surfaces_and_leaves_opacity_alone() -> None:
    """A flat face at z = 0, seen from four face heights before it at half opacity."""
    relief = Relief()
    relief.side.fill_(1.0)
    relief.depth[..., 1] = 1.0
    rays = ray((0.0, 0.0, -4.0), (0.0, 0.0, 1.0))
    opacity = torch.tensor([[0.5]], requires_grad=True)

    def lost(away: float) -> torch.Tensor:
        return relief.loss(rendered(opacity, away), rays, torch.ones(1)).sum()

    assert float(lost(4.0)) == pytest.approx(0, abs=1e-6)
    assert float(lost(4.5)) == pytest.approx(0.5 * (0.5 - 0.015), abs=1e-4)
    (slope,) = torch.autograd.grad(lost(4.5), opacity)
    assert abs(float(slope)) < 1e-5, "or thinning out would pay"


def test_gradient_difference_ignores_brightness() -> None:
    a = torch.rand(1, 8, 8, 3)
    assert gradient_difference(a, a + 0.1) < 1e-6
    assert gradient_difference(a, a.flip(1)) > 0.1


def test_points_move_with_their_own_rows_and_say_so_to_them() -> None:
    """Places and slopes, point by point."""
    torch.manual_seed(0)
    x, motion = torch.randn(50, 3, requires_grad=True), torch.randn(4, 3, 4, requires_grad=True)
    row, weight = torch.randint(0, 4, (50,)), torch.randn(50, 3)
    found = moved(x, motion, row)
    each = torch.stack(
        [motion[r, :, :3] @ p + motion[r, :, 3] for p, r in zip(x, row, strict=True)]
    )
    assert torch.allclose(found, each, atol=1e-6)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), [x, motion]) for y in (found, each))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_what_follows_from_tensors_is_made_again_when_they_change() -> None:
    class Owner:
        pass

    owner, made = Owner(), []

    def double(t: torch.Tensor) -> torch.Tensor:
        made.append(1)
        return 2 * t

    first = torch.ones(3)
    for _ in range(2):
        assert remembered(owner, "twice", [first], lambda: double(first)).tolist() == [2, 2, 2]
    assert len(made) == 1
    first.mul_(3)
    assert remembered(owner, "twice", [first], lambda: double(first)).tolist() == [6, 6, 6]
    for n in range(1, 4):  # where the one before lay, another may come to lie
        other = torch.full((3,), float(n))
        found = remembered(owner, "twice", [other], lambda other=other: double(other))
        assert found.tolist() == [2 * n] * 3
        del other
    assert len(made) == 5
    assert constant(1.0, 2.0, device=first.device) is constant(1.0, 2.0, device=first.device)


def test_lively_boxes_hold_lips_and_eyes_and_little_else() -> None:
    face = torch.zeros(68, 3)
    face[:, 0], face[:, 1] = torch.linspace(-0.4, 0.4, 68), 0.4  # jaw and the rest: below
    turn = torch.linspace(0, 6.2, 20)
    face[48:68] = torch.stack([0.15 * turn.cos(), 0.2 + 0.05 * turn.sin(), 0 * turn], 1)
    for side, eye in ((-1, regions.EYES[0]), (1, regions.EYES[1])):
        turn = torch.linspace(0, 5.2, 6)
        face[eye] = torch.stack(
            [0.15 * side + 0.06 * turn.cos(), -0.2 + 0.02 * turn.sin(), 0 * turn], 1
        )
    boxes = regions.lively_boxes(face)
    for box, part in zip(boxes, (regions.LIPS, *regions.EYES), strict=True):
        assert ((face[part] > box[:3]) & (face[part] < box[3:])).all()
        others = torch.cat(
            [face[other] for other in (regions.LIPS, *regions.EYES) if other != part] + [face[:17]]
        )
        assert not ((others > box[:3]) & (others < box[3:])).all(1).any()
