"""Analytic bodies, cameras that look at them and marchers, for tests of marching."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from talkhead_cli.contracts import Camera, Field, RayBundle, Rendered
from talkhead_cli.march import (
    DenseMarcher,
    GuidedMarcher,
    Marcher,
    OccupancyGrid,
    PackedMarcher,
    intersect_box,
    picture_rays,
    step_length,
)

BOX = torch.tensor([-1.0, -1.2, -0.8, 1.0, 1.2, 0.8])
N_STEPS = 64
STEP = step_length(BOX, N_STEPS)

Shape = Callable[[Tensor, Tensor], Tensor]


def length(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()


class Solid:
    """Analytic density(x, row); its channels are x, y, z and 1."""

    def __init__(self, shape: Shape, n_rows: int = 1, n_detached: int = 0) -> None:
        self.aabb, self.channels = BOX, 4
        self.shape, self.n_rows, self.n_detached = shape, n_rows, n_detached

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        assert x.shape == (len(row), 3) and row.dtype == torch.long
        return self.shape(x, row)

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        assert d.shape == x.shape
        return self.density(x, row), torch.cat((x, torch.ones_like(x[:, :1])), 1)


def slab(strength: float | Tensor, z0: float, z1: float) -> Shape:
    return lambda x, row: strength * ((x[:, 2] > z0) & (x[:, 2] < z1)).float()


def ball(strength: float, radius: float, centre: tuple[float, float, float] = (0, 0, 0)) -> Shape:
    def shape(x: Tensor, row: Tensor) -> Tensor:
        return strength * (length(x - torch.tensor(centre)) < radius).float()

    return shape


def smooth(x: Tensor, row: Tensor) -> Tensor:
    return 30 * torch.exp(-8 * (x**2).sum(-1)) * (1.5 + torch.sin(9 * x[:, 0] + row))


def two_balls(x: Tensor, row: Tensor) -> Tensor:
    """Row 0 fills one side, row 1 the other."""
    side = torch.where(row == 0, -0.5, 0.5)[:, None] * torch.tensor([1.0, 0.0, 0.0])
    return 50.0 * (length(x - side) < 0.25).float()


def camera(size: int = 12, yaw: float = 0.0, rows: int = 1) -> Camera:
    """On a circle of radius 4 around the origin, looking at it, z forward."""
    s, c = math.sin(yaw), math.cos(yaw)
    c2w = torch.eye(4)
    c2w[:3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    c2w[:3, 3] = -4 * c2w[:3, 2]
    k = torch.tensor([[1.7 * size, 0, size / 2], [0, 1.7 * size, size / 2], [0, 0, 1]])
    return Camera(c2w.repeat(rows, 1, 1), k.repeat(rows, 1, 1), size)


def picture(size: int = 12, yaw: float = 0.0, rows: int = 1) -> RayBundle:
    return picture_rays(camera(size, yaw, rows), torch.arange(rows), BOX)


def ray(origin: tuple[float, float, float], towards: tuple[float, float, float]) -> RayBundle:
    o = torch.tensor([origin], dtype=torch.float32)
    d = torch.nn.functional.normalize(torch.tensor([towards], dtype=torch.float32), dim=-1)
    row = torch.zeros(1, dtype=torch.long)
    return RayBundle(o, d, *intersect_box(o, d, BOX), torch.zeros(1, 2), row)


def packed(n_steps: int = N_STEPS, early_stop: float = 0.0) -> PackedMarcher:
    step = step_length(BOX, n_steps)
    return PackedMarcher(OccupancyGrid(BOX, step, 16), step, early_stop=early_stop).eval()


def marchers(n_steps: int = N_STEPS) -> list[Marcher]:
    few = GuidedMarcher(packed(n_steps), n_steps, n_steps).eval()
    return [packed(n_steps), DenseMarcher(BOX, n_steps).eval(), few]


def assert_same(a: Rendered, b: Rendered, tolerance: float = 1e-4) -> None:
    for name in ("feature", "opacity", "depth", "spread"):
        difference = (getattr(a, name) - getattr(b, name)).abs().max()
        assert difference <= tolerance, f"{name} differs by {difference}"


def trained(field: Field, n_samples: int, *, steps: int = 40) -> GuidedMarcher:
    """A guided marcher whose grid has watched `field` from several sides."""
    marcher = GuidedMarcher(packed(), n_samples, N_STEPS).train()
    views = [picture(16, yaw) for yaw in (-0.3, 0.0, 0.3)]
    for step in range(steps):
        marcher.exploring = step < steps // 2
        marcher.march(field, views[step % 3])
        marcher.occupancy.update(field, step)
    return marcher.eval()
