"""LPIPS at work, where its weights are: a word in the losses, and a figure."""

from __future__ import annotations

from talkhead_cli.blocks.perceptual import Perceptual
from talkhead_cli.contracts import Progress
from talkhead_cli.jobs.preset import Train
from talkhead_cli.store import weights

LOSSES = ("lpips", "whole_lpips")  # by its word


def asked(train: Train, progress: Progress) -> Perceptual | None:
    """LPIPS for stages that weigh it; None if none does or, with a word, without its weights."""
    stages = [name for name, stage in train.stages.items()
              if stage.steps and any(stage.weights.get(loss) for loss in LOSSES)]  # fmt: skip
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
    """LPIPS's network; refuses without its weights."""
    state = weights.load("lpips")
    return Perceptual(lambda net: weights.fill(net, "lpips", state, "torchvision"))
