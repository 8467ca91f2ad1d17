"""What training draws from footage: which rows, which rays, and their truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from trainings import PRESETS, SHORT, train

from talkhead_cli.contracts import (
    RayShot,
    SilentProgress,
    TalkheadError,
    repacked,
    unpacked,
)
from talkhead_cli.jobs import fit, footage, shots, stage_loop
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.holdout import split
from talkhead_cli.jobs.pixels import DevicePixels, DiskPixels
from talkhead_cli.march import picture_rays
from talkhead_cli.store import Workspace


def test_seconds_in_which_nothing_is_heard_teach_nothing(home: Path) -> None:
    space = Workspace.open(home, "speaker")
    sound = space.load("voice")
    for n_heard, told in ((0, "0.0"), (20, "0.8")):
        sound["heard"][:] = False
        sound["heard"][:n_heard] = True
        space.save("voice", sound)
        with pytest.raises(TalkheadError, match=f"heard in only {told} of the .* s of 'speaker'"):
            train(home)


def test_training_can_be_held_to_the_first_seconds(speaker_home: Path) -> None:
    """The same frames stay held out, and nothing is measured on what is not learnt from."""
    space = Workspace.open(speaker_home, "speaker")
    clips = [
        footage.load(space, presets.load(PRESETS, [f"data.train_s={s}"]).data, SilentProgress())
        for s in (0, 3, 1000)
    ]
    whole, short, long = clips
    assert short.train.tolist() == whole.train[whole.train < 75].tolist()
    assert torch.equal(short.held, whole.held) and torch.equal(long.train, whole.train)
    assert (short.stats.mean != whole.stats.mean).any()


def test_shots_drawn_from_memory_are_those_drawn_from_the_disk(speaker_home: Path) -> None:
    preset = presets.load(PRESETS, SHORT)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    aabb = footage.box_of(clip.signals.camera[clip.train])
    near = clip.on(torch.device("cpu"))
    assert isinstance(clip.pixels, DiskPixels) and isinstance(near.pixels, DevicePixels)
    whole = preset.train.stages["lips"].model_copy(update={"rays": "picture", "n_frames": 2})
    for stage in (*preset.train.stages.values(), whole):
        found = [
            unpacked(shots.draw(c, stage, 2048, aabb, torch.Generator().manual_seed(1)))
            for c in (clip, near)
        ]
        assert len(found[0]) > 10
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-6)


def test_what_is_unpacked_is_repacked(speaker_home: Path) -> None:
    preset = presets.load(PRESETS, SHORT)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    aabb = footage.box_of(clip.signals.camera[clip.train])
    shot = shots.draw(clip, preset.train.stages["lips"], 2048, aabb, torch.Generator())
    twice = repacked(shot, (2 * t for t in unpacked(shot)))
    assert isinstance(shot, RayShot)
    assert twice.rays.layout == shot.rays.layout and twice.portrait is None
    assert torch.equal(twice.signals.camera.k, 2 * shot.signals.camera.k)
    assert twice.signals.camera.size_px == shot.signals.camera.size_px
    assert torch.equal(twice.truth.colour, 2 * shot.truth.colour)
    assert all(torch.equal(a, 2 * b) for a, b in zip(*map(unpacked, (twice, shot)), strict=True))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_labels_between_stored_ones_are_interpolated(size: int) -> None:
    """A ramp of labels 64 px wide stays a ramp at any size of picture, up to half a label from the
    edges; at its own size it is read as it is."""
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    labels = np.stack([ramp, ramp.T, *[np.zeros((64, 64), np.uint8)] * 4])[None]
    pictures = np.zeros((1, size, size, 3), np.uint8)
    disk = DiskPixels(pictures, labels)
    line, column = (
        part.flatten()
        for part in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    )
    row = torch.zeros(len(line), dtype=torch.long)
    along, down = (((p + 0.5) * 64 / size - 0.5).clamp(0, 63) for p in (column, line))
    for pixels in (disk, DevicePixels.of(disk, torch.device("cpu"))):
        for found in (pixels.at(row, line, column)[1], pixels.whole(row[:1])[1]):
            assert torch.allclose(255 * found[:, 0], along, atol=1e-3)
            assert torch.allclose(255 * found[:, 1], down, atol=1e-3)


@pytest.fixture
def clip(speaker_home: Path) -> footage.Footage:
    data = presets.load(PRESETS, SHORT).data
    return footage.load(Workspace.open(speaker_home, "speaker"), data, SilentProgress())


def test_rows_in_sequence_follow_each_other(clip: footage.Footage) -> None:
    stage = presets.load(PRESETS).train.stages["speech"]
    stage = stage.model_copy(update={"batch": 120, "in_sequence": 12})
    holed = replace(clip, train=clip.train[clip.train % 20 != 15])
    shot = shots.draw(holed, stage, 0, torch.zeros(6), torch.Generator().manual_seed(0))
    assert bool((shot.signals.moment.view(10, 12).diff(dim=1) == 1).all())


def test_patches_lie_inside_the_picture(clip: footage.Footage) -> None:
    stage = presets.load(PRESETS, SHORT).train.stages["lips"].model_copy(update={"region": "all"})
    box = footage.box_of(clip.signals.camera[clip.train])
    for seed in range(10):
        shot = shots.draw(clip, stage, 4096, box, torch.Generator().manual_seed(seed))
        assert isinstance(shot, RayShot)
        assert shot.rays.pixel.min() >= 0 and shot.rays.pixel.max() < clip.size_px


def test_rare_rows_have_the_widest_mouths(clip: footage.Footage) -> None:
    wide = clip.signals[clip.train].lip_gap.argsort(descending=True)[: len(clip.train) // 20]
    assert set(clip.train[wide].tolist()) <= set(clip.rare.tolist())


def test_nobody_is_best_shown_with_shut_eyes(clip: footage.Footage) -> None:
    best, eye = clip.best_likeness(), clip.signals.eye.clone()
    eye[best] = 0.0
    asleep = replace(clip, signals=clip.signals.with_(eye=eye))
    assert asleep.best_likeness().tolist() != best.tolist()


def test_what_settles_mouths_was_not_trained_on(clip: footage.Footage) -> None:
    stage = presets.load(PRESETS).train.stages["speech"]
    (shorter,), (kept,) = stage_loop.inner_split([clip], stage)
    assert len(kept) > 5 and len(shorter.speaking)
    assert not set(shorter.train.tolist()) & set(kept.moment.tolist())


def test_footage_goes_to_the_gpu_as_far_as_half_of_it_goes(
    speaker_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many people there are: training needs the other half."""
    clip = footage.load(
        Workspace.open(speaker_home, "speaker"), presets.load(PRESETS, SHORT).data, SilentProgress()
    )
    monkeypatch.setattr(fit.march, "room_on", lambda _: 5 * clip.n_bytes)
    sent = fit._brought_near([clip] * 6, torch.device("cpu"))
    assert [isinstance(c.pixels, DevicePixels) for c in sent] == [True] * 2 + [False] * 4


def test_shots_know_their_truth(speaker_home: Path) -> None:
    preset = presets.load(PRESETS, SHORT)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    aabb = footage.box_of(clip.signals.camera[clip.train])
    rng = torch.Generator().manual_seed(1)
    shot = shots.draw(clip, preset.train.stages["shape"], 512, aabb, rng)
    assert isinstance(shot, RayShot)
    frame = shot.signals.moment[shot.rays.row]
    x, y = shot.rays.pixel.long().unbind(1)
    truth = torch.from_numpy(clip.pictures[frame.numpy(), y.numpy(), x.numpy()]).float() / 255
    assert torch.equal(truth, shot.truth.colour)
    assert torch.equal(shot.truth.plate, clip.plate[y, x])
    assert torch.allclose(shot.truth.labels.sum(1), torch.ones(len(truth)), atol=0.02)
    assert set(frame.tolist()) <= set(clip.train.tolist())
    picture = preset.train.stages["lips"].model_copy(update={"rays": "picture", "n_frames": 2})
    whole = shots.draw(clip, picture, 0, aabb, rng)
    assert isinstance(whole, RayShot)
    frame = whole.signals.moment[whole.rays.row]
    x, y = whole.rays.pixel.long().unbind(1)
    truth = torch.from_numpy(clip.pictures[frame.numpy(), y.numpy(), x.numpy()]).float() / 255
    assert torch.equal(truth, whole.truth.colour)
    _, one_by_one = clip.pixels.at(frame, y, x)
    assert torch.allclose(one_by_one, whole.truth.labels, atol=1e-6)
    assert torch.equal(whole.truth.plate, clip.plate[y, x])
    patch = shots.draw(clip, preset.train.stages["lips"], 2048, aabb, rng)
    assert isinstance(patch, RayShot) and patch.rays.layout is not None
    assert len(patch.rays) == torch.tensor(patch.rays.layout).prod()


def test_held_out_frames_are_the_end_and_never_trained(speaker_home: Path) -> None:
    assert split(1000, 1 / 11) == 100  # at least four seconds
    assert split(11_000, 1 / 11) == 1000
    assert split(200, 1 / 11) == 50  # at most a quarter
    assert split(200, 0) == 0
    preset = presets.load(PRESETS, SHORT)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    assert clip.train.max() < clip.held.min()


def test_the_box_holds_every_ray_that_meets_the_head(speaker_home: Path) -> None:
    preset = presets.load(PRESETS, SHORT)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    rows = clip.train[::20]
    box = footage.box_of(clip.signals.camera[clip.train])
    for row in rows.tolist():
        rays = picture_rays(clip.signals[row].camera, torch.zeros(1, dtype=torch.long), box)
        assert bool((rays.far > rays.near).float().mean() > 0.99)


def test_rows_of_a_speech_stage_come_in_runs(speaker_home: Path) -> None:
    preset = presets.load(PRESETS, SHORT)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    stage = preset.train.stages["speech"].model_copy(update={"batch": 60, "in_sequence": 12})
    shot = shots.draw(clip, stage, 0, torch.zeros(6), torch.Generator().manual_seed(0))
    runs = shot.signals.moment.view(5, 12)
    assert bool((runs.diff(dim=1) == 1).all()) and len(runs[:, 0].unique()) > 1


def test_a_stage_that_listens_mixes_what_is_said_with_what_was_tracked(speaker_home: Path) -> None:
    preset = presets.load(PRESETS, SHORT)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    said = torch.full_like(clip.signals.landmarks, 7.0)
    clip = replace(clip, said=said)
    stage = preset.train.stages["lips"].model_copy(update={"listen": 0.5, "n_frames": 8})
    box = footage.box_of(clip.signals.camera[clip.train])
    n_said = [
        int(
            (
                shots.draw(
                    clip, stage, 8 * 24**2, box, torch.Generator().manual_seed(s)
                ).signals.landmarks
                == 7
            )
            .all((1, 2))
            .sum()
        )
        for s in range(20)
    ]
    assert 40 < sum(n_said) < 120 and len(set(n_said)) > 1


def test_lids_are_drawn_by_how_far_they_are_open(speaker_home: Path) -> None:
    """Somebody who blinks for two frames of two hundred is to learn it, too."""
    preset = presets.load(PRESETS, SHORT)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    eye = 0.8 + 0.4 * torch.rand(clip.signals.eye.shape, generator=torch.Generator().manual_seed(0))
    eye[clip.train[70:72]] = 0.05
    clip = replace(clip, signals=clip.signals.with_(eye=eye))
    box = footage.box_of(clip.signals.camera[clip.train])
    rng = torch.Generator().manual_seed(1)
    stage = preset.train.stages["detail"].model_copy(update={"lids": 0.5, "n_frames": 16})
    drawn = [shots.draw(clip, stage, 1600, box, rng) for _ in range(60)]
    lids = torch.cat([shot.signals.eye[16:] for shot in drawn]).mean(1)
    assert len(lids) == 120, "two beside sixteen rows"
    # of levels from 0 to 1, shut eyes are the nearest to those under 0.42
    assert 0.3 < float((lids < 0.5).float().mean()) < 0.55
    rays = drawn[0].rays
    assert rays is not None and abs(len(rays) - 1600) < 40
    beside = rays.row >= 16
    assert float(beside.float().mean()) == pytest.approx(0.06, abs=0.01)
    moments = drawn[0].signals.moment[rays.row[beside]]

    def within(region: str) -> Tensor:
        centre, half = clip.regions[region][moments].unbind(2)
        off = (rays.pixel[beside][:, None] / clip.size_px - centre).abs() - half
        return off.amax(2).amin(1) < 1 / clip.size_px

    assert within("around eyes").all() and 0.7 < float(within("eyes").float().mean()) < 0.95
    eyes = preset.train.stages["eyes"].model_copy(update={"lids": 0.5, "n_frames": 8})
    rows = torch.cat([shots.draw(clip, eyes, 8 * 16**2, box, rng).signals.eye for _ in range(60)])
    assert 0.15 < float((rows.mean(1) < 0.5).float().mean()) < 0.28, "in patches, of the rows"


def test_gaze_of_shut_eyes_is_that_of_the_open_ones_around(speaker_home: Path) -> None:
    """Where lids hide an iris, it is tracked anywhere."""
    space = Workspace.open(speaker_home, "speaker")
    data, tracks = presets.load(PRESETS, SHORT).data, space.load("tracks")
    stats = footage.load(space, data, SilentProgress(), pictures=False).stats
    tracks["eye"][:], tracks["gaze"][:] = 1.0, [0.01, 0.0]
    tracks["gaze"][12:] = [0.04, 0.0]
    tracks["eye"][10:12], tracks["gaze"][10:12] = 0.1, [-0.3, 0.5]
    tracks["eye"][-3:] = 0.2
    tracks["gaze"][-3:] = 9.0

    def gaze() -> Tensor:
        return footage.make_signals(tracks, space.load("voice")["stream"], stats, data).gaze

    assert torch.allclose(gaze()[9:13, 0], torch.tensor([0.01, 0.02, 0.03, 0.04]))
    assert torch.allclose(gaze()[-3:], torch.tensor([0.04, 0.0]))
    tracks["eye"][:] = 0.1
    assert torch.equal(gaze(), torch.from_numpy(tracks["gaze"])), "with none open, all as tracked"


def test_a_stage_of_pictures_draws_them_whole(speaker_home: Path) -> None:
    preset = presets.load(PRESETS, SHORT)
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    stage = preset.train.stages["lips"].model_copy(update={"rays": "picture", "n_frames": 3})
    box = footage.box_of(clip.signals.camera[clip.train])
    shot = shots.draw(clip, stage, 100, box, torch.Generator().manual_seed(0))
    assert isinstance(shot, RayShot)
    assert shot.rays.layout == (3, 64, 64)
    truth = torch.from_numpy(clip.pictures[shot.signals.moment.numpy()]).float() / 255
    assert torch.equal(shot.truth.colour.view(3, 64, 64, 3), truth)
