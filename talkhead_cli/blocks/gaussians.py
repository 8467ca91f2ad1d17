"""Gaussian relative position coding of points with respect to landmarks.

GtsTalkNeRF (Computational Visual Media 11(4), 2025), as its release computes it: every landmark
has an anisotropic Gaussian, which weights a code of the point's relative depth along the camera
axis.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.blocks.precision import exact

WAVES = 5  # z, sin z, cos z, sin 2z, cos 2z
FAR = 14.0  # squared Mahalanobis distance beyond which a Gaussian's weight is below 1/1000


class GaussianCode(nn.Module):
    """Code of points relative to L moving landmarks.

    log_size (L, 3), turn (L, 4): the Gaussians, common to all rows: covariance S = R diag(s^2) R'
    with s = exp(log_size) in face heights and R from the quaternion.

    For a point x and landmark l_k:  d = x - l_k,  w = exp(-d' S^-1 d / 2),
    z = (d . axis) / unit,  code = w [z, sin z, cos z, sin 2z, cos 2z].
    """

    def __init__(self, n_landmarks: int, size: float = 0.1, unit: float = 0.1) -> None:
        """size: initial scale of the Gaussians · unit: of z; both in face heights."""
        super().__init__()
        self.log_size = nn.Parameter(torch.full((n_landmarks, 3), float(size)).log())
        self.turn = nn.Parameter(torch.tensor([1.0, 0, 0, 0]).repeat(n_landmarks, 1))
        self.unit = unit
        self.n_out = WAVES * n_landmarks

    @exact
    def tables(self, landmarks: Tensor, axis: Tensor) -> Tensor:
        """landmarks (T, L, 3), axis (T, 3) unit camera axis -> tables (T, 10, 2 L) for `forward`.

        Both the squared distance and z are linear in a point's [x x', x, 1], so the codes of all
        points need one matrix product per row, not a loop over landmarks.
        """
        whiten = (-self.log_size).exp()[:, :, None] * _rotations(self.turn).transpose(1, 2)
        inverse = whiten.transpose(1, 2) @ whiten  # (L, 3, 3), of the covariances
        i, j = torch.triu_indices(3, 3, device=landmarks.device)
        twice = torch.where(i == j, 1.0, 2.0)
        square = (inverse[:, i, j] * twice).T.expand(len(landmarks), -1, -1)  # (T, 6, L)
        pulled = torch.einsum("kij,tkj->tik", inverse, landmarks)
        constant = (pulled * landmarks.transpose(1, 2)).sum(1, keepdim=True)
        distance = torch.cat([square, -2 * pulled, constant], 1)  # (T, 10, L)
        ahead = axis[:, :, None].expand(-1, -1, landmarks.shape[1]) / self.unit
        depth = torch.cat(
            [torch.zeros_like(square), ahead, -(ahead * landmarks.transpose(1, 2)).sum(1, True)], 1
        )
        return torch.cat([distance, depth], 2)

    def forward(self, x: Tensor, tables: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 3), tables of the T rows, row (N,) -> codes (M, 5 L) of the M points near any
        landmark, and their indices (M,); the codes of all others are negligible."""
        square, z = self._read(x, tables, row).chunk(2, 1)
        near = (square.detach().amin(1) < FAR).nonzero().squeeze(1)
        code: Tensor = _Waves.apply(square.index_select(0, near), z.index_select(0, near))
        return code, near

    @exact
    def _read(self, x: Tensor, tables: Tensor, row: Tensor) -> Tensor:
        """Squared distances and depths z (N, 2 L) of points to the landmarks of their rows."""
        i, j = torch.triu_indices(3, 3, device=x.device)
        powers = torch.cat([x[:, i] * x[:, j], x, torch.ones_like(x[:, :1])], 1)  # (N, 10)
        if len(tables) == 1:
            return powers @ tables[0]
        order = row.argsort()
        counts = torch.bincount(row, minlength=len(tables)).tolist()
        parts = powers.index_select(0, order).split(counts)
        read = torch.cat([p @ t for p, t in zip(parts, tables, strict=True)])
        return read.index_select(0, order.argsort())


class _Waves(torch.autograd.Function):
    """exp(-square / 2) [z, sin z, cos z, sin 2z, cos 2z]: (N, L), (N, L) -> (N, 5 L).

    Written by hand because autograd would store and traverse a dozen arrays of that size.
    """

    @staticmethod
    def forward(ctx: Any, square: Tensor, z: Tensor) -> Tensor:
        weight = square.mul(-0.5).exp_()
        sin, cos = z.sin(), z.cos()
        ctx.save_for_backward(weight, z, sin, cos)
        n = z.shape[1]
        code = z.new_empty(len(z), WAVES * n)
        parts = code.split(n, 1)
        torch.mul(weight, z, out=parts[0])
        torch.mul(weight, sin, out=parts[1])
        torch.mul(weight, cos, out=parts[2])
        torch.mul(parts[1], cos, out=parts[3]).mul_(2)  # sin 2z = 2 sin z cos z
        torch.mul(parts[2], cos, out=parts[4]).mul_(2).sub_(weight)  # cos 2z = 2 cos^2 z - 1
        return code

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        weight, z, sin, cos = ctx.saved_tensors
        g = gradients[0].float().split(z.shape[1], 1)
        sin2, cos2 = 2 * sin * cos, 2 * cos * cos - 1
        by_weight = (g[0] * z).addcmul_(g[1], sin).addcmul_(g[2], cos)
        by_weight.addcmul_(g[3], sin2).addcmul_(g[4], cos2)
        by_z = (g[1] * cos).addcmul_(g[2], sin, value=-1).add_(g[0])
        by_z.addcmul_(g[3], cos2, value=2).addcmul_(g[4], sin2, value=-2)
        return by_weight.mul_(weight).mul_(-0.5), by_z.mul_(weight)


def _rotations(quaternion: Tensor) -> Tensor:
    """Quaternions (L, 4), of any length, -> matrices (L, 3, 3)."""
    w, x, y, z = F.normalize(quaternion, dim=1).unbind(1)
    return torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ], 1).view(-1, 3, 3)  # fmt: skip
