"""The pixels that training takes its targets from: on the disk, or on the training device.

Labels are stored at a lower resolution than pictures are trained at, and interpolated bilinearly:
from the nearest label, silhouettes would be staircases, which the losses on opacity would teach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class Pixels(Protocol):
    """Colours (N, 3) and soft labels (N, 6) of pixels, in [0, 1]."""

    def whole(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return all pixels of whole frames, frame after frame in raster order."""

    def at(self, row: Tensor, line: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Return single pixels, each of its own frame."""


@dataclass(frozen=True)
class DiskPixels:
    """pictures (T, s, s, 3) uint8 · labels (T, 6, L, L) uint8, both memory-mapped."""

    pictures: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def whole(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        frames = rows.numpy()
        colours = torch.from_numpy(self.pictures[frames]).view(-1, 3)
        labels = torch.from_numpy(self.labels[frames])
        return _shares(colours), _whole_labels(labels, self.pictures.shape[1])

    def at(self, row: Tensor, line: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        frame = row.numpy()
        colours = torch.from_numpy(self.pictures[frame, line.numpy(), column.numpy()])
        labels = _interpolated(
            lambda y, x: torch.from_numpy(self.labels[frame, :, y.numpy(), x.numpy()]),
            line,
            column,
            self.pictures.shape[1],
            self.labels.shape[-1],
        )
        return _shares(colours), labels


@dataclass(frozen=True)
class DevicePixels:
    """pictures (T, s, s, 3) uint8 · labels (T, L, L, 6) uint8."""

    pictures: Tensor
    labels: Tensor

    @classmethod
    def of(cls, pixels: DiskPixels, device: torch.device) -> DevicePixels:
        pictures, labels = (
            torch.from_numpy(np.array(part)).to(device) for part in (pixels.pictures, pixels.labels)
        )
        return cls(pictures, labels.permute(0, 2, 3, 1).contiguous())

    def whole(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.labels[rows].permute(0, 3, 1, 2)
        return (
            _shares(self.pictures[rows].view(-1, 3)),
            _whole_labels(labels, self.pictures.shape[1]),
        )

    def at(self, row: Tensor, line: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        labels = _interpolated(
            lambda y, x: self.labels[row, y, x],
            line,
            column,
            self.pictures.shape[1],
            self.labels.shape[1],
        )
        return _shares(self.pictures[row, line, column]), labels


def _shares(values: Tensor) -> Tensor:
    return values.float() / 255


def _whole_labels(labels: Tensor, size: int) -> Tensor:
    """Labels (B, 6, L, L) uint8 -> those of all pixels of pictures (size, size), (B * s * s, 6)."""
    shares = _shares(labels)
    if labels.shape[-1] != size:
        shares = F.interpolate(shares, size=(size, size), mode="bilinear")
    return shares.permute(0, 2, 3, 1).reshape(-1, shares.shape[1])


def _interpolated(
    pick: Callable[[Tensor, Tensor], Tensor], line: Tensor, column: Tensor, size: int, side: int
) -> Tensor:
    """Labels (N, 6) of pixels of a picture of `size`, from maps of `side`, which `pick` reads at
    lines and columns."""
    if side == size:
        return _shares(pick(line, column))
    (top, bottom, down), (left, right, along) = (
        _neighbours(pixel, size, side) for pixel in (line, column)
    )
    above, below = (
        torch.lerp(_shares(pick(y, left)), _shares(pick(y, right)), along) for y in (top, bottom)
    )
    return torch.lerp(above, below, down)


def _neighbours(pixel: Tensor, size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the labels' lines before and after pixels (N,), and how far they are from the first
    to the second, (N, 1)."""
    at = ((pixel + 0.5) * (side / size) - 0.5).clamp(0, side - 1)
    before = at.floor()
    first = before.long()
    return first, (first + 1).clamp(max=side - 1), (at - before)[:, None]
