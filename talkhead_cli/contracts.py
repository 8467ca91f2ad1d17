"""Types and protocols that all packages share (floor 0); imports none of our modules.

Shape legend
    T rows of Signals (frames)   W audio window steps   A audio feature size
    L = 68 landmarks             R rays                 S samples per ray
    N packed points              C channels             B pictures
    H, W_px height and width of a picture in pixels

Axes
    World = head space: origin between the ears, x to the person's left (right in the
    picture), y down, z away from the camera (a face looks along -z); 1.0 = one face
    height (top of the forehead to the chin).  Camera axes are OpenCV's (x right, y down,
    z forward); pixel centres lie at +0.5.  Colours are sRGB in [0, 1], channels last.
    The head is fixed in head space: head motion appears as camera motion.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:  # keeps torch out of the start-up time of `--help`
    from torch import Tensor

FPS = 25
SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // FPS
# Landmarks in iBUG's order; eyes on the picture's left and right, inner lips in their middle.
N_LANDMARKS = 68
JAWLINE, LIPS = slice(0, 17), slice(48, 68)
EYES = slice(36, 42), slice(42, 48)
CHIN, NOSE, UPPER_LIP, LOWER_LIP = 8, 33, 62, 66
RELIEF_SIDE = 1.1  # face heights
LABELS = ("face", "mouth", "hair", "neck", "torso", "background")
Size = Literal["tiny", "small", "full"]  # of networks: made for 128, 256 and 512 px

Item = TypeVar("Item")


class TalkheadError(Exception):
    """An error the user can fix; its text is one sentence that says how."""


class MisuseError(TalkheadError):
    """The command itself is wrong (unknown key, bad id): exit code 2."""


class UnfitError(TalkheadError):
    """The film itself will not do: the same command would be refused again."""


class Progress(Protocol):
    """How a job reports progress. The console implements it; tests pass `SilentProgress`."""

    def stage(self, name: str, total: int | None = None, unit: str = "frames") -> None:
        """Begin a named stage of `total` units (None: unknown)."""

    def advance(self, n: int = 1, **figures: float) -> None:
        """Report `n` more units as done; `figures` are shown beside them."""

    def note(self, text: str) -> None:
        """Show one line the user should read: a fallback and its cost, or a choice made."""


class SilentProgress:
    """A `Progress` that prints nothing and collects the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None = None, unit: str = "frames") -> None:
        pass

    def advance(self, n: int = 1, **figures: float) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def followed(progress: Progress, items: Iterable[Item]) -> Iterator[Item]:
    """Yield `items`, advancing progress by one unit after each."""
    for item in items:
        yield item
        progress.advance()


@dataclass(frozen=True)
class Need:
    """One requirement that a package has of the machine; `doctor` prints them."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    required: bool = True


CGROUP = Path("/sys/fs/cgroup")  # has the limits of the container, where this runs in one


def free_gb() -> float:
    """Return available memory in GB (2^30 bytes), of the machine or of the container if that is
    less; on Linux including reclaimable page cache."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    with contextlib.suppress(OSError, ValueError, KeyError):
        free = _table(Path("/proc/meminfo"))["MemAvailable:"] / 2**20
    for most, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no number
            left = int((CGROUP / most).read_text()) - int((CGROUP / used).read_text())
            left += _table((CGROUP / used).with_name("memory.stat"))[cache]
            free = min(free, left / 2**30)
    return free


def n_bound_cores() -> int:
    """Return the number of CPU cores that this process is bound to."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def n_cores() -> int:
    """Return the number of CPU cores that this process may use: those it is bound to, or the quota
    of its container if that is less."""
    n = n_bound_cores()
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            quota, period = map(int, " ".join((CGROUP / f).read_text() for f in files).split())
            if quota > 0:
                n = min(n, max(1, round(quota / period)))
    return n


def _table(file: Path) -> dict[str, int]:
    """Return the first number of each line of a kernel's file, by the word before it."""
    rows = (line.split() for line in file.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def _alone(index: Any, n: int) -> slice:
    """The slice that holds item `index` of n, counted from the end if negative."""
    first = range(n)[int(index)]
    return slice(first, first + 1)


@dataclass(frozen=True)
class Camera:
    """One pinhole camera per row, in head space.

    c2w      (T, 4, 4) camera to world, rotation orthonormal
    k        (T, 3, 3) intrinsics in pixels of a picture of `size_px`
    size_px  side of the square picture
    """

    c2w: Tensor
    k: Tensor
    size_px: int

    def __getitem__(self, rows: Any) -> Camera:
        return Camera(self.c2w[rows], self.k[rows], self.size_px)

    def to(self, device: Any) -> Camera:
        return Camera(self.c2w.to(device), self.k.to(device), self.size_px)

    def resized(self, size_px: int) -> Camera:
        """Return the same view for a picture of another size."""
        k = self.k.clone()
        k[:, :2] *= size_px / self.size_px
        return Camera(self.c2w, k, size_px)

    def smaller(self, times: int) -> Camera:
        """Return the same view for a picture whose side is `times` times smaller."""
        return self if times == 1 else self.resized(self.size_px // times)


@dataclass(frozen=True)
class Signals:
    """All driving signals that networks may use, T rows; already smoothed, never smoothed later.

    audio         (T, W, A) standardised speech features around each frame
    eye           (T, 2) openness of the picture's left, right eye: 0 shut, 1 open, up to 1.2
    gaze          (T, 2) iris offset right, down, in eye widths
    brow          (T, 2) height of the picture's left, right brow minus the person's mean
    landmarks     (T, 68, 3) iBUG order, head space
    landmarks_2d  (T, 68, 2) x, y in the picture, as fractions of its side: [0, 1]
    pose          (T, 6) head to camera: rotation vector (rad), translation (face heights)
    body          (T, 4) shoulders relative to their mean: right, down (face heights at the
                  torso's depth), roll (rad), log scale (not measured: always 0)
    person        (T,) long, index of the person
    moment        (T,) long, frame number in the clip; consecutive numbers are consecutive in time
    """

    audio: Tensor
    eye: Tensor
    gaze: Tensor
    brow: Tensor
    landmarks: Tensor
    landmarks_2d: Tensor
    pose: Tensor
    body: Tensor
    camera: Camera
    person: Tensor
    moment: Tensor

    def __len__(self) -> int:
        return int(self.pose.shape[0])

    def __getitem__(self, rows: Any) -> Signals:
        if isinstance(rows, int) or getattr(rows, "ndim", 1) == 0:
            rows = _alone(rows, len(self))
        return Signals(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: Any) -> Signals:
        return Signals(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def lip_gap(self) -> Tensor:
        """Opening of the lips (T,), face heights."""
        return self.landmarks[:, LOWER_LIP, 1] - self.landmarks[:, UPPER_LIP, 1]

    def with_(self, **changes: Any) -> Signals:
        """Return a copy with some tensors replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class RayBundle:
    """R rays in head space.

    origins (R, 3) · directions (R, 3) unit · near, far (R, 1) distances; far <= near: misses
    pixel (R, 2) x, y in pixels · row (R,) the row of the Signals each ray belongs to
    layout (B, h, w) if they are B patches or pictures in raster order · whole: if pictures
    """

    origins: Tensor
    directions: Tensor
    near: Tensor
    far: Tensor
    pixel: Tensor
    row: Tensor
    layout: tuple[int, int, int] | None = None
    whole: bool = False

    def __len__(self) -> int:
        return int(self.origins.shape[0])

    def to(self, device: Any) -> RayBundle:
        return RayBundle(
            self.origins.to(device),
            self.directions.to(device),
            self.near.to(device),
            self.far.to(device),
            self.pixel.to(device),
            self.row.to(device),
            self.layout,
            self.whole,
        )

    def __getitem__(self, rows: Any) -> RayBundle:
        return RayBundle(
            self.origins[rows],
            self.directions[rows],
            self.near[rows],
            self.far[rows],
            self.pixel[rows],
            self.row[rows],
        )


@dataclass(frozen=True)
class Rendered:
    """Composited channels of R rays; weights accumulate in float32.

    feature (R, C) composited channels, the last `n_detached` with detached weights
    opacity (R, 1) in [0, 1] · depth (R, 1) expected hit distance, sum w t, not normalised by
    opacity · spread (R, 1) variance of that distance along the ray,
    sum w t^2 - (sum w t)^2 / sum w (0 for a thin surface) · n_points number of points sent to
    the field, a () tensor on the device if reading it would have needed a host sync
    """

    feature: Tensor
    opacity: Tensor
    depth: Tensor
    spread: Tensor
    n_points: int | Tensor

    @classmethod
    def of_moments(
        cls, feature: Tensor, moments: Tensor, origin: Tensor, n_points: int | Tensor
    ) -> Rendered:
        """Build from moments (R, 3) of the weights: sum w, sum w s, sum w s^2, s = t - origin.

        origin (R, 1) should be each ray's first sample: s then stays small, so that the spread of
        a thin surface survives float32."""
        opacity, first, second = moments.split(1, 1)
        spread = (second - first**2 / opacity.clamp_min(1e-10)).clamp_min(0)
        return cls(feature, opacity, first + origin * opacity, spread, n_points)


@dataclass(frozen=True)
class Frame:
    """B finished pictures if the rays have a layout, else R single pixels.

    rgb (B, H, W, 3) or (R, 3) · alpha, depth with one channel; depth is the distance in face
    heights where opacity exceeds 0.5, else infinite · parts: named maps for losses and
    visualisation, never for control flow
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor
    parts: dict[str, Tensor]

    def __getitem__(self, index: int) -> Frame:
        """Return one of the B pictures as a frame with B = 1."""
        own = _alone(index, len(self.rgb))
        parts = {name: part[own] for name, part in self.parts.items()}
        return Frame(self.rgb[own], self.alpha[own], self.depth[own], parts)


@dataclass(frozen=True)
class Portrait:
    """P pictures of one person, for avatars built from pictures; the first is the main one.

    pictures (P, H, W, 3) · labels (P, 6, h, w) soft, in the order of LABELS · signals P rows: pose
    and expression in each picture · relief (P, n, n, 2) depth z of the rigid face and confidence
    in it, over x, y in [-RELIEF_SIDE, RELIEF_SIDE] of head space
    """

    pictures: Tensor
    labels: Tensor
    signals: Signals
    relief: Tensor

    def __len__(self) -> int:
        return int(self.pictures.shape[0])

    def to(self, device: Any) -> Portrait:
        return Portrait(
            self.pictures.to(device),
            self.labels.to(device),
            self.signals.to(device),
            self.relief.to(device),
        )


@dataclass(frozen=True)
class Truth:
    """What rays should show: colour (R, 3) · labels (R, 6) soft, in the order of LABELS · plate
    (R, 3) background.  If the rays are whole pictures, there is one row for every pixel of the
    finished pictures, which may be larger than the marched ones.
    """

    colour: Tensor
    labels: Tensor
    plate: Tensor


@dataclass(frozen=True)
class SpeechShot:
    """T rows of one person in a speech-only training step; pictures (T, H, W, 3) of these rows, if
    the stage uses them."""

    signals: Signals
    pictures: Tensor | None = None


@dataclass(frozen=True)
class RayShot:
    """One person's rays in a training step, for T rows of signals; portrait: other pictures of the
    person, for avatars that are built from pictures."""

    signals: Signals
    rays: RayBundle
    truth: Truth
    portrait: Portrait | None = None


Shot = SpeechShot | RayShot


def unpacked(thing: Any) -> list[Tensor]:
    """Return all tensors nested in a tensor, dict or dataclass, in a fixed order."""
    if hasattr(thing, "data_ptr"):  # isinstance would need torch, which this module never imports
        return [thing]
    if isinstance(thing, dict):
        return [t for part in thing.values() for t in unpacked(part)]
    if not is_dataclass(thing):
        return []
    return [t for f in fields(thing) for t in unpacked(getattr(thing, f.name))]


def repacked(like: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a copy of `like` with its tensors replaced, in the order of `unpacked`."""
    if hasattr(like, "data_ptr"):
        return next(tensors)
    if isinstance(like, dict):
        return {name: repacked(part, tensors) for name, part in like.items()}
    if not is_dataclass(like) or isinstance(like, type):
        return like
    return replace(like, **{f.name: repacked(getattr(like, f.name), tensors) for f in fields(like)})


@runtime_checkable
class Field(Protocol):
    """Density and C channels of points in head space, for the `n_rows` rows it was built for."""

    aabb: Tensor  # (6,) x0 y0 z0 x1 y1 z1
    channels: int
    n_detached: int
    n_rows: int

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        """x (N, 3), row (N,) long -> density (N,) >= 0 per face height."""

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 3), unit d (N, 3), row (N,) -> density (N,), channels (N, C)."""
