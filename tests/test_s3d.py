"""S3D-NeRF and its blocks, against closed forms; pictures as people have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import hearing

from talkhead_cli import march
from talkhead_cli.avatars.s3d import DEFORMATIONS, S3D, S3DField, S3DSpeaker
from talkhead_cli.avatars.s3d.face import filled
from talkhead_cli.avatars.s3d.field import LIP_CUE, _projected, between
from talkhead_cli.blocks.appearance import AppearanceEncoder, CrossModal, Slots
from talkhead_cli.blocks.mouth import N_CODES, Mouth, principal_shapes
from talkhead_cli.blocks.regions import RELIEF, head_relief
from talkhead_cli.contracts import RELIEF_SIDE, RayShot, SilentProgress, SpeechShot
from talkhead_cli.jobs import footage, portraits, shots, views
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.jobs.step import Step, UncastShots
from talkhead_cli.store import Workspace

PX = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def preset() -> Preset:
    return presets.load(["s3d", "tiny"], [f"data.size_px={PX}", "march.resolution=32"])


@pytest.fixture(scope="module")
def clip(speaker_home: Path, preset: Preset) -> Footage:
    return footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())


@pytest.fixture
def avatar(clip: Footage, preset: Preset) -> S3D:
    torch.manual_seed(0)
    made = S3D("tiny", **hearing(clip.signals))
    made.survey([clip.signals[clip.train]])
    return made.eval()


@pytest.fixture
def speaker(avatar: S3D, clip: Footage) -> S3DSpeaker:
    with torch.no_grad():
        made = avatar.enroll(clip.portrait(clip.best_likeness()))
    assert isinstance(made, S3DSpeaker)
    return made


def dreaming(avatar: S3D) -> S3D:
    """The avatar with deformations and retouching that say something."""
    torch.manual_seed(1)
    for net in (avatar.mouth_net, avatar.eye_net):
        torch.nn.init.normal_(net.last.weight, std=0.3)
    torch.nn.init.normal_(avatar.retoucher.last.weight, std=0.1)
    return avatar


# -- blocks ---------------------------------------------------------------------------------------


def test_an_encoder_gives_planes_of_every_scale() -> None:
    net = AppearanceEncoder(8, (8, 12, 16, 20), 6, 3)
    planes, seen = net(torch.rand(2, 8, 64, 64))
    assert [p.shape for p in planes] == [(2, 3, 6, s, s) for s in (32, 16, 8)]
    assert seen.shape == (2, 16, 20) and net.n_out == 18


def test_slots_do_not_mind_in_which_order_places_come() -> None:
    torch.manual_seed(0)
    net = Slots(12, 4, 8)
    seen = torch.randn(1, 30, 12)
    slots = net(seen)
    assert slots.shape == (1, 4, 8)
    assert torch.allclose(net(seen[:, torch.randperm(30)]), slots, atol=1e-5)
    assert (slots[0, 0] - slots[0, 1]).abs().max() > 1e-2, "slots differ"


def test_what_is_heard_depends_on_the_face_and_on_which_number_it_is() -> None:
    torch.manual_seed(0)
    net = CrossModal(5, 3, 8, 6).eval()
    slots, driving = torch.randn(3, 8), torch.randn(4, 5)
    heard = net(slots, driving)
    assert heard.shape == (4, 6)
    one = driving.clone()
    one[1, 2] += 1
    moved = (net(slots, one) - heard).abs().amax(1) > 1e-4
    assert moved.tolist() == [False, True, False, False], "rows know nothing of each other"
    assert not torch.allclose(net(slots, driving[:, [1, 0, 2, 3, 4]]), heard, atol=1e-4)
    assert not torch.allclose(net(torch.randn(3, 8), driving), heard, atol=1e-4)


def test_filling_keeps_what_is_sure_and_carries_it_outwards() -> None:
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 32, 32)
    sure = torch.zeros(1, 1, 32, 32)
    sure[..., 8:16, 8:16] = 1
    found = filled(picture, sure)
    assert torch.allclose(found[..., 8:16, 8:16], picture[..., 8:16, 8:16])
    low, high = (picture[..., 8:16, 8:16].amin(), picture[..., 8:16, 8:16].amax())
    assert found.min() >= low - 1e-5 and found.max() <= high + 1e-5
    flat = torch.full((1, 3, 32, 32), 0.4)
    assert torch.allclose(filled(flat, sure), flat, atol=1e-4)
    assert torch.isfinite(filled(picture, torch.zeros_like(sure))).all()


def test_a_mouth_of_one_picture_is_at_rest_however_it_is_shown(clip: Footage) -> None:
    """Jaws that hang and lips that are shut give the same face at rest, as far as opening goes."""
    rows = clip.signals[clip.train]
    basis = principal_shapes([rows])
    true = Mouth()
    true.measure(rows, basis)
    rest = true.opening(torch.zeros(1, N_CODES))[0]
    gain = torch.ones(())
    order = true.opening(true.code(rows)).argsort()
    for row in order[[0, len(order) // 2, -1]].tolist():
        mouth = Mouth()
        mouth.init_from_picture(rows.landmarks[row], basis, true.scale, rest, gain)
        assert torch.allclose(mouth.opening(torch.zeros(1, N_CODES))[0], rest, atol=1e-5)
        known = (rows.landmarks[row] - true.neutral).norm(dim=1).mean()
        # of a mouth that hardly differs from rest, undoing the opening may take a hair too much
        assert (mouth.neutral - true.neutral).norm(dim=1).mean() <= known + 2e-3


def test_a_head_goes_on_behind_its_face_without_a_step(clip: Footage) -> None:
    relief = head_relief(clip.mesh, RELIEF_SIDE)
    depth = relief[..., 0]
    steps = torch.maximum(depth.diff(dim=0).abs().amax(), depth.diff(dim=1).abs().amax())
    assert float(steps) < 0.09, "per texel of .017 face heights"
    middle = depth[RELIEF // 2 - 8 : RELIEF // 2 + 8, RELIEF // 2 - 8 : RELIEF // 2 + 8]
    nose = clip.mesh[:, 2].min()
    assert abs(float(middle.min() - nose)) < 0.08, (middle.min(), nose)
    assert depth[:4].abs().max() < 0.02, "far from the face: the plane between the ears"


# -- the method -----------------------------------------------------------------------------------


def test_a_place_in_the_picture_is_where_the_camera_sees_it(clip: Footage) -> None:
    camera = clip.signals[:1].camera
    pixel = torch.tensor([[10.5, 20.5], [40.5, 31.5]])
    rays = march.pixel_rays(camera, torch.zeros(2).long(), pixel, torch.tensor(S3D.box))
    at = _projected(rays.origins + 4.2 * rays.directions, camera)
    assert torch.allclose((at[:, :2] + 1) / 2 * PX, pixel, atol=1e-3)
    ears = _projected(torch.zeros(1, 3), camera)
    assert float(ears[0, 2]) == pytest.approx(0, abs=1e-5)


def test_before_training_the_picture_itself_comes_back(
    avatar: S3D, speaker: S3DSpeaker, clip: Footage, preset: Preset
) -> None:
    row = clip.signals[clip.best_likeness()]
    frame, points = picture(speaker, row, clip, preset)
    true = torch.from_numpy(clip.pictures[int(clip.best_likeness())]).float() / 255
    face = torch.from_numpy(clip.labels[int(clip.best_likeness()), 0] > 250)[::2, ::2]
    assert points > 0 and face.sum() > 100
    error = (frame.rgb[0] - true)[face].square().mean()
    assert float(-10 * error.log10()) > 28, "what the picture shows is carried, not painted"
    assert frame.alpha[0, face].mean() > 0.98


def picture(speaker, row, clip, preset, seed=0):  # type: ignore[no-untyped-def]
    marcher, _ = march.build(speaker.aabb, CPU, n_steps=24, n_samples=6, resolution=48)
    marcher.eval()
    views.rebuild_from_views(speaker, marcher, row, CPU)
    with torch.no_grad():
        rays = march.picture_rays(row.camera, torch.zeros(1, dtype=torch.long), speaker.aabb)
        rendered = marcher.march(speaker.condition(row), rays)
        return speaker.compose(rendered, rays, row, clip.plate.view(-1, 3)), rendered.n_points


def test_the_mouth_moves_the_mouth_alone(avatar: S3D, clip: Footage) -> None:
    dreaming(avatar)
    with torch.no_grad():
        speaker = avatar.enroll(clip.portrait(clip.best_likeness()))
        row = clip.signals[clip.best_likeness()]
        wide = views.opening_mouths(speaker, row, 3)[-1:]
        marks = row.landmarks[0]
        x = torch.cat([marks[48:68], torch.tensor([[0.0, -0.6, -0.2], [0.6, 0.1, 0]])])
        where = torch.zeros(len(x), dtype=torch.long)
        fields = [speaker.condition(r) for r in (row, wide)]
        assert all(isinstance(f, S3DField) for f in fields)
        one, two = (f.views[0].displaced(x, where)[0] for f in fields)  # type: ignore[union-attr]
    moved = (one - two).norm(dim=1)
    assert float(moved[:20].max()) > 1e-3, "lips"
    assert torch.allclose(one[-2:], x[-2:]) and torch.allclose(two[-2:], x[-2:]), "forehead, hair"


def test_eyes_are_mirror_images_of_each_other(avatar: S3D, clip: Footage) -> None:
    """Of a face that is its own mirror image, one eye does what the other does."""
    dreaming(avatar)
    avatar.deformation = "naive"  # slots see an uneven picture
    torch.nn.init.zeros_(avatar.mouth_net.last.weight)  # and mouths may be uneven too
    kept = clip.portrait(clip.best_likeness())
    marks = kept.signals.landmarks.clone()
    marks[:, 42:48] = marks[:, [39, 38, 37, 36, 41, 40]] * torch.tensor([-1.0, 1, 1])
    still = torch.ones(1, 2)
    signals = kept.signals.with_(landmarks=marks, eye=still, gaze=0 * still, brow=0 * still)
    with torch.no_grad():
        speaker = avatar.enroll(replace(kept, signals=signals))
        blink = signals.with_(eye=torch.full((1, 2), 0.1))
        field = speaker.condition(blink)
        assert isinstance(field, S3DField)
        x = marks[0, 36:42] + torch.tensor([0.01, 0.02, 0])
        mirror = torch.tensor([-1.0, 1, 1])
        where = torch.zeros(6, dtype=torch.long)
        left, right = (
            field.views[0].displaced(x, where)[0],
            field.views[0].displaced(x * mirror, where)[0],
        )
    assert torch.allclose(left * mirror, right, atol=1e-5)
    assert (left - x).norm(dim=1).max() > 1e-4


def test_a_point_knows_whether_it_lies_between_the_lips() -> None:
    """A mouth like a lens: corners at -0.2 and 0.2, open by 0.1 in the middle."""
    knots = torch.linspace(-0.2, 0.2, 5)
    bow = 0.05 * (1 - (knots / 0.2) ** 2)
    lips = torch.stack([torch.stack([knots, -bow], 1), torch.stack([knots, bow], 1)])
    shut = torch.stack([torch.stack([knots, 0 * bow], 1)] * 2)
    lips = torch.stack([lips, shut])
    x = torch.tensor([[0.0, 0.0, 0], [0.0, 0.07, 0], [0.1, 0.0, 0], [0.3, 0.0, 0], [0.0, 0.0, 0]])
    row = torch.tensor([0, 0, 0, 0, 1])
    inside, along = between(x, lips, torch.arange(5), row, scale=LIP_CUE).unbind(1)
    assert torch.allclose(inside / 20, torch.tensor([0.05, -0.02, 0.0375, -0.1, 0]), atol=1e-4)
    assert torch.allclose(along, torch.tensor([0, 0, 0.5, 1.5, 0]), atol=1e-6)


def test_of_several_pictures_the_one_most_like_the_row_has_its_say(
    avatar: S3D, clip: Footage, preset: Preset
) -> None:
    order = clip.signals.pose[clip.train][:, 1].argsort()
    rows = clip.train[order[[0, -1]]]  # as far to either side as she looks
    both = clip.portrait(rows)
    with torch.no_grad():
        speaker = avatar.enroll(both)
        assert isinstance(speaker, S3DSpeaker) and len(speaker.faces) == 2
        told = speaker.condition(clip.signals[rows]).likeness
        assert torch.allclose(told.sum(1), torch.ones(2)) and told.argmax(1).tolist() == [0, 1]
        alone = avatar.enroll(clip.portrait(rows[:1]))
        twice = avatar.enroll(clip.portrait(rows[[0, 0]]))
    row = clip.signals[rows[:1]]
    one, same = (picture(who, row, clip, preset)[0].rgb for who in (alone, twice))
    assert torch.allclose(one, same, atol=2e-2), "the same picture twice says nothing new"
    true = torch.from_numpy(clip.pictures[int(rows[1])]).float() / 255
    face = torch.from_numpy(clip.labels[int(rows[1]), 0] > 250)[::2, ::2]
    errors = [
        float(
            (picture(who, clip.signals[rows[1:]], clip, preset)[0].rgb[0] - true)[face]
            .square()
            .mean()
        )
        for who in (alone, speaker)
    ]
    assert errors[1] < errors[0], errors


def test_lids_are_where_openness_puts_them(avatar: S3D, clip: Footage) -> None:
    speaker = avatar.enroll(clip.portrait(clip.best_likeness()))
    row = clip.signals[clip.best_likeness()]
    marks = row.landmarks[0]
    iris = (marks[[37, 38]].mean(0) + marks[[40, 41]].mean(0)) / 2
    other = (marks[[43, 44]].mean(0) + marks[[46, 47]].mean(0)) / 2
    x, where = torch.stack([iris, other]), torch.zeros(2, dtype=torch.long)
    for eye, inside in ((row.eye, True), (0 * row.eye, False)):
        field = speaker.condition(row.with_(eye=eye))
        assert isinstance(field, S3DField)
        cue = field.views[0].displaced(x, where)[1][:, -2]
        assert bool((cue > 0.1).all() if inside else (cue < -0.1).all()), cue


@pytest.mark.parametrize("kind", DEFORMATIONS)
def test_deformations_hear_what_they_say_they_hear(avatar: S3D, clip: Footage, kind: str) -> None:
    dreaming(avatar)
    avatar.deformation = kind
    rows = clip.train[[3, 40]]
    faces = [clip.portrait(rows[i : i + 1]) for i in (0, 1)]
    faces[1] = replace(faces[1], signals=faces[0].signals, pictures=faces[1].pictures.flip(2))
    row = clip.signals[clip.train[20:21]]
    x = row.landmarks[0, 48:68]
    where = torch.zeros(20, dtype=torch.long)
    shifts = []
    with torch.no_grad():
        for face in faces:
            field = avatar.enroll(face).condition(row)
            assert isinstance(field, S3DField)
            shifts.append(field.views[0].displaced(x, where)[0] - x)
    looks = not torch.allclose(shifts[0], shifts[1], atol=1e-6)
    assert looks == (kind in ("concatenated", "cross-modal"))
    assert bool(shifts[0].abs().max() > 1e-5) == (kind != "none")


@pytest.mark.parametrize("half", [False, True])
def test_a_step_teaches_every_part_that_learns(
    clip: Footage, avatar: S3D, preset: Preset, half: bool
) -> None:
    assert preset.pretrain is not None
    rng = torch.Generator().manual_seed(0)
    aabb = torch.tensor(S3D.box)
    marcher, _ = march.build(aabb, CPU, n_steps=16, n_samples=4, resolution=16)
    step = Step(dreaming(avatar), marcher).train()
    for name in ("pairs", "finish"):
        stage = preset.pretrain.stages[name]
        marcher.exploring = True
        drawn = [shots.draw(clip, stage, 400, aabb, rng)]
        assert drawn[0].portrait is not None and len(drawn[0].portrait) == stage.portraits
        avatar.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            lost = step(UncastShots(drawn), stage.weights)
        absent = set(stage.weights) - set(lost.terms)
        assert absent <= {"whole_lpips", "critic"}, "whose networks are not here"
        lost.loss.backward()
        for part in stage.learn:
            gradients = [p.grad for p in avatar.part(part)]
            assert any(g is not None and g.abs().max() > 0 for g in gradients), (name, part)


def test_the_full_size_counts_places_in_finished_pixels(clip: Footage, preset: Preset) -> None:
    """It marches a quarter of the side; a mouth's own colours must not be paid for there."""
    assert preset.pretrain is not None
    torch.manual_seed(0)
    avatar = S3D("full", **hearing(clip.signals)).eval()
    avatar.survey([clip.signals[clip.train]])
    rows = clip.train[:1]
    camera = clip.signals[rows].camera.smaller(avatar.magnification)
    rays = march.picture_rays(camera, torch.zeros(1, dtype=torch.long), avatar.aabb)
    truth = shots.truth_of(clip, rows, rays)
    shot = RayShot(clip.signals[rows], rays, truth, clip.portrait(rows))
    step = Step(avatar, march.DenseMarcher(avatar.aabb, 12))
    with torch.no_grad():
        weights = preset.pretrain.stages["finish"].weights
        terms = step(UncastShots([shot]), weights).terms
        speaker = avatar.enroll(shot.portrait)
        rendered = step.marcher.march(speaker.condition(shot.signals), rays)  # type: ignore[operator]
        share = rendered.feature[:, 6].mean()
    assert set(weights) - set(terms) <= {"whole_lpips", "critic"}, "whose networks are not here"
    assert all(bool(v.isfinite()) for v in terms.values())
    assert 0 < float(terms["own"]) < 0.97 * float(share), "mouth and eyes are spared"


def test_landmarks_teach_where_points_lie(clip: Footage, avatar: S3D) -> None:
    """The anchor is zero where displacements carry each landmark to the picture's own."""
    portrait = clip.portrait(clip.best_likeness())
    row = clip.signals[clip.best_likeness()]
    field = avatar.enroll(portrait).condition(row)
    assert isinstance(field, S3DField)
    assert float(field.losses(row)["anchor"].detach()) == pytest.approx(0, abs=1e-9)
    away = row.with_(landmarks=row.landmarks + 0.05)
    assert float(field.losses(away)["anchor"].detach()) > 0.3


@torch.no_grad()
def test_whom_a_prior_is_refined_for_can_be_heard(clip: Footage, avatar: S3D) -> None:
    """Stages that listen want the person's mouth, which no survey has measured."""
    rows = clip.signals[clip.train]
    avatar.survey([rows, rows.with_(person=torch.ones(len(rows), dtype=torch.long))])
    alone = S3D.build("tiny", **hearing(rows), px=PX)
    alone.take_common(avatar.common_state())
    alone.calibrate(rows, clip.mesh, torch.tensor(S3D.box))
    heard = alone.listen(rows)
    assert bool(heard.landmarks.isfinite().all())
    assert float((heard.landmarks - rows.landmarks).norm(dim=2).mean()) < 0.1


def test_losses_of_speech_are_those_of_each_person(clip: Footage, avatar: S3D) -> None:
    people = [
        clip.signals[clip.train],
        clip.signals[clip.train].with_(landmarks=clip.signals.landmarks[clip.train] * 1.1),
    ]
    people[1] = people[1].with_(person=torch.ones(len(people[1]), dtype=torch.long))
    avatar.survey(people)
    batch = [SpeechShot(p[:16]) for p in people]
    torch.manual_seed(0)
    both = avatar.losses(batch)["speech"]
    torch.manual_seed(0)
    alone = torch.stack([avatar.losses([b])["speech"] for b in batch]).mean()
    assert torch.allclose(both, alone)


def test_shoulders_and_head_together_are_as_solid_as_the_person(clip: Footage, avatar: S3D) -> None:
    portrait = clip.portrait(clip.best_likeness())
    labels = torch.zeros_like(portrait.labels)
    labels[:, 2], labels[:, 4], labels[:, 5] = 0.5, 0.4, 0.1  # half hair, nearly half torso
    speaker = avatar.enroll(replace(portrait, labels=labels))
    assert isinstance(speaker, S3DSpeaker)
    behind = speaker.main.shoulders[0, 3]
    assert torch.allclose(0.5 + 0.5 * behind[-4:, :4], torch.tensor(0.9), atol=0.06)


def test_rare_rows_are_drawn_more_often(clip: Footage, preset: Preset) -> None:
    assert preset.pretrain is not None
    stage = preset.pretrain.stages["pairs"].model_copy(update={"n_frames": 8})
    rng = torch.Generator().manual_seed(0)
    aabb = torch.tensor(S3D.box)
    rare = set(clip.signals.moment[clip.rare].tolist())
    assert len(rare) <= 0.11 * len(clip.train)
    shares = []
    for share in (0.0, 0.5):
        wanted = stage.model_copy(update={"rare": share})
        drawn = [shots.draw(clip, wanted, 400, aabb, rng).signals for _ in range(30)]
        moments = [m for signals in drawn for m in signals.moment.tolist()]
        shares.append(sum(m in rare for m in moments) / len(moments))
    assert shares[0] < 0.2 and 0.4 < shares[1] < 0.75, shares


def test_lids_leave_rare_rows_where_they_are(clip: Footage, preset: Preset) -> None:
    assert preset.pretrain is not None
    rng, rare = torch.Generator().manual_seed(0), set(clip.signals.moment[clip.rare].tolist())
    n_rare = 0
    for lids in (0.0, 0.5):
        stage = preset.pretrain.stages["finish"].model_copy(
            update={"n_frames": 8, "rare": 0.4, "lids": lids}
        )
        aabb = torch.tensor(S3D.box)
        rows = [shots.draw(clip, stage, 0, aabb, rng).signals.moment[:3] for _ in range(30)]
        n_rare = sum(m in rare for some in rows for m in some.tolist())
        assert n_rare > 45, "the first of eight"


def test_a_portrait_survives_its_file(clip: Footage, tmp_path: Path) -> None:
    from talkhead_cli.store import Run

    kept = clip.portrait(clip.train[:2])
    run = Run(tmp_path / "run")
    assert run.portrait() is None
    run.save_portrait(portraits.to_arrays(kept))
    arrays = run.portrait()
    assert arrays is not None
    back = portraits.from_arrays(arrays)
    assert torch.allclose(back.pictures, kept.pictures, atol=1 / 500)
    assert torch.allclose(back.labels, kept.labels, atol=1 / 500)
    assert torch.equal(back.relief, kept.relief)
    assert torch.equal(back.signals.landmarks, kept.signals.landmarks)
    assert torch.equal(back.signals.camera.c2w, kept.signals.camera.c2w)
    assert back.signals.camera.size_px == PX and len(back) == 2
    renamed = {**arrays, "landmarks_px": arrays["landmarks_2d"]}  # as older files have it
    del renamed["landmarks_2d"]
    again = portraits.from_arrays(renamed)
    assert torch.equal(again.signals.landmarks_2d, kept.signals.landmarks_2d)
