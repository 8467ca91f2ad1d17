"""Triton kernels that apply per-row motions to points: the CUDA version of `rigid.moved`.

Plain torch operations write a motion per point to memory, read it back, and read it again for the
gradient; and the gradients of a few motions, to which a quarter of a million points add, serialise
on memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # points per program


class Move(torch.autograd.Function):
    """x (N, 3), motion (T, 3, 4), row (N,) -> (N, 3), floats in float32; gradients to x and motion.

    If T is 1, that motion applies to all points and row is ignored.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, motion: Tensor, row: Tensor) -> Tensor:
        x, motion, row = x.contiguous(), motion.contiguous(), row.contiguous()
        out = torch.empty_like(x)
        if len(x):
            _move[(triton.cdiv(len(x), BLOCK),)](
                x, motion, row, out, len(x), MANY=len(motion) > 1, BLOCK=BLOCK
            )
        ctx.save_for_backward(x, motion, row)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, motion, row = ctx.saved_tensors
        of_x, of_motion, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if of_x else None
        grad_motion = torch.zeros_like(motion) if of_motion else None
        if len(x):
            # placeholders for the unused outputs, which the kernel does not touch
            _move_back[(triton.cdiv(len(x), BLOCK),)](
                x,
                motion,
                row,
                grads[0].contiguous(),
                x if grad_x is None else grad_x,
                motion if grad_motion is None else grad_motion,
                len(x),
                MANY=len(motion) > 1,
                OF_X=of_x,
                OF_MOTION=of_motion,
                BLOCK=BLOCK,
            )
        return grad_x, grad_motion, None


@triton.jit
def _rows(row, point, here, MANY: tl.constexpr):
    rows = tl.zeros_like(point)
    if MANY:
        rows += tl.load(row + point, mask=here, other=0).to(tl.int32)
    return rows


@triton.jit
def _move(x, motion, row, out, n, MANY: tl.constexpr, BLOCK: tl.constexpr):
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = point < n
    own = motion + 12 * _rows(row, point, here, MANY)
    x0 = tl.load(x + 3 * point, mask=here, other=0.0)
    x1 = tl.load(x + 3 * point + 1, mask=here, other=0.0)
    x2 = tl.load(x + 3 * point + 2, mask=here, other=0.0)
    for i in tl.static_range(3):
        y = tl.load(own + 4 * i) * x0 + tl.load(own + 4 * i + 1) * x1
        y += tl.load(own + 4 * i + 2) * x2 + tl.load(own + 4 * i + 3)
        tl.store(out + 3 * point + i, y, mask=here)


@triton.jit
def _move_back(
    x, motion, row, grad, grad_x, grad_motion, n,
    MANY: tl.constexpr, OF_X: tl.constexpr, OF_MOTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = point < n
    rows = _rows(row, point, here, MANY)
    g0 = tl.load(grad + 3 * point, mask=here, other=0.0)
    g1 = tl.load(grad + 3 * point + 1, mask=here, other=0.0)
    g2 = tl.load(grad + 3 * point + 2, mask=here, other=0.0)
    if OF_X:
        own = motion + 12 * rows
        for i in tl.static_range(3):
            back = tl.load(own + i) * g0 + tl.load(own + 4 + i) * g1 + tl.load(own + 8 + i) * g2
            tl.store(grad_x + 3 * point + i, back, mask=here)
    if OF_MOTION:
        # Points of a block mostly share a row: sum over the block first, then one atomic.
        one = tl.max(tl.where(here, rows, 0), 0)
        alike = tl.min(tl.where(here, rows, one), 0) == one
        some = here & ((g0 != 0) | (g1 != 0) | (g2 != 0))
        for j in tl.static_range(4):
            at = 1.0
            if j < 3:
                at = tl.load(x + 3 * point + j, mask=here, other=0.0)
            for i in tl.static_range(3):
                part = at * (g0 if i == 0 else (g1 if i == 1 else g2))
                place = grad_motion + 4 * i + j
                if alike:
                    tl.atomic_add(place + 12 * one, tl.sum(part, 0), sem="relaxed")
                else:
                    tl.atomic_add(place + 12 * rows, part, mask=some, sem="relaxed")
