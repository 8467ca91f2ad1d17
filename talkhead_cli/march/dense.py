"""Reference marcher, which evaluates the field at every sample of every ray, and quadrature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from talkhead_cli.contracts import Field, RayBundle, Rendered
from talkhead_cli.march.marcher import Marcher
from talkhead_cli.march.rays import step_length

SHORT = 32  # up to so many samples, a matrix product beats cumsum on a GPU


def first_sample(rays: RayBundle, step: float, jitter: bool) -> Tensor:
    """Return each ray's first lattice sample (R, 1), near + u * step; sample i is i steps further.

    u = 1/2, or with `jitter` one random number per ray from torch's global RNG.
    """
    u = torch.rand_like(rays.near) if jitter else torch.full_like(rays.near, 0.5)
    return rays.near + u * step


def quadrature(density: Tensor, step: float | Tensor) -> Tensor:
    """Weights w_i = T_i (1 - exp(-density_i step)), T_i = exp(-sum_{j<i} density_j step).

    density (R, S) finite and >= 0, step a number or (R, S) -> (R, S) float32.  Exact for piecewise
    constant density (Max 1995; Mildenhall et al. 2020, eq. 3).
    """
    tau = density.float() * step
    return torch.exp(-_before(tau)) * -torch.expm1(-tau)


def _before(tau: Tensor) -> Tensor:
    """Exclusive cumulative sums (R, S).  Not computed as cumsum minus own value, which would lose
    the sum to rounding at an opaque sample."""
    n = tau.shape[1]
    if tau.is_cuda and n <= SHORT:
        with torch.autocast("cuda", enabled=False):
            return tau @ torch.ones(n, n, device=tau.device).triu(1)
    return nn.functional.pad(tau[:, :-1].cumsum(1), (1, 0))


class DenseMarcher(Marcher):
    """Marcher of all samples, `n_steps` through the box's depth, with one spacing for all rays."""

    def __init__(self, aabb: Tensor, n_steps: int) -> None:
        super().__init__()
        self.step = step_length(aabb, n_steps)

    def march(self, field: Field, rays: RayBundle) -> Rendered:
        """Integrate `field` along `rays`, on the lattice that `PackedMarcher` uses."""
        n_rays, n_channels = len(rays), field.channels
        first = first_sample(rays, self.step, self.training)
        longest = float((rays.far - rays.near).max()) if n_rays else 0.0
        n_samples = max(1, math.ceil(longest / self.step))
        t = first + self.step * torch.arange(n_samples, device=first.device)  # (R, S)
        within = t < rays.far
        # Clamp to `far`: fields need not handle points beyond the box.
        place = torch.minimum(t, rays.far)[..., None]
        x = rays.origins[:, None] + place * rays.directions[:, None]
        d = rays.directions[:, None].expand_as(x)
        row = rays.row[:, None].expand_as(t)
        density, channels = field(x.reshape(-1, 3), d.reshape(-1, 3), row.reshape(-1))
        assert density.shape == (t.numel(),) and channels.shape == (t.numel(), n_channels)

        w = quadrature(torch.where(within, density.view_as(t), 0.0), self.step)
        channels = channels.float().view(*t.shape, n_channels)
        split = n_channels - field.n_detached
        feature = torch.cat(
            (
                (w[..., None] * channels[..., :split]).sum(1),
                (w.detach()[..., None] * channels[..., split:]).sum(1),
            ),
            1,
        )
        opacity = w.sum(1, keepdim=True)
        depth = (w * t).sum(1, keepdim=True)
        mean = depth / opacity.clamp_min(1e-10)
        spread = (w * (t - mean) ** 2).sum(1, keepdim=True)
        return Rendered(feature, opacity, depth, spread, t.numel())
