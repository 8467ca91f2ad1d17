"""The guided march with Triton kernels, able to run without host syncs."""

from __future__ import annotations

import torch
from torch import Tensor

from talkhead_cli.contracts import Field, RayBundle, Rendered
from talkhead_cli.march.guided import GuidedMarcher
from talkhead_cli.march.packed import PackedMarcher

EVENLY = 3  # factor on the samples per ray while exploring, when they lie evenly in occupied cells


class FusedMarcher(GuidedMarcher):
    """`GuidedMarcher` for CUDA devices on which Triton compiles.

    `keeps_misses`: also march rays that hit no occupied cell, to avoid the host sync of finding
    those that do.  If also `exploring`, each ray takes EVENLY times as many samples, all cells
    weighted alike.
    """

    def __init__(self, lattice: PackedMarcher, n_samples: int, n_cells: int) -> None:
        super().__init__(lattice, n_samples, n_cells)
        self.keeps_misses = False

    @property
    def waits(self) -> bool:
        return self.exploring

    def fix_shapes(self, on: bool) -> int:
        self.keeps_misses = on
        return self.samples_per_ray if on else 0

    @property
    def samples_per_ray(self) -> int:
        """Samples of each ray of the guided march (the lattice march's number varies)."""
        return self.n_samples * (EVENLY if self.exploring else 1)

    def march(self, field: Field, rays: RayBundle) -> Rendered:
        """Integrate `field` along `rays`, without host sync if it `skips` and no gradients flow."""
        if self.exploring and not self.keeps_misses:
            return self.lattice.march(field, rays)
        if getattr(field, "skips", False) and not torch.is_grad_enabled():
            return self._without_waiting(field, rays)
        return self._guided(field, rays)

    def look_closely(self, boxes: Tensor, n_samples: int) -> None:
        """As `sample_more`: kernels take the same number of samples on every ray."""
        self.sample_more(n_samples)

    def _missed(self, rays: RayBundle, ray: Tensor, opacity: Tensor) -> Tensor:
        return ray[:0]  # `lay` takes the same number of samples on every ray

    @torch.no_grad()
    def lay(self, rays: RayBundle, n_samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As `GuidedMarcher.lay`, but if `keeps_misses`, for all rays; `n_samples` is ignored."""
        t, width, crossing = self._laid(rays)
        if self.keeps_misses:
            return t, width, torch.arange(len(rays), device=t.device)
        alive = crossing.nonzero().squeeze(1)  # a host sync, once per march
        return t[alive], width[alive], alive

    def _laid(self, rays: RayBundle) -> tuple[Tensor, Tensor, Tensor]:
        """Return t and width (R, K) of all rays, and whether each crosses occupied cells (R,)."""
        from talkhead_cli.march import guided_triton as kernels  # not importable without triton

        grid, k = self.occupancy, self.samples_per_ray
        shift = (torch.rand_like(rays.near) - 0.5) / k if self.training else None
        return kernels.lay(rays, grid.tight_box(), grid.aabb, self._worth(), self.n_cells, k, shift)

    def _worth(self) -> Tensor:
        return self.occupancy.occupied.float() if self.exploring else super()._worth()

    def _without_waiting(self, field: Field, rays: RayBundle) -> Rendered:
        """March all rays at once without host sync; the field skips points of row -1, those of rays
        that cross no occupied cell.  No gradients."""
        from talkhead_cli.march import guided_triton as kernels

        t, width, alive = self._laid(rays)
        shape = n, k = t.shape
        d = rays.directions[:, None].expand(n, k, 3)
        x = torch.addcmul(rays.origins[:, None], t[..., None], d)
        row = torch.where(alive, rays.row, -1)[:, None].expand(shape)
        density, channels = field(x.view(-1, 3), d.reshape(-1, 3), row.reshape(-1))
        maps = kernels.composite(density, channels, t, width, alive)
        feature, opacity, depth, spread = maps.split((field.channels, 1, 1, 1), 1)
        return Rendered(feature, opacity, depth, spread, k * alive.sum())
