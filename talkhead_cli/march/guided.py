"""Guided marching: few samples per ray, importance-sampled from weights seen in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from talkhead_cli.contracts import Field, RayBundle, Rendered
from talkhead_cli.march.dense import quadrature
from talkhead_cli.march.marcher import Marcher
from talkhead_cli.march.occupancy import OccupancyGrid
from talkhead_cli.march.packed import PackedMarcher, ask, rays_at_once
from talkhead_cli.march.rays import intersect_box

# Added to the weight seen in an occupied cell, so that surfaces of new poses are found.  Of 0.001
# to 0.4, tried on a trained avatar with 4 and 6 samples per ray, 0.05 and 0.1 gave the pictures
# closest to the plain march's.
FLOOR = 0.07
# Share of a ray's samples evaluated first; the rest only on rays that are still transparent.  Of
# 0.4 to 0.8, tried on a trained avatar, slightly the fastest.
AT_FIRST = 0.7
# A ray that stays more transparent than OPAQUE, though training saw at least SEEN weight in the
# cells that it crosses, the union over all poses, has probably missed the surface of this pose: it
# is marched again, with AGAIN times as many samples.
OPAQUE, SEEN, AGAIN = 0.9, 3.0, 2
# Points per call of the field without gradients: its activations stay in a CPU's cache, or within
# a few gigabytes of GPU memory.
POINTS_AT_ONCE = {"cpu": 32_768, "cuda": 2**20}


class GuidedMarcher(Marcher):
    """Marcher with `n_samples` importance samples on each ray that crosses an occupied cell.

    A ray is cut into intervals of equal mass under the weights that samples had in training
    (`OccupancyGrid.seen`); each interval is one sample, whose width is the interval's length inside
    occupied cells (inverse transform sampling: NeRF, section 5.2, with the grid in place of a
    coarse network).  So fine resolution is cheap: thin surfaces do not fall between the samples of
    a lattice.  In training all cuts of a ray are shifted by one random fraction of an interval.

    While `exploring`, all lattice samples in occupied cells are taken, as by `PackedMarcher`: the
    weights seen so far are not reliable yet.

    `look_closely(boxes, n)`: without gradients, rays that hit a box take n samples each.  Lips
    rendered with few samples, at positions not randomised as in training, followed the video worse.

    Without gradients, a ray's last samples are skipped if its transmittance after the first ones is
    no more than the lattice's `early_stop`, and rays that seem to have missed a surface are marched
    again (OPAQUE).
    """

    def __init__(self, lattice: PackedMarcher, n_samples: int, n_cells: int) -> None:
        """n_cells: intervals per ray at which the grid is read to build the distribution"""
        super().__init__()
        assert n_samples > 0 and n_cells > 0
        self.lattice, self.n_samples, self.n_cells = lattice, n_samples, n_cells
        self._close: tuple[Tensor, int] | None = None

    @property
    def occupancy(self) -> OccupancyGrid:
        return self.lattice.occupancy

    @property
    def resolution(self) -> int:
        return self.occupancy.resolution

    def refresh(self, field: Field, step: int) -> None:
        self.lattice.refresh(field, step)

    def rebuild_from_views(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        self.lattice.rebuild_from_views(views)

    def extend_from_views(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        self.lattice.extend_from_views(views)

    def march(self, field: Field, rays: RayBundle) -> Rendered:
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

    @property
    def sampling(self) -> tuple[int, ...]:
        return self.n_samples, self.n_cells

    def look_closely(self, boxes: Tensor, n_samples: int) -> None:
        self._close = boxes, n_samples

    def sample_more(self, n_samples: int) -> None:
        self.n_samples = max(self.n_samples, n_samples)

    def finer(self, n_samples: int) -> Marcher:
        made = GuidedMarcher(self.lattice, max(n_samples, self.n_samples), self.n_cells)
        made._close = self._close
        return made.train(self.training)

    def _shares(self, rays: RayBundle) -> list[tuple[Tensor | None, int]]:
        """Return groups of rays: indices (R',), or None for all, and their samples per ray."""
        if self._close is None or torch.is_grad_enabled() or self._close[1] <= self.n_samples:
            return [(None, self.n_samples)]
        boxes, n = self._close
        crossed = [intersect_box(rays.origins, rays.directions, box) for box in boxes]
        meets = torch.cat([far > near for near, far in crossed], 1).any(1)
        return [((~meets).nonzero().squeeze(1), self.n_samples), (meets.nonzero().squeeze(1), n)]

    def _march(self, field: Field, rays: RayBundle, n_samples: int) -> tuple[Tensor, Tensor, int]:
        """Return sums and origins (A, C + 4) of the rays that have samples, the indices (A,) of
        these rays, and the number of points evaluated."""
        t, width, alive = self.lay(rays, n_samples)
        if torch.is_grad_enabled():
            sums = self._sums(field, rays, alive, t, width, t[:, :1])
            return torch.cat((sums, t[:, :1]), 1), alive, t.numel()
        sums, n_points = self._front_to_back(field, rays, alive, t, width)
        found = torch.cat((sums, t[:, :1]), 1)
        missed = self._missed(rays, alive, sums[:, field.channels])
        if len(missed):
            again = alive[missed]
            t, width, crossing = self.lay(rays[again], AGAIN * n_samples)
            sums, n_more = self._front_to_back(field, rays, again[crossing], t, width)
            found[missed[crossing]] = torch.cat((sums, t[:, :1]), 1)
            n_points += n_more
        return found, alive, n_points

    def _missed(self, rays: RayBundle, ray: Tensor, opacity: Tensor) -> Tensor:
        """Return which (M,) of the rays (A,) have probably missed a surface, from their opacity."""
        clear = (opacity < OPAQUE).nonzero().squeeze(1)
        seen = torch.where(self.occupancy.occupied, self.occupancy.seen, 0.0)
        missed = [
            part[self._along(rays[ray[part]], seen)[2].sum(1) > SEEN]
            for part in clear.split(rays_at_once(ray.device))
        ]
        return torch.cat(missed) if missed else clear

    def _front_to_back(
        self, field: Field, rays: RayBundle, ray: Tensor, t: Tensor, width: Tensor
    ) -> tuple[Tensor, int]:
        """As `_sums`, but front to back in two parts, the second only on rays whose transmittance
        is above the lattice's `early_stop`; also returns the number of points evaluated."""
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
        """Composite samples t, width (A, K) of the rays (A,) -> (A, C + 3): channels, and moments
        of the weights about origin (A, 1)."""
        shape = n, k = t.shape
        x, density, channels = ask(field, rays, t.reshape(-1), ray.repeat_interleave(k))
        w = quadrature(density.view(shape), width)
        if self.training and torch.is_grad_enabled():
            self.occupancy.observe(x, w.view(-1))
        channels = channels.view(n, k, field.channels)
        attached = field.channels - field.n_detached
        s = t - origin
        return torch.cat(
            [
                _sum(w, channels[..., :attached]),
                _sum(w.detach(), channels[..., attached:]),
                w.sum(1, keepdim=True),
                (w * s).sum(1, keepdim=True),
                (w * s * s).sum(1, keepdim=True),
            ],
            1,
        )

    def _worth(self) -> Tensor:
        """Return the sampling weight of each cell of the grid, (D, D, D)."""
        grid = self.occupancy
        return torch.where(grid.occupied, grid.seen + FLOOR, 0.0)

    @torch.no_grad()
    def lay(self, rays: RayBundle, n_samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return sample distances t (A, K), ascending, widths (A, K), and ray indices (A,).

        A ray's widths add up to its length inside occupied cells; rays without any are left out.
        """
        k, none, device = n_samples or self.n_samples, rays.near[:0], rays.near.device
        worth = self._worth()
        # Quantiles: odd ones are samples, even ones the edges between them.
        cuts = torch.arange(2 * k + 1, device=device) / (2 * k)
        found = [(none.expand(0, k), none.expand(0, k), none.squeeze(1).long())]
        at_once = rays_at_once(device)
        for first in range(0, len(rays), at_once):
            start, cell, value = self._along(rays[first : first + at_once], worth)
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

    def _along(self, rays: RayBundle, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut rays inside the box of occupied cells into `n_cells` intervals; return where the
        first begins (R, 1), their length (R, 1), and the grid's values (D, D, D) in their middles,
        (R, n_cells)."""
        grid = self.occupancy
        enter, leave = intersect_box(rays.origins, rays.directions, grid.tight_box())
        near, far = torch.maximum(enter, rays.near), torch.minimum(leave, rays.far)
        length = (far - near) / self.n_cells
        lane = torch.arange(self.n_cells, device=near.device) + 0.5
        at = grid.cells(rays.origins, rays.directions, near + length * lane)
        found = values.view(-1).index_select(0, at.view(-1)).view(at.shape)
        return near, length, found * (length > 0)


def _sum(w: Tensor, channels: Tensor) -> Tensor:
    """Weights (A, K), channels (A, K, C) -> sums (A, C), in float32 even under autocast."""
    with torch.autocast(w.device.type, enabled=False):
        return torch.bmm(w[:, None], channels.float())[:, 0]
