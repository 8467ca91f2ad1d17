"""What is computed from a person's pictures once, for all rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from talkhead_cli.blocks.mouth import Mouth
from talkhead_cli.blocks.planes import RowPlanes
from talkhead_cli.contracts import EYES, Portrait, Signals


@dataclass(frozen=True)
class Face:
    """One picture of a person, encoded.

    planes by scale · seen (1, 6, s, s): colour and labels of face, mouth, hair at the encoder's
    input size · picture (1, 3, H, W) the head's colours, extrapolated beyond its rim · shoulders
    (1, 4, H, W) premultiplied · signals of one row · slots (n, width) · relief (1, 1, n, n) ·
    mouth as estimated from the picture (`init_from_picture`) · skin (3,) the face's mean colour
    """

    planes: list[RowPlanes]
    seen: Tensor
    picture: Tensor
    shoulders: Tensor
    signals: Signals
    slots: Tensor
    relief: Tensor
    mouth: Mouth
    skin: Tensor


@dataclass(frozen=True)
class Layers:
    """P pictures as layers: encoded (P, 8, s, s), the encoder's input, and `Face`'s seen, picture
    and shoulders of each."""

    encoded: Tensor
    seen: Tensor
    picture: Tensor
    shoulders: Tensor

    @classmethod
    def of(cls, portrait: Portrait, picture_px: int) -> Layers:
        """Split pictures into layers; picture_px: side s of the encoder's input."""
        size = (portrait.pictures.shape[1],) * 2
        picture = portrait.pictures.permute(0, 3, 1, 2)
        labels = F.interpolate(portrait.labels, size=size, mode="bilinear")
        head = labels[:, :3].sum(1, keepdim=True).clamp(0, 1)
        # rim pixels mix with the background: extrapolate the head's colour from its inside
        sure = (1 - 10 * labels[:, 5:6]).clamp_min(0) * (5 * (head - 0.2)).clamp(0, 1)
        colour = torch.lerp(filled(picture, sure), picture, sure)
        seen = torch.cat([colour, labels[:, :3]], 1)
        small = F.interpolate(seen, size=(picture_px,) * 2, mode="area")
        inner = small[:, :3] * small[:, 3:].sum(1, keepdim=True)
        encoded = torch.cat([inner, small[:, 3:], _places(portrait.signals, picture_px)], 1)
        return cls(encoded, small, colour, _behind_the_head(picture, labels, portrait.signals))


def _places(signals: Signals, px: int) -> Tensor:
    """Return pixel positions (P, 2, px, px) from between the eyes, in two eye distances."""
    marks = 2 * signals.landmarks_2d - 1
    left, right = (marks[:, eye].mean(1) for eye in EYES)
    middle, unit = (left + right) / 2, (right - left).norm(dim=1)
    line = (torch.arange(px, device=marks.device) + 0.5) * 2 / px - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = torch.stack([x, y]) - middle[:, :, None, None]
    return (at / unit[:, None, None, None] / 2).clamp(-3, 3)


def _behind_the_head(picture: Tensor, labels: Tensor, signals: Signals) -> Tensor:
    """Return shoulders and neck (P, 4, H, W), premultiplied, extended behind chin and hair."""
    body = labels[:, 3:5].sum(1, keepdim=True).clamp(0, 1)
    head = labels[:, :3].sum(1, keepdim=True).clamp(0, 1)
    marks = signals.landmarks_2d
    height = (marks[:, 8, 1] - marks[:, 27, 1]).clamp_min(1e-3)  # from chin to nose bridge
    px = picture.shape[-1]
    line = (torch.arange(px, device=picture.device) + 0.5) / px
    y, x = torch.meshgrid(line, line, indexing="ij")
    wide = (marks[:, 12, 0] - marks[:, 4, 0]).abs()
    beside = (x - marks[:, 8, 0, None, None]).abs() / wide[:, None, None]
    below = (y - marks[:, 8, 1, None, None]) / height[:, None, None] + 0.35
    throat = (8 * (0.5 - beside)).sigmoid() * (16 * below).sigmoid()
    # composited behind the partly transparent head, the result has the person's total alpha
    alpha = torch.maximum((body / (1 - head).clamp_min(0.05)).clamp_max(1), throat[:, None])
    alpha = alpha * (body + head).clamp(0, 1)
    sure = (10 * (body + head - 0.9)).clamp(0, 1) * (5 * (body - 0.2)).clamp(0, 1)
    colour = torch.lerp(filled(picture, sure), picture, sure)
    return torch.cat([alpha * colour, alpha], 1)


def filled(picture: Tensor, sure: Tensor) -> Tensor:
    """Fill colours (P, C, H, W) where confidence `sure` (P, 1, H, W) is low from nearby confident
    pixels, at ever coarser scales (push-pull over a pyramid)."""
    if picture.shape[-1] <= 2:
        mean = (picture * sure).sum((2, 3), True) / sure.sum((2, 3), True).clamp_min(1e-4)
        return torch.lerp(mean.expand_as(picture), picture, sure)
    taken, weight = F.avg_pool2d(picture * sure, 2), F.avg_pool2d(sure, 2)
    below = filled(taken / weight.clamp_min(1e-4), (4 * weight).clamp_max(1))
    below = F.interpolate(below, size=picture.shape[2:], mode="bilinear")
    return torch.lerp(below, picture, sure)
