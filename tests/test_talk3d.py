"""Talk3D and its blocks, against closed forms."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import hearing

from talkhead_cli import march
from talkhead_cli.avatars.base import PictureResult
from talkhead_cli.avatars.talk3d import SIZES, TOKENS, Talk3D, Talk3DField
from talkhead_cli.blocks.mouth import Mouth
from talkhead_cli.blocks.rigid import moved
from talkhead_cli.contracts import Frame, RayShot, Rendered, Signals, SilentProgress
from talkhead_cli.jobs import footage, shots
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.player import Player
from talkhead_cli.jobs.pretrain import pretrain
from talkhead_cli.store import Workspace

PX = 64
# Which two of x, y, z lie along the width and the height of each plane.
AXES = ((0, 1), (0, 2), (1, 2))


@pytest.fixture(scope="module")
def clip(speaker_home: Path) -> Footage:
    data = presets.load(["talk3d", "tiny"], [f"data.size_px={PX}"]).data
    return footage.load(Workspace.open(speaker_home, "speaker"), data, SilentProgress())


@pytest.fixture(scope="module")
def fresh(clip: Footage) -> Talk3D:
    return built(clip)


@pytest.fixture
def doubling(clip: Footage, monkeypatch: pytest.MonkeyPatch) -> Talk3D:
    """One that marches half the size of its pictures."""
    monkeypatch.setitem(SIZES, "tiny", replace(SIZES["tiny"], magnification=2))
    return built(clip)


def built(clip: Footage) -> Talk3D:
    torch.manual_seed(0)
    made = Talk3D.build("tiny", **hearing(clip.signals), px=PX)
    box = footage.box_of(clip.signals.camera[clip.train])
    made.calibrate(clip.signals[clip.train], clip.mesh, box)
    return made.eval()


@pytest.fixture
def avatar(fresh: Talk3D) -> Iterator[Talk3D]:
    """One whose editor and upscaler say something."""
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    torch.manual_seed(1)
    for layer in (fresh.editor.last, fresh.upscaler.last):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    yield fresh
    fresh.load_state_dict(before)
    fresh.still, fresh.unheard = False, frozenset()


def drawn(avatar: Talk3D, rows: Signals) -> tuple[Talk3DField, Rendered, Frame]:
    """Whole pictures of the rows, before a black wall."""
    size = PX // avatar.magnification
    rays = march.picture_rays(rows.camera.resized(size), torch.arange(len(rows)), avatar.aabb)
    marcher, _ = march.build(avatar.aabb, "cpu", n_steps=16, n_samples=6)
    marcher.eval()
    with torch.no_grad():
        field = avatar.condition(rows)
        rendered = marcher.march(field, rays)
        plate = torch.zeros(len(rows) * PX * PX, 3)
        return field, rendered, avatar.compose(rendered, rays, rows, plate)


def test_training_starts_from_the_still_identity_bit_for_bit(clip: Footage, fresh: Talk3D) -> None:
    rows = clip.signals[clip.train[:2]]
    fresh.requires_grad_(True)  # so that nothing is skipped for being silent
    _, _, moving = drawn(fresh, rows)
    fresh.still = True
    try:
        _, _, still = drawn(fresh, rows)
    finally:
        fresh.still = False
    assert torch.equal(moving.rgb, still.rgb) and torch.equal(moving.alpha, still.alpha)


def test_speech_edits_the_planes_and_stillness_forbids_it(clip: Footage, avatar: Talk3D) -> None:
    row = clip.signals[clip.train[:1]]
    open_mouth = row.landmarks.clone()
    open_mouth[:, 55:60, 1] += 0.1
    spoken = row.with_(landmarks=open_mouth)
    assert not torch.equal(drawn(avatar, row)[2].rgb, drawn(avatar, spoken)[2].rgb)
    avatar.unheard = frozenset({"speech"})
    assert torch.equal(drawn(avatar, row)[2].rgb, drawn(avatar, spoken)[2].rgb)
    avatar.unheard, avatar.still = frozenset(), True
    assert torch.equal(drawn(avatar, row)[2].rgb, drawn(avatar, spoken)[2].rgb)


def test_speech_of_a_prior_says_the_same_mouths_in_the_persons_own_shapes(
    clip: Footage, avatar: Talk3D
) -> None:
    """Shapes in other words; nets and linear map are turned alike, and kept as what is known."""
    torch.manual_seed(1)
    rows = clip.signals[clip.train]
    new = Talk3D.build("tiny", **hearing(rows), px=PX).eval()
    crowd = Talk3D.build("tiny", **hearing(rows), px=PX, n_people=2)
    shared = crowd.common_state() | {k: v.clone() for k, v in avatar.common_state().items()}
    shared["mouth_basis"] = shared["mouth_basis"] @ torch.linalg.qr(torch.randn(8, 8))[0]
    new.take_common(shared)
    theirs = Mouth()
    theirs.measure(rows, shared["mouth_basis"])
    with torch.no_grad():
        said = new.speech(rows)
        new.calibrate(rows, clip.mesh, avatar.aabb)
        own = new.person(rows).mouth
        assert new.speech.known is not None
        same = own.landmarks(own.from_speech_units(new.speech.known(rows)))
    assert torch.allclose(own.basis.abs(), avatar.mouth_basis.abs(), atol=1e-3)
    assert torch.allclose(same, theirs.landmarks(theirs.from_speech_units(said)), atol=1e-4)


def test_people_of_a_generator_differ_and_a_new_one_begins_as_their_mean(
    clip: Footage, fresh: Talk3D
) -> None:
    torch.manual_seed(2)
    rows = clip.signals[clip.train[:1]]
    crowd = Talk3D.build("tiny", **hearing(rows), px=PX, n_people=3).eval()
    crowd.survey([clip.signals[clip.train]] * 2)
    crowd.calibrate(clip.signals[clip.train], clip.mesh, fresh.aabb)
    assert crowd.latents is not None and crowd.generator is not None
    styles = torch.cat([crowd.latents(index) for index in range(3)])
    assert torch.allclose(styles.mean(0), torch.zeros(styles.shape[1]), atol=1e-6)
    with torch.no_grad():
        drawn_of = [crowd._drawn(index) for index in range(3)]
    assert not torch.allclose(drawn_of[0], drawn_of[1], atol=1e-3)
    assert not any(level.any() for level in crowd.planes.levels), "the pyramid is silent"

    shared = crowd.common_state()
    assert not any(name.startswith(("latents", "planes", "editor", "people")) for name in shared)
    new = Talk3D.build("tiny", **hearing(rows), px=PX).eval()
    new.take_common(shared)
    with torch.no_grad():
        assert torch.allclose(new._drawn(0), crowd.generator(torch.zeros(1, styles.shape[1])))
    new.calibrate(clip.signals[clip.train], clip.mesh, fresh.aabb)
    assert torch.equal(new.face, crowd.face) and torch.equal(new.frame, crowd.frame)
    for part in ("generator", "latents"):
        assert new.part(part) and part in new.parts()
    before = drawn(new, rows)[2].rgb
    new.finish()
    assert torch.allclose(drawn(new, rows)[2].rgb, before, atol=1e-5)
    left = {name for name in new.state_dict() if not name.startswith("speech.known")}
    assert left == fresh.state_dict().keys(), "a person like any other"


def test_latents_and_generator_learn_from_what_is_drawn(clip: Footage, fresh: Talk3D) -> None:
    torch.manual_seed(2)
    crowd = Talk3D.build("tiny", **hearing(clip.signals), px=PX, n_people=2)
    crowd.survey([clip.signals[clip.train]] * 2)
    crowd.calibrate(clip.signals[clip.train], clip.mesh, fresh.aabb)
    stages = presets.load(["talk3d", "tiny"]).pretrain
    assert stages is not None
    stage = stages.stages["detail"]
    shot = shots.draw(clip, stage, 64, crowd.aabb, torch.Generator().manual_seed(0))
    assert isinstance(shot, RayShot)
    marcher, _ = march.build(crowd.aabb, "cpu", n_steps=16)
    field = crowd.condition(shot.signals)
    rendered = marcher.march(field, shot.rays)
    frame = crowd.compose(rendered, shot.rays, shot.signals, shot.truth.plate)
    losses = crowd.losses(
        [PictureResult(shot.signals, shot.rays, shot.truth, field, rendered, frame)]
    )
    assert {"latent", "rough", "symmetry"} <= losses.keys()
    sum(losses[name] * weight for name, weight in stage.weights.items()).backward()
    for part in ("generator", "latents", "decoder"):
        assert all(p.grad is not None and bool(p.grad.any()) for p in crowd.part(part)), part


def test_a_person_is_found_in_a_prior_and_goes_on_after_a_kill(
    speaker_home: Path, tmp_path: Path
) -> None:
    for name in ("one", "two", "new"):
        shutil.copytree(speaker_home / "speaker", tmp_path / name)
        space = Workspace(tmp_path, name)
        space.note(id=name, source={**space.manifest()["source"], "sha256": name * 8})
    names, small = ["talk3d", "tiny"], [f"data.size_px={PX}", "march.resolution=16"]
    preset = presets.load(names)
    assert preset.pretrain is not None
    pretrain(
        tmp_path, ["one", "two"], "heads", SilentProgress(), preset_names=names, device="cpu",
        settings=[*small, *(f"pretrain.stages.{stage}.{value}" for stage in preset.pretrain.stages
                            for value in ("steps=3", "n_points=2000"))],
    )  # fmt: skip
    settings = [
        *small,
        *(
            f"train.stages.{stage}.{value}"
            for stage in preset.train.stages
            for value in ("steps=3", "n_points=2000")
        ),
    ]
    weights = {}
    for run_name, kills in (("whole", ()), ("cut", (8, 11, 14))):  # invert, tune, speak
        for kill in kills:
            finetune(
                tmp_path,
                "new",
                SilentProgress(),
                preset_names=names,
                settings=settings,
                run_name=run_name,
                device="cpu",
                stop_after=lambda p, k=kill: p.total >= k,
            )
        run = finetune(
            tmp_path,
            "new",
            SilentProgress(),
            preset_names=names,
            settings=settings,
            run_name=run_name,
            device="cpu",
        )
        assert run.meta()["steps"] == 18 and run.meta()["prior"]["name"] == "heads"
        weights[run_name] = run.weights()
    assert not any("generator" in name or "latents" in name for name in weights["whole"])
    assert weights["whole"].keys() == weights["cut"].keys()
    for name, value in weights["whole"].items():
        assert torch.allclose(value.float(), weights["cut"][name].float(), atol=1e-4), name
    player = Player.load(run, torch.device("cpu"))
    clip = footage.load(Workspace.open(tmp_path, "new"), player.preset.data, SilentProgress())
    ((frame, _),) = player.pictures(player.listen_to_rows(clip.signals, clip.held[:1]))
    assert frame.rgb.shape == (1, PX, PX, 3)


def test_each_signal_has_its_token(clip: Footage, avatar: Talk3D) -> None:
    row = clip.signals[clip.train[:1]]
    changed = {
        "speech": row.with_(landmarks=row.landmarks + 0.05 * torch.randn(1, 68, 3)),
        "eyes": row.with_(eye=1 - row.eye),
        "rotation": row.with_(pose=row.pose + torch.tensor([0.1, 0, 0, 0, 0, 0])),
        "place": row.with_(body=row.body + 0.05),
    }
    assert set(TOKENS) == {*changed, "nothing"}
    with torch.no_grad():
        before = avatar._tokens(row, avatar.person(row).stance(row))
        for name, other in changed.items():
            after = avatar._tokens(other, avatar.person(other).stance(other))
            differ = (after != before).any(2)[0]
            assert differ.tolist() == [token == name for token in TOKENS], name


def test_a_row_is_drawn_alike_whatever_stands_beside_it(clip: Footage, avatar: Talk3D) -> None:
    rows = clip.signals[clip.train[:40:13]]
    together = drawn(avatar, rows)[2].rgb
    for index in range(len(rows)):
        alone = drawn(avatar, rows[index : index + 1])[2].rgb[0]
        assert torch.allclose(together[index], alone, atol=1e-4)


def test_a_corrected_pose_leaves_the_shoulders(clip: Footage, avatar: Talk3D) -> None:
    rows = clip.signals[clip.train[::40]]
    n = len(rows)
    box = torch.tensor([-2.0, -2, -1, 2, 2, 1])
    rays = march.pixel_rays(rows.camera, torch.arange(n), torch.rand(n, 2) * PX, box)
    with torch.no_grad():
        before = avatar.condition(rows)
        torch.nn.init.normal_(avatar.pose_correction.linear.weight)
        aimed, field = avatar.aim(rows, rays), avatar.condition(rows)
    point, same = (r.origins + 4 * r.directions for r in (rays, aimed))
    assert (point - same).norm(dim=1).min() > 1e-3
    landed = moved(point, before._shoulders, rays.row)
    assert torch.allclose(landed, moved(same, field._shoulders, rays.row), atol=1e-5)


def test_pictures_are_finished_at_twice_the_size_that_is_marched(
    clip: Footage, doubling: Talk3D
) -> None:
    with torch.no_grad():
        doubling.decoder[-1].bias[0] = 4.0  # something to hit
    _, rendered, frame = drawn(doubling, clip.signals[clip.train[:2]])
    assert rendered.feature.shape == (2 * (PX // 2) ** 2, doubling.n_features)
    assert frame.rgb.shape == (2, PX, PX, 3) and frame.depth.shape == (2, PX, PX, 1)
    small = (rendered.depth / rendered.opacity).view(2, PX // 2, PX // 2, 1)
    assert bool(torch.isfinite(frame.depth).all())
    for corner in (frame.depth[:, ::2, ::2], frame.depth[:, 1::2, 1::2], frame.depth[:, ::2, 1::2]):
        assert torch.allclose(corner, small)


def test_what_is_marched_small_comes_out_whole_in_films_and_in_training(
    clip: Footage, monkeypatch: pytest.MonkeyPatch, speaker_home: Path, tmp_path: Path
) -> None:
    """Through the jobs themselves, at twice the size that is marched."""
    monkeypatch.setitem(SIZES, "tiny", replace(SIZES["tiny"], magnification=2))
    shutil.copytree(speaker_home / "speaker", tmp_path / "speaker")
    quick = [f"train.stages.{stage}.steps=3" for stage in presets.load(["talk3d"]).train.stages]
    run = finetune(
        tmp_path,
        "speaker",
        SilentProgress(),
        preset_names=["talk3d", "tiny"],
        settings=[f"data.size_px={PX}", "march.resolution=16", *quick],
        device="cpu",
    )
    player = Player.load(run, torch.device("cpu"))
    ((frame, _),) = player.pictures(clip.signals[clip.train[:1]])
    assert player.avatar.magnification == 2 and frame.rgb.shape == (1, PX, PX, 3)


def test_loose_rays_are_not_upscaled(clip: Footage, avatar: Talk3D) -> None:
    """They show what was marched, whatever the upscaler says."""
    stage = presets.load(["talk3d", "tiny"]).train.stages["speak"]
    shot = shots.draw(clip, stage, 64, avatar.aabb, torch.Generator().manual_seed(0))
    assert isinstance(shot, RayShot)
    marcher, _ = march.build(avatar.aabb, "cpu", n_steps=16)
    marcher.eval()
    found = []
    for _ in range(2):
        with torch.no_grad():
            rendered = marcher.march(avatar.condition(shot.signals), shot.rays)
            found.append(avatar.compose(rendered, shot.rays, shot.signals, shot.truth.plate).rgb)
            torch.nn.init.normal_(avatar.upscaler.last.weight)
    assert found[0].shape == (len(shot.rays), 3) and torch.equal(*found)


def test_whole_pictures_lose_by_what_is_finished_and_what_was_marched(
    clip: Footage, doubling: Talk3D
) -> None:
    """A picture that is right costs nothing; a wrong mouth is counted by the mouth."""
    stage = presets.load(["talk3d", "tiny"]).train.stages["upscale"]
    rng = torch.Generator().manual_seed(0)
    shot = shots.draw(clip, stage, 64, doubling.aabb, rng, doubling.magnification)
    n = stage.n_frames
    assert isinstance(shot, RayShot)
    assert len(shot.rays) == n * (PX // 2) ** 2 and shot.truth.colour.shape == (n * PX * PX, 3)
    truth = shot.truth.colour.view(n, PX, PX, 3)
    small = F.avg_pool2d(truth.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    raw = torch.cat([small, torch.ones(n, PX // 2, PX // 2, 1)], -1)
    alpha = 1 - shot.truth.labels[:, 5:6].view(n, PX, PX, 1)
    rendered = Rendered(*(torch.zeros(1, 1) for _ in range(4)), n_points=0)
    field = doubling.condition(shot.signals)

    def losses(rgb: torch.Tensor) -> dict[str, float]:
        frame = Frame(rgb, alpha, alpha, {"raw": raw})
        found = doubling.picture_losses(
            PictureResult(shot.signals, shot.rays, shot.truth, field, rendered, frame)
        )
        return {name: float(value) for name, value in found.items()}

    assert max(losses(truth).values()) < 1e-5
    wrong = truth.clone()
    marks = (shot.signals.landmarks_2d[:, 48:68].mean(1) * PX).long()
    for picture, (x, y) in enumerate(marks.tolist()):
        wrong[picture, y - 2 : y + 3, x - 2 : x + 3] = 0
    found = losses(wrong)
    assert found["mouth"] > 5 * found["whole"] > 0 and found["raw"] < 1e-9


@pytest.mark.parametrize("from_prior", [False, True])
def test_every_part_learns_and_parts_are_all_there_is(clip: Footage, from_prior: bool) -> None:
    avatar = built(clip)
    if from_prior:
        avatar.take_common(
            Talk3D.build("tiny", **hearing(clip.signals), px=PX, n_people=2).common_state()
        )
    begun = presets.adapted_to_start(
        presets.load(["talk3d", "tiny"]), () if from_prior else None, 20
    )
    stages = begun.train.stages
    named = [id(p) for name in avatar.parts() for p in avatar.part(name)]
    taught = {id(p) for s in stages.values() for name in s.learn for p in avatar.part(name)}
    learnable = {
        id(p)
        for n, p in avatar.named_parameters()
        if n != "speech.linear.weight" and n != "speech.linear.bias"
    }
    assert len(named) == len(set(named)) and set(named) == learnable == taught


def test_no_points_no_answers(clip: Footage, avatar: Talk3D) -> None:
    for rows in (clip.signals[:1], clip.signals[:3]):
        field = avatar.condition(rows)
        nowhere = torch.zeros(0, 3)
        density, channels = field(nowhere, nowhere, torch.zeros(0, dtype=torch.long))
        assert density.shape == (0,) and channels.shape == (0, field.channels)


def test_half_precision_draws_the_same_heads(clip: Footage, avatar: Talk3D) -> None:
    rows = clip.signals[clip.train[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        field_half, _, half = drawn(avatar, rows)
    field, _, full = drawn(avatar, rows)
    assert torch.allclose(field._shoulders, field_half._shoulders, atol=1e-5)
    error, variance = (full.rgb - half.rgb).square().mean(), full.rgb.var()
    assert 0 < error < 0.01 * variance, (error, variance)


def test_the_full_size_is_the_paper_s() -> None:
    """Planes 3 x 32 x 256^2, five tokens, split convolutions down to 32^2, pictures times four."""
    full = Talk3D("full", n_steps=33, n_features=30)
    with torch.no_grad():
        assert full.planes().shape == (3, 32, 256, 256)
    assert full.edited == 256 and len(full.editor.down) == 3 and full.magnification == 4
    millions = sum(p.numel() for p in full.editor.parameters()) / 1e6
    assert 8 < millions < 20, "the paper's has 16.7"
