"""Volume rendering: rays through an occupancy grid to composited channels.

Also chooses the device and the marcher for it.  A marcher sees points, directions and row
numbers only; deforming points is up to the field.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.march.cuda import NerfaccMarcher, check, why_no_nerfacc
from talkhead_cli.march.dense import DenseMarcher
from talkhead_cli.march.fused import FusedMarcher
from talkhead_cli.march.guided import GuidedMarcher
from talkhead_cli.march.marcher import Marcher
from talkhead_cli.march.occupancy import OccupancyGrid
from talkhead_cli.march.packed import PackedMarcher
from talkhead_cli.march.rays import intersect_box, picture_rays, pixel_rays, step_length
from talkhead_cli.march.replay import CannotRecordError, Replay

__all__ = [
    "CannotRecordError",
    "DenseMarcher",
    "FusedMarcher",
    "GuidedMarcher",
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
    "why_no_nerfacc",
    "picture_rays",
    "pixel_rays",
    "room_on",
    "step_length",
]

KINDS = ("auto", "packed", "dense", "nerfacc")


def device_of(name: str) -> torch.device:
    """Return the device called auto, cpu or cuda; errors if CUDA is requested but missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise MisuseError(f"--device must be auto, cpu or cuda, not '{name}'")
    if name == "cuda" and not torch.cuda.is_available():
        raise TalkheadError("no CUDA device is found; use --device cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of a device for records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def room_on(device: torch.device) -> int:
    """Return the free memory of a CUDA device in bytes; 0 on other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def build(
    aabb: Tensor,
    device: torch.device | str,
    *,
    n_steps: int = 64,
    n_samples: int = 0,
    resolution: int = 64,
    early_stop: float = 1e-4,
    kind: Literal["auto", "packed", "dense", "nerfacc"] = "auto",
    kernels: bool = False,
) -> tuple[Marcher, str]:
    """Return the marcher for a box aabb (6,) on a device, and one line on why it was chosen.

    n_steps     samples of a ray straight through the box: step = depth (z) / n_steps
    n_samples   samples per ray of the guided march; 0: all lattice samples in occupied cells
    resolution  cells of the occupancy grid along each axis
    early_stop  transmittance at which a ray ends in marches without gradients; 0: never
    kind        marcher of the lattice; "auto": nerfacc if its kernels are available, else packed
    kernels     whether Triton kernels compile on that device
    """
    device = torch.device(device)
    if kind not in KINDS:
        raise MisuseError(f"march.kind is {kind!r}; use one of {', '.join(KINDS)}")
    aabb = aabb.to(device)
    if kind == "dense":
        return DenseMarcher(aabb, n_steps), "dense: asked for"

    step = step_length(aabb, n_steps)
    grid = OccupancyGrid(aabb, step, resolution)

    def made(lattice: type[PackedMarcher], how: str) -> tuple[Marcher, str]:
        marcher = lattice(grid, step, early_stop=early_stop)
        if not n_samples:
            return marcher, how
        guided = FusedMarcher if kernels else GuidedMarcher
        how = f"{n_samples} samples a ray; while surfaces are not known, {how}"
        return guided(marcher, n_samples, n_steps), how

    if kind == "packed":
        return made(PackedMarcher, "packed: asked for")
    why_not = why_no_nerfacc() if device.type == "cuda" else "nerfacc needs a CUDA device"
    if not why_not:
        return made(NerfaccMarcher, "nerfacc: CUDA kernels")
    if kind == "nerfacc":
        raise TalkheadError(f"nerfacc cannot be used ({why_not}); set march.kind=packed")
    return made(PackedMarcher, f"packed in plain torch: {why_not}")
