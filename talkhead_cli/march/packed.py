"""Packed marching in plain torch: only samples in occupied cells are evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talkhead_cli.contracts import Field, RayBundle, Rendered
from talkhead_cli.march.dense import first_sample, quadrature
from talkhead_cli.march.marcher import Marcher
from talkhead_cli.march.occupancy import OccupancyGrid
from talkhead_cli.march.rays import intersect_box

FIRST_ROUND = 4  # samples; about as many as it takes from empty space into skin
# Step length when looking at new poses, in march steps.  Cells that a step jumps over record no
# weight, so the guided march takes hardly any samples there: holes in thin shoulders.
LOOK_STEP = 0.5


@dataclass(frozen=True)
class Packed:
    """The N samples of R rays in occupied cells, ray by ray and front to back.

    t (N,) distance · ray (N,) long, ascending · start, count (R,) long, each ray's range in them
    """

    t: Tensor
    ray: Tensor
    start: Tensor
    count: Tensor


class PackedMarcher(Marcher):
    """Marcher of the samples of `DenseMarcher`'s lattice that lie in occupied cells.

    With gradients, all are evaluated at once.  Without, rays are marched front to back in rounds
    and end when their transmittance falls to `early_stop`: occluded samples are not evaluated, and
    the error of a channel is at most `early_stop` times its largest value.  In training every ray's
    lattice is shifted by a random fraction of a step.
    """

    def __init__(
        self, occupancy: OccupancyGrid, step_length: float, *, early_stop: float = 1e-4
    ) -> None:
        super().__init__()
        assert step_length > 0 and 0 <= early_stop < 1
        self.occupancy, self.step = occupancy, step_length
        self.early_stop = early_stop
        self.watching = False

    @property
    def resolution(self) -> int:
        return self.occupancy.resolution

    @property
    def reports(self) -> bool:
        """Whether compositing weights of samples are reported to the grid."""
        return self.watching or (self.training and torch.is_grad_enabled())

    def march(self, field: Field, rays: RayBundle) -> Rendered:
        packed = self.sample(rays)
        origin = first_distance(packed)
        feature = rays.origins.new_zeros(len(rays), field.channels, dtype=torch.float32)
        moments = feature.new_zeros(len(rays), 3)
        alive = packed.count.nonzero().squeeze(1)
        through = feature.new_ones(len(alive))
        n_points = 0
        for a, b in self._rounds(packed):
            if not len(alive):
                break
            start, n_left = packed.start[alive] + a, packed.count[alive] - a
            width = min(b - a, int(n_left.max()))
            lane = torch.arange(width, device=alive.device)
            slot = (lane < n_left[:, None]).view(-1).nonzero().squeeze(1)  # into (A, width)
            if a == 0 and b == len(packed.t):  # one round: packed order equals slot order
                t, ray = packed.t, packed.ray
            else:
                here = (start[:, None] + lane).view(-1).index_select(0, slot)
                t, ray = packed.t.index_select(0, here), packed.ray.index_select(0, here)
            x, density, channels = ask(field, rays, t, ray)
            n_points += len(t)

            shape = (len(alive), width)
            matrix = density.new_zeros(shape[0] * width)
            w = quadrature(matrix.scatter(0, slot, density).view(shape), self.step)
            w = w * through[:, None]
            packed_w = w.view(-1).index_select(0, slot)
            if self.reports:
                self.occupancy.observe(x, packed_w)
            feature = feature + _composite(field, packed_w, channels, ray, len(rays))
            s = matrix.scatter(0, slot, t).view(shape) - origin[alive]
            ws = w * s
            sums = torch.stack((w.sum(1), ws.sum(1), (ws * s).sum(1)), 1)
            moments = moments.index_add(0, alive, sums)
            through = through - w.detach().sum(1)
            keep = (through > self.early_stop) & (n_left > width)
            alive, through = alive[keep], through[keep]

        if torch.is_grad_enabled() and not len(packed.t):  # the result keeps its graph all the same
            _, density, channels = ask(field, rays, packed.t, packed.ray)
            feature = _composite(field, density, channels, packed.ray, len(rays))
            moments = moments.index_add(0, packed.ray, density[:, None].expand(-1, 3))
        return Rendered.of_moments(feature, moments, origin, n_points)

    def refresh(self, field: Field, step: int) -> None:
        self.occupancy.update(field, step)

    @torch.no_grad()
    def extend_from_views(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        """Extend the grid to poses and views not seen in training, each a field of one row.

        Opens the cells they fill, marches the views to record weights, and closes newly opened
        cells that contribute to no ray: as many lie under the skin.
        """
        grid, known = self.occupancy, self.occupancy.occupied.clone()
        for number, (field, _) in enumerate(views):
            grid.extend(field, [0], look=number)
        if not grid.watched:
            return
        step, self.step = self.step, LOOK_STEP * self.step
        try:
            self._watch(views)
        finally:
            self.step = step
        grid.close_unseen(known)

    @torch.no_grad()
    def rebuild_from_views(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        """Build the grid from scratch for fields not seen in training; each view's has one row.

        Opens the cells that the views fill, and closes those that contribute to none of the rays.
        """
        grid = self.occupancy
        grid.forget()
        for number, (field, _) in enumerate(views):
            grid.extend(field, [0], look=number)
        self._watch(views)
        grid.close_unseen(torch.zeros_like(grid.occupied))

    def _watch(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        """March the views and report the weights of their samples to the grid."""
        self.watching = True
        try:
            for field, rays in views:
                self.march(field, rays)
        finally:
            self.watching = False

    @torch.no_grad()
    def sample(self, rays: RayBundle) -> Packed:
        """Return the lattice samples of each ray that lie in occupied cells."""
        first = first_sample(rays, self.step, self.training)
        enter, leave = intersect_box(rays.origins, rays.directions, self.occupancy.tight_box())
        # The lattice starts at `near`, independent of the grid: a cell that opens or closes must
        # not move the other samples.  One extra sample on either side absorbs rounding.
        begin = ((enter - first) / self.step).floor().clamp_min(0)
        end = ((torch.minimum(leave, rays.far) - first) / self.step).ceil() + 1
        span = torch.where(leave > enter, end - begin, 0).clamp_min(0).squeeze(1)
        live = (span > 0).nonzero().squeeze(1)
        count = live.new_zeros(len(rays))
        found = [first.new_zeros(0)]
        for part in torch.split(live, rays_at_once(live.device)) if len(live) else ():
            lane = torch.arange(int(span[part].max()), device=part.device)
            t = first[part] + self.step * (begin[part] + lane)  # (R', S)
            keep = self.occupancy.along(rays.origins[part], rays.directions[part], t)
            keep &= t < rays.far[part]
            count[part] = keep.sum(1)
            found.append(t.view(-1).index_select(0, keep.view(-1).nonzero().squeeze(1)))
        return pack(torch.cat(found), count)

    def _rounds(self, packed: Packed) -> Iterator[tuple[int, int]]:
        """Yield the range a <= i < b of each ray's samples that a round evaluates."""
        if torch.is_grad_enabled() or self.early_stop == 0:
            yield 0, len(packed.t)
            return
        a, n = 0, FIRST_ROUND
        while True:
            yield a, a + n
            a, n = a + n, max(n, a)  # 4, 4, 8, 16, ...


def pack(t: Tensor, count: Tensor) -> Packed:
    """Pack samples t (N,), ordered by ray, with counts (R,) per ray."""
    ray = torch.arange(len(count), device=t.device).repeat_interleave(count)
    return Packed(t, ray, count.cumsum(0) - count, count)


def _composite(field: Field, w: Tensor, channels: Tensor, ray: Tensor, n_rays: int) -> Tensor:
    """Weights (N,), channels (N, C), ray (N,) -> (n_rays, C); the last with w detached."""
    attached = field.channels - field.n_detached
    zeros = torch.zeros(n_rays, field.channels, device=w.device)
    # Summed separately: concatenating per ray costs a hundredth of concatenating per sample.
    parts = (
        zeros[:, part].index_add(0, ray, weight[:, None] * channels[:, part].float())
        for weight, part in ((w, slice(attached)), (w.detach(), slice(attached, None)))
    )
    return torch.cat(tuple(parts), 1)


def first_distance(packed: Packed) -> Tensor:
    """Return the distance (R, 1) of each ray's first sample, 0 if it has none."""
    some = packed.count > 0
    at = torch.where(some, packed.start, 0)
    t = packed.t if len(packed.t) else packed.t.new_zeros(1)
    return torch.where(some, t.index_select(0, at), 0.0)[:, None]


def rays_at_once(device: torch.device) -> int:
    """Return how many rays are tested against the grid at once."""
    return 2048 if device.type == "cpu" else 2**21  # on a CPU, few enough to stay in its cache


def ask(field: Field, rays: RayBundle, t: Tensor, ray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the field at t (N,) along rays (N,): x (N, 3), density (N,), channels (N, C)."""
    d = rays.directions.index_select(0, ray)
    x = rays.origins.index_select(0, ray) + t[:, None] * d
    density, channels = field(x, d, rays.row.index_select(0, ray))
    assert density.shape == t.shape, (density.shape, t.shape)
    assert channels.shape == (len(t), field.channels), channels.shape
    return x, density.float(), channels
