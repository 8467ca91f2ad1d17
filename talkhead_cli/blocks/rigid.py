"""Rigid motions of head space: rotation vectors, shoulder motion and tracker correction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.blocks.mlp import by_row
from talkhead_cli.blocks.planes import why_no_triton
from talkhead_cli.blocks.precision import exact
from talkhead_cli.blocks.remember import constant
from talkhead_cli.contracts import Camera

TWIST = 0.02  # radians and face heights; scale of the learned corrections


@exact
def rotations(vector: Tensor) -> Tensor:
    """Rotation vectors (T, 3) -> matrices (T, 3, 3), by Rodrigues' formula; differentiable at 0."""
    angle = (vector.square().sum(1) + 1e-14).sqrt()[:, None, None]
    x, y, z = (vector / angle[:, :, 0]).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    one = torch.eye(3, device=vector.device)
    return one + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)


CHIN_GAP, CHIN_SOFT = 0.12, 0.05  # face heights


def below_chin(y: Tensor, chin: Tensor | float) -> Tensor:
    """Return the weight in [0, 1] with which points at y of head space follow the shoulders; chin:
    its y at rest."""
    return ((y - chin - CHIN_GAP) / CHIN_SOFT).sigmoid()


@exact
def moved(x: Tensor, motion: Tensor, row: Tensor) -> Tensor:
    """Apply the motions (T, 3, 4), [R | t], of the rows (N,) to points (N, 3)."""
    if x.is_cuda and why_no_triton() == "":
        from talkhead_cli.blocks.rigid_triton import Move

        return Move.apply(x.float(), motion.float(), row)
    if len(motion) == 1:
        return torch.addmm(motion[0, :, 3], x, motion[0, :, :3].T)
    columns = motion.transpose(1, 2).flatten(1)  # (T, 12)
    # gather by matrix product: its gradient is one too, faster than an index_add over rows
    own = by_row(torch.ones_like(x[:, :1]), row, len(motion)) @ columns
    a, b, c, t = own.view(-1, 4, 3).unbind(1)
    return a * x[:, :1] + b * x[:, 1:2] + c * x[:, 2:] + t


@exact
def after(second: Tensor, first: Tensor) -> Tensor:
    """Compose motions (T, 3, 4): `first`, then `second`."""
    return torch.cat(
        [second[:, :, :3] @ first[:, :, :3], second[:, :, :3] @ first[:, :, 3:] + second[:, :, 3:]],
        2,
    )


@exact
def undone(motion: Tensor) -> Tensor:
    """Invert motions (T, 3, 4)."""
    back = motion[:, :, :3].transpose(1, 2)
    return torch.cat([back, -back @ motion[:, :, 3:]], 2)


@exact
def alignment(neutral: Tensor, face: Tensor) -> Tensor:
    """Return the least-squares affine map (1, 3, 4) from a person's neutral landmarks (68, 3) to
    those of the shared face (68, 3), regularised towards the identity."""
    known = F.pad(neutral, (0, 1), value=1.0)
    gram = known.T @ known + 1e-3 * torch.eye(4, device=known.device)
    change = torch.linalg.solve(gram, known.T @ (face - neutral)).T
    return (torch.eye(3, 4, device=known.device) + change)[None]


class PoseCorrection(nn.Module):
    """Small rigid motion of head space, linear in the tracked signals.

    Face trackers have systematic errors: a mesh that understates pitch, a guessed focal length,
    brows that bias the fit.  The correction is learned jointly with the field; being linear, with
    nothing per frame, it generalises to poses outside the training data.  Starts at the identity.
    """

    def __init__(self, n_signals: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_signals, 6)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, signals: Tensor) -> Tensor:
        """Standardised signals (T, n_signals) -> motions (T, 3, 4)."""
        twist = TWIST * self.linear(signals).float()
        return torch.cat([rotations(twist[:, :3]), twist[:, 3:, None]], 2)


@exact
def shoulders_in_head(pose: Tensor, body: Tensor, rest: Tensor) -> Tensor:
    """Return motions (T, 3, 4) that carry shoulder points from a row to the canonical rest pose.

    pose (T, 6), body (T, 4), rest (6,) the pose in which head and shoulders are canonical.  Head
    space of the row -> camera -> undo the shoulders' motion -> head space at rest.
    """
    turn, move = rotations(pose[:, :3]), pose[:, 3:]
    home_turn, home = rotations(rest[None, :3])[0], rest[3:]
    roll = rotations(F.pad(body[:, 2:3], (2, 0)))
    # The shoulders roll about a pivot half a face height under the chin.
    pivot = home + home_turn @ constant(0.0, 1.1, 0.0, device=home.device)
    still = roll.transpose(1, 2) @ turn
    offset = move - pivot - F.pad(body[:, :2], (0, 1))
    at_rest = (roll.transpose(1, 2) @ offset[..., None])[..., 0] + pivot - home
    back = home_turn.T
    return torch.cat([back @ still, (at_rest @ back.T)[..., None]], 2)


@exact
def shoulders_in_picture(body: Tensor, camera: Camera, rest: Tensor) -> Tensor:
    """Return affine maps (T, 2, 3) of picture positions, in [-1, 1], from a row to the rest pose.

    body (T, 4), rest (6,) head pose at which the shoulders are canonical.  Undoes the motion
    `body` of a point at the shoulders' depth: the shift, then roll and scale about the point half
    a face height under the chin.
    """
    # assume the torso at the depth of the head at rest
    depth = rest[5]
    focal = 2 * camera.k[:, 0, 0] / camera.size_px / depth  # [-1, 1] per face height
    pivot_at = rest[3:5] + constant(0.0, 1.1, device=rest.device)
    centre = 2 * camera.k[:, :2, 2] / camera.size_px - 1
    pivot = centre + focal[:, None] * pivot_at
    shift = focal[:, None] * body[:, :2]
    size, roll = (-body[:, 3]).exp(), -body[:, 2]
    turn = torch.stack([roll.cos(), -roll.sin(), roll.sin(), roll.cos()], 1).view(-1, 2, 2)
    linear = size[:, None, None] * turn
    offset = pivot - (linear @ (pivot + shift)[..., None])[..., 0]
    return torch.cat([linear, offset[..., None]], 2)
