"""A few samples per ray, laid where training has seen surfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..contracts import Field, RayBundle, Rendered
from .dense import quadrature
from .occupancy import OccupancyGrid
from .packed import PackedMarcher, ask, rays_at_once
from .rays import intersect_box

# What an occupied cell is worth where nothing was seen: new poses find their surfaces by it.
# Tried on a trained avatar at 4 and at 6 samples per ray: of 0.001 to 0.4, pictures with 0.05 and
# 0.1 came nearest to the plain march's.
FLOOR = 0.07
# Of a ray's samples; the others are asked for where light still passes.  Of 0.4 to 0.8, tried on a
# trained avatar, the fastest by little.
AT_FIRST = 0.7
# Points of a picture: so few that what a field makes of them stays in a CPU's cache; or, without
# kernels, in a few gigabytes of a GPU's memory.
POINTS_AT_ONCE = {"cpu": 32_768, "cuda": 2**20}


class GuidedMarcher(nn.Module):
    """`n_samples` samples on each ray that meets an occupied cell.

    A ray is cut into parts that are worth the same by the weights that samples had in training
    (`OccupancyGrid.seen`); each part is one sample as wide as the occupied cells of the part
    (importance sampling by an inverse distribution function: NeRF, section 5.2; the grid takes
    the place of a coarse network).  So fine steps do not cost: a field may put a thin surface
    anywhere between two samples of a lattice.  In training all cuts of a ray are shifted by one
    random part.

    While it is `exploring`, every sample of the lattice that lies in an occupied cell is taken,
    as `PackedMarcher` does: what was seen so far guides nobody yet.

    `look_closely(boxes, n)`: in pictures, rays that meet a box take n samples each.  Lips that were
    drawn by few samples, whose places no shift varies there, followed the truth less closely.

    In pictures, of a ray that lets no more than the lattice's `early_stop` of the light past its
    first samples the others are not asked for.
    """

    def __init__(self, lattice: PackedMarcher, n_samples: int, n_cells: int) -> None:
        """`n_cells`: cells that the guide is read in along a ray's way through the box."""
        super().__init__()
        assert n_samples > 0 and n_cells > 0
        self.lattice, self.n_samples, self.n_cells = lattice, n_samples, n_cells
        self.exploring = False
        self._close: tuple[Tensor, int] | None = None

    @property
    def occupancy(self) -> OccupancyGrid:
        return self.lattice.occupancy

    def refresh(self, field: Field, step: int) -> None:
        """Update the grid when it is due."""
        self.lattice.refresh(field, step)

    def discover(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        """Learn from nothing where a field is, by marching the lattice once."""
        self.lattice.discover(views)

    def reveal(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        """Learn of new poses and views by marching the lattice once."""
        self.lattice.reveal(views)

    def march(self, field: Field, rays: RayBundle) -> Rendered:
        """Integrate `field` along `rays`."""
        if self.exploring:
            return self.lattice.march(field, rays)
        return self._guided(field, rays)

    def _guided(self, field: Field, rays: RayBundle) -> Rendered:
        sums, n_points = rays.near.new_zeros(len(rays), field.channels + 4), 0
        for at, n_samples in self._shares(rays):
            own, alive, n = self._march(field, rays if at is None else rays[at], n_samples)
            sums = sums.index_copy(0, alive if at is None else at[alive], own)
            n_points += n
        feature, moments, origin = sums.split((field.channels, 3, 1), 1)
        return Rendered.of_moments(feature, moments, origin, n_points)

    def look_closely(self, boxes: Tensor, n_samples: int) -> None:
        """Give rays of pictures that meet one of the boxes (B, 6) so many samples, unless all have
        as many."""
        self._close = boxes, n_samples

    def _shares(self, rays: RayBundle) -> list[tuple[Tensor | None, int]]:
        """Which rays (R',), None all of them, are marched by how many samples each."""
        if self._close is None or torch.is_grad_enabled() or self._close[1] <= self.n_samples:
            return [(None, self.n_samples)]
        boxes, n = self._close
        crossed = [intersect_box(rays.origins, rays.directions, box) for box in boxes]
        meets = torch.cat([far > near for near, far in crossed], 1).any(1)
        return [((~meets).nonzero().squeeze(1), self.n_samples), (meets.nonzero().squeeze(1), n)]

    def _march(self, field: Field, rays: RayBundle, n_samples: int) -> tuple[Tensor, Tensor, int]:
        """Sums of the rays (A,) that have samples and the origins of their moments, (A, C + 4); the
        rays; and how many points that took."""
        t, width, alive = self.lay(rays, n_samples)
        if torch.is_grad_enabled():
            sums, n_points = self._sums(field, rays, alive, t, width, t[:, :1]), t.numel()
        else:
            sums, n_points = self._front_to_back(field, rays, alive, t, width)
        return torch.cat((sums, t[:, :1]), 1), alive, n_points

    def _front_to_back(
        self, field: Field, rays: RayBundle, ray: Tensor, t: Tensor, width: Tensor
    ) -> tuple[Tensor, int]:
        """As `_sums`, but rays whose transmittance fell to the lattice's `early_stop` are left
        alone; and the number of points asked."""
        (n, k), opacity = t.shape, field.channels
        left, n_points = torch.arange(n, device=t.device), 0
        sums = t.new_zeros(n, field.channels + 3)
        for a, b in pairwise(sorted({0, math.ceil(AT_FIRST * k), k})):
            at_once = POINTS_AT_ONCE[t.device.type] // (b - a)
            for at in left.split(at_once) if len(left) else ():
                part = self._sums(field, rays, ray[at], t[at, a:b], width[at, a:b], t[at, :1])
                sums.index_add_(0, at, (1 - sums[at, opacity, None]) * part)
                n_points += (b - a) * len(at)
            left = left[1 - sums[left, opacity] > self.lattice.early_stop]
        return sums, n_points

    def _sums(
        self, field: Field, rays: RayBundle, ray: Tensor, t: Tensor, width: Tensor, origin: Tensor
    ) -> Tensor:
        """Samples (A, K) of the rays (A,) -> (A, C + 3): channels, and the weights' moments about
        origin (A, 1)."""
        shape = n, k = t.shape
        x, density, channels = ask(field, rays, t.reshape(-1), ray.repeat_interleave(k))
        w = quadrature(density.view(shape), width)
        if self.training and torch.is_grad_enabled():
            self.occupancy.observe(x, w.view(-1))
        channels = channels.view(n, k, field.channels)
        attached = field.channels - field.n_detached
        s = t - origin
        return torch.cat([
            _sum(w, channels[..., :attached]), _sum(w.detach(), channels[..., attached:]),
            w.sum(1, keepdim=True), (w * s).sum(1, keepdim=True), (w * s * s).sum(1, keepdim=True),
        ], 1)  # fmt: skip

    def _worth(self) -> Tensor:
        """What each of the grid's cells is worth, (D, D, D)."""
        grid = self.occupancy
        return torch.where(grid.occupied, grid.seen + FLOOR, 0.0)

    @torch.no_grad()
    def lay(self, rays: RayBundle, n_samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Distances t (A, K), ascending, their widths (A, K), and the rays (A,) that have any.

        A ray's widths add up to its length inside occupied cells.
        """
        grid, k, device = self.occupancy, n_samples or self.n_samples, rays.near.device
        enter, leave = intersect_box(rays.origins, rays.directions, grid.tight_box())
        near, far = torch.maximum(enter, rays.near), torch.minimum(leave, rays.far)
        worth = self._worth().view(-1)
        lane = torch.arange(self.n_cells, device=device) + 0.5
        # Odd cuts are samples, even ones the edges between them.
        cuts = torch.arange(2 * k + 1, device=device) / (2 * k)
        found = [(near.new_zeros(0, k), near.new_zeros(0, k), near.new_zeros(0).long())]
        at_once = rays_at_once(device)
        for first in range(0, len(rays), at_once):
            part = slice(first, first + at_once)
            start, cell = near[part], (far[part] - near[part]) / self.n_cells
            at = grid.cells(rays.origins[part], rays.directions[part], start + cell * lane)
            value = worth.index_select(0, at.view(-1)).view(at.shape) * (cell > 0)
            total = value.cumsum(1)
            alive = (total[:, -1] > 0).nonzero().squeeze(1)
            start, cell, value, total = (v[alive] for v in (start, cell, value, total))
            share = cuts.expand(len(alive), -1)
            if self.training:
                share = share + (torch.rand_like(cell) - 0.5) / k
                share[:, 0], share[:, -1] = 0.0, 1.0
            want = share * (total[:, -1:] * (1 - 1e-6))
            index = torch.searchsorted(total, want, right=True).clamp_(max=self.n_cells - 1)
            # How far into its cell each cut lies, in [0, 1].
            into = (want - total.gather(1, index)) / value.gather(1, index).clamp_min(1e-9) + 1
            into.clamp_(0, 1)
            t = start + cell * (index + into)[:, 1::2]
            edge = ((value > 0).cumsum(1).gather(1, index) - 1 + into)[:, ::2]
            found.append((t, (edge[:, 1:] - edge[:, :-1]) * cell, alive + first))
        t, width, alive = (torch.cat(columns) for columns in zip(*found, strict=True))
        return t, width, alive


def _sum(w: Tensor, channels: Tensor) -> Tensor:
    """Weights (A, K), channels (A, K, C) -> (A, C), in float32 whatever came."""
    with torch.autocast(w.device.type, enabled=False):
        return torch.bmm(w[:, None], channels.float())[:, 0]
