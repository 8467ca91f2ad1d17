"""Triton kernels of the guided march: importance sampling and compositing of rays.

In plain torch, every operation on a ray's cells and samples goes through memory, and cumsum along
short rows is slow; here each ray loops over its cells and samples in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from talkhead_cli.contracts import RayBundle

BLOCK = 64  # rays per program


def lay(
    rays: RayBundle,
    box: Tensor,
    aabb: Tensor,
    worth: Tensor,
    n_cells: int,
    n_samples: int,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`GuidedMarcher.lay` for all rays: t, width (R, K), and whether they have samples (R,).

    box (6,) around occupied cells · aabb (6,) of the grid · worth (D, D, D) sampling weights of its
    cells · shift (R, 1) of all quantiles of a ray, a share of its total weight
    """
    n, side = len(rays), worth.shape[0]
    t, width = rays.near.new_empty(n, n_samples), rays.near.new_empty(n, n_samples)
    alive = torch.empty(n, dtype=torch.bool, device=t.device)
    if n:
        _lay[(triton.cdiv(n, BLOCK),)](
            rays.origins.contiguous(), rays.directions.contiguous(), rays.near.contiguous(),
            rays.far.contiguous(), box, aabb, worth.contiguous(), t if shift is None else shift,
            t, width, alive, n,
            D=side, N=n_cells, K=n_samples, ROOM=triton.next_power_of_2(n_samples),
            SHIFTED=shift is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return t, width, alive


def composite(density: Tensor, channels: Tensor, t: Tensor, width: Tensor, alive: Tensor) -> Tensor:
    """Composite density (R K,), channels (R K, C) of samples at t with width (R, K) -> (R, C + 3):
    channels, opacity, depth and spread as in `Rendered`; zeros for rays not alive (R,)."""
    n, k = t.shape
    n_channels = channels.shape[1]
    maps = t.new_empty(n, n_channels + 3)
    if n:
        _composite[(triton.cdiv(n, BLOCK),)](
            density.contiguous(), channels.contiguous(), t, width, alive, maps, n,
            K=k, C=n_channels, ROOM=triton.next_power_of_2(n_channels), BLOCK=BLOCK,
        )  # fmt: skip
    return maps


@triton.jit
def _part(origins, directions, box, ray, here, axis: tl.constexpr):
    """Along one axis: a ray's origin and direction, and where it enters and leaves the slab."""
    o = tl.load(origins + 3 * ray + axis, mask=here, other=0.0)
    d = tl.load(directions + 3 * ray + axis, mask=here, other=1.0)
    slope = 1 / tl.where(tl.abs(d) < 1e-12, 1e-12, d)
    a = (tl.load(box + axis) - o) * slope
    b = (tl.load(box + 3 + axis) - o) * slope
    return o, d, tl.minimum(a, b), tl.maximum(a, b)


@triton.jit
def _worth(worth, aabb, at, o0, d0, o1, d1, o2, d2, D: tl.constexpr):
    """Sampling weights of the cells at distances `at`; outside the grid, of the nearest cell."""
    cell = tl.zeros_like(at)
    for axis in tl.static_range(3):
        o = o0 if axis == 0 else (o1 if axis == 1 else o2)
        d = d0 if axis == 0 else (d1 if axis == 1 else d2)
        low = tl.load(aabb + axis)
        scale = D / (tl.load(aabb + 3 + axis) - low)
        place = at * (d * scale) + (o - low) * scale
        cell = cell * D + tl.floor(tl.minimum(tl.maximum(place, 0.0), D - 1.0))
    return tl.load(worth + cell.to(tl.int32))


@triton.jit
def _lay(
    origins, directions, nears, fars, box, aabb, worth, shifts, t, width, alive, n,
    D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROOM: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    ray = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = ray < n
    o0, d0, a0, b0 = _part(origins, directions, box, ray, here, 0)
    o1, d1, a1, b1 = _part(origins, directions, box, ray, here, 1)
    o2, d2, a2, b2 = _part(origins, directions, box, ray, here, 2)
    begin = tl.load(nears + ray, mask=here, other=0.0)
    far = tl.load(fars + ray, mask=here, other=0.0)
    near = tl.maximum(begin, tl.maximum(a0, tl.maximum(a1, a2)))
    far = tl.minimum(far, tl.minimum(b0, tl.minimum(b1, b2)))
    cell = (far - near) / N
    crossing = cell > 0
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(N):
        value = _worth(worth, aabb, near + cell * (i + 0.5), o0, d0, o1, d1, o2, d2, D)
        total += tl.where(crossing, value, 0.0)
    tl.store(alive + ray, total > 0, mask=here)
    # On rays that miss the box, `near` may be 1e5 face heights away, which overflows float16, and
    # the field would return NaN there.
    near = tl.where(total > 0, near, begin)
    cell = tl.where(total > 0, cell, 0.0)

    # Quantiles of each sample's two edges and its middle.
    k = tl.arange(0, ROOM)
    lower = (k / K)[None, :] + tl.zeros((BLOCK, ROOM), tl.float32)
    middle, upper = lower + 0.5 / K, lower + 1.0 / K
    if SHIFTED:
        shift = tl.load(shifts + ray, mask=here, other=0.0)[:, None]
        lower = tl.where(k[None, :] == 0, 0.0, lower + shift)
        middle += shift
        upper = tl.where(k[None, :] == K - 1, 1.0, upper + shift)
    whole = (total * (1 - 1e-6))[:, None]
    lower, middle, upper = lower * whole, middle * whole, upper * whole
    before = tl.zeros((BLOCK,), tl.float32)
    passed = tl.zeros((BLOCK,), tl.float32)  # occupied cells so far
    low, high = tl.zeros_like(lower), tl.zeros_like(lower)
    place = tl.zeros_like(lower)
    for i in range(N):
        value = _worth(worth, aabb, near + cell * (i + 0.5), o0, d0, o1, d1, o2, d2, D)
        value = tl.where(crossing, value, 0.0)
        after = before + value
        passed += tl.where(value > 0, 1.0, 0.0)
        a, b = before[:, None], after[:, None]
        rate = 1 / tl.maximum(value, 1e-9)[:, None]
        last = i == N - 1
        into = tl.minimum(tl.maximum((lower - b) * rate + 1, 0.0), 1.0)
        low = tl.where((lower >= a) & ((lower < b) | last), passed[:, None] - 1 + into, low)
        into = tl.minimum(tl.maximum((upper - b) * rate + 1, 0.0), 1.0)
        high = tl.where((upper >= a) & ((upper < b) | last), passed[:, None] - 1 + into, high)
        into = tl.minimum(tl.maximum((middle - b) * rate + 1, 0.0), 1.0)
        place = tl.where((middle >= a) & ((middle < b) | last), i + into, place)
        before = after
    out = ray[:, None] * K + k[None, :]
    wanted = here[:, None] & (k[None, :] < K)
    tl.store(t + out, near[:, None] + cell[:, None] * place, mask=wanted)
    tl.store(width + out, (high - low) * cell[:, None], mask=wanted)


@triton.jit
def _composite(
    density, channels, t, width, alive, maps, n,
    K: tl.constexpr, C: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ray = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = ray < n
    asked = here & tl.load(alive + ray, mask=here, other=0).to(tl.int1)
    column = tl.arange(0, ROOM)
    wanted = asked[:, None] & (column < C)[None, :]
    feature = tl.zeros((BLOCK, ROOM), tl.float32)
    opacity = tl.zeros((BLOCK,), tl.float32)
    first, second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    passed = tl.zeros((BLOCK,), tl.float32)  # optical depth so far
    origin = tl.load(t + ray * K, mask=asked, other=0.0)
    for i in range(K):
        at = ray * K + i
        tau = tl.load(density + at, mask=asked, other=0.0).to(tl.float32)
        tau *= tl.load(width + at, mask=asked, other=0.0)
        w = tl.exp(-passed) * (1 - tl.exp(-tau))
        passed += tau
        s = tl.load(t + at, mask=asked, other=0.0) - origin
        opacity += w
        first += w * s
        second += w * s * s
        value = tl.load(channels + at[:, None] * C + column[None, :], mask=wanted, other=0.0)
        feature += w[:, None] * value.to(tl.float32)
    place = maps + ray * (C + 3)
    tl.store(place[:, None] + column[None, :], feature, mask=here[:, None] & (column < C)[None, :])
    spread = second - first * first / tl.maximum(opacity, 1e-10)
    tl.store(place + C, opacity, mask=here)
    tl.store(place + C + 1, first + origin * opacity, mask=here)
    tl.store(place + C + 2, tl.maximum(spread, 0.0), mask=here)
