"""Which cells of space a field fills: one grid for all rows, shared by every marcher."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from ..contracts import Field

ALPHA_THRESHOLD = 0.01  # a cell that stops less of the light in one march step is empty
CHUNK = {"cpu": 65_536, "cuda": 2**20}  # points per call of the field
SEEN_THRESHOLD = 0.005  # a cell no sample of which adds more to any pixel is hidden
SEEN_DECAY = 0.9  # per update
SEEN_AT_FIRST = 0.05  # so that cells nobody ever sees close after some twenty updates


class OccupancyGrid(nn.Module):
    """D^3 cells over an anisotropic box, as in Instant-NGP (Mueller et al. 2022, app. E.2).

    Rows are drawn at random, so the grid holds the union over expressions and never hears
    of audio. It is dilated by one cell: without that, a face's rim loses opacity. It starts
    full, and runs repeat because every update is seeded by its step.

    A head is a shell: what lies under the skin is as dense as the skin, and never seen.  While
    training, marchers report what each sample added to its pixel (`observe`), and cells that
    add nothing any more are closed like empty ones.

    density   (D, D, D) moving maximum of the density in each cell
    seen      (D, D, D) moving maximum of the weight of samples in each cell, in [0, 1]
    watched   () bool, whether any marcher reports; if none does, nothing is closed as hidden
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
        """Whether points lie in occupied cells: x (N, 3) -> (N,) bool; outside is empty."""
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
        """Flat numbers of the cells of origins + t * directions: t (R, S) -> (R, S) int.

        Axis by axis and in place, because this touches every sample of every ray and (R, S, 3)
        is what it must not allocate.
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
        """Samples x (N, 3) added `weight` (N,) to their pixels."""
        scale = self.resolution / (self.aabb[3:] - self.aabb[:3])
        place = ((x - self.aabb[:3]) * scale).long().clamp_(0, self.resolution - 1)
        cell = (place[:, 0] * self.resolution + place[:, 1]) * self.resolution + place[:, 2]
        self.seen.view(-1).scatter_reduce_(0, cell, weight.detach().float(), "amax")
        self.watched.fill_(True)

    def tight_box(self) -> Tensor:
        """(6,) the smallest box around the occupied cells; inside out when there are none."""
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
        """Look into the cells once more, for rows drawn at random.

        One random point per cell, each for one of the rows drawn: the occupied cells, which at
        first are all, and a random quarter of the others.
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

        Only cells that are still shut are looked into, so a familiar pose costs one pass
        and a grid that is still full costs nothing.  `look` numbers calls that follow each other:
        each tries other points of a cell, since a thin surface may pass between them.
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
        """Shut every cell; all that comes after is noted."""
        for grid in (self.density, self.seen, self.occupied):
            grid.zero_()
        self.watched.fill_(True)

    @torch.no_grad()
    def close_unseen(self, spared: Tensor) -> None:
        """Close cells that add nothing to any pixel, but for those of `spared` (D, D, D) bool."""
        self.occupied &= spared | _dilate(self.seen > SEEN_THRESHOLD)

    def _generator(self, number: int) -> torch.Generator:
        generator = torch.Generator(self.density.device)
        return generator.manual_seed(number)

    def _alpha(self, density: Tensor) -> Tensor:
        """The share of light that one march step through `density` stops, in [0, 1]."""
        return -torch.expm1(-density * self.step_length)

    def _limit(self, threshold: float) -> Tensor:
        """() The threshold, or the grid's mean alpha while all of it is still thin."""
        return self._alpha(self.density).mean().clamp_max(threshold)

    def _look(self, field: Field, cells: Tensor, row: Tensor, rng: torch.Generator) -> Tensor:
        """Density at one random point in each of `cells` (N,) flat, for `row` (N,) -> (N,)."""
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
    """(D, D, D) bool, grown by one cell in every direction, corners too."""
    grown = cells[None, None].float()
    for kernel in ((3, 1, 1), (1, 3, 1), (1, 1, 3)):  # three lines are cheaper than a cube
        pad = tuple(k // 2 for k in kernel)
        grown = nn.functional.max_pool3d(grown, kernel, stride=1, padding=pad)
    return grown[0, 0] > 0
