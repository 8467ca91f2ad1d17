"""Patch discriminator ("critic") of rendered against real faces, and its losses.

PatchGAN (Isola et al. 2017) with spectral normalisation (Miyato et al. 2018) and the hinge loss
(Lim and Ye 2017).  It scores patches, not whole pictures as StyleGAN's does: trained on a handful
of people, that would memorise their faces.  For the same reason both faces of a pair get the same
random mirroring and lighting (Zhao et al. 2020).  It sees face crops only: background and
shoulders are warped from a real picture, so there is nothing to discriminate.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from talkhead_cli.contracts import Size

LIGHT, CONTRAST = 0.1, 0.2  # largest random changes of brightness and contrast
REACH = 0.6  # half a crop's side over the longer side of the landmarks' bounding box
# Side of the crops and widths of the stride-2 levels; receptive fields: 46, 94, 190 px.
SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "tiny": (64, (24, 48, 96)),
    "small": (128, (24, 48, 96, 96)),
    "full": (256, (32, 64, 128, 256, 256)),
}


class Critic(nn.Module):
    """Patch discriminator of face crops; frozen, except during its own training steps.

    side: of the crops it takes, pixels
    """

    def __init__(self, size: Size) -> None:
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
        """faces (B, side, side, 3) in [0, 1] -> scores (B, h, w), positive for real patches."""
        x = 2 * faces.permute(0, 3, 1, 2) - 1
        for level in self.levels:
            x = F.leaky_relu(level(x), 0.2)
        return self.last(x)[:, 0]


def faces_of(pictures: Tensor, marks_2d: Tensor, side: int) -> Tensor:
    """Crop pictures (B, H, W, 3) around landmarks (B, 68, 2) in [0, 1]: (B, side, side, 3)."""
    low, high = marks_2d.amin(1), marks_2d.amax(1)
    half = REACH * (high - low).amax(1)
    line = (torch.arange(side, device=pictures.device) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = ((low + high) / 2)[:, None, None] + half[:, None, None, None] * torch.stack([x, y], -1)
    found = F.grid_sample(
        pictures.float().permute(0, 3, 1, 2), 2 * at - 1, padding_mode="border", align_corners=False
    )
    return found.permute(0, 2, 3, 1)


def critic_losses(
    loss_networks: Iterable[nn.Module], made: Tensor, marks_2d: Tensor
) -> dict[str, Tensor]:
    """Return the generator's loss {"critic": -mean score} of rendered pictures (B, H, W, 3); empty
    if there is no critic among the frozen networks `loss_networks`."""
    for judge in loss_networks:
        if isinstance(judge, Critic):
            return {"critic": -judge(faces_of(made, marks_2d, judge.side)).mean()}
    return {}


def hinge(made: Tensor, true: Tensor) -> Tensor:
    """Return the discriminator's hinge loss from its scores of rendered and of real pictures."""
    return F.relu(1 + made).mean() + F.relu(1 - true).mean()


def shown(made: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the same random mirroring, contrast and light to both faces (B, s, s, 3) of a pair."""
    chance = torch.rand(3, len(made), 1, 1, 1, device=made.device)
    gain = 1 + CONTRAST * (2 * chance[1] - 1)
    light = LIGHT * (2 * chance[2] - 1)
    pair = [
        gain * torch.where(chance[0] < 0.5, picture, picture.flip(2)) + light
        for picture in (made, true)
    ]
    return pair[0], pair[1]
