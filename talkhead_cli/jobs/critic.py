"""Adversarial training against the picture critic: avatar and critic take steps in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from talkhead_cli.avatars.base import Avatar
from talkhead_cli.blocks.critic import Critic, faces_of, hinge, shown
from talkhead_cli.contracts import MisuseError
from talkhead_cli.jobs.preset import Preset, Stage, Train


def critic_if_weighed(avatar: Avatar, preset: Preset, train: Train) -> Critic | None:
    """Return an untrained critic if a stage has a weight for the loss `critic`, else None."""
    stages = train.stages_weighing("critic")
    for name in stages:
        if "critic" not in avatar.expert_losses:
            raise MisuseError(
                f"preset {preset.method} has no loss 'critic'; stage '{name}' weighs it"
            )
        if train.stages[name].rays != "picture":
            raise MisuseError(f"stage '{name}' weighs 'critic', which needs rays picture")
    return Critic(preset.avatar.size) if stages else None


def critic_of(avatar: Avatar) -> Critic | None:
    """Return the critic among an avatar's loss networks, None without one."""
    return next((judge for judge in avatar.loss_networks if isinstance(judge, Critic)), None)


class CriticTrainer:
    """The critic and its optimiser in a stage, for a step after each of the avatar's."""

    def __init__(self, critic: Critic, stage: Stage, fabric: Fabric) -> None:
        self.critic = critic
        critic.requires_grad_(True)  # a frozen module would not be set up for training
        optimizer = torch.optim.Adam(critic.parameters(), lr=stage.critic_rate, betas=(0.0, 0.99))
        self._wrapped, self._optimizer = fabric.setup(critic, optimizer)
        critic.requires_grad_(False).eval()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Step the critic on the gradients computed inside the block."""
        self.critic.requires_grad_(True).train()
        self._optimizer.zero_grad(set_to_none=True)
        yield
        self._optimizer.step()
        self.critic.requires_grad_(False).eval()

    def critic_loss(self, shots: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Return the critic's hinge loss () on pictures just rendered and their targets,
        (B, H, W, 3) each, with the landmarks (B, 68, 2) in both."""
        side = self.critic.side
        pairs = [(faces_of(m, marks, side), faces_of(t, marks, side)) for m, t, marks in shots]
        made, true = (torch.cat(faces) for faces in zip(*pairs, strict=True))
        scores: Tensor = self._wrapped(torch.cat(shown(made, true))).float()
        return hinge(*scores.chunk(2))

    def state(self) -> dict[str, Any]:
        return {"net": self.critic.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
