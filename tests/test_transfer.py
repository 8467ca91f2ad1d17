"""What people lend each other of LokiTalk's fields, and how somebody new begins from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import hearing

from talkhead_cli.avatars.lokitalk import LokiTalk
from talkhead_cli.avatars.lokitalk.transfer import N_SEEN, VECTORS, in_plane_layout
from talkhead_cli.blocks.mlp import Mlp
from talkhead_cli.blocks.planes import unwarped, warped
from talkhead_cli.blocks.rigid import alignment, rotations
from talkhead_cli.blocks.variant import variant
from talkhead_cli.contracts import Portrait, Signals, SilentProgress
from talkhead_cli.jobs import footage
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.store import Workspace

BOX = torch.tensor([-1.5, -1.5, -0.95, 1.5, 1.5, 0.75])


@pytest.fixture(scope="module")
def clip(speaker_home: Path) -> Footage:
    data = presets.load(["lokitalk", "tiny"]).data
    return footage.load(Workspace.open(speaker_home, "speaker"), data, SilentProgress())


def crowd_of(clip: Footage) -> LokiTalk:
    """Two people, one of whom has a face a tenth wider and moves twice as much."""
    torch.manual_seed(0)
    rows = clip.signals[clip.train]
    loud = rows.landmarks.mean(0) + 2 * (rows.landmarks - rows.landmarks.mean(0))
    other = rows.with_(landmarks=loud * torch.tensor([1.1, 1, 1]), person=0 * rows.person + 1)
    made = LokiTalk.build("tiny", **hearing(rows), px=128, n_people=2)
    made.survey([rows, other])
    for signals in (rows, other):
        made.calibrate(signals, clip.mesh, BOX)
    with torch.no_grad():  # as after training: heads that say something
        for name, parameter in made.transfer.named_parameters():
            if parameter.ndim > 1 and ("items" in name or "planes" in name):
                parameter.mul_(5)
        torch.nn.init.normal_(made.transfer.items["hyper"].weight, std=0.1)
    return made.eval()


@pytest.fixture(scope="module")
def crowd(clip: Footage) -> LokiTalk:
    return crowd_of(clip)


def newcomer(crowd: LokiTalk, clip: Footage) -> LokiTalk:
    rows = clip.signals[clip.train]
    new = LokiTalk.build("tiny", **hearing(rows), px=128)
    new.take_common(crowd.common_state())
    new.calibrate(rows, clip.mesh, BOX * 1.2)
    return new.eval()


def asked(avatar: LokiTalk, signals: Signals) -> torch.Tensor:
    """Density and channels of some points of the first row."""
    torch.manual_seed(3)
    x = torch.rand(500, 3) * 1.6 - 0.8
    d = F.normalize(torch.tensor([[0.1, 0.0, 1.0]]).expand(500, 3), dim=1)
    with torch.no_grad():
        density, channels = avatar.condition(signals[:1])(x, d, torch.zeros(500).long())
    return torch.cat([density[:, None], channels], 1)


def test_a_variant_shares_all_but_what_is_changed() -> None:
    torch.manual_seed(0)
    net = Mlp(3, 8, 2, 3)
    change = torch.ones(8, requires_grad=True)
    other, x = variant(net, {"0.bias": change}), torch.randn(5, 3)
    assert other[2] is net[2] and other[0].weight is net[0].weight
    first = F.linear(x, net[0].weight, net[0].bias + 1)
    assert torch.allclose(other(x), net[4](net[3](net[2](first.relu()))), atol=1e-6)
    other(x).sum().backward()
    assert torch.equal(change.grad, net[0].bias.grad) and change.grad.abs().sum() > 0
    before = net(x)
    assert not torch.equal(before, other(x)) and set(dict(net.named_parameters())) == {
        f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    }


def test_gathered_places_come_back() -> None:
    reach = torch.tensor([1.3, 1.7, 1.0])
    x = torch.rand(100, 3) * 2 - 1
    assert torch.allclose(unwarped(warped(x, reach), reach), x, atol=1e-5)


def test_faces_are_laid_on_each_other_and_one_alone_stays_where_it_is(clip: Footage) -> None:
    rest = clip.signals.landmarks.mean(0)
    assert torch.equal(alignment(rest, rest)[0], torch.eye(3, 4))
    true = torch.tensor([[1.1, 0.05, 0, 0.1], [0, 0.9, 0.1, -0.2], [0, 0, 1.2, 0.05]])
    theirs = rest @ true[:, :3].T + true[:, 3]
    assert torch.allclose(alignment(rest, theirs)[0], true, atol=0.02)


def laid(
    crowd: LokiTalk,
    portrait: Portrait,
    shoulders: torch.Tensor | None = None,
    aimed: torch.Tensor | None = None,
) -> torch.Tensor:
    signals = portrait.signals
    neutral = crowd.person(signals).mouth.neutral
    return in_plane_layout(
        portrait,
        px=96,
        reach=crowd.reach,
        shared=alignment(neutral, crowd.face),
        aimed=crowd.correction(signals) if aimed is None else aimed,
        chin=float(neutral[8, 1]),
        shoulders=crowd.shoulders(signals) if shoulders is None else shoulders,
    )


def test_pictures_are_laid_out_alike_however_the_head_is_turned(
    clip: Footage, crowd: LokiTalk
) -> None:
    """The face lies in one place, though in the pictures it does not."""
    turns = clip.signals.pose[clip.train, 1]
    rows = clip.train[torch.stack([turns.argmin(), turns.argmax()])]
    portrait = clip.portrait(rows)
    one, other = laid(crowd, portrait)
    face = (one[3] > 0.9) & (other[3] > 0.9)
    assert one.shape == (N_SEEN, 96, 96) and int(face.sum()) > 300
    still = (one - other)[:3].abs().mean(0)[face].mean()
    a, b = (F.interpolate(p.permute(2, 0, 1)[None], size=96)[0] for p in portrait.pictures)
    seen = F.interpolate(portrait.labels[:, :1], size=96)[:, 0] > 0.9
    moved = 2 * (a - b).abs().mean(0)[seen[0] & seen[1]].mean()
    assert still < 0.6 * moved, (still, moved)
    assert one[9].max() > 0.99 and one[9, 0, 0] == 0, "what the picture does not reach is said"


def test_shoulders_are_laid_where_they_rest(clip: Footage, crowd: LokiTalk) -> None:
    """Carried by half a face height they come from elsewhere; the face does not."""
    portrait = clip.portrait(clip.train[:1])
    plain = torch.eye(3, 4)[None]
    away = plain.clone()
    away[:, 0, 3] = 0.5
    before, after = laid(crowd, portrait, plain)[0], laid(crowd, portrait, away)[0]
    change = (before - after)[:3].abs().mean(0)
    above = (before[3] > 0.95) & (torch.arange(96) < 48)[:, None]  # the ears
    assert change[above].max() < 0.01
    assert change[72:][before[9, 72:] > 0.9].mean() > 0.1


def test_a_corrected_pose_is_that_of_a_camera_that_moved(clip: Footage, crowd: LokiTalk) -> None:
    portrait = clip.portrait(clip.train[:1])
    turn = torch.eye(4)[None]
    turn[0, :3, :3] = rotations(torch.tensor([[0.05, -0.1, 0.02]]))[0]
    turn[0, :3, 3] = torch.tensor([0.03, 0.02, -0.05])
    camera = portrait.signals.camera
    moved = replace(camera, c2w=turn @ camera.c2w)
    seen = replace(portrait, signals=portrait.signals.with_(camera=moved))
    still = torch.eye(3, 4)[None]
    corrected = laid(crowd, portrait, still, turn[:, :3])
    torch.testing.assert_close(corrected, laid(crowd, seen, still, still), atol=1e-3, rtol=0)
    assert not torch.allclose(corrected, laid(crowd, portrait, still, still), atol=0.05)


def test_whom_pictures_show_has_five_things_of_its_own(clip: Footage, crowd: LokiTalk) -> None:
    own = crowd._own(clip.portrait(clip.best_likeness(2)))
    names = {name for names in VECTORS.values() for name in names}
    assert set(own) == names | {f"volume.levels.{i}" for i in range(4)}
    assert all(value.abs().max() > 0 for value in own.values())
    dark = clip.portrait(clip.best_likeness(2))
    dark = replace(dark, pictures=dark.pictures * 0.3)
    other = crowd._own(dark)
    assert all(not torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_what_is_said_of_a_person_fits_what_it_is_added_to(size: str) -> None:
    made = LokiTalk.build(size, n_steps=33, n_features=5, px=64, n_people=2)  # type: ignore[arg-type]
    with torch.no_grad():
        px = made.transfer.px
        changes = made.transfer(torch.randn(1, N_SEEN, px, px), torch.randn(1, 11))
    assert all(made.get_parameter(name).shape == change.shape for name, change in changes.items())
    assert len([n for n in changes if n.startswith("volume.")]) == len(made.volume.levels)


def test_who_meets_a_prior_is_what_the_prior_draws_of_it(clip: Footage, crowd: LokiTalk) -> None:
    """Enrolled among the others, or met and from there on with parameters of its own: the same."""
    portrait, rows = clip.portrait(clip.best_likeness(2)), clip.signals[clip.train]
    enrolled = crowd.enroll(portrait)
    new = newcomer(crowd, clip)
    stranger = asked(new, rows)
    new.meet(portrait)
    assert new.transfer is None and not any("transfer" in k for k in new.state_dict())
    assert torch.allclose(asked(new, rows), asked(enrolled, rows), atol=1e-4)
    assert not torch.allclose(asked(new, rows), stranger, atol=1e-2)
    plain = LokiTalk.build("tiny", **hearing(rows), px=128).eval()
    plain.load_state_dict(new.state_dict())
    assert torch.equal(asked(plain, rows), asked(new, rows))


def test_losses_of_people_teach_the_encoder_and_what_is_common(
    clip: Footage, crowd: LokiTalk
) -> None:
    made = crowd_of(clip)
    field = made.enroll(clip.portrait(clip.train[:1])).condition(clip.signals[clip.train[:2]])
    x = torch.rand(400, 3) - 0.5
    density, channels = field(x, F.normalize(x, dim=1), torch.zeros(400).long())
    (density.mean() + channels.mean()).backward()
    for part in ("volume", "static", "transfer"):
        learning = [p.grad is not None and bool(p.grad.any()) for p in made.part(part)]
        assert sum(learning) > 0.7 * len(learning), part


def test_what_people_share_is_taken_whole_or_not_at_all(clip: Footage, crowd: LokiTalk) -> None:
    shared = crowd.common_state()
    assert {"mouth_basis", "face", "frame", "volume.levels.0"} <= set(shared)
    assert not any(k.startswith(("people.", "aabb")) for k in shared)
    new = newcomer(crowd, clip)
    assert torch.equal(new.frame, BOX) and torch.equal(new.aabb, BOX * 1.2)
    assert torch.equal(new.mouth_basis, crowd.mouth_basis), "codes mean what the prior's mean"
    for wrong in (
        shared | {"mouth_basis": torch.zeros(3, 3)},
        shared | {"people.0.mouth.gain": torch.zeros(())},
        {k: v for k, v in shared.items() if not k.startswith("transfer.told")},
    ):
        fresh = LokiTalk.build("tiny", **hearing(clip.signals), px=128)
        with pytest.raises(ValueError, match="mouth_basis|people|transfer"):
            fresh.take_common(wrong)
