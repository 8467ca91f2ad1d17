"""A critic that learns to tell drawn faces from true ones, patch by patch.

Of the kind of Isola et al. 2017 (scores of patches), with spectral normalisation (Miyato et al.
2018) and the hinge (Lim and Ye 2017).  Not a critic of whole pictures, as StyleGAN has: of a
handful of people it would learn the faces by heart.  For the same reason, what it is shown of a
pair is mirrored and lit by chance, alike for both (Zhao et al. 2020).  It looks at the face alone:
walls and shoulders are carried over from a picture, and there would be nothing to tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

LIGHT, CONTRAST = 0.1, 0.2  # at most, of what is shown
REACH = 0.6  # half a crop's side, in the longer side of the landmarks' box
# side of the crops, and widths of the levels, each of half the size: patches of 46 and of 190 px
SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "tiny": (64, (24, 48, 96)), "full": (256, (32, 64, 128, 256, 256)),
}  # fmt: skip


class Critic(nn.Module):
    """Faces -> how true each patch of them looks; frozen, except while it learns.

    side: of the crops that it looks at, pixels
    """

    def __init__(self, size: Literal["tiny", "full"]) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        self.side, widths = SIZES[size]
        n_in = 3
        for width in widths:
            self.levels.append(spectral_norm(nn.Conv2d(n_in, width, 4, stride=2, padding=1)))
            n_in = width
        self.last = spectral_norm(nn.Conv2d(n_in, 1, 4, padding=1))
        self.requires_grad_(False).eval()

    def forward(self, faces: Tensor) -> Tensor:
        """(B, side, side, 3) in [0, 1] -> scores (B, h, w), above zero for true ones."""
        x = 2 * faces.permute(0, 3, 1, 2) - 1
        for level in self.levels:
            x = F.leaky_relu(level(x), 0.2)
        scores: Tensor = self.last(x)[:, 0]
        return scores


def faces_of(pictures: Tensor, marks_px: Tensor, side: int) -> Tensor:
    """Crops (B, side, side, 3) of pictures (B, H, W, 3) round landmarks (B, 68, 2) in [0, 1]."""
    low, high = marks_px.amin(1), marks_px.amax(1)
    half = REACH * (high - low).amax(1)
    line = (torch.arange(side, device=pictures.device) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = ((low + high) / 2)[:, None, None] + half[:, None, None, None] * torch.stack([x, y], -1)
    found = F.grid_sample(
        pictures.float().permute(0, 3, 1, 2), 2 * at - 1, padding_mode="border", align_corners=False
    )
    return found.permute(0, 2, 3, 1)


def critic_losses(judges: Iterable[nn.Module], made: Tensor, marks_px: Tensor) -> dict[str, Tensor]:
    """How far the faces of drawn pictures (B, H, W, 3) are from passing for true ones; nothing
    without a critic among the judges."""
    for judge in judges:
        if isinstance(judge, Critic):
            return {"critic": -judge(faces_of(made, marks_px, judge.side)).mean()}
    return {}


def hinge(made: Tensor, true: Tensor) -> Tensor:
    """What a critic loses by its scores of drawn and of true pictures."""
    return F.relu(1 + made).mean() + F.relu(1 - true).mean()


def shown(made: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of faces (B, s, s, 3), mirrored and lit by chance, both of a pair alike."""
    chance = torch.rand(3, len(made), 1, 1, 1, device=made.device)
    gain = 1 + CONTRAST * (2 * chance[1] - 1)
    light = LIGHT * (2 * chance[2] - 1)
    pair = [
        gain * torch.where(chance[0] < 0.5, picture, picture.flip(2)) + light
        for picture in (made, true)
    ]
    return pair[0], pair[1]
