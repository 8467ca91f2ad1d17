"""Rays of camera pixels, and their intersection with the field's box."""

from __future__ import annotations

import torch
from torch import Tensor

from talkhead_cli.contracts import Camera, RayBundle

NEAR = 0.01  # near plane, face heights from the camera


def step_length(aabb: Tensor, n_steps: int) -> float:
    """Return the length of a march step: the box's depth (z, face heights) over `n_steps`.

    A ray along z takes `n_steps` samples and an oblique one more, so that the spacing, and with it
    the opacity that a density gives per sample, is the same on every ray.
    """
    assert aabb.shape == (6,) and n_steps > 0
    return float(aabb[5] - aabb[2]) / n_steps


def intersect_box(origins: Tensor, directions: Tensor, aabb: Tensor) -> tuple[Tensor, Tensor]:
    """Return where rays enter and leave a box (slab method: Kay & Kajiya 1986).

    origins, directions (R, 3), aabb (6,) -> near, far (R, 1) with NEAR <= near <= far.
    A ray that misses gets near = far.
    """
    assert origins.shape == directions.shape and origins.shape[-1] == 3 and aabb.shape == (6,)
    # For rays parallel to a slab, a huge finite slope avoids 0 * inf = nan.
    tiny = torch.full_like(directions, 1e-12)
    slope = 1.0 / torch.where(directions.abs() < tiny, tiny, directions)
    a, b = (aabb[:3] - origins) * slope, (aabb[3:] - origins) * slope
    near = torch.minimum(a, b).amax(-1, keepdim=True).clamp_min(NEAR)
    far = torch.maximum(a, b).amin(-1, keepdim=True)
    hit = far > near
    near = torch.where(hit, near, NEAR)
    return near, torch.where(hit, far, near)


def pixel_rays(
    camera: Camera,
    row: Tensor,
    pixel: Tensor,
    aabb: Tensor,
    layout: tuple[int, int, int] | None = None,
    whole: bool = False,
) -> RayBundle:
    """Rays through single pixels of a pinhole camera without lens distortion.

    row (R,) long, the row of `camera` of each ray; pixel (R, 2) x, y in pixels of a picture of
    `camera.size_px`, centres at +0.5; aabb (6,) the field's box.
    """
    assert row.ndim == 1 and pixel.shape == (len(row), 2), (row.shape, pixel.shape)
    directions = _directions(camera.k[row], camera.c2w[row], pixel)
    origins = camera.c2w[row, :3, 3]
    near, far = intersect_box(origins, directions, aabb)
    return RayBundle(origins, directions, near, far, pixel, row, layout, whole)


def _directions(k: Tensor, c2w: Tensor, pixel: Tensor) -> Tensor:
    """Return unit world directions (..., 3) through pixels (..., 2) of cameras k (..., 3, 3), c2w
    (..., 4, 4)."""
    y = (pixel[..., 1] - k[..., 1, 2]) / k[..., 1, 1]
    x = (pixel[..., 0] - k[..., 0, 2] - k[..., 0, 1] * y) / k[..., 0, 0]
    # not @, which autocast would run in half precision.  Camera axes: z forward
    along = [c2w[..., i, 0] * x + c2w[..., i, 1] * y + c2w[..., i, 2] for i in range(3)]
    return torch.nn.functional.normalize(torch.stack(along, -1), dim=-1)


def picture_rays(camera: Camera, rows: Tensor, aabb: Tensor) -> RayBundle:
    """Rays through every pixel of whole pictures in raster order, layout (B, H, W).

    rows (B,) long, indices into `camera`; `row` of the rays holds the same indices.
    """
    assert rows.ndim == 1
    size = camera.size_px
    centre = torch.arange(size, device=rows.device, dtype=camera.k.dtype) + 0.5
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    pixel = torch.stack((x, y), -1).reshape(1, -1, 2)
    k, c2w = camera.k[rows, None], camera.c2w[rows, None]  # broadcast over pixels, not copied
    directions = _directions(k, c2w, pixel).flatten(0, 1)
    everywhere = len(rows), size * size
    origins = c2w[..., :3, 3].expand(*everywhere, 3).flatten(0, 1)
    near, far = intersect_box(origins, directions, aabb)
    return RayBundle(
        origins,
        directions,
        near,
        far,
        pixel.expand(*everywhere, 2).flatten(0, 1),
        rows[:, None].expand(everywhere).flatten(),
        (len(rows), size, size),
        whole=True,
    )
