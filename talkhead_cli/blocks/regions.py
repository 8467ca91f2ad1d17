"""Soft masks of lips, eyes and torso in the picture, and the face's depth map ("relief")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.contracts import CHIN, EYES, LIPS, NOSE, RayBundle, Rendered, Signals

RELIEF = 128  # side of the face's depth map
FALL_OFF = 0.18  # face heights over which depth falls off beside the face
RELIEF_HINT = 0.1  # confidence of the depth outside the face


def region_masks(signals: Signals, at: Tensor, row: Tensor, labels: Tensor) -> Tensor:
    """Return soft masks (R, 3) of lips, eyes and torso at pixels (R, 2) of the rows (R,).

    Ellipses around the row's landmarks with a Gaussian fall-off; the lips' ellipse reaches from
    under the nose to the chin, since speech moves the jaw too.  Torso, from labels (R, 6):
    shoulders 1, neck 0.7, the rest 0.
    """
    size = signals.camera.size_px
    marks = signals.landmarks_2d * size
    lips, chin, nose = marks[:, LIPS], marks[:, CHIN], marks[:, NOSE]
    centre = (nose + chin) / 2
    wide = (lips[..., 0].amax(1) - lips[..., 0].amin(1)) * 0.85
    tall = (chin - nose).norm(dim=1) * 0.62
    mouth = _ellipse(at, centre[row], torch.stack([wide, tall], 1)[row])
    eyes = at.new_zeros(len(at))
    for eye in EYES:
        corner = marks[:, eye]
        width = (corner[..., 0].amax(1) - corner[..., 0].amin(1)).clamp_min(2)
        radius = torch.stack([0.9 * width, 0.75 * width], 1)
        middle = corner.mean(1) - torch.stack([torch.zeros_like(width), 0.1 * width], 1)
        eyes = torch.maximum(eyes, _ellipse(at, middle[row], radius[row]))
    torso = labels[:, 4] + 0.7 * labels[:, 3]
    return torch.stack([mouth, eyes, torso], 1)


def lively_boxes(neutral: Tensor) -> Tensor:
    """Return head-space boxes (3, 6) around lips and eyes of a face (68, 3), with room to move."""
    boxes = []
    for part in (LIPS, *EYES):
        low, high = neutral[part].amin(0), neutral[part].amax(0)
        wide = high[0] - low[0]
        room = torch.stack([0.1 * wide, 0.25 * wide, torch.full_like(wide, 0.03)])
        boxes.append(torch.cat([low - room, high + room]))
    return torch.stack(boxes)


def picture_masks(signals: Signals, labels: Tensor) -> Tensor:
    """As `region_masks`, for every pixel of whole pictures: labels (B, H, W, 6) -> (B, H, W, 3)."""
    shape = labels.shape[:3]
    row, line, column = torch.meshgrid(
        *(torch.arange(n, device=labels.device) for n in shape), indexing="ij"
    )
    at = torch.stack([column, line], -1).view(-1, 2) + 0.5
    return region_masks(signals, at, row.flatten(), labels.flatten(0, 2)).view(*shape, 3)


def _ellipse(at: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Return (R,) 1 inside the ellipse, with a Gaussian fall-off outside."""
    distance = ((at - centre) / radius).square().sum(1).sqrt()
    return (-4 * (distance - 1).clamp_min(0).square()).exp()


def relief_of(mesh: Tensor, side: float) -> Tensor:
    """Rigid face mesh (n, 3) in head space -> depth over a grid of x, y in [-side, side].

    (RELIEF, RELIEF, 2) of z and its confidence.  Inside the face, z is a thin-plate spline through
    the mesh (Bookstein 1989), confidence 1; outside, z = 0, the plane through the ears where hair,
    neck and shoulders lie on average, confidence RELIEF_HINT.
    """
    flat, z = mesh[:, :2].double(), mesh[:, 2].double()

    def bend(a: Tensor, b: Tensor) -> Tensor:
        square = torch.cdist(a, b).square()
        return square * (square + 1e-12).log()

    n = len(flat)
    affine = torch.cat([torch.ones_like(flat[:, :1]), flat], 1)
    system = flat.new_zeros(n + 3, n + 3)
    system[:n, :n] = bend(flat, flat) + 1e-3 * torch.eye(n).to(flat)
    system[:n, n:], system[n:, :n] = affine, affine.T
    solution = torch.linalg.solve(system, F.pad(z, (0, 3)))
    line = torch.linspace(-side, side, RELIEF).to(flat)
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = torch.stack([x, y], -1).view(-1, 2)
    depth = bend(at, flat) @ solution[:n] + solution[n] + at @ solution[n + 1 :]
    inside = (1 - (torch.cdist(at, flat).amin(1) - 0.03).clamp_min(0) / 0.05).clamp_min(0)
    trust = RELIEF_HINT + (1 - RELIEF_HINT) * inside
    return torch.stack([inside * depth, trust], -1).view(RELIEF, RELIEF, 2).float()


def head_relief(mesh: Tensor, side: float) -> Tensor:
    """As `relief_of`, but without a step at the face's edge: around the mesh, depth falls off
    smoothly to the plane through the ears."""
    relief = relief_of(mesh, side)
    line = torch.linspace(-side, side, RELIEF)
    y, x = torch.meshgrid(line, line, indexing="ij")
    away = torch.cdist(torch.stack([x, y], -1).view(-1, 2), mesh[:, :2].float()).amin(1)
    near = (-((away - 0.03).clamp_min(0) / FALL_OFF).square()).exp().view(1, 1, RELIEF, RELIEF)
    # extrapolate the mesh's depth outwards by ever wider means
    inside = ((relief[..., 1] - RELIEF_HINT) / (1 - RELIEF_HINT)).clamp(0, 1)[None, None]
    known = (inside > 0.999).float()
    depth, weight = relief[None, None, ..., 0] * known, known
    smooth = depth
    for width in (3, 7, 15, 31):
        pooled, share = (F.avg_pool2d(t, width, 1, width // 2) for t in (depth * weight, weight))
        found = share > 1e-6
        fresh = found & (weight == 0)
        smooth = torch.where(fresh, pooled / share.clamp_min(1e-6), depth)
        depth, weight = smooth, torch.maximum(weight, fresh.float())
    near, smooth = (F.avg_pool2d(t, 7, 1, 3, count_include_pad=False) for t in (near, smooth))
    depth = torch.where(known > 0, depth, near * smooth)
    soft = F.avg_pool2d(depth, 5, 1, 2, count_include_pad=False)
    rim = 1 - F.avg_pool2d(known, 5, 1, 2, count_include_pad=False)
    return torch.stack([torch.lerp(depth, soft, rim)[0, 0], relief[..., 1]], -1)


def relief_gap(relief: Tensor, side: float | Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far points (N, 3) lie behind the relief, face heights, and its confidence (N,)."""
    found = F.grid_sample(
        relief.permute(2, 0, 1)[None], point[None, None, :, :2].detach() / side, align_corners=True
    )[0, :, 0]
    return point[:, 2] - found[0], found[1]


class Relief(nn.Module):
    """Depth loss against the tracked face mesh: one camera and a head that turns by a few degrees
    do not determine depth.

    depth (RELIEF, RELIEF, 2) of z and confidence over a square of half-width side ()
    """

    depth: Tensor
    side: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("depth", torch.zeros(RELIEF, RELIEF, 2))
        self.register_buffer("side", torch.zeros(()))

    @torch.no_grad()
    def measure(self, mesh: Tensor, aabb: Tensor) -> None:
        """Set the buffers from the rigid face mesh (n, 3) and the field's box aabb (6,)."""
        self.side.copy_(aabb[[0, 1, 3, 4]].abs().max())
        self.depth.copy_(relief_of(mesh, float(self.side)))

    def loss(self, rendered: Rendered, rays: RayBundle, sure: Tensor) -> Tensor:
        """Return the smooth L1 loss of depth, weighted by sure (R,), opacity and confidence."""
        distance = rendered.depth / rendered.opacity.clamp_min(1e-3)
        point = rays.origins + distance * rays.directions
        gap, trust = relief_gap(self.depth, self.side, point)
        sure = trust * sure * rendered.opacity.detach()[:, 0]
        away = F.smooth_l1_loss(gap, torch.zeros_like(gap), reduction="none", beta=0.03)
        return (sure * away).mean()
