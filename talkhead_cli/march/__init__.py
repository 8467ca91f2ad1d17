"""Volume rendering: rays through an occupancy grid to composited channels.

The only room that asks whether CUDA exists. A marcher sees points, directions and row
numbers; what moved the points there is the field's affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..contracts import MisuseError, TalkheadError
from .cuda import NerfaccMarcher, check, obstacle
from .dense import DenseMarcher
from .fused import FusedMarcher
from .guided import GuidedMarcher
from .occupancy import OccupancyGrid
from .packed import PackedMarcher
from .rays import intersect_box, picture_rays, pixel_rays, step_length
from .replay import CannotRecordError, Replay

__all__ = [
    "CannotRecordError",
    "DenseMarcher",
    "FusedMarcher",
    "GuidedMarcher",
    "MarchOptions",
    "Marcher",
    "NerfaccMarcher",
    "OccupancyGrid",
    "PackedMarcher",
    "Replay",
    "build",
    "check",
    "device_name",
    "device_of",
    "intersect_box",
    "obstacle",
    "picture_rays",
    "pixel_rays",
    "room_on",
    "step_length",
]

Marcher: TypeAlias = DenseMarcher | PackedMarcher | GuidedMarcher
KINDS = ("auto", "packed", "dense", "nerfacc")


@dataclass(frozen=True)
class MarchOptions:
    """How finely to march.

    n_steps     samples of a ray straight through the box: step = depth (z) / n_steps
    n_samples   samples of a ray where the grid knows what to look at; 0: every occupied one
    resolution  cells of the occupancy grid along each axis
    early_stop  transmittance at which a ray ends when no gradient is wanted; 0: never
    every       training steps between updates of the grid
    kind        "auto" takes nerfacc where its kernels can be had, else packed
    """

    n_steps: int = 64
    n_samples: int = 0
    resolution: int = 64
    early_stop: float = 1e-4
    every: int = 16
    kind: Literal["auto", "packed", "dense", "nerfacc"] = "auto"


def device_of(name: str) -> torch.device:
    """auto, cpu or cuda -> the device to work on."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise MisuseError(f"--device must be auto, cpu or cuda, not '{name}'")
    if name == "cuda" and not torch.cuda.is_available():
        raise TalkheadError("no CUDA device is found; use --device cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What to call a device in records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def room_on(device: torch.device) -> int:
    """Bytes that are free on a CUDA device; none on any other, whose memory is the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def build(
    options: MarchOptions, aabb: Tensor, device: torch.device | str, *, kernels: bool = False
) -> tuple[Marcher, str]:
    """The marcher for a box (6,) on a device, and one line that says why this one.

    kernels: whether Triton's compile there
    """
    device = torch.device(device)
    if options.kind not in KINDS:
        raise MisuseError(f"march.kind is {options.kind!r}; use one of {', '.join(KINDS)}")
    aabb = aabb.to(device)
    if options.kind == "dense":
        return DenseMarcher(aabb, options.n_steps), "dense: asked for"

    step = step_length(aabb, options.n_steps)
    grid = OccupancyGrid(aabb, step, options.resolution)

    def made(kind: type[PackedMarcher]) -> PackedMarcher | GuidedMarcher:
        lattice = kind(grid, step, early_stop=options.early_stop, every=options.every)
        if not options.n_samples:
            return lattice
        guided = FusedMarcher if kernels else GuidedMarcher
        return guided(lattice, options.n_samples, options.n_steps)

    if options.kind == "packed":
        return made(PackedMarcher), "packed: asked for"
    why_not = obstacle() if device.type == "cuda" else "nerfacc needs a CUDA device"
    if not why_not:
        return made(NerfaccMarcher), "nerfacc: CUDA kernels"
    if options.kind == "nerfacc":
        raise TalkheadError(f"nerfacc cannot be used ({why_not}); set march.kind=packed")
    return made(PackedMarcher), f"packed in plain torch: {why_not}"
