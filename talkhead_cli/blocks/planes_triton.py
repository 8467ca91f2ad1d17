"""The multi-resolution planes as one Triton kernel per level: CUDA's twin of `grid_sample`.

A point's readings of a level's three planes land side by side in the row that the networks
read, in their precision; grid_sample writes them channel by channel in float32, to be joined,
turned and cast.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # points per program


class ReadPlanes(torch.autograd.Function):
    """x (N, 3), the box mapped to [-1, 1], and levels (3, C, s, s) -> (N, levels * 3 * C).

    Columns are ordered level, plane (xy, xz, yz), channel, as `TriPlanes` orders them; outside
    the box the border's value is read.  Gradients go to x and to the texels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, *levels: Tensor) -> Tensor:
        x = x.contiguous()
        width = sum(3 * level.shape[1] for level in levels)
        out = torch.empty(len(x), width, device=x.device, dtype=dtype)
        column = 0
        for level in levels:
            channels, side = level.shape[1], level.shape[-1]
            grid = (triton.cdiv(len(x), BLOCK), 3)
            if len(x):
                _read[grid](x, level, out, len(x), side, width, column, C=channels, BLOCK=BLOCK)
            column += 3 * channels
        ctx.save_for_backward(x, *levels)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *levels = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = torch.zeros_like(x)
        grad_levels = [torch.zeros_like(level) for level in levels]
        column = 0
        for level, grad_level in zip(levels, grad_levels, strict=True):
            channels, side = level.shape[1], level.shape[-1]
            if len(x):
                _spread[(triton.cdiv(len(x), BLOCK),)](
                    x, level, grad, grad_x, grad_level, len(x), side, grad.shape[1], column,
                    C=channels, BLOCK=BLOCK,
                )  # fmt: skip
            column += 3 * channels
        return (grad_x, None, *grad_levels)


@triton.jit
def _corners(x, point, here, axis, side):
    """Along one axis: the texel before a point, the one after, how far between, whether inside."""
    at = tl.load(x + 3 * point + axis, mask=here, other=0.0)
    place = ((at + 1) * side - 1) * 0.5  # texel centres: grid_sample's align_corners=False
    inside = (place > 0) & (place < side - 1)
    place = tl.minimum(tl.maximum(place, 0.0), side - 1.0)
    low = tl.floor(place)
    before = low.to(tl.int32)
    after = tl.minimum(before + 1, side - 1)
    return before, after, place - low, inside


@triton.jit
def _read(x, texels, out, n, side, stride, column, C: tl.constexpr, BLOCK: tl.constexpr):
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(1)
    here = point < n
    across = tl.where(plane == 2, 1, 0)
    down = tl.where(plane == 0, 1, 2)
    x0, x1, right, _ = _corners(x, point, here, across, side)
    y0, y1, under, _ = _corners(x, point, here, down, side)
    for channel in tl.static_range(C):
        base = texels + (plane * C + channel) * side * side
        a = tl.load(base + y0 * side + x0, mask=here, other=0.0)
        b = tl.load(base + y0 * side + x1, mask=here, other=0.0)
        c = tl.load(base + y1 * side + x0, mask=here, other=0.0)
        d = tl.load(base + y1 * side + x1, mask=here, other=0.0)
        top = a + right * (b - a)
        value = top + under * (c + right * (d - c) - top)
        place = out + point.to(tl.int64) * stride + column + plane * C + channel
        tl.store(place, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _spread(x, texels, grad, grad_x, grad_texels, n, side, stride, column,
            C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = point < n
    for plane in tl.static_range(3):
        across = 1 if plane == 2 else 0
        down = 1 if plane == 0 else 2
        x0, x1, right, inside_x = _corners(x, point, here, across, side)
        y0, y1, under, inside_y = _corners(x, point, here, down, side)
        slope_x = tl.zeros((BLOCK,), tl.float32)
        slope_y = tl.zeros((BLOCK,), tl.float32)
        for channel in tl.static_range(C):
            start = (plane * C + channel) * side * side
            place = grad + point.to(tl.int64) * stride + column + plane * C + channel
            g = tl.load(place, mask=here, other=0.0).to(tl.float32)
            a = tl.load(texels + start + y0 * side + x0, mask=here, other=0.0)
            b = tl.load(texels + start + y0 * side + x1, mask=here, other=0.0)
            c = tl.load(texels + start + y1 * side + x0, mask=here, other=0.0)
            d = tl.load(texels + start + y1 * side + x1, mask=here, other=0.0)
            slope_x += g * ((1 - under) * (b - a) + under * (d - c))
            slope_y += g * ((1 - right) * (c - a) + right * (d - b))
            own = grad_texels + start
            tl.atomic_add(own + y0 * side + x0, g * (1 - right) * (1 - under), mask=here)
            tl.atomic_add(own + y0 * side + x1, g * right * (1 - under), mask=here)
            tl.atomic_add(own + y1 * side + x0, g * (1 - right) * under, mask=here)
            tl.atomic_add(own + y1 * side + x1, g * right * under, mask=here)
        # Levels are launched one after another, and a point belongs to one program: no race.
        half = 0.5 * side
        old = tl.load(grad_x + 3 * point + across, mask=here, other=0.0)
        tl.store(grad_x + 3 * point + across, old + half * tl.where(inside_x, slope_x, 0.0), here)
        old = tl.load(grad_x + 3 * point + down, mask=here, other=0.0)
        tl.store(grad_x + 3 * point + down, old + half * tl.where(inside_y, slope_y, 0.0), here)
