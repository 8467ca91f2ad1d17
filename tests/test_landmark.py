"""The landmark method and its blocks, against closed forms."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import hearing, one_picture
from torch.utils._python_dispatch import TorchDispatchMode

from talkhead_cli import march
from talkhead_cli.avatars.base import PictureResult
from talkhead_cli.avatars.landmark import UPPER, Face, Landmark
from talkhead_cli.blocks.gaussians import WAVES, GaussianCode, _Waves
from talkhead_cli.blocks.modulated import ModulatedConv
from talkhead_cli.blocks.rigid import shoulders_in_picture
from talkhead_cli.blocks.speech import SpeechTransformer
from talkhead_cli.blocks.style_unet import StyleUNet, haar, unhaar
from talkhead_cli.contracts import Camera, MisuseError, Rendered, Signals, SilentProgress
from talkhead_cli.jobs import footage, shots
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.step import Step, UncastShots
from talkhead_cli.store import Workspace

PX = 64


@pytest.fixture(scope="module")
def clip(speaker_home: Path) -> Footage:
    data = presets.load(["landmark", "tiny"], [f"data.size_px={PX}"]).data
    return footage.load(Workspace.open(speaker_home, "speaker"), data, SilentProgress())


@pytest.fixture(scope="module")
def avatar(clip: Footage) -> Landmark:
    torch.manual_seed(0)
    made = Landmark.build("tiny", **hearing(clip.signals), px=PX)
    box = footage.box_of(clip.signals.camera[clip.train])
    made.calibrate(clip.signals[clip.train], clip.mesh, box)
    return made.eval()


@pytest.fixture(scope="module")
def face(clip: Footage, avatar: Landmark) -> Face:
    found = avatar.person(clip.signals)
    assert isinstance(found, Face)
    return found


# -- Gaussian relative position coding ---------------------------------------------------------


def code_of(
    code: GaussianCode, x: torch.Tensor, marks: torch.Tensor, axis: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """Codes of all points (N, 5, L), zero where the block leaves them out."""
    found, near = code(x, code.tables(marks, axis), row)
    whole = found.new_zeros(len(x), found.shape[1]).index_add(0, near, found)
    return whole.view(len(x), WAVES, -1)


def test_the_code_says_how_near_and_how_far_along_the_axis() -> None:
    code = GaussianCode(1, size=0.1, unit=0.2)
    mark, axis = torch.tensor([[[0.3, 0.1, -0.4]]]), torch.tensor([[0.0, 0, 1]])
    x = mark[0] + torch.tensor([[0, 0, 0], [0.1, 0, 0], [0, 0, 0.2], [2.0, 0, 0]])
    found = code_of(code, x, mark, axis, torch.zeros(4, dtype=torch.long))[..., 0]
    near, far = math.exp(-0.5), math.exp(-2)
    z = 1.0  # 0.2 along the axis in units of 0.2
    expected = torch.tensor(
        [
            [0, 0, 1, 0, 1],
            [0, 0, near, 0, near],
            [far * z, far * math.sin(z), far * math.cos(z), far * math.sin(2), far * math.cos(2)],
            [0, 0, 0, 0, 0],
        ]
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_code_of_many_rows_is_that_of_each_point_by_hand() -> None:
    torch.manual_seed(0)
    code = GaussianCode(5)
    with torch.no_grad():
        code.log_size.add_(0.5 * torch.randn(5, 3))
        code.turn.copy_(torch.randn(5, 4))
    marks, axis = 0.3 * torch.randn(3, 5, 3), F.normalize(torch.randn(3, 3), dim=1)
    x, row = 0.3 * torch.randn(40, 3), torch.randint(3, (40,))
    found = code_of(code, x, marks, axis, row)
    w, i, j, k = F.normalize(code.turn, dim=1).unbind(1)
    for n in range(40):
        for m in range(5):
            gap = x[n] - marks[row[n], m]
            # the rotation undone, by quaternion algebra: v + 2 u x (u x v - w v)
            u = torch.stack([i[m], j[m], k[m]])
            back = gap + 2 * torch.linalg.cross(u, torch.linalg.cross(u, gap) - w[m] * gap)
            weight = (-0.5 * (back / code.log_size[m].exp()).square().sum()).exp()
            z = (gap @ axis[row[n]]) / code.unit
            waves = torch.stack([z, z.sin(), z.cos(), (2 * z).sin(), (2 * z).cos()])
            assert torch.allclose(found[n, :, m], weight * waves, atol=2e-3)
    assert (found[:, 2].abs() > 0.05).any()


def test_the_waves_gradient_is_right() -> None:
    torch.manual_seed(0)
    square = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def exact(square: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        weight = (-square / 2).exp()
        parts = [z, z.sin(), z.cos(), (2 * z).sin(), (2 * z).cos()]
        return torch.cat([weight * p for p in parts], 1)

    assert torch.allclose(_Waves.apply(square, z), exact(square, z))
    weights = torch.randn(4, 15, dtype=torch.float64)
    want = torch.autograd.grad((exact(square, z) * weights).sum(), (square, z))
    have = torch.autograd.grad((_Waves.apply(square, z) * weights).sum(), (square, z))
    for a, b in zip(have, want, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_what_is_left_out_is_as_good_as_zero() -> None:
    code = GaussianCode(2)
    marks, axis = torch.zeros(1, 2, 3), torch.tensor([[0.0, 0, 1]])
    x = torch.stack([torch.linspace(0, 1, 50), torch.zeros(50), torch.zeros(50)], 1)
    found, near = code(x, code.tables(marks, axis), torch.zeros(50, dtype=torch.long))
    weight = (-0.5 * (x[:, 0] / 0.1).square()).exp()
    assert 0 < len(near) < 50 and found.shape == (len(near), 10)
    out = torch.ones(50, dtype=torch.bool)
    out[near] = False
    assert weight[out].max() < 1e-3 < weight[near].min() * 1.2


# -- speech ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer() -> SpeechTransformer:
    torch.manual_seed(0)
    net = SpeechTransformer(33, 10, 4, 32).eval()
    torch.nn.init.normal_(net.last.weight)  # so that what attention adds is seen
    return net


def said(
    net: SpeechTransformer, heard: torch.Tensor, moment: torch.Tensor, person: int = 0
) -> torch.Tensor:
    n = len(heard)
    camera = Camera(torch.eye(4).repeat(n, 1, 1), torch.eye(3).repeat(n, 1, 1), PX)
    rest = {f.name: torch.zeros(n, 1) for f in fields(Signals)}
    who = torch.full((n,), person)
    with torch.no_grad():
        return net(heard, Signals(**rest | {"camera": camera, "moment": moment, "person": who}))


def test_a_row_is_said_alike_from_any_stretch_that_holds_its_past(
    transformer: SpeechTransformer,
) -> None:
    heard, moment = torch.randn(90, 10, 33), torch.arange(90)
    whole = said(transformer, heard, moment)
    for first in (transformer.past, 40, 61):
        part = slice(first - transformer.past, 90)
        again = said(transformer, heard[part], moment[part])[transformer.past :]
        assert torch.allclose(again, whole[first:], atol=1e-5)
    short = said(transformer, heard[40:], moment[40:])
    assert not torch.allclose(short[0], whole[40], atol=1e-3), "the past has no say"


def test_long_films_take_memory_by_their_length_not_its_square(
    transformer: SpeechTransformer,
) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    n = 4000
    with Largest() as seen:
        said(transformer, torch.zeros(n, 10, 33), torch.arange(n))
    assert seen.numel < 2000 * n


def test_rows_hear_neither_the_future_nor_other_stretches(transformer: SpeechTransformer) -> None:
    heard, moment = torch.randn(40, 10, 33), torch.arange(40)
    later = heard.clone()
    later[20:] = torch.randn(20, 10, 33)
    apart = torch.cat([moment[:20], moment[20:] + 500])
    whole = said(transformer, heard, moment)
    assert torch.allclose(said(transformer, later, moment)[:20], whole[:20], atol=1e-5)
    alone = said(transformer, heard[20:], apart[20:])
    assert torch.allclose(said(transformer, heard, apart)[20:], alone, atol=1e-5)


def test_people_have_their_styles_and_a_new_one_that_of_the_mean() -> None:
    torch.manual_seed(0)
    many = SpeechTransformer(33, 10, 4, 32, n_people=3).eval()
    torch.nn.init.normal_(many.last.weight)
    torch.nn.init.normal_(many.styles)
    heard, moment = torch.randn(20, 10, 33), torch.arange(20)
    assert not torch.allclose(said(many, heard, moment, 0), said(many, heard, moment, 1), atol=1e-2)
    new = SpeechTransformer(33, 10, 4, 32).eval()
    shared = {k: v for k, v in many.state_dict().items() if k != "styles"}
    assert new.load_state_dict(shared, strict=False).missing_keys == ["styles"]
    with torch.no_grad():
        many.styles.copy_(many.styles.mean(0).expand(3, -1))
    assert torch.allclose(said(new, heard, moment), said(many, heard, moment, 2), atol=1e-5)


def test_chunks_of_a_speech_have_no_seams(clip: Footage, avatar: Landmark) -> None:
    rows = clip.signals[:80]
    with torch.no_grad():
        whole = avatar.listen(rows).landmarks
        part = avatar.listen(rows[30 - avatar.past :]).landmarks[avatar.past :]
    assert avatar.past > 0 and torch.allclose(part, whole[30:], atol=1e-5)


def test_lids_and_brows_follow_eyes_and_brows(clip: Footage, avatar: Landmark, face: Face) -> None:
    rows = clip.signals[clip.train]
    heard = avatar.listen(rows)
    truth = rows.landmarks[:, 36:48] - rows.landmarks[:, 36:48].mean(0)
    error = heard.landmarks[:, 36:48] - rows.landmarks[:, 36:48]
    assert error.square().sum() < 0.6 * truth.square().sum()
    shut = avatar.listen(rows.with_(eye=torch.zeros_like(rows.eye)))
    open_ = avatar.listen(rows.with_(eye=torch.ones_like(rows.eye)))

    def gap(s: Signals) -> torch.Tensor:
        return (s.landmarks[:, [41, 40], 1] - s.landmarks[:, [37, 38], 1]).mean()

    assert gap(shut) < 0.5 * gap(open_)
    assert torch.allclose(shut.landmarks[:, 48:], open_.landmarks[:, 48:])
    assert set(UPPER.tolist()).isdisjoint(range(48, 68))


# -- the field ---------------------------------------------------------------------------------


def test_a_mouth_moves_the_field_at_the_mouth_alone(
    clip: Footage, avatar: Landmark, face: Face
) -> None:
    row = clip.signals[int(clip.train[0])]
    moved = row.landmarks.clone()
    moved[:, 57:60, 1] += 0.1
    moved[:, 65:68, 1] += 0.1
    neutral = face.mouth.neutral
    places = torch.stack([neutral[48:68].mean(0), neutral[27] - torch.tensor([0, 0.35, 0])])
    zero, look = torch.zeros(2, dtype=torch.long), torch.tensor([[0.0, 0, 1]]).expand(2, 3)
    with torch.no_grad():
        _, still = avatar.condition(row)(places, look, zero)
        _, other = avatar.condition(row.with_(landmarks=moved))(places, look, zero)
    change = (still - other)[:, :3].abs().amax(1)
    assert change[0] > 1e-6 and change[1] < 0.01 * change[0]


def test_sound_reaches_the_field_through_landmarks_alone(clip: Footage, avatar: Landmark) -> None:
    row = clip.signals[:1]
    x, zero = torch.rand(20, 3) - 0.5, torch.zeros(20, dtype=torch.long)
    with torch.no_grad():
        one = avatar.condition(row)(x, x, zero)
        two = avatar.condition(row.with_(audio=torch.randn_like(row.audio)))(x, x, zero)
    assert torch.equal(one[1], two[1]) and torch.equal(one[0], two[0])


def test_every_part_learns_and_only_named_parts_move(avatar: Landmark) -> None:
    named = {id(p) for name in avatar.parts() for p in avatar.part(name)}
    frozen = {id(p) for p in avatar.speech.linear.parameters()}
    assert named | frozen == {id(p) for p in avatar.parameters()} and not named & frozen


def test_the_full_radiance_network_has_three_million_parameters() -> None:
    full = Landmark.build("full", n_steps=33, n_features=46, px=512)
    n = sum(p.numel() for name in ("volume", "coding", "static") for p in full.part(name))
    assert 2.5e6 < n < 3.5e6, n


# -- the torso ---------------------------------------------------------------------------------


def test_wavelets_lose_nothing() -> None:
    x = torch.randn(2, 3, 16, 12)
    bands = haar(x)
    assert bands.shape == (2, 12, 8, 6) and torch.allclose(unhaar(bands), x, atol=1e-6)
    assert torch.allclose(bands.square().sum(), x.square().sum(), rtol=1e-5)
    flat = haar(torch.ones(1, 1, 4, 4))
    assert torch.allclose(flat[:, 0], torch.full((1, 2, 2), 2.0)) and flat[:, 1:].abs().max() == 0


def test_modulation_is_that_of_each_picture_s_own_weights() -> None:
    torch.manual_seed(0)
    conv = ModulatedConv(3, 5, 8)
    x, style = torch.randn(2, 3, 6, 6), torch.randn(2, 8)
    scale = conv.scale(style)
    for b in range(2):
        own = conv.weight * scale[b][None, :, None, None]
        own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        want = math.sqrt(2) * F.leaky_relu(F.conv2d(x[b : b + 1], own, padding=1), 0.2)
        assert torch.allclose(conv(x, style)[b : b + 1], want, atol=1e-5)


def test_the_torso_starts_as_nothing_and_its_canvas_goes_with_the_shoulders() -> None:
    torch.manual_seed(0)
    net = StyleUNet((8, 12), 10, px=32)
    head = torch.rand(1, 4, 32, 32)
    still = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    style = torch.randn(1, 10)
    assert torch.allclose(net(head, style, still), head, atol=1e-6)
    with torch.no_grad():
        net.canvas[:, :, 20:24, 8:12] = 0.25
    clear = torch.zeros_like(head)
    right = still.clone()
    right[:, 0, 2] = -2 * 4 / 32  # what is seen 4 pixels further right lay here
    assert torch.allclose(
        net(clear, style, right)[..., 4:], net(clear, style, still)[..., :-4], atol=1e-5
    )
    solid = torch.ones_like(head)
    assert torch.allclose(net(solid, style, still), solid, atol=1e-6), "the head lies before it"


def test_shoulders_that_moved_find_their_canvas(clip: Footage, face: Face) -> None:
    """A point of the shoulders, seen where `body` took it, lands where it rests."""
    row = clip.signals[int(clip.train[0])]
    at = face.mouth.pose_mean[3:] + torch.tensor([0.4, 1.0, 0.0])
    body = torch.tensor([[0.05, -0.03, 0.0, 0.0]])
    k = row.camera.k[0] / torch.tensor([[row.camera.size_px], [row.camera.size_px], [1.0]])

    def seen(point: torch.Tensor) -> torch.Tensor:
        place = k @ point
        return 2 * place[:2] / place[2] - 1

    moved = seen(at + torch.cat([body[0, :2], torch.zeros(1)]))
    carry = shoulders_in_picture(body, row.camera, face.mouth.pose_mean)[0]
    assert torch.allclose(carry @ torch.cat([moved, torch.ones(1)]), seen(at), atol=1e-5)
    still = shoulders_in_picture(torch.zeros(1, 4), row.camera, face.mouth.pose_mean)[0]
    assert torch.allclose(still, torch.tensor([[1.0, 0, 0], [0, 1, 0]]), atol=1e-6)


def test_whole_pictures_have_a_torso_and_patches_a_head(clip: Footage, avatar: Landmark) -> None:
    rows = clip.signals[clip.train[:2]]
    rays = march.picture_rays(rows.camera, torch.arange(2), avatar.aabb)
    patch = march.pixel_rays(
        rows.camera,
        torch.zeros(16, dtype=torch.long),
        rays.pixel[:16],
        avatar.aabb,
        layout=(1, 4, 4),
    )
    marcher, _ = march.build(avatar.aabb, "cpu", n_steps=16, n_samples=4)
    marcher.eval()
    try:
        with torch.no_grad():
            avatar.torso.canvas.fill_(0.1)
            field = avatar.condition(rows)
            whole = avatar.compose(
                marcher.march(field, rays), rays, rows, torch.zeros(len(rays), 3)
            )
            part = avatar.compose(marcher.march(field, patch), patch, rows, torch.zeros(16, 3))
    finally:
        torch.nn.init.zeros_(avatar.torso.canvas)
    assert whole.rgb.shape == (2, PX, PX, 3) and whole.alpha.max() <= 1
    assert not torch.allclose(whole.rgb, whole.parts["head"])
    assert torch.equal(part.rgb, part.parts["head"]) and part.rgb.shape == (1, 4, 4, 3)
    hidden = whole.parts["head_alpha"] > 0.5
    assert bool(torch.isfinite(whole.depth[hidden]).all())
    assert bool(torch.isinf(whole.depth[~hidden]).all())


def test_losses_want_the_head_over_the_plate_and_the_person_in_the_matte(
    clip: Footage, avatar: Landmark
) -> None:
    """A head drawn as it is, over the background, costs nothing; nor does the matte of labels."""
    rows, rays, truth = one_picture(clip, avatar.aabb)
    head = truth.labels[:, :3].sum(1, keepdim=True).clamp(0, 1)
    feature = torch.cat([head * truth.colour, torch.zeros(len(rays), 1)], 1)
    nothing = torch.zeros(len(rays), 1)
    made = Rendered(feature, head, 4 * head, nothing, torch.tensor(1))
    field = avatar.condition(rows)
    part = replace(rays, whole=False)
    frame = avatar.compose(made, part, rows, truth.plate)
    lost = avatar.picture_losses(PictureResult(rows, part, truth, field, made, frame))
    assert float(lost["colour"]) < 1e-10
    person = (1 - truth.labels[:, 5]).view(1, PX, PX, 1)
    frame = replace(frame, rgb=truth.colour.view(1, PX, PX, 3).clone(), alpha=person)
    lost = avatar.picture_losses(PictureResult(rows, rays, truth, field, made, frame))
    assert float(lost["whole_matte"]) < 1e-10 and float(lost["whole"]) < 1e-10


@torch.no_grad()
def test_shoulders_do_not_shake_in_films(clip: Footage, avatar: Landmark) -> None:
    rows, stances = clip.signals[clip.train[:1]], []
    hook = avatar.torso.register_forward_pre_hook(lambda _, given: stances.append(given[1]))
    try:
        for _ in range(2):
            avatar._whole(torch.zeros(1, PX, PX, 4), rows)
    finally:
        hook.remove()
    assert torch.equal(*stances)


def test_a_field_that_does_not_learn_is_marched_without_gradients(
    clip: Footage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What shoulders learn does not depend on it; the other stages' gradients reach the field."""
    preset = presets.load(["landmark", "tiny"], [f"data.size_px={PX}"])
    avatar = Landmark.build("tiny", **hearing(clip.signals), px=PX)
    box = footage.box_of(clip.signals.camera[clip.train])
    avatar.calibrate(clip.signals[clip.train], clip.mesh, box)
    marcher, _ = march.build(box, "cpu", **preset.march.of_marcher())
    marched, honest = [], type(marcher).march

    def spied(*args: Any) -> Any:
        marched.append(torch.is_grad_enabled())
        return honest(*args)

    monkeypatch.setattr(type(marcher), "march", spied)
    step = Step(avatar, marcher).train()
    for name, expected in (("shape", True), ("torso", False)):
        stage = preset.train.stages[name]
        learning = {id(p) for part in stage.learn for p in avatar.part(part)}
        for parameter in avatar.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        shot = shots.draw(clip, stage, 256, box, torch.Generator().manual_seed(0))
        step(UncastShots([shot]), stage.weights).loss.backward()
        assert marched.pop() is expected
        assert any(p.grad is not None and p.grad.any() for p in avatar.part(stage.learn[0]))
        avatar.zero_grad()


@pytest.mark.parametrize("px", [72, 360])
def test_sizes_that_cannot_be_halved_often_enough_are_refused(px: int) -> None:
    """Four levels halve a picture four times, three levels three times."""
    with pytest.raises(MisuseError, match="data.size_px must be a multiple of 16"):
        Landmark("full", n_steps=33, n_features=8, px=px)
    Landmark("tiny", n_steps=33, n_features=8, px=px)


def test_half_precision_draws_the_same_heads(clip: Footage, avatar: Landmark) -> None:
    """Sixteen bits in the networks, as on a GPU, and thirty-two where things are."""
    rows = clip.signals[clip.train[:2]]
    rays = march.picture_rays(rows.camera, torch.arange(2), avatar.aabb)
    marcher, _ = march.build(avatar.aabb, "cpu", n_steps=16, n_samples=4)
    marcher.eval()
    found = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            said = avatar.listen(rows).landmarks.float()
            rendered = marcher.march(avatar.condition(rows), rays)
            frame = avatar.compose(rendered, rays, rows, torch.zeros(len(rays), 3))
            found.append((said, frame.rgb))
    (said, full), (said_half, half) = found
    assert torch.allclose(said, said_half, atol=0.01)
    assert (full - half).square().mean() < 1e-4 and not torch.equal(full, half)
