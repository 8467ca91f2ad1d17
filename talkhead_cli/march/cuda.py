"""Ray marching with nerfacc's CUDA kernels, and what building them requires."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import torch

from talkhead_cli.contracts import Field, Need, RayBundle, Rendered, free_gb, n_cores
from talkhead_cli.march.dense import first_sample
from talkhead_cli.march.packed import Packed, PackedMarcher, ask, first_distance, pack
from talkhead_cli.march.rays import intersect_box

GB_PER_JOB = 3.0  # memory allowed for one nvcc process; a guess on the safe side
TOO_NEW = (2, 14)  # nerfacc 0.5.3 does not compile with torch from this version on


class NerfaccMarcher(PackedMarcher):
    """`PackedMarcher` with nerfacc 0.5's kernels; CUDA only.

    Its grid traversal replaces the test of every lattice sample, and with gradients the weights
    stay packed (no (R, S) matrix).  nerfacc's `rendering()` is not used: it takes 3 channels only.
    """

    @torch.no_grad()
    def sample(self, rays: RayBundle) -> Packed:
        """Sample by traversing the grid cell by cell (`nerfacc.traverse_grids`)."""
        if not len(rays):
            return super().sample(rays)
        grid = self.occupancy
        enter, leave = intersect_box(rays.origins, rays.directions, grid.tight_box())
        near, far = torch.maximum(rays.near, enter), torch.minimum(rays.far, leave)
        # nerfacc samples at interval midpoints, so intervals start half a step earlier.
        start = first_sample(rays, self.step, self.training) - 0.5 * self.step
        _, samples, _ = _module("grid").traverse_grids(
            rays.origins.float(),
            rays.directions.float(),
            grid.occupied[None],
            grid.aabb[None],
            near_planes=start.squeeze(1),
            far_planes=rays.far.squeeze(1),
            step_size=self.step,
            # Own box intersections: nerfacc's divide by direction components of exactly zero.
            t_sorted=torch.cat((near, far), 1),
            t_indices=torch.arange(2, device=near.device).expand(len(rays), 2),
            hits=far > near,
        )
        return pack(samples.vals, samples.packed_info[:, 1])

    def march(self, field: Field, rays: RayBundle) -> Rendered:
        if not torch.is_grad_enabled():
            return super().march(field, rays)
        packed = self.sample(rays)
        if not len(packed.t):
            return super().march(field, rays)
        x, density, channels = ask(field, rays, packed.t, packed.ray)
        volrend = _module("volrend")
        weights, _, _ = volrend.render_weight_from_density(
            torch.zeros_like(packed.t),
            torch.full_like(packed.t, self.step),
            density,
            packed_info=torch.stack((packed.start, packed.count), 1),
        )
        if self.reports:
            self.occupancy.observe(x, weights)
        origin = first_distance(packed)
        s = packed.t[:, None] - origin[packed.ray]
        attached = field.channels - field.n_detached
        feature, extra, moments = (
            volrend.accumulate_along_rays(w, values, ray_indices=packed.ray, n_rays=len(rays))
            for w, values in (
                (weights, channels[:, :attached].float()),
                (weights.detach(), channels[:, attached:].float()),
                (weights, torch.cat((torch.ones_like(s), s, s**2), 1)),
            )
        )
        feature = torch.cat((feature, extra), 1)
        return Rendered.of_moments(feature, moments, origin, len(packed.t))


def why_no_nerfacc() -> str:
    """Return why nerfacc cannot be used here, or "" if it can.

    Builds its extension if needed (`talkhead doctor --build` does so ahead of time): some minutes,
    once, with as many parallel compilers as free memory allows.
    """
    if not torch.cuda.is_available():
        return "nerfacc needs a CUDA device"
    _make_way()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # from its docstrings, since Python 3.12
            version = importlib.import_module("nerfacc").__version__
        with contextlib.redirect_stdout(sys.stderr):  # it prints, and stdout is for output paths
            kernels = _module("cuda._backend")._C
    except Exception as error:  # a failed build raises whatever the compiler wrapper raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    if kernels is None:
        return f"nerfacc {version} found no nvcc" if not shutil.which("nvcc") else "no kernels"
    return ""


def check() -> list[Need]:
    """List what the kernels need; none is required, since plain torch marches on any machine."""
    modern = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])
    free = free_gb()
    headers = _headers()
    wishes = (
        (
            "CUDA device",
            torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "install a CUDA build of torch, or train on the CPU with the tiny preset",
        ),
        (
            "nerfacc",
            "installed" if importlib.util.find_spec("nerfacc") else None,
            "pip install nerfacc  (of use only with a CUDA device)",
        ),
        (
            "triton",
            "installed" if importlib.util.find_spec("triton") else None,
            "it comes with torch's CUDA builds on Linux; without it planes are read more slowly",
        ),
        (
            "torch for nerfacc",
            torch.__version__ if modern < TOO_NEW else None,
            "pip install 'torch<2.14'; with a newer one the plain torch march is used",
        ),
        (
            "nvcc",
            shutil.which("nvcc"),
            "put the CUDA toolkit's bin folder on PATH; nerfacc compiles with it, once",
        ),
        ("ninja", shutil.which("ninja"), "pip install ninja  (nerfacc compiles with it, once)"),
        (
            "CUDA headers",
            str(headers) if headers else None,
            "pip install nvidia-curand nvidia-cublas nvidia-cusparse, or the whole CUDA toolkit",
        ),
        (
            "memory to compile",
            f"{free:.0f} GB free" if free >= GB_PER_JOB else None,
            f"free {GB_PER_JOB:.0f} GB; one nvcc process may take that much",
        ),
    )
    return [
        Need(name, found is not None, found or "none", fix, required=False)
        for name, found, fix in wishes
    ]


def compilers(free: float, n_cores: int) -> int:
    """Return how many nvcc processes may run in parallel in `free` GB on `n_cores`; at least 1."""
    return max(1, min(n_cores, int(free // GB_PER_JOB)))


def _make_way() -> None:
    """Set MAX_JOBS, CUDA_HOME, PATH (for ninja and the toolkit) and CPLUS_INCLUDE_PATH (for headers
    installed by pip), before torch reads them."""
    os.environ.setdefault("MAX_JOBS", str(compilers(free_gb(), n_cores())))
    places = [sysconfig.get_path("scripts")]  # ninja, even if the environment is not activated
    if (home := _toolkit()) is not None:
        os.environ.setdefault("CUDA_HOME", str(home))
        places.append(str(home / "bin"))
    searched = os.environ.get("PATH", "").split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*searched, *(p for p in places if p not in searched)])
    headers = _headers()
    known = os.environ.get("CPLUS_INCLUDE_PATH", "")
    if headers is not None and str(headers) not in known.split(os.pathsep):
        os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join(p for p in (known, str(headers)) if p)


def _toolkit() -> Path | None:
    """Return the CUDA toolkit's folder, recognised by the runtime library programs link against.

    The nvcc on PATH is not enough: it may be a wrapper script outside the toolkit.
    """
    for home in _homes():
        if any((home / lib / "libcudart.so").exists() for lib in ("lib64", "lib")):
            return home
    return None


def _homes() -> list[Path]:
    """List candidate folders of the toolkit, likeliest first."""
    nvcc = shutil.which("nvcc")
    said = os.environ.get("CUDA_HOME")
    return [
        *([Path(said)] if said else []),
        *([Path(nvcc).resolve().parents[1]] if nvcc else []),
        Path("/usr/local/cuda"),
        Path("/opt/cuda"),
    ]


def _headers() -> Path | None:
    """Return the folder with the CUDA libraries' headers: the toolkit's, else pip's."""
    homes = _homes()
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        homes += sorted(Path(place).glob("cu*"))
    for home in homes:
        folder = home / "include"
        if all((folder / name).exists() for name in ("curand.h", "cublas_v2.h", "cusparse.h")):
            return folder
    return None


def _module(name: str) -> Any:
    return importlib.import_module(f"nerfacc.{name}")
