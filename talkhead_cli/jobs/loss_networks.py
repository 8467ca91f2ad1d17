"""The networks that judge pictures in training; LPIPS, one of them, is also a metric."""

from __future__ import annotations

import torch

from talkhead_cli.avatars.base import Avatar
from talkhead_cli.blocks.perceptual import Perceptual
from talkhead_cli.contracts import Progress
from talkhead_cli.jobs import critic
from talkhead_cli.jobs.expert import Judge
from talkhead_cli.jobs.preset import Preset, Train
from talkhead_cli.store import weights

LOSSES = ("lpips", "whole_lpips")  # losses that LPIPS computes


def attach(
    avatar: Avatar,
    judge: Judge | None,
    preset: Preset,
    train: Train,
    where: torch.device,
    progress: Progress,
) -> None:
    """Add to an avatar's loss networks those that stages have loss weights for: the lip-sync
    expert, if it was found, LPIPS and a picture critic."""
    if judge is not None:
        judge.attach_to(avatar, where)
    if (eye := lpips_if_weighed(train, progress)) is not None:
        avatar.loss_networks.append(eye.to(where))
    if (new := critic.critic_if_weighed(avatar, preset, train)) is not None:
        avatar.loss_networks.append(new.to(where))


def lpips_if_weighed(train: Train, progress: Progress) -> Perceptual | None:
    """Return LPIPS if a stage uses it, else None; None with a note if its weights are missing."""
    stages = train.stages_weighing(*LOSSES)
    if not stages:
        return None
    if weights.find("lpips") is None:
        progress.note(
            f"stage '{stages[0]}' does without LPIPS, whose weights are not here (talkhead models "
            "pull lpips): SSIM and gradients alone keep pictures sharp"
        )
        return None
    return lpips()


def lpips() -> Perceptual:
    """Return the LPIPS network; TalkheadError without its weights."""
    state = weights.load("lpips")
    return Perceptual(lambda net: weights.load_into(net, "lpips", state, "torchvision"))
