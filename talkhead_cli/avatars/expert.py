"""The lip-sync expert: draws nobody, but learns from the same people by the same loop.

Frozen, it tells other methods (and `evaluate`) whether lips go with a sound.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.avatars.base import Avatar, StepResult
from talkhead_cli.blocks.sync import SyncExpert, agreement, lip_boxes, lip_crops, runs_of
from talkhead_cli.contracts import Signals

SIZES = {"tiny": (32, 64), "full": (64, 128)}
SHIFT, STRETCH, SHADE, NOISE = 0.08, 0.08, 0.15, 0.02  # how crops are varied in training


class Expert(Avatar):
    """Trains a SyncExpert."""

    common = ("",)
    box = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)

    def __init__(self, size: Literal["tiny", "full"], *, n_steps: int, n_features: int) -> None:
        super().__init__()
        width, n_out = SIZES[size]
        self.sync = SyncExpert(n_steps, n_features, width, n_out)

    @classmethod
    def build(
        cls, size: Literal["tiny", "full"], *, n_steps: int, n_features: int, px: int,
        n_people: int = 1,
    ) -> Self:  # fmt: skip
        return cls(size, n_steps=n_steps, n_features=n_features)

    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        """Nothing is measured."""

    def embedded(
        self, pictures: Tensor, marks_px: Tensor, signals: Signals
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lips and sounds of rows as unit vectors (N, D), and the rows (N,) they are of.

        pictures (T, H, W, 3) · marks_px (T, 68, 2) where landmarks are in them, in [0, 1]
        """
        boxes = lip_boxes(marks_px)
        crops = _varied(pictures, boxes) if self.training else lip_crops(pictures, boxes)
        runs, middle = runs_of(crops, signals.moment)
        return self.sync.seen(runs), self.sync.heard(signals.audio[middle]), middle

    def losses(self, results: list[StepResult]) -> dict[str, Tensor]:
        terms: dict[str, list[Tensor]] = {}
        for result in results:
            shot = result.shot
            assert shot.target is not None, "the expert's stages show their rows"
            marks = shot.signals.landmarks_px
            seen, heard, middle = self.embedded(shot.target, marks, shot.signals)
            for name, value in agreement(seen, heard, shot.signals.moment[middle]).items():
                terms.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def part(self, name: str) -> list[nn.Parameter]:
        return list({"sync": self.sync}[name].parameters())

    def parts(self) -> list[str]:
        return ["sync"]


def _varied(pictures: Tensor, boxes: Tensor) -> Tensor:
    """Crops of a shot, all shifted, stretched, shaded and mirrored alike: films do not tremble."""
    shift = SHIFT * (2 * torch.rand(2, device=boxes.device) - 1)
    stretch = 1 + STRETCH * (2 * torch.rand(1, device=boxes.device) - 1)
    moved = torch.cat([boxes[:, :2] + boxes[:, 2:] * shift, boxes[:, 2:] * stretch], 1)
    crops = lip_crops(pictures, moved)
    gain = 1 + SHADE * torch.randn(1, device=boxes.device)
    crops = gain * crops + NOISE * torch.randn_like(crops)
    return crops.flip(-1) if bool(torch.rand(()) < 0.5) else crops
