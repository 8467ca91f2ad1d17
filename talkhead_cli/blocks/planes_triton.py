"""Triton kernels that sample multi-resolution tri-planes: the CUDA version of `grid_sample`.

One kernel per level.  A point's samples of all planes are written side by side, in the dtype of
the networks that read them; grid_sample writes float32 channels-first, to be concatenated,
transposed and cast.  Texels are stored channels-last, so that a texel is one memory access, also
for gradients, whose atomic additions are the slowest part of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # points per program


class ReadPlanes(torch.autograd.Function):
    """Sample levels (3, C, s, s) at x (N, 3) in [-1, 1] -> (N, levels * 3 * C).

    Columns are ordered level, plane (xy, xz, yz), channel, as in `TriPlanes`; points outside are
    clamped to the border.  Gradients go to x and to the texels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, *levels: Tensor) -> Tensor:
        x = x.contiguous()
        turned = [level.permute(0, 2, 3, 1).contiguous() for level in levels]
        (channels,) = {texels.shape[3] for texels in turned}
        out = torch.empty(len(x), 3 * len(turned) * channels, device=x.device, dtype=dtype)
        for index, texels in enumerate(turned):
            if len(x):
                _read[(triton.cdiv(len(x), BLOCK), 3)](
                    x,
                    texels,
                    out,
                    len(x),
                    texels.shape[1],
                    len(turned),
                    index,
                    C=channels,
                    ROOM=triton.next_power_of_2(channels),
                    BLOCK=BLOCK,
                )
        ctx.save_for_backward(x, *turned)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *turned = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = torch.zeros_like(x)
        grad_levels = [torch.zeros_like(texels) for texels in turned]
        for index, (texels, grad_texels) in enumerate(zip(turned, grad_levels, strict=True)):
            channels = texels.shape[3]
            if len(x):
                _spread[(triton.cdiv(len(x), BLOCK),)](
                    x, texels, grad, grad_x, grad_texels, len(x), texels.shape[1], len(turned),
                    index, C=channels, ROOM=triton.next_power_of_2(channels), BLOCK=BLOCK,
                )  # fmt: skip
        return (grad_x, None, *(g.permute(0, 3, 1, 2).contiguous() for g in grad_levels))


@triton.jit
def _corners(x, point, here, axis, side):
    """Along one axis: texels before and after a point, the fraction between, whether inside."""
    at = tl.load(x + 3 * point + axis, mask=here, other=0.0)
    place = ((at + 1) * side - 1) * 0.5  # texel centres: grid_sample's align_corners=False
    inside = (place > 0) & (place < side - 1)
    place = tl.minimum(tl.maximum(place, 0.0), side - 1.0)
    low = tl.floor(place)
    before = low.to(tl.int32)
    after = tl.minimum(before + 1, side - 1)
    return before, after, place - low, inside


@triton.jit
def _read(
    x,
    texels,
    out,
    n,
    side,
    n_levels,
    level,
    C: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(1)
    here = point < n
    across = tl.where(plane == 2, 1, 0)
    down = tl.where(plane == 0, 1, 2)
    x0, x1, right, _ = _corners(x, point, here, across, side)
    y0, y1, under, _ = _corners(x, point, here, down, side)
    channel = tl.arange(0, ROOM)[None, :]
    wanted = here[:, None] & (channel < C)
    base = texels + plane * side * side * C + channel
    a = tl.load(base + ((y0 * side + x0) * C)[:, None], mask=wanted, other=0.0)
    b = tl.load(base + ((y0 * side + x1) * C)[:, None], mask=wanted, other=0.0)
    c = tl.load(base + ((y1 * side + x0) * C)[:, None], mask=wanted, other=0.0)
    d = tl.load(base + ((y1 * side + x1) * C)[:, None], mask=wanted, other=0.0)
    right, under = right[:, None], under[:, None]
    top = a + right * (b - a)
    value = top + under * (c + right * (d - c) - top)
    place = out + ((point.to(tl.int64) * n_levels + level) * 3 + plane)[:, None] * C + channel
    tl.store(place, value.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _spread(
    x, texels, grad, grad_x, grad_texels, n, side, n_levels, level,
    C: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = point < n
    channel = tl.arange(0, ROOM)[None, :]
    wanted = here[:, None] & (channel < C)
    for plane in tl.static_range(3):
        across = 1 if plane == 2 else 0
        down = 1 if plane == 0 else 2
        x0, x1, right, inside_x = _corners(x, point, here, across, side)
        y0, y1, under, inside_y = _corners(x, point, here, down, side)
        start = plane * side * side * C + channel
        place = grad + ((point.to(tl.int64) * n_levels + level) * 3 + plane)[:, None] * C + channel
        g = tl.load(place, mask=wanted, other=0.0).to(tl.float32)
        at00, at01 = ((y0 * side + x0) * C)[:, None], ((y0 * side + x1) * C)[:, None]
        at10, at11 = ((y1 * side + x0) * C)[:, None], ((y1 * side + x1) * C)[:, None]
        base = texels + start
        a = tl.load(base + at00, mask=wanted, other=0.0)
        b = tl.load(base + at01, mask=wanted, other=0.0)
        c = tl.load(base + at10, mask=wanted, other=0.0)
        d = tl.load(base + at11, mask=wanted, other=0.0)
        right, under = right[:, None], under[:, None]
        slope_x = tl.sum(g * ((1 - under) * (b - a) + under * (d - c)), 1)
        slope_y = tl.sum(g * ((1 - right) * (c - a) + right * (d - b)), 1)
        # No atomics where the gradient is zero, as along rays that hit nothing.
        some = wanted & (tl.max((g != 0).to(tl.int32), 1) > 0)[:, None]
        own = grad_texels + start
        tl.atomic_add(own + at00, g * (1 - right) * (1 - under), mask=some, sem="relaxed")
        tl.atomic_add(own + at01, g * right * (1 - under), mask=some, sem="relaxed")
        tl.atomic_add(own + at10, g * (1 - right) * under, mask=some, sem="relaxed")
        tl.atomic_add(own + at11, g * right * under, mask=some, sem="relaxed")
        # No race: levels are launched one after another, and one program owns a point.
        half = 0.5 * side
        old = tl.load(grad_x + 3 * point + across, mask=here, other=0.0)
        tl.store(grad_x + 3 * point + across, old + half * tl.where(inside_x, slope_x, 0.0), here)
        old = tl.load(grad_x + 3 * point + down, mask=here, other=0.0)
        tl.store(grad_x + 3 * point + down, old + half * tl.where(inside_y, slope_y, 0.0), here)
