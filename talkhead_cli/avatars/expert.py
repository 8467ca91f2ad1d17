"""The lip-sync expert: renders nothing, but is trained on the same data by the same loop.

Frozen, it scores for other methods (and `evaluate`) how well lips match a sound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.avatars.base import Avatar, PictureResult, averaged
from talkhead_cli.blocks.sync import SyncExpert, agreement, lip_boxes, lip_crops, runs_of
from talkhead_cli.contracts import Signals, Size, SpeechShot

SIZES = {"tiny": (32, 64), "small": (32, 64), "full": (64, 128)}
SHIFT, STRETCH, SHADE, NOISE = 0.08, 0.08, 0.15, 0.02  # strengths of crop augmentation


class Expert(Avatar):
    """Trains a SyncExpert."""

    common = ("",)
    loss_names = frozenset({"contrast", "found"})
    box = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)

    def __init__(self, size: Size, *, n_steps: int, n_features: int) -> None:
        super().__init__()
        width, n_out = SIZES[size]
        self.sync = SyncExpert(n_steps, n_features, width, n_out)

    @classmethod
    def build(
        cls, size: Size, *, n_steps: int, n_features: int, px: int, n_people: int = 1
    ) -> Self:
        return cls(size, n_steps=n_steps, n_features=n_features)

    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        """Do nothing: no measurements are needed."""

    def losses_of(self, rays: str) -> frozenset[str]:
        return self.loss_names if rays == "none" else frozenset()

    def crops(self, pictures: Tensor, marks_2d: Tensor) -> Tensor:
        """Return grey lip crops of pictures (T, H, W, 3) with landmarks marks_2d (T, 68, 2) in
        [0, 1]; augmented in training."""
        boxes = lip_boxes(marks_2d)
        return _varied(pictures, boxes) if self.training else lip_crops(pictures, boxes)

    def embedded(
        self, crops: Tensor, audio: Tensor, moment: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit embeddings (N, D) of lips and of sounds, and the rows (N,) they belong to.

        crops of T rows · audio (T, W, A) standardised windows · moment (T,) frame numbers
        """
        runs, middle = runs_of(crops, moment)
        return self.sync.embed_lips(runs), self.sync.embed_sound(audio[middle]), middle

    def losses(self, results: Sequence[SpeechShot | PictureResult]) -> dict[str, Tensor]:
        found = []
        for shot in results:
            assert isinstance(shot, SpeechShot) and shot.pictures is not None, "a stage shows rows"
            rows = shot.signals
            crops = self.crops(shot.pictures, rows.landmarks_2d)
            seen, heard, middle = self.embedded(crops, rows.audio, rows.moment)
            if not len(middle):  # this person has no five consecutive rows
                continue
            found.append(agreement(seen, heard, rows.moment[middle]))
        if not found:
            return {"contrast": 0 * self.sync.embed_sound(results[0].signals.audio[:1]).sum()}
        return averaged(found)

    def modules_of_parts(self) -> dict[str, list[nn.Module]]:
        return {"sync": [self.sync]}


def _varied(pictures: Tensor, boxes: Tensor) -> Tensor:
    """Return augmented crops, alike in all rows but for pixel noise: videos do not tremble."""
    shift = SHIFT * (2 * torch.rand(2, device=boxes.device) - 1)
    stretch = 1 + STRETCH * (2 * torch.rand(1, device=boxes.device) - 1)
    moved = torch.cat([boxes[:, :2] + boxes[:, 2:] * shift, boxes[:, 2:] * stretch], 1)
    crops = lip_crops(pictures, moved)
    gain = 1 + SHADE * torch.randn(1, device=boxes.device)
    crops = gain * crops + NOISE * torch.randn_like(crops)
    return crops.flip(-1) if bool(torch.rand(()) < 0.5) else crops
