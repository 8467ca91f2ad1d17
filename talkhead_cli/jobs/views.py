"""Show a marcher views that it was not trained on, so that its occupancy holds what they show."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from talkhead_cli import march
from talkhead_cli.avatars.base import Speaker
from talkhead_cli.contracts import Field, RayBundle, Signals

WIDE_OPEN = 0.15  # face heights
LOWER_MOUTH = [*range(5, 12), *range(55, 60), *range(65, 68)]  # of the 68: chin, lower lip
N_FIRST = 4  # views by which a marcher discovers a person
N_VIEWS = 24  # views by which a marcher is shown new poses
NEW_POSE_DISTANCE = (
    0.04  # distance of a new pose from all known ones, rad and face heights: about a grid cell
)
# Distance from all poses that were trained on, from which on the guiding grid, the union over these
# poses, is coarser than a surface: few samples give specks.
RARE_POSE_DISTANCE = 0.1


@torch.no_grad()
def open_views(
    avatar: Speaker, marcher: march.Marcher, signals: Signals, device: torch.device
) -> None:
    """Show the marcher at most N_VIEWS of the rows, evenly spread."""
    marcher.extend_from_views(_views(avatar, marcher, signals, device, N_VIEWS))


@torch.no_grad()
def rebuild_from_views(
    avatar: Speaker, marcher: march.Marcher, signals: Signals, device: torch.device
) -> None:
    """Show the marcher a person on whom it was not trained, in at most N_FIRST of the rows."""
    marcher.rebuild_from_views(_views(avatar, marcher, signals, device, N_FIRST))


def _views(
    avatar: Speaker, marcher: march.Marcher, signals: Signals, device: torch.device, n: int
) -> list[tuple[Field, RayBundle]]:
    if not marcher.resolution:
        return []
    size_px = 2 * marcher.resolution  # two rays per cell if the picture is as wide as the box
    views, alone = [], torch.zeros(1, dtype=torch.long, device=device)
    for row in dict.fromkeys(np.linspace(0, len(signals) - 1, n).astype(int).tolist()):
        one = signals[row].to(device)
        rays = march.picture_rays(one.camera.resized(size_px), alone, avatar.aabb)
        views.append((avatar.condition(one), avatar.aim(one, rays)))
    return views


def new_poses(poses: Tensor, known: Tensor, n: int) -> list[int]:
    """Choose at most n rows of `poses` (T, K) that are not in `known` (M, K), the furthest first,
    until all that are left lie within NEW_POSE_DISTANCE of a known or chosen one."""
    away = torch.cdist(poses, known).amin(1)
    rows: list[int] = []
    while len(rows) < n and float(away.max()) > NEW_POSE_DISTANCE:
        rows.append(int(away.argmax()))
        away = torch.minimum(away, torch.cdist(poses, poses[rows[-1:]])[:, 0])
    return rows


def are_rare(poses: Tensor, trained: Tensor) -> bool:
    """Return whether any of `poses` (T, K) is far from all that were trained on, (M, K)."""
    return bool(torch.cdist(poses, trained).amin(1).max() > RARE_POSE_DISTANCE)


def poses_of(signals: Signals) -> Tensor:
    """Return the poses of head and shoulders, in radians and face heights, (T, 10)."""
    return torch.cat([signals.pose, signals.body], 1)


def opening_mouths(speaker: Speaker, signals: Signals, n: int) -> Signals:
    """Return a row (1) repeated n times, with mouths from shut to wide open."""
    rest = speaker.neutral
    assert rest is not None
    marks = rest.repeat(n, 1, 1)
    for row, drop in enumerate(torch.linspace(0, WIDE_OPEN, n).tolist()):
        marks[row, LOWER_MOUTH, 1] += drop
    rows = signals[torch.zeros(n, dtype=torch.long)]
    return rows.with_(landmarks=marks.to(signals.landmarks))
