"""Occupancy grid: one for all rows, shared by every marcher."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from talkhead_cli.contracts import Field

ALPHA_THRESHOLD = 0.01  # a cell with less alpha per march step is empty
CHUNK = {"cpu": 65_536, "cuda": 2**20}  # points per call of the field
SEEN_THRESHOLD = 0.005  # a cell whose samples all have smaller compositing weights is hidden
SEEN_DECAY = 0.9  # per update
SEEN_AT_FIRST = 0.05  # so that cells never seen close after some twenty updates


class OccupancyGrid(nn.Module):
    """D^3 cells over an anisotropic box, as in Instant-NGP (Mueller et al. 2022, app. E.2).

    Updates draw rows at random, so the grid covers the union over expressions and does not depend
    on the driving signals.  It is dilated by one cell, or a face's rim would lose opacity.  It
    starts full; updates are seeded by the step, so that runs are reproducible.

    A head is opaque at the skin: what lies underneath is as dense but never visible.  In training,
    marchers report each sample's compositing weight (`observe`), and cells that stop contributing
    are closed like empty ones.

    density   (D, D, D) decaying maximum of the density in each cell
    seen      (D, D, D) decaying maximum of the weights of samples in each cell, in [0, 1]
    watched   () bool, whether any marcher reports weights; else no cell is closed as hidden
    occupied  (D, D, D) bool, indexed x, y, z
    aabb      (6,)
    """

    density: Tensor
    seen: Tensor
    watched: Tensor
    occupied: Tensor
    aabb: Tensor

    def __init__(self, aabb: Tensor, step_length: float, resolution: int = 64) -> None:
        super().__init__()
        assert aabb.shape == (6,) and bool((aabb[3:] > aabb[:3]).all()), aabb
        assert 1 < resolution <= 256, "flat cell numbers must be exact in float32"
        self.step_length, self.resolution = step_length, resolution
        cells = (resolution,) * 3
        self.register_buffer("aabb", aabb.detach().float().clone())
        self.register_buffer("density", torch.zeros(cells, device=aabb.device))
        self.register_buffer("seen", torch.full(cells, SEEN_AT_FIRST, device=aabb.device))
        self.register_buffer("watched", torch.zeros((), dtype=torch.bool, device=aabb.device))
        self.register_buffer("occupied", torch.ones(cells, dtype=torch.bool, device=aabb.device))

    def contains(self, x: Tensor) -> Tensor:
        """Whether points lie in occupied cells: x (N, 3) -> (N,) bool; False outside the box."""
        assert x.ndim == 2 and x.shape[1] == 3, x.shape
        inside = ((x >= self.aabb[:3]) & (x <= self.aabb[3:])).all(-1)
        zero = torch.zeros_like(x[:, :1])
        return self.along(x, torch.zeros_like(x), zero).squeeze(1) & inside

    def along(self, origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
        """Whether origins + t * directions lie in occupied cells: t (R, S) -> (R, S) bool.

        Points outside the box count as the nearest cell.
        """
        cells = self.cells(origins, directions, t)
        return self.occupied.view(-1).index_select(0, cells.view(-1)).view(t.shape)

    def cells(self, origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
        """Flat cell indices of origins + t * directions: t (R, S) -> (R, S) int.

        Axis by axis and in place, to avoid allocating (R, S, 3) for every sample of every ray.
        """
        d = self.resolution
        scale = d / (self.aabb[3:] - self.aabb[:3])
        start, slope = (origins - self.aabb[:3]) * scale, directions * scale
        cell = torch.zeros_like(t)
        for axis in range(3):
            place = (t * slope[:, axis, None]).add_(start[:, axis, None])
            cell.mul_(d).add_(place.clamp_(0, d - 1).floor_())
        return cell.int()

    @torch.no_grad()
    def observe(self, x: Tensor, weight: Tensor) -> None:
        """Record the compositing weights (N,) of samples at x (N, 3) in `seen`."""
        scale = self.resolution / (self.aabb[3:] - self.aabb[:3])
        place = ((x - self.aabb[:3]) * scale).long().clamp_(0, self.resolution - 1)
        cell = (place[:, 0] * self.resolution + place[:, 1]) * self.resolution + place[:, 2]
        self.seen.view(-1).scatter_reduce_(0, cell, weight.detach().float(), "amax")
        self.watched.fill_(True)

    def tight_box(self) -> Tensor:
        """Return the smallest box (6,) around the occupied cells; if there are none, the whole box
        with its corners swapped, which rays meet like any other."""
        d, occupied = self.resolution, self.occupied
        slab = occupied.any(2)
        used = torch.stack((slab.any(1), slab.any(0), occupied.any(0).any(0)))  # (3, D)
        cell = torch.arange(d, device=used.device)
        first = torch.where(used, cell, d).amin(1)
        last = torch.where(used, cell + 1, 0).amax(1)
        low, size = self.aabb[:3], self.aabb[3:] - self.aabb[:3]
        return torch.cat((low + size * (first / d), low + size * (last / d)))

    @torch.no_grad()
    def update(
        self,
        field: Field,
        step: int,
        *,
        n_rows_drawn: int = 2,
        decay: float = 0.95,
        threshold: float = ALPHA_THRESHOLD,
        generator: torch.Generator | None = None,
    ) -> None:
        """Update density and occupancy for rows drawn at random.

        Evaluates one random point per cell, each for one of the drawn rows: in all occupied cells
        and in a random quarter of the others.
        """
        generator = generator or self._generator(step)
        device, n = self.density.device, self.density.numel()
        lucky = torch.rand(n, generator=generator, device=device) < 0.25
        cells = (lucky | self.occupied.view(-1)).nonzero().squeeze(1)
        drawn = torch.randperm(field.n_rows, generator=generator, device=device)[:n_rows_drawn]
        pick = torch.randint(len(drawn), cells.shape, generator=generator, device=device)
        new = self._look(field, cells, drawn[pick], generator)
        flat = self.density.view(-1)
        flat[cells] = torch.maximum(flat[cells] * decay, new)
        if self.watched:
            self.seen.mul_(SEEN_DECAY)
        if distributed.is_available() and distributed.is_initialized():
            for grid in (self.density, self.seen):
                distributed.all_reduce(grid, op=distributed.ReduceOp.MAX)
        filled = self._alpha(self.density) > self._limit(threshold)
        filled &= self.seen > SEEN_THRESHOLD
        # An empty grid sends no points, hence no gradients: it could never fill again.
        self.occupied.copy_(_dilate(filled) if bool(filled.any()) else torch.ones_like(filled))

    @torch.no_grad()
    def extend(
        self,
        field: Field,
        rows: Iterable[int] | Tensor,
        threshold: float = ALPHA_THRESHOLD,
        *,
        look: int = 0,
    ) -> None:
        """Open the cells that any of `rows` fills and close none: once before a render.

        Only closed cells are evaluated, so that a familiar pose costs one pass over them and a full
        grid nothing.  `look` numbers successive calls and seeds them: each tries other points of a
        cell, since a thin surface may pass between the points of one call.
        """
        for row in (int(r) for r in rows):
            cells = (~self.occupied.view(-1)).nonzero().squeeze(1)
            if not len(cells):
                return
            new = self._look(field, cells, torch.full_like(cells, row), self._generator(look + row))
            flat = self.density.view(-1)
            flat[cells] = torch.maximum(flat[cells], new)
            fresh = torch.zeros_like(self.occupied)
            fresh.view(-1)[cells] = self._alpha(new) > self._limit(threshold)
            self.occupied |= _dilate(fresh)

    def forget(self) -> None:
        """Close every cell, reset the statistics, and set `watched`."""
        for grid in (self.density, self.seen, self.occupied):
            grid.zero_()
        self.watched.fill_(True)

    @torch.no_grad()
    def close_unseen(self, spared: Tensor) -> None:
        """Close cells that contribute to no pixel, except those in `spared` (D, D, D) bool."""
        self.occupied &= spared | _dilate(self.seen > SEEN_THRESHOLD)

    def _generator(self, number: int) -> torch.Generator:
        generator = torch.Generator(self.density.device)
        return generator.manual_seed(number)

    def _alpha(self, density: Tensor) -> Tensor:
        """Return the alpha of one march step through `density`, in [0, 1]."""
        return -torch.expm1(-density * self.step_length)

    def _limit(self, threshold: float) -> Tensor:
        """Return the threshold (), or the mean alpha if lower, as it is early in training."""
        return self._alpha(self.density).mean().clamp_max(threshold)

    def _look(self, field: Field, cells: Tensor, row: Tensor, rng: torch.Generator) -> Tensor:
        """Evaluate density (N,) at a random point in each of `cells` (N,) flat, for `row` (N,)."""
        d, low, size = self.resolution, self.aabb[:3], self.aabb[3:] - self.aabb[:3]
        found = [cells.new_zeros(0, dtype=torch.float32)]
        at_once = CHUNK[cells.device.type]
        chunks = zip(torch.split(cells, at_once), torch.split(row, at_once), strict=True)
        for cell, rows in chunks:
            corner = torch.stack((cell // (d * d), cell // d % d, cell % d), -1)
            inside = torch.rand(corner.shape, generator=rng, device=cell.device)
            found.append(field.density(low + size * (corner + inside) / d, rows).float())
        return torch.cat(found)


def _dilate(cells: Tensor) -> Tensor:
    """Dilate (D, D, D) bool by one cell in every direction, corners included."""
    grown = cells[None, None].float()
    for kernel in ((3, 1, 1), (1, 3, 1), (1, 1, 3)):  # separable: cheaper than one cube
        pad = tuple(k // 2 for k in kernel)
        grown = nn.functional.max_pool3d(grown, kernel, stride=1, padding=pad)
    return grown[0, 0] > 0
