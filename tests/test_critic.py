"""The picture critic: what it learns, when it is frozen, and that a run goes on with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from talkhead_cli.avatars.s3d import S3D
from talkhead_cli.blocks.critic import REACH, Critic, critic_losses, faces_of, hinge, shown
from talkhead_cli.contracts import MisuseError, SilentProgress
from talkhead_cli.jobs import critic, fit
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.pretrain import pretrain
from talkhead_cli.store import Run

STAGE = presets.load(["s3d", "tiny"]).pretrain.stages["finish"]  # type: ignore[union-attr]

ALONE = Fabric(accelerator="cpu", devices=1)


def pictures(n: int, seed: int) -> Tensor:
    """Random pictures with fine detail."""
    return torch.rand(n, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


def learn(turns: critic.CriticTrainer, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    with turns.learning():
        loss = turns.critic_loss([(made, true, marks(len(made))) for made, true in pairs])
        loss.backward()
    return loss.detach()


def marks(n: int) -> Tensor:
    """Landmarks round which a crop is the whole picture."""
    box = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) / (4 * REACH) + 0.5
    return box.repeat(34, 1).expand(n, 68, 2)


def blurred(sharp: Tensor) -> Tensor:
    return F.avg_pool2d(sharp.movedim(-1, 1), 3, stride=1, padding=1).movedim(1, -1)


def test_a_critic_comes_to_tell_blurred_from_sharp_and_gives_way_to_sharpening() -> None:
    torch.manual_seed(0)
    net = Critic("tiny")
    turns = critic.CriticTrainer(net, STAGE.model_copy(update={"critic_rate": 2e-3}), ALONE)
    losses = [float(learn(turns, [(blurred(p), p)])) for p in (pictures(4, s) for s in range(60))]
    assert losses[0] == pytest.approx(2, abs=0.5) and losses[-1] < 1
    fresh = pictures(4, 1000)
    assert net(fresh).mean() > net(blurred(fresh)).mean() + 0.5, "pictures that it never saw"
    drawn = blurred(fresh).requires_grad_(True)
    optimizer = torch.optim.Adam([drawn], lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        critic_losses([net], drawn, marks(4))["critic"].backward()
        optimizer.step()
    edges = [p.diff(dim=2).square().mean() for p in (drawn.detach(), blurred(fresh))]
    assert float(edges[0]) > 1.2 * float(edges[1]), "its word is to be sharper"
    assert all(p.grad is None or not p.requires_grad for p in net.parameters())


def test_a_critic_is_frozen_except_in_its_own_step() -> None:
    torch.manual_seed(0)
    net = Critic("tiny")
    turns = critic.CriticTrainer(net, STAGE, ALONE)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    net(pictures(1, 0))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    learn(turns, [(blurred(pictures(1, 0)), pictures(1, 0))])
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in net.state_dict().items())
    turns.load({**turns.state(), "net": before})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_hinge_is_at_rest_where_scores_are_beyond_one() -> None:
    assert float(hinge(torch.tensor([-1.5]), torch.tensor([1.0]))) == 0
    assert float(hinge(torch.tensor([0.0]), torch.tensor([0.0]))) == 2


def test_both_of_a_pair_are_shown_alike() -> None:
    torch.manual_seed(3)
    true = pictures(64, 0)
    made, same = shown(true, true)
    assert torch.equal(made, same)
    one = made.view(64, -1)
    assert (one - true.view(64, -1)).abs().amax(1).min() > 0, "none as it was"
    order = [
        float(torch.corrcoef(torch.stack([m.flatten(), t.flatten()]))[0, 1])
        for m, t in zip(made, true, strict=True)
    ]
    mirrored = sum(r < 0.5 for r in order)
    assert 16 < mirrored < 48


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_every_patch_has_a_score(size: Literal["tiny", "full"]) -> None:
    net = Critic(size)
    scores = net(torch.rand(2, net.side, net.side, 3))
    n = net.side // 2 ** len(net.levels) - 1
    assert scores.shape == (2, n, n)


def test_a_crop_is_the_face_wherever_it_is() -> None:
    line = torch.linspace(0, 1, 128)
    ramp = torch.stack([*torch.meshgrid(line, line, indexing="xy"), torch.zeros(128, 128)], -1)
    face = torch.tensor([0.6, 0.3]) + 0.1 * (2 * torch.rand(68, 2) - 1)
    face[:2] = torch.tensor([[0.5, 0.2], [0.7, 0.4]])
    (found,) = faces_of(ramp[None], face[None], 40)
    edges = 0.6 + REACH * 0.2 * torch.tensor([-39 / 40, 39 / 40])
    assert torch.allclose(found[20, [0, -1], 0], edges, atol=6e-3)
    assert torch.allclose(found[[0, -1], 20, 1], edges - 0.3, atol=6e-3)
    still = torch.rand(2, 64, 64, 3)
    assert torch.allclose(faces_of(still, marks(2), 64), still, atol=1e-4)


def test_a_critic_is_asked_only_where_it_can_be_heard() -> None:
    avatar = S3D("tiny", n_steps=33, n_features=4)

    def found(*settings: str, method: str = "s3d") -> Critic | None:
        preset = presets.load([method, "tiny"], settings)
        return critic.critic_if_weighed(avatar, preset, preset.train)

    on = ["train.stages.refine.steps=3", "train.stages.refine.weights.critic=0.1"]
    assert found() is None and found(on[1]) is None, "no steps, no critic"
    assert isinstance(found(*on), Critic)
    with pytest.raises(MisuseError, match="needs rays picture"):
        found(*on, "train.stages.refine.rays=random")
    avatar.expert_losses = frozenset()
    with pytest.raises(MisuseError, match="no loss 'critic'"):
        found(*on)


def test_a_killed_run_goes_on_with_its_critic(speaker_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(speaker_home, tmp_path / "home"))
    shutil.copytree(home / "speaker", home / "twin")
    settings = [
        "data.size_px=64",
        "march.resolution=16",
        "march.n_steps=12",
        "pretrain.stages.speech.steps=1",
        "pretrain.stages.speech_all.steps=1",
        "pretrain.stages.pairs.steps=1",
        "pretrain.stages.finish.steps=6",
        "pretrain.stages.finish.critic_rate=0.01",
        "pretrain.stages.sync.steps=0",
    ]
    told: list[float] = []

    def train(name: str, until: int = 99) -> Run:
        def watch(place: fit.Position) -> bool:
            told.append(place.figures.get("told_apart", -1.0))
            return place.total >= until

        return pretrain(
            home,
            ["speaker", "twin"],
            name,
            SilentProgress(),
            settings=settings,
            preset_names=["s3d", "tiny"],
            device="cpu",
            stop_after=watch,
        )

    whole = train("whole").weights()
    assert told[:3] == [-1] * 3 and len(set(told[3:])) == 6 and min(told[3:]) > 0
    assert not train("cut", until=6).is_finished
    cut = train("cut").weights()
    assert told[9:] == pytest.approx(told[:9], abs=1e-5)
    for name, value in whole.items():
        assert torch.allclose(value, cut[name], atol=1e-5), name
