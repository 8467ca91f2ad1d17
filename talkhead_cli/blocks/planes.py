"""Axis-aligned feature planes: multi-resolution tri-planes, and reading them at points."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The two coordinates that each plane keeps: xy, xz, yz.
_PAIRS = (slice(0, 2), slice(0, 3, 2), slice(1, 3))
GATHER = 1.6  # strength of the asinh warp that gives the face more texels than the box's rim


@cache
def why_no_triton() -> str:
    """Return why the Triton kernel cannot run on this GPU, or "" if it can.

    Triton comes with torch's CUDA builds, but compiles its kernel launchers with the machine's C
    compiler, which may be missing.
    """
    if importlib.util.find_spec("triton") is None:
        return "there is no triton"
    try:
        from talkhead_cli.blocks.planes_triton import ReadPlanes

        level = torch.zeros(3, 1, 2, 2, device="cuda")
        ReadPlanes.apply(torch.zeros(1, 3, device="cuda"), torch.float32, level)
    except Exception as error:  # whatever compiler and driver raise
        said = str(error).strip().splitlines()
        return f"{type(error).__name__}: {said[0] if said else ''}"
    return ""


class TriPlanes(nn.Module):
    """Multi-resolution tri-plane encoder (EG3D's planes, instant-ngp's resolution pyramid).

    Each level holds three planes of C channels, sampled bilinearly; the samples of all planes
    and levels are concatenated.
    """

    def __init__(self, sizes: Sequence[int], channels: int, *, spread: float = 0.1) -> None:
        """sizes: sides of the levels · spread: planes start uniform in [-spread, spread]"""
        super().__init__()
        self.levels = nn.ParameterList(
            nn.Parameter(torch.empty(3, channels, s, s).uniform_(-spread, spread)) for s in sizes
        )
        self.n_out = 3 * channels * len(sizes)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3) in [-1, 1], clamped to the border outside -> (N, n_out)."""
        assert x.ndim == 2 and x.shape[1] == 3, x.shape
        if x.is_cuda and why_no_triton() == "":
            from talkhead_cli.blocks.planes_triton import ReadPlanes

            half = torch.is_autocast_enabled("cuda")
            dtype = torch.get_autocast_dtype("cuda") if half else x.dtype
            return ReadPlanes.apply(x, dtype, *self.levels)
        grid = torch.stack([x[:, pair] for pair in _PAIRS]).unsqueeze(2)  # (3, N, 1, 2)
        # On a CPU, grid_sample threads over its batch: six half planes balance better than three.
        parts = 2 if torch.get_num_threads() > 1 and self.channels % 2 == 0 else 1
        grid = grid.repeat_interleave(parts, 0)
        found = [
            F.grid_sample(
                level.unflatten(1, (parts, -1)).flatten(0, 1),
                grid,
                padding_mode="border",
                align_corners=False,
            ).flatten(0, 1)
            for level in self.levels
        ]
        # Joined channels-first, as they lie in memory; a matrix product takes the transposed view.
        return torch.cat(found).flatten(1).T

    def roughness(self) -> Tensor:
        """Mean squared difference of neighbouring texels, over planes and levels."""
        return torch.stack([roughness(level) for level in self.levels]).mean()


class Planes2d(nn.Module):
    """Multi-resolution encoder of 2D points: one plane per level."""

    def __init__(self, sizes: Sequence[int], channels: int, *, spread: float = 0.1) -> None:
        super().__init__()
        self.levels = nn.ParameterList(
            nn.Parameter(torch.empty(1, channels, s, s).uniform_(-spread, spread)) for s in sizes
        )
        self.n_out = channels * len(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 2) in [-1, 1] -> (N, n_out)."""
        grid = x[None, :, None].to(self.levels[0].dtype)
        found = [
            F.grid_sample(level, grid, padding_mode="border", align_corners=False)[0, :, :, 0]
            for level in self.levels
        ]
        return torch.cat(found).T

    def roughness(self) -> Tensor:
        """Mean squared difference of neighbouring texels, over levels."""
        return torch.stack([roughness(level) for level in self.levels]).mean()


class PlanePyramid(nn.Module):
    """Three planes as a sum over resolutions, so that unsupervised regions stay smooth."""

    def __init__(self, sizes: Sequence[int], channels: int, *, spread: float = 0.1) -> None:
        """sizes: sides of the levels, ascending, each dividing the next"""
        super().__init__()
        self.levels = nn.ParameterList(
            nn.Parameter(torch.empty(3, channels, s, s).uniform_(-spread, spread)) for s in sizes
        )

    def forward(self) -> Tensor:
        """Return the planes xy, xz, yz (3, C, s, s) at the largest size."""
        first, *finer = self.levels
        planes: Tensor = first
        for level in finer:
            size = (level.shape[-1],) * 2
            planes = level + F.interpolate(planes, size=size, mode="bilinear")
        return planes

    def roughness(self) -> Tensor:
        """Mean squared difference of neighbouring texels, over planes and levels."""
        return torch.stack([roughness(level) for level in self.levels]).mean()

    def asymmetry(self) -> Tensor:
        """Mean squared difference of planes xy, xz and their mirror images in x, over levels."""
        return torch.stack([asymmetry(level) for level in self.levels]).mean()


class RowPlanes:
    """Planes (T, 3, C, s, s) of T rows, sampled at points that each belong to one row.

    The rows' planes lie side by side in one mosaic, so that points need not be sorted by row.
    """

    def __init__(self, planes: Tensor) -> None:
        self.n_rows, _, c, s, _ = planes.shape
        # float32: half precision cannot resolve a texel of a wide mosaic
        self._mosaic = planes.float().permute(1, 2, 3, 0, 4).reshape(3, c, s, -1)

    def __call__(self, x: Tensor, row: Tensor) -> Tensor:
        """x (N, 3) in [-1, 1], clamped to the border outside, row (N,) -> (N, C), the mean of the
        three planes' samples (EG3D)."""
        at = torch.stack([x[:, pair] for pair in _PAIRS])  # (3, N, 2)
        if self.n_rows > 1:
            edge = 1 - 1 / self._mosaic.shape[2]  # outermost texel centres: rows must not mix
            across = (at[..., 0].clamp(-edge, edge) + 1 + 2 * row) / self.n_rows - 1
            at = torch.stack([across, at[..., 1]], -1)
        found = F.grid_sample(
            self._mosaic, at.unsqueeze(2), padding_mode="border", align_corners=False
        )
        return found[..., 0].mean(0).T


def warped(x: Tensor, reach: Tensor) -> Tensor:
    """Warp head space (N, 3) to [-1, 1], expanded near the face; reach (3,) half the box."""
    return _asinh(GATHER * x / reach) / math.asinh(GATHER)


def _asinh(x: Tensor) -> Tensor:
    """asinh; torch's own is nine times slower on a CPU.  (The gradient at exactly 0 is 0.)"""
    if x.is_cuda:
        return x.asinh()
    return (x.abs() + (x * x + 1).sqrt()).log().copysign(x)


def unwarped(x: Tensor, reach: Tensor) -> Tensor:
    """The inverse of `warped`."""
    return (x * math.asinh(GATHER)).sinh() * reach / GATHER


def roughness(texels: Tensor) -> Tensor:
    """Mean squared difference of horizontal plus that of vertical neighbours in (..., s, s).

    The sum of squares is the quadratic form p' L p with the grid's Laplacian L, whose gradient is
    2 L p: one pass gives both, where autograd takes ten times as long.
    """
    with torch.no_grad():
        laplacian = torch.zeros_like(texels)
        for axis in (-1, -2):
            n = texels.shape[axis] - 1
            step = texels.narrow(axis, 1, n) - texels.narrow(axis, 0, n)
            laplacian.narrow(axis, 1, n).add_(step)
            laplacian.narrow(axis, 0, n).sub_(step)
    # L p is a constant to autograd, which sees half of the gradient: hence the factor 2
    form = torch.dot(texels.flatten(), laplacian.flatten())
    return (2 * form - form.detach()) / (texels.numel() / texels.shape[-1] * n)


def asymmetry(planes: Tensor) -> Tensor:
    """Mean squared difference of planes xy and xz, of (3, C, s, s), and their mirror image in x."""
    return (planes[:2] - planes[:2].flip(-1)).square().mean()


def frequencies(x: Tensor, n_octaves: int) -> Tensor:
    """Frequency encoding of x (N, d), input kept -> (N, d (1 + 2 n)) (NeRF, eq. 4)."""
    angle = x[..., None] * (torch.pi * 2.0 ** torch.arange(n_octaves, device=x.device))
    return torch.cat([x, angle.sin().flatten(1), angle.cos().flatten(1)], -1)
