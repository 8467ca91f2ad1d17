"""LokiTalk's geometry and gates, on numbers that can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import hearing, one_picture

from talkhead_cli import march
from talkhead_cli.avatars.base import PictureResult
from talkhead_cli.avatars.lokitalk import LokiTalk
from talkhead_cli.avatars.lokitalk.method import MAX_LIPS, SHIFTS
from talkhead_cli.avatars.personal import N_EYES, Person, eyes_told, view
from talkhead_cli.blocks.mouth import (
    MAX_POSE,
    MAX_REST,
    N_CODES,
    SHUT,
    SPREAD,
    Mouth,
    principal_shapes,
)
from talkhead_cli.blocks.regions import region_masks, relief_gap, relief_of
from talkhead_cli.blocks.rigid import moved
from talkhead_cli.contracts import (
    EYES,
    LIPS,
    LOWER_LIP,
    RayBundle,
    Rendered,
    Signals,
    SilentProgress,
)
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
    made = LokiTalk.build("tiny", **hearing(clip.signals), px=64)
    box = footage.box_of(clip.signals.camera[clip.train])
    made.calibrate(clip.signals[clip.speaking], clip.mesh, box)
    made.see(clip.signals[clip.train])
    return made.eval()


@pytest.fixture(scope="module")
def mouth(clip: Footage, avatar: LokiTalk) -> Mouth:
    return avatar.person(clip.signals).mouth


def test_relief_passes_through_the_face(clip: Footage, avatar: LokiTalk) -> None:
    side = float(avatar.aabb[[0, 1, 3, 4]].abs().max())
    relief = relief_of(clip.mesh, side)
    nose = clip.mesh[4]
    behind = nose + torch.tensor([0.0, 0.0, 0.2])
    gap, trust = relief_gap(relief, side, torch.stack([nose, behind]))
    assert torch.allclose(gap, torch.tensor([0.0, 0.2]), atol=0.03) and trust.min() > 0.95
    assert relief[0, 0, 1] < 0.2 and relief[0, 0, 0].abs() < 0.05


def test_listening_writes_mouths_that_read_back_as_the_same_code(
    clip: Footage, avatar: LokiTalk, mouth: Mouth
) -> None:
    heard = avatar.listen(clip.signals[clip.held])
    with torch.no_grad():
        code = mouth.with_gain(mouth.from_speech_units(avatar.speech(heard))) + mouth.pose_part(
            heard
        )
    assert torch.allclose(mouth.code(heard), code, atol=1e-3)
    others = [i for i in range(68) if i not in (*range(4, 13), *range(48, 68))]
    assert torch.allclose(
        heard.landmarks[:, others], mouth.neutral[others].expand(len(heard), -1, -1)
    )


def test_the_code_keeps_the_mouth_and_ignores_the_eyes(clip: Footage, mouth: Mouth) -> None:
    rows = clip.signals[clip.train]
    moved = rows.landmarks.clone()
    moved[:, 36:48, 1] += 0.05
    assert torch.allclose(mouth.code(rows), mouth.code(rows.with_(landmarks=moved)))
    shape = mouth.code(rows) * mouth.scale @ mouth.basis.T
    truth = (rows.landmarks - mouth.neutral)[:, [*range(4, 13), *range(48, 68)]].flatten(1)
    assert (shape - truth).square().sum() < 0.1 * truth.square().sum()


@pytest.mark.parametrize(("heard", "gain"), [(0.6, SPREAD / 0.6), (2.0, 1.0), (0.01, 2.0)])
def test_heard_mouths_are_widened_to_a_share_of_the_true_opening(
    clip: Footage, mouth: Mouth, heard: float, gain: float
) -> None:
    """Never narrowed, and no more than twofold, however little is heard."""
    kept = clip.signals[clip.train]
    mouth.settle(kept, heard * mouth.speech_target(kept))
    assert float(mouth.gain) == pytest.approx(gain, rel=0.1)


def test_widening_opens_the_mouth_further_and_leaves_the_rest(mouth: Mouth) -> None:
    code = torch.randn(20, N_CODES, generator=torch.Generator().manual_seed(0))
    rest, slope = mouth.opening(0 * code), mouth.slope(code)
    before = mouth.gain.clone()
    try:
        mouth.gain.fill_(1.7)
        wide = mouth.with_gain(code)
        assert torch.allclose(
            mouth.opening(wide) - rest, 1.7 * (mouth.opening(code) - rest), atol=1e-5
        )
        across = code - (code @ slope)[:, None] * slope / slope.square().sum()
        assert torch.allclose(mouth.with_gain(across), across, atol=1e-5)
    finally:
        mouth.gain.copy_(before)


def test_lips_that_stand_one_before_the_other_are_not_open(clip: Footage, mouth: Mouth) -> None:
    rest = torch.zeros(1, N_CODES)
    before = mouth.opening(rest)
    neutral = mouth.neutral.clone()
    try:
        mouth.neutral[66, 2] -= 0.1  # the lower lip, towards the camera
        assert torch.allclose(mouth.opening(rest), before)
        mouth.neutral[66, 1] += 0.1  # and down
        assert torch.allclose(mouth.opening(rest), before + 0.1)
    finally:
        mouth.neutral.copy_(neutral)


def test_what_is_said_weighs_by_what_it_moves(clip: Footage, mouth: Mouth) -> None:
    """One unit, whichever shape it is said in, moves the landmarks by one distance."""
    rows = clip.signals[clip.train]
    told = mouth.speech_target(rows)
    assert torch.allclose(
        mouth.from_speech_units(told), mouth.code(rows) - mouth.pose_part(rows), atol=1e-5
    )
    moved = mouth.landmarks(mouth.from_speech_units(torch.eye(N_CODES))) - mouth.neutral
    distance = moved.flatten(1).norm(dim=1)
    assert torch.allclose(distance, distance.mean().expand(N_CODES), rtol=1e-3)


def test_brows_say_nothing_of_shut_eyes(clip: Footage) -> None:
    rows = clip.signals[clip.train][:4]
    eye = torch.tensor([[0.0, 0.0], [0.2, 0.2], [0.7, 0.7], [1.0, 0.1]])
    low, high = (
        eyes_told(rows.with_(eye=eye, brow=torch.full((4, 2), brow))) for brow in (-0.02, 0.03)
    )
    changed = (low != high).any(1).tolist()
    assert changed == [False, False, True, True] and low.shape == (4, N_EYES)
    assert torch.equal((low != high)[3, -2:], torch.tensor([True, False])), "each eye's own"


def test_a_mouth_at_rest_is_shut_and_the_rest_is_kept(clip: Footage, mouth: Mouth) -> None:
    rows = clip.signals[clip.train][:20]
    rest = mouth.at_rest(rows)
    code = mouth.code(rest) - mouth.pose_part(rest)
    assert bool((code.norm(dim=1) < MAX_REST + 1e-3).all())
    near = Mouth()  # which is nearly shut in the mean
    near.load_state_dict(mouth.state_dict())
    near.neutral[65:68, 1] += SHUT + 0.01 - near.opening(torch.zeros(1, N_CODES))
    shut = near.code(near.at_rest(rows)) - near.pose_part(rows)
    assert float(shut.norm(dim=1).max()) < MAX_REST - 1e-2, "no further than it takes"
    torch.testing.assert_close(near.opening(shut), torch.full((20,), SHUT), atol=1e-3, rtol=0)
    brows = slice(17, 27)
    assert torch.equal(rest.landmarks[:, brows], rows.landmarks[:, brows])
    wide = Mouth()
    wide.load_state_dict(mouth.state_dict())
    wide.neutral[LOWER_LIP, 1] += 10.0
    assert float(wide.code(wide.at_rest(rows)).norm(dim=1).max()) < MAX_REST + 3, "no other face"
    shared = Mouth()
    shared.measure(rows, wide.basis, 3 * wide.scale)
    shared.load_state_dict(wide.state_dict() | {"scale": 3 * wide.scale, "lean": wide.lean / 3})
    torch.testing.assert_close(
        shared.at_rest(rows).landmarks, wide.at_rest(rows).landmarks, atol=1e-4, rtol=0
    )


def test_shapes_have_one_sign_whichever_the_decomposition_picks(clip: Footage) -> None:
    rows = clip.signals[clip.train]
    basis = principal_shapes([rows])
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
    torch.testing.assert_close(basis.T @ basis, torch.eye(N_CODES), atol=1e-4, rtol=0)
    mirrored = rows.with_(landmarks=2 * rows.landmarks.mean(0) - rows.landmarks)
    torch.testing.assert_close(principal_shapes([mirrored]), basis, atol=1e-4, rtol=0)


def test_one_row_leaves_the_gain(clip: Footage, mouth: Mouth) -> None:
    row = clip.signals[clip.train][:1]
    before = mouth.gain.clone()
    mouth.settle(row, mouth.speech_target(row))
    assert torch.equal(mouth.gain, before)


def test_what_the_pose_says_of_the_mouth_is_not_asked_of_speech(
    clip: Footage, mouth: Mouth
) -> None:
    """A mouth that hangs with pitch is given back by the pose, and speech need not know."""
    rows = clip.signals[clip.train]
    marks = mouth.neutral.expand(len(rows), -1, -1).clone()
    pitch = (rows.pose[:, 0] - rows.pose[:, 0].mean()) / rows.pose[:, 0].std()
    marks[:, 48:68, 1] += 0.05 * pitch[:, None]
    hanging = rows.with_(landmarks=marks)
    own = Mouth()
    own.measure(hanging, principal_shapes([hanging]))
    left, all_of_it = (
        own.from_speech_units(own.speech_target(hanging))[:, 0],
        own.code(hanging)[:, 0],
    )
    # a ridge of one per row takes at least half of it away, and a quarter of its power is left
    assert left.square().mean() < 0.25 * all_of_it.square().mean()
    far = rows.with_(pose=rows.pose * 100)
    assert own.pose_part(far).abs().max() < 20, "held where training ended"


def test_shapes_are_common_to_people_whose_mouths_move_by_different_amounts(
    clip: Footage, mouth: Mouth
) -> None:
    """One who speaks with three times the motion neither changes the shapes nor the codes."""
    rows = clip.signals[clip.train]
    loud = rows.with_(landmarks=mouth.neutral + 3 * (rows.landmarks - mouth.neutral))
    basis = principal_shapes([rows, loud])
    agree = (basis * principal_shapes([rows])).sum(0).abs()
    assert bool((agree > 0.999).all()), agree
    one, other = Mouth(), Mouth()
    one.measure(rows, basis)
    other.measure(loud, basis)
    assert torch.allclose(one.code(rows), other.code(loud), atol=1e-3)
    assert torch.allclose(other.scale, 3 * one.scale, rtol=1e-3)


def test_a_corrected_pose_moves_the_head_and_leaves_the_shoulders(
    clip: Footage, avatar: LokiTalk
) -> None:
    """Whatever is put right of the head's pose, a point of the picture at the shoulders lands in
    the same canonical place."""
    rows = clip.signals[clip.train[::40]]
    rays = footage_rays(rows)
    before = avatar.condition(rows)
    assert torch.equal(avatar.aim(rows, rays).origins, rays.origins), "it starts as no motion"
    try:
        with torch.no_grad():
            torch.nn.init.normal_(avatar.pose_correction.linear.weight)
            aimed, field = avatar.aim(rows, rays), avatar.condition(rows)
    finally:
        torch.nn.init.zeros_(avatar.pose_correction.linear.weight)
    assert (aimed.origins - rays.origins).norm(dim=1).min() > 1e-3
    assert torch.allclose(aimed.directions.norm(dim=1), torch.ones(len(rays)), atol=1e-5)
    point, same = (r.origins + 4 * r.directions for r in (rays, aimed))
    landed = moved(point, before._shoulders, rays.row)
    assert torch.allclose(landed, moved(same, field._shoulders, rays.row), atol=1e-5)


@torch.no_grad()
def test_colours_of_views_never_seen_are_those_of_the_nearest_seen(
    clip: Footage, avatar: LokiTalk
) -> None:
    rows = clip.signals[clip.train[:3]]
    person = avatar.person(rows)
    assert person.to_known_view(rows) is None, "in training's own views nothing changes"
    turn = torch.eye(4)
    turn[0, 0] = turn[2, 2] = math.cos(0.6)
    turn[0, 2], turn[2, 0] = math.sin(0.6), -math.sin(0.6)
    beside = rows.with_(camera=replace(rows.camera, c2w=turn @ rows.camera.c2w))
    away = person.to_known_view(beside)
    assert away is not None
    torch.testing.assert_close((view(beside) + away)[:, 0], person.views[1, 0].expand(3))
    x = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    d, row = (
        torch.nn.functional.normalize(x + torch.tensor([0.0, 0, 2]), dim=1),
        torch.arange(30) % 3,
    )
    _, seen = avatar.condition(beside)(x, d, row)
    _, same = avatar.condition(rows)(x, d + away[row], row)
    torch.testing.assert_close(seen, same)
    _, other = avatar.condition(rows)(x, d, row)
    assert not torch.allclose(seen[:, :3], other[:, :3], atol=1e-4)


def test_a_run_of_before_views_were_measured_is_loaded_and_bounds_none(
    clip: Footage, avatar: LokiTalk
) -> None:
    state = {name: v for name, v in avatar.state_dict().items() if not name.endswith("views")}
    old = LokiTalk.build("tiny", **hearing(clip.signals), px=64)
    old.load_state_dict(state)
    person = old.people[0]
    assert isinstance(person, Person) and bool(person.views.isinf().all())


def test_a_field_that_is_asked_nothing_answers_nothing(clip: Footage, avatar: LokiTalk) -> None:
    """Rays that all miss send no points."""
    field = avatar.condition(clip.signals[:1])
    nowhere = torch.zeros(0, 3)
    density, channels = field(nowhere, nowhere, torch.zeros(0, dtype=torch.long))
    assert density.shape == (0,) and channels.shape == (0, field.channels)


def test_half_precision_places_heads_exactly(clip: Footage, avatar: LokiTalk) -> None:
    """Sixteen bits will do for networks, not for where things are."""
    rows = clip.signals[clip.train[:3]]
    rays = march.picture_rays(rows.camera, torch.arange(3), avatar.aabb)
    marcher, _ = march.build(avatar.aabb, "cpu", n_steps=16, n_samples=6)
    marcher.eval()
    found = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            aimed, field = avatar.aim(rows, rays), avatar.condition(rows)
            found.append((aimed, field, marcher.march(field, aimed)))
    (aimed, field, full), (aimed_half, field_half, half) = found
    assert torch.allclose(aimed.origins, aimed_half.origins, atol=1e-5)
    assert torch.allclose(field._shoulders, field_half._shoulders, atol=1e-5)
    assert half.feature.dtype == half.depth.dtype == torch.float32
    assert (half.feature - full.feature)[:, :3].square().mean() < 1e-4
    assert not torch.equal(half.feature, full.feature), "nothing ran in half precision"


def footage_rays(rows: Signals) -> RayBundle:
    n = len(rows)
    pixel = torch.rand(n, 2) * 64
    return march.pixel_rays(
        rows.camera, torch.arange(n), pixel, torch.tensor([-2.0, -2, -1, 2, 2, 1])
    )


def test_attention_starts_on_the_regions(avatar: LokiTalk, clip: Footage, mouth: Mouth) -> None:
    """An ellipsoid round the lips and each eye, at whose rim the logit is -1; under the chin."""
    field = avatar.condition(clip.signals[:1])
    lips = (mouth.neutral[LIPS].mean(0) * 2 + mouth.neutral[8]) / 3
    eye = mouth.neutral[EYES[1]].mean(0)
    under = mouth.neutral[8] + torch.tensor([0, 0.12, 0])
    places = torch.stack(
        [
            lips,
            lips + torch.tensor([0, 0, 0.35]),
            eye,
            eye + torch.tensor([0.16, 0, 0]),
            under,
            under + torch.tensor([0, 0.1, 0]),
        ]
    )
    logits = field._prior(places)
    assert torch.allclose(logits[:2, 0], torch.tensor([3.0, -1]), atol=1e-4)
    assert torch.allclose(logits[2:4, 1], torch.tensor([3.0, -1]), atol=1e-4)
    assert torch.allclose(logits[4:, 2], torch.tensor([0.0, 2]), atol=1e-4)


def masks_at(signals: Signals, pixel: torch.Tensor) -> torch.Tensor:
    row = torch.zeros(len(pixel), dtype=torch.long)
    return region_masks(signals, pixel, row, torch.zeros(len(pixel), 6))


def test_region_masks_lie_on_their_regions(clip: Footage) -> None:
    one = clip.signals[int(clip.train[0])]
    marks = one.landmarks_2d[0] * 64
    lips, left_eye, forehead = marks[LIPS].mean(0), marks[EYES[0]].mean(0), marks[27] - 14
    masks = masks_at(one, torch.stack([lips, left_eye, forehead]))
    assert masks[0, 0] > 0.95 and masks[1, 1] > 0.95
    assert masks[0, 1] < 0.1 and masks[1, 0] < 0.1 and masks[2, 0] < 0.05


def test_signals_move_only_their_region(clip: Footage, avatar: LokiTalk, mouth: Mouth) -> None:
    """A changed mouth changes the field at the mouth, and nothing at the forehead or shoulder."""
    row = clip.signals[int(clip.train[0])]
    moved = row.landmarks.clone()
    moved[:, 57:60, 1] += 0.1
    moved[:, 65:68, 1] += 0.1
    places = torch.stack(
        [
            mouth.neutral[LIPS].mean(0),
            mouth.neutral[27] - torch.tensor([0, 0.35, 0]),
            mouth.neutral[8] + torch.tensor([0.6, 0.5, 0.4]),
        ]
    )
    zero = torch.zeros(3, dtype=torch.long)
    look = torch.tensor([[0.0, 0, 1]]).expand(3, 3)
    with torch.no_grad():
        _, still = avatar.condition(row)(places, look, zero)
        _, other = avatar.condition(row.with_(landmarks=moved))(places, look, zero)
    change = (still - other)[:, :3].abs().amax(1)
    assert change[0] > 10 * change[1:].max()


def told_to(parts: list[torch.nn.Module], work: Callable[[], object]) -> list[torch.Tensor]:
    """What the parts are told, in the order of the calls."""
    seen: list[torch.Tensor] = []
    hooks = [p.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for p in parts]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_networks_are_told_no_more_than_training_told_them(
    clip: Footage, avatar: LokiTalk, mouth: Mouth
) -> None:
    rows = clip.signals[clip.train[:2]]
    wild = rows.with_(landmarks=50 * rows.landmarks, pose=rows.pose + 50)
    lips, pose = told_to([avatar.lip_code, avatar.pose_code], lambda: avatar.condition(wild))
    assert lips.abs().max() <= MAX_LIPS * max(1.0, float(mouth.relative_extent)) + 1e-4
    assert pose.abs().max() <= MAX_POSE


def test_a_stage_without_noise_tells_the_lips_as_rendering_does(
    clip: Footage, avatar: LokiTalk
) -> None:
    rows = clip.signals[clip.train[:2]]

    def both() -> None:
        avatar.condition(rows)
        try:
            avatar.train()
            avatar.noise = 0.0
            avatar.condition(rows)
        finally:
            avatar.eval()
            avatar.noise = 1.0

    assert torch.equal(*told_to([avatar.lip_code], both))


def test_losses_hold_still_what_need_not_move_and_leave_opacity_to_others(
    clip: Footage, avatar: LokiTalk
) -> None:
    rows, rays, truth = one_picture(clip, avatar.aabb)
    field, n = avatar.condition(rows), len(rays)
    masks = region_masks(rows, rays.pixel, rays.row, truth.labels)
    regions = torch.stack([masks[:, :2].amax(1), masks[:, 2]], 1)
    opacity = torch.full((n, 1), 0.5, requires_grad=True)

    def lost(shift: torch.Tensor) -> dict[str, torch.Tensor]:
        feature = torch.zeros(n, field.channels)
        feature[:, SHIFTS] = shift
        made = Rendered(feature, opacity, 4 * opacity, 0 * opacity, torch.tensor(n))
        frame = avatar.compose(made, rays, rows, truth.plate)
        return avatar.picture_losses(PictureResult(rows, rays, truth, field, made, frame))

    assert lost(regions)["still"] < 0.3 * lost(1 - regions)["still"]
    assert not lost(regions)["attention"].requires_grad, "it would make heads transparent"


def test_planes_reach_around_the_whole_box(avatar: LokiTalk) -> None:
    frame = avatar.frame
    assert bool((avatar.reach >= torch.maximum(-frame[:3], frame[3:])).all())


def test_every_part_learns_and_only_named_parts_move(clip: Footage, avatar: LokiTalk) -> None:
    named = {id(p) for name in avatar.parts() for p in avatar.part(name)}
    frozen = {id(p) for p in avatar.speech.linear.parameters()}
    assert named | frozen == {id(p) for p in avatar.parameters()}
    assert not named & frozen


def test_each_person_has_its_own_mouth(clip: Footage) -> None:
    rows = clip.signals[clip.train]
    other = rows.with_(landmarks=2 * rows.landmarks, person=torch.ones_like(rows.person))
    many = LokiTalk.build("tiny", **hearing(rows), px=64, n_people=2)
    many.survey([rows, other])
    box = torch.tensor([-1.0, -1, -1, 1, 1, 1])
    for signals in (rows, other):
        many.calibrate(signals, clip.mesh, box)
    first, second = many.person(rows).mouth, many.person(other).mouth
    assert first is not second and torch.allclose(second.neutral, 2 * first.neutral)
    assert torch.allclose(2 * first.code(rows), second.code(other), atol=1e-3)
    assert torch.allclose(first.speech_target(rows), second.speech_target(other), atol=1e-3), (
        "in its own size"
    )
