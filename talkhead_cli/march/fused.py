"""The guided march by kernels of its own, on a GPU that never waits for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Field, RayBundle, Rendered
from .guided import GuidedMarcher
from .packed import PackedMarcher

EVENLY = 3  # times the samples while nobody knows which cells are worth looking at


class FusedMarcher(GuidedMarcher):
    """Twin of `GuidedMarcher` for CUDA devices on which Triton compiles.

    `whole`: rays that meet nothing come along, so that nobody waits to hear which do.  While it is
    `exploring`, more samples, EVENLY times as many, lie in occupied cells one like the other then.
    """

    def __init__(self, lattice: PackedMarcher, n_samples: int, n_cells: int) -> None:
        super().__init__(lattice, n_samples, n_cells)
        self.whole = False

    @property
    def samples_per_ray(self) -> int:
        """Of one that meets anything; of the lattice's rays nobody knows."""
        return self.n_samples * (EVENLY if self.exploring else 1)

    def march(self, field: Field, rays: RayBundle) -> Rendered:
        """Integrate `field` along `rays`; a field that `skips` is asked without waiting."""
        if self.exploring and not self.whole:
            return self.lattice.march(field, rays)
        if getattr(field, "skips", False) and not torch.is_grad_enabled():
            return self._without_waiting(field, rays)
        return self._guided(field, rays)

    def look_closely(self, boxes: Tensor, n_samples: int) -> None:
        """Give every ray so many samples, unless it has as many: the kernels take as many of all
        rays, and do not ask which of them meet the boxes (B, 6)."""
        self.n_samples = max(self.n_samples, n_samples)

    @torch.no_grad()
    def lay(self, rays: RayBundle, n_samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As `GuidedMarcher.lay`; every ray is alive while it is `whole`."""
        t, width, crossing = self._laid(rays)
        if self.whole:
            return t, width, torch.arange(len(rays), device=t.device)
        alive = crossing.nonzero().squeeze(1)  # where a GPU waits, once per march
        return t[alive], width[alive], alive

    def _laid(self, rays: RayBundle) -> tuple[Tensor, Tensor, Tensor]:
        """As `lay`, of all rays (R, K), and whether each has any samples (R,)."""
        from . import guided_triton as kernels  # which no machine without a GPU can import

        grid, k = self.occupancy, self.samples_per_ray
        shift = (torch.rand_like(rays.near) - 0.5) / k if self.training else None
        return kernels.lay(rays, grid.tight_box(), grid.aabb, self._worth(), self.n_cells, k, shift)

    def _worth(self) -> Tensor:
        return self.occupancy.occupied.float() if self.exploring else super()._worth()

    def _without_waiting(self, field: Field, rays: RayBundle) -> Rendered:
        """All rays in one go, and whoever starts it need not know how many of them meet anything:
        the field passes over points of row -1.  No gradients."""
        from . import guided_triton as kernels

        t, width, alive = self._laid(rays)
        shape = n, k = t.shape
        d = rays.directions[:, None].expand(n, k, 3)
        x = torch.addcmul(rays.origins[:, None], t[..., None], d)
        row = torch.where(alive, rays.row, -1)[:, None].expand(shape)
        density, channels = field(x.view(-1, 3), d.reshape(-1, 3), row.reshape(-1))
        maps = kernels.composite(density, channels, t, width, alive)
        feature, opacity, depth, spread = maps.split((field.channels, 1, 1, 1), 1)
        return Rendered(feature, opacity, depth, spread, k * alive.sum())
