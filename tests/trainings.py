"""Trainings of seconds, for tests of what training does."""

from __future__ import annotations

from pathlib import Path

import torch

from talkhead_cli.contracts import SilentProgress
from talkhead_cli.jobs.finetune import finetune

SHORT = [
    "train.stages.speech.steps=24",
    "train.stages.speech_all.steps=6",
    "train.stages.shape.steps=24",
    "train.stages.detail.steps=24",
    "train.stages.lips.steps=4",
    "train.stages.eyes.steps=4",
    "data.size_px=64",
    "march.resolution=32",
    "march.n_steps=32",
]
for _name in ("shape", "detail", "lips", "eyes"):
    SHORT.append(f"train.stages.{_name}.n_points=4000")
PRESETS = ["lokitalk", "tiny"]


def train(home: Path, **options: object) -> dict[str, torch.Tensor]:
    run = finetune(
        home,
        "speaker",
        SilentProgress(),
        preset_names=PRESETS,
        settings=SHORT,
        device="cpu",
        **options,
    )
    return run.weights() if run.is_finished else {}
