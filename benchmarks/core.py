"""Benchmarks of the ray marcher inside one process, on held-out rows of a trained run.

Nothing here needs the tracking packages, so that a machine with a GPU and a preprocessed
workspace can run all of it.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from talkhead_cli import march
from talkhead_cli.contracts import Field, RayBundle, Signals, SilentProgress
from talkhead_cli.jobs import finetune, footage, scores
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.player import Player, eight_bits
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.march import DenseMarcher, GuidedMarcher
from talkhead_cli.store import Run, Workspace

SIZES = (128, 256, 512, 1024)
LEAST_S = {"cpu": 1.5, "cuda": 0.4}  # minimum wall time, s, behind every figure
STRIDE = {"cpu": 16, "cuda": 4}  # step between measured held-out rows


@dataclass
class Bench:
    """A run's player and the held-out rows that it renders."""

    player: Player
    clip: Footage
    rows: Signals
    truth: Tensor  # (T, s, s, 3) in [0, 1]
    boxes: np.ndarray

    @property
    def marcher(self) -> GuidedMarcher:
        assert isinstance(self.player.marcher, GuidedMarcher), "give a run with march.n_samples > 0"
        return self.player.marcher

    def pictures(self, rows: Signals | None = None) -> tuple[Tensor, int]:
        """Render rows, (T, s, s, 3) in [0, 1] on the CPU; also return the number of points."""
        made = list(self.player.pictures(self.rows if rows is None else rows))
        rgb = torch.cat([f.rgb.float().cpu().clamp(0, 1) for f, _ in made])
        return rgb, sum(n for _, n in made)

    def psnr(self, rgb: Tensor) -> dict[str, float]:
        """Return PSNR against the truth, dB, mean over rows."""
        face, full = [], []
        for a, b, (x0, y0, x1, y1) in zip(self.truth.numpy(), rgb.numpy(), self.boxes, strict=True):
            face.append(scores.psnr(a[y0:y1, x0:x1], b[y0:y1, x0:x1]))
            full.append(scores.psnr(a, b))
        return {
            "face_db": round(float(np.mean(face)), 3),
            "full_db": round(float(np.mean(full)), 3),
        }


def load(home: Path, name: str, device: str, run: str | None = None, every: int = 0) -> Bench:
    """Load the newest (or the named) run of an identity and every `every`-th held-out row."""
    space = Workspace.open(home, name)
    found = pick_run(space, run, SilentProgress())
    player = Player.load(found, march.device_of(device))
    clip = footage.load(space, player.preset.data, SilentProgress())
    held = clip.held[:: every or STRIDE[player.device.type]]
    rows = player.listen_to_rows(clip.signals, held)
    truth = torch.from_numpy(clip.pictures[held.numpy()].astype(np.float32) / 255)
    boxes = scores.face_boxes(space.load("tracks")["mesh_fractions"][held.numpy()], clip.size_px)
    return Bench(player, clip, rows, truth, boxes)


# -- what is measured ----------------------------------------------------------------------------


def against_reference(bench: Bench) -> dict[str, Any]:
    """Compare the dense, the packed and the guided marcher on the same trained field."""
    player, few = bench.player, bench.marcher
    lattice, step = few.lattice, few.lattice.step
    n_steps = round(float(player.avatar.aabb[5] - player.avatar.aabb[2]) / step)
    dense = DenseMarcher(player.avatar.aabb, n_steps).eval().to(player.device)
    pictures, rows = {}, {}
    for name, marcher in (("reference", dense), ("packed", lattice), ("guided", few)):
        player.marcher = marcher
        rgb, n_points = bench.pictures()
        hits = sum(int((f.alpha > 0.5).sum()) for f, _ in player.pictures(bench.rows))
        rate = frames_per_second(bench)
        pictures[name] = rgb
        rows[name] = {
            "frames_per_second": rate,
            "samples_per_hit_ray": round(n_points / hits, 2),
            "points_per_frame": n_points // len(rgb),
            **bench.psnr(rgb),
        }
    player.marcher = few
    for name in ("packed", "guided"):
        difference = scores.psnr(pictures[name].numpy(), pictures["reference"].numpy())
        rows[name]["db_against_reference"] = round(difference, 2)
        ratio = rows[name]["frames_per_second"] / rows["reference"]["frames_per_second"]
        rows[name]["times_as_fast"] = round(ratio, 2)
    return {
        "n_steps": n_steps,
        "n_samples": few.n_samples,
        "early_stop": lattice.early_stop,
        **rows,
    }


def by_size(bench: Bench) -> list[dict[str, Any]]:
    """Measure frames per second and milliseconds per stage against picture size."""
    found = []
    for size in SIZES:
        rows = _resized(bench.rows, size)
        plate = _plate(bench, size)
        with _peak(bench.player.device) as peak:
            together = frames_per_second(bench, rows, plate)
            with _at_once(1):
                alone = frames_per_second(bench, rows, plate)
            stages = _stages(bench, rows[0], plate)
        found.append(
            {
                "size_px": size,
                "frames_per_second": alone,
                "frames_per_second_together": together,
                **stages,
                "peak_mb": peak(),
            }
        )
    return found


def by_points(bench: Bench) -> list[dict[str, Any]]:
    """Measure the time per frame, at one size, against samples per ray and guide cells."""
    few, kept = bench.marcher, (bench.marcher.n_samples, bench.marcher.n_cells)
    found = []
    for n_samples in (2, 4, 8, 12, 16):
        few.n_samples = n_samples
        found.append({"n_samples": n_samples, "n_cells": few.n_cells, **_frame(bench)})
    few.n_samples = kept[0]
    for n_cells in (16, 24, 48, 96):
        few.n_cells = n_cells
        found.append({"n_samples": kept[0], "n_cells": n_cells, **_frame(bench)})
    few.n_cells = kept[1]
    return found


def by_batch(bench: Bench) -> list[dict[str, Any]]:
    """Measure frames per second against the number of frames marched together."""
    found = []
    for n in (1, 2, 4, 8):
        with _at_once(n):
            found.append({"frames_in_a_march": n, "frames_per_second": frames_per_second(bench)})
    return found


@contextmanager
def _at_once(n: int) -> Iterator[None]:
    """Make the player march n frames together, whatever the size."""
    kept = Player.rows_at_once
    Player.rows_at_once = lambda self, size_px: n  # type: ignore[method-assign]
    try:
        yield
    finally:
        Player.rows_at_once = kept  # type: ignore[method-assign]


def parity(bench: Bench, other: Bench, sheet: Path) -> dict[str, Any]:
    """Compare one checkpoint on two devices; write truth and both renders to a picture."""
    a, _ = bench.pictures()
    b, _ = other.pictures()
    rows = torch.cat([torch.cat(list(part), 0) for part in (bench.truth, a, b)], 1)
    cv2.imwrite(str(sheet), (rows.numpy()[..., ::-1] * 255).round().astype(np.uint8))
    return {
        "devices": [march.device_name(x.player.device) for x in (bench, other)],
        "db": round(scores.psnr(a.numpy(), b.numpy()), 2),
        "psnr": [bench.psnr(a), bench.psnr(b)],
    }


def roofline(bench: Bench, n_points: int = 65_536) -> dict[str, Any]:
    """Measure operations and bytes of the field per point, the machine's peaks, and the gap.

    `bytes` counts what every operation reads and writes when torch runs them one by one;
    `bytes_at_least` a point's position, direction, density and channels: one fused kernel's share.
    """
    player = bench.player
    one = bench.rows[0].to(player.device)
    plain = player.avatar.condition(one)  # with gradients: torch operations, which can be counted
    with torch.no_grad():
        field = player.avatar.condition(one)
    low, high = player.avatar.aabb[:3], player.avatar.aabb[3:]
    x = low + (high - low) * torch.rand(n_points, 3, device=player.device)
    d = torch.nn.functional.normalize(x, dim=1)
    row = torch.zeros(n_points, dtype=torch.long, device=player.device)
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
            plain(x, d, row)
        seconds = timed(lambda: field(x, d, row), player.device)
        peak_flops, peak_bytes = _peaks(player.device)
    per_point = {
        "operations": round(flops.get_total_flops() / n_points),
        "bytes": round(traffic.bytes / n_points),
        "bytes_at_least": 4 * (3 + 3 + 1 + field.channels),
    }
    nanoseconds = {
        "measured": seconds / n_points,
        "floor_operations": per_point["operations"] / peak_flops,
        "floor_bytes": per_point["bytes"] / peak_bytes,
        "floor_bytes_fused": per_point["bytes_at_least"] / peak_bytes,
    }
    floor = max(nanoseconds["floor_operations"], nanoseconds["floor_bytes_fused"])
    return {
        "points": n_points,
        "threads": torch.get_num_threads(),
        "machine_gflops": round(peak_flops / 1e9, 1),
        "machine_gbytes_per_s": round(peak_bytes / 1e9, 1),
        "per_point": per_point,
        "nanoseconds_per_point": {k: round(v * 1e9, 2) for k, v in nanoseconds.items()},
        "gap_to_floor": round(seconds / n_points / floor, 2),
    }


class _Clock(SilentProgress):
    """Progress that records steps, rays and seconds of each training stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, dict[str, float]] = {}

    def stage(self, name: str, total: int | None = None, unit: str = "frames") -> None:
        self._close()
        self._name, self._began, self._steps, self._rays = name, time.perf_counter(), 0, 0.0

    def advance(self, n: int = 1, **figures: float) -> None:
        self._steps += n
        self._rays += figures.get("rays", 0.0)
        self._last = time.perf_counter()

    def _close(self) -> None:
        if not getattr(self, "_steps", 0) or not self._name.startswith("train: "):
            return
        seconds = self._last - self._began
        self.stages[self._name.removeprefix("train: ")] = {
            "steps": self._steps,
            "seconds": round(seconds, 2),
            "rays_per_second": round(self._rays / seconds),
        }

    def closed(self) -> dict[str, dict[str, float]]:
        self._close()
        return self.stages


def train(
    home: Path, name: str, presets: list[str], device: str, scale: float, seed: int
) -> tuple[Run, dict[str, dict[str, float]]]:
    """Train with a share of the preset's steps; return run and steps, seconds, rays per stage."""
    clock = _Clock()
    run = finetune.finetune(
        home,
        name,
        clock,
        preset_names=presets,
        settings=[f"train.scale={scale}"],
        run_name=f"curve-{scale:g}",
        device=device,
        seed=seed,
        fresh=True,
        prior="none",
    )
    return run, clock.closed()


# -- the clock -----------------------------------------------------------------------------------


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, the median of many."""
    work()
    took: list[float] = []
    while sum(took) < LEAST_S[device.type] or len(took) < 3:
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        took.append(time.perf_counter() - began)
    return float(np.median(took))


def frames_per_second(
    bench: Bench, rows: Signals | None = None, plate: Tensor | None = None
) -> float:
    """Return the rate of whole pictures as `render` draws them, without encoding."""
    rows = bench.rows if rows is None else rows
    at_once = bench.player.rows_at_once(rows.camera.size_px // bench.player.avatar.magnification)
    if bench.player.device.type == "cpu":
        at_once *= torch.get_num_threads()  # a frame each
    rows = rows[: max(1, len(rows) // at_once) * at_once]  # what is left would leave cores idle

    def film() -> None:
        for frame, _ in bench.player.pictures(rows, plate):
            eight_bits(frame)

    return round(len(rows) / timed(film, bench.player.device), 2)


def _frame(bench: Bench) -> dict[str, Any]:
    rows = bench.rows[:4]
    rgb, n_points = bench.pictures(rows)
    return {
        "points_per_frame": n_points // len(rgb),
        "milliseconds": round(1000 / frames_per_second(bench, rows), 3),
    }


@torch.no_grad()
def _stages(bench: Bench, one: Signals, plate: Tensor) -> dict[str, Any]:
    """Time each stage of one frame on all threads, milliseconds, and count its samples."""
    player, marcher, device = bench.player, bench.marcher, bench.player.device
    one, background = one.to(device), plate.reshape(-1, 3).to(device)
    row = torch.zeros(1, dtype=torch.long, device=device)

    def shoot() -> tuple[RayBundle, Field]:
        rays = march.picture_rays(
            one.camera.smaller(player.avatar.magnification), row, player.avatar.aabb
        )
        return player.avatar.aim(one, rays), player.avatar.condition(one)

    def sample() -> None:
        for at, n_samples in marcher._shares(rays):
            marcher.lay(rays if at is None else rays[at], n_samples)

    half = device.type == "cuda"
    with torch.autocast(device.type, torch.float16, enabled=half):
        rays, field = shoot()
        asked = _Asked(field)
        rendered = marcher.march(asked, rays)
        whole = timed(lambda: marcher.march(field, rays), device)
        took = {
            "condition": timed(shoot, device),
            "sample": timed(sample, device),
            "field": timed(lambda: [field(*points) for points in asked.calls], device),
            "compose": timed(
                lambda: player.avatar.compose(rendered, rays, one, background), device
            ),
        }
    took["composite"] = max(0.0, whole - took["sample"] - took["field"])
    hits, n_points = int((rendered.opacity > 0.5).sum()), int(rendered.n_points)
    return {
        "milliseconds": {k: round(1000 * v, 3) for k, v in took.items()},
        "points_per_frame": n_points,
        "samples_per_hit_ray": round(n_points / max(1, hits), 2),
        "million_points_per_second": round(n_points / took["field"] / 1e6, 3),
    }


class _Asked:
    """A field that keeps the points it was asked for, call by call."""

    def __init__(self, field: Any) -> None:
        self.field = field
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.field, name)

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> Any:
        self.calls.append((x, d, row))
        return self.field(x, d, row)


def _resized(rows: Signals, size_px: int) -> Signals:
    return rows.with_(camera=rows.camera.resized(size_px))


def _plate(bench: Bench, size_px: int) -> Tensor:
    chw = bench.player.plate.permute(2, 0, 1)[None]
    grown = torch.nn.functional.interpolate(chw, (size_px, size_px), mode="bilinear")
    return grown[0].permute(1, 2, 0).contiguous()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns peak MB: of the GPU allocator, else this process, sampled."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: round(torch.cuda.max_memory_allocated(device) / 2**20)
        return
    most, over = [0], threading.Event()
    page = resource.getpagesize()

    def watch() -> None:
        while not over.wait(0.005):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            most[0] = max(most[0], pages * page)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: round(most[0] / 2**20)
    finally:
        over.set()
        thread.join()


class _Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in _tensors((args, kwargs or {}, out)):
                self.bytes += tensor.numel() * tensor.element_size()
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))
    elif isinstance(tree, tuple | list):
        for leaf in tree:
            yield from _tensors(leaf)


def _peaks(device: torch.device) -> tuple[float, float]:
    """Measure operations/s of a large matrix product and bytes/s of a large copy."""
    n = 2048 if device.type == "cpu" else 8192
    kind = torch.float32 if device.type == "cpu" else torch.float16
    a = torch.rand(n, n, device=device, dtype=kind)
    source = torch.rand(2**26, device=device)
    target = torch.empty_like(source)
    flops = 2 * n**3 / timed(lambda: a @ a, device)
    return flops, 2 * source.numel() * 4 / timed(lambda: target.copy_(source), device)
