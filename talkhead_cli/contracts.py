"""Floor 0: the types that every room shares. Imports nothing of ours.

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
    In head space the head stands still: a turning head is a moving camera.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:  # `--help` must not pay for torch
    from torch import Tensor

FPS = 25
SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // FPS
N_LANDMARKS = 68
RELIEF_SIDE = 1.1  # face heights
LABELS = ("face", "mouth", "hair", "neck", "torso", "background")

Item = TypeVar("Item")


class TalkheadError(Exception):
    """Something the user can mend; its text is one sentence that says how."""


class MisuseError(TalkheadError):
    """The command itself is wrong (unknown key, bad id): exit code 2."""


class UnfitError(TalkheadError):
    """The film itself will not do: the same command would be refused again."""


class Progress(Protocol):
    """How a job reports. The console implements it; tests pass `SilentProgress`."""

    def stage(self, name: str, total: int | None = None, unit: str = "frames") -> None:
        """Begin a named part of `total` units (None: unknown)."""

    def advance(self, n: int = 1, **figures: float) -> None:
        """`n` more units are done; `figures` are shown beside them."""

    def note(self, text: str) -> None:
        """One line the user should read: a fallback and what it lost, a choice made."""


class SilentProgress:
    """Keeps the notes and says nothing."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None = None, unit: str = "frames") -> None:
        pass

    def advance(self, n: int = 1, **figures: float) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def followed(progress: Progress, items: Iterable[Item]) -> Iterator[Item]:
    """Yield `items`, one unit of progress each."""
    for item in items:
        yield item
        progress.advance()


@dataclass(frozen=True)
class Need:
    """One thing that a room needs of the machine; `doctor` prints them."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    required: bool = True


def free_gb() -> float:
    """Memory that is free for the asking, GB; what the disk's cache holds is."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = next((line for line in lines if line.startswith("MemAvailable:")), "")
        return int(told.split()[1]) / 2**20
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _alone(index: Any, n: int) -> slice:
    """The slice that holds item `index` of n, counted from the end if negative."""
    first = range(n)[int(index)]
    return slice(first, first + 1)


@dataclass(frozen=True)
class Camera:
    """Where each row is seen from, in head space.

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
        """The same view as a picture of another size."""
        k = self.k.clone()
        k[:, :2] *= size_px / self.size_px
        return Camera(self.c2w, k, size_px)

    def smaller(self, times: int) -> Camera:
        """The same view as a picture of a `times` smaller side."""
        return self if times == 1 else self.resized(self.size_px // times)


@dataclass(frozen=True)
class Signals:
    """All that a network may listen to, T rows. Smoothing happens here and nowhere later.

    audio         (T, W, A) standardised speech features around each frame
    eye           (T, 2) openness of the eyes on the picture's left, right: 0 shut ... 1 open
    gaze          (T, 2) iris offset right, down, in eye widths
    brow          (T, 2) height of the brows on the picture's left, right, over the person's mean
    landmarks     (T, 68, 3) iBUG order, head space
    landmarks_px  (T, 68, 2) as seen, in pixels of the 512-normalised crop divided by 512: [0, 1]
    pose          (T, 6) head to camera: rotation vector (rad), translation (face heights)
    body          (T, 4) shoulders against their mean: right, down (face heights at the
                  torso's depth), roll (rad), and 0, where log scale would be: not measured
    person        (T,) long
    moment        (T,) long, number of the frame in its clip or film: rows whose numbers follow each
                  other are heard one after the other
    """

    audio: Tensor
    eye: Tensor
    gaze: Tensor
    brow: Tensor
    landmarks: Tensor
    landmarks_px: Tensor
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

    def with_(self, **changes: Any) -> Signals:
        """A copy with some tensors replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class RayBundle:
    """R rays in head space.

    origins (R, 3) · directions (R, 3) unit · near, far (R, 1) distances; far <= near: misses
    pixel (R, 2) x, y in pixels · row (R,) the row of the Signals each ray belongs to
    layout (B, h, w) when the rays are B patches or pictures in raster order · whole: pictures
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
    """What marching returns for R rays; weights accumulate in float32.

    feature (R, C) composited channels, the last `n_detached` with detached weights
    opacity (R, 1) in [0, 1] · depth (R, 1) expected distance of what was hit, not
    normalised by opacity · spread (R, 1) variance of that distance along the ray,
    sum w t^2 - (sum w t)^2 / sum w (0 for a thin surface) · n_points sent to the field, a
    number () on the device where nobody waited for it
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
        """moments (R, 3): of the weights about origin (R, 1) on each ray, sum w, sum w s and
        sum w s^2.  A ray's first sample is a good one: numbers stay small, so that the spread of a
        thin surface survives float32."""
        opacity, first, second = moments.split(1, 1)
        spread = (second - first**2 / opacity.clamp_min(1e-10)).clamp_min(0)
        return cls(feature, opacity, first + origin * opacity, spread, n_points)


@dataclass(frozen=True)
class Frame:
    """A finished picture, B of them when the rays had a layout, else R loose pixels.

    rgb (B, H, W, 3) or (R, 3) · alpha, depth with one channel, depth the distance in face heights
    of what is solid and infinite elsewhere · parts: named maps for losses and pictures, never
    for control
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor
    parts: dict[str, Tensor]

    def __getitem__(self, index: int) -> Frame:
        """One of the B pictures, as a frame of its own (B = 1)."""
        own = _alone(index, len(self.rgb))
        parts = {name: part[own] for name, part in self.parts.items()}
        return Frame(self.rgb[own], self.alpha[own], self.depth[own], parts)


@dataclass(frozen=True)
class Portrait:
    """P pictures of one person, for avatars that are made from pictures; the first is the main one.

    pictures (P, H, W, 3) · labels (P, 6, h, w) soft, in the order of LABELS · signals P rows: how
    each picture's face stands and what it does · relief (P, n, n, 2) depth z of the rigid face
    and the trust in it over x, y in [-RELIEF_SIDE, RELIEF_SIDE] of head space
    """

    pictures: Tensor
    labels: Tensor
    signals: Signals
    relief: Tensor

    def __len__(self) -> int:
        return int(self.pictures.shape[0])

    def to(self, device: Any) -> Portrait:
        return Portrait(
            self.pictures.to(device), self.labels.to(device), self.signals.to(device),
            self.relief.to(device),
        )  # fmt: skip


@dataclass(frozen=True)
class Shot:
    """One person's share of a training step.

    signals  T rows · rays None for a stage that hears only speech
    target   (R, 3) true colours; without rays the rows' pictures (T, H, W, 3), for a stage that is
             shown them · labels (R, 6) soft labels in the order of LABELS · plate (R, 3)
             what is behind: of every ray, or of every pixel of the finished pictures where the
             rays are whole pictures, which may be smaller
    portrait other pictures of the person, for avatars that are made from pictures
    """

    signals: Signals
    rays: RayBundle | None = None
    target: Tensor | None = None
    labels: Tensor | None = None
    plate: Tensor | None = None
    portrait: Portrait | None = None


def unpacked(thing: Any) -> list[Tensor]:
    """All tensors in dataclasses of this file, however deep, in a fixed order."""
    if hasattr(thing, "data_ptr"):  # who reads contracts need not load torch
        return [thing]
    if isinstance(thing, dict):
        return [t for part in thing.values() for t in unpacked(part)]
    if not is_dataclass(thing):
        return []
    return [t for f in fields(thing) for t in unpacked(getattr(thing, f.name))]


def repacked(like: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors, in the order of `unpacked`."""
    if hasattr(like, "data_ptr"):
        return next(tensors)
    if isinstance(like, dict):
        return {name: repacked(part, tensors) for name, part in like.items()}
    if not is_dataclass(like) or isinstance(like, type):
        return like
    return replace(like, **{f.name: repacked(getattr(like, f.name), tensors) for f in fields(like)})


@runtime_checkable
class Field(Protocol):
    """Density and C channels of points in head space, for `n_rows` rows said beforehand."""

    aabb: Tensor  # (6,) x0 y0 z0 x1 y1 z1
    channels: int
    n_detached: int
    n_rows: int

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        """x (N, 3), row (N,) long -> density (N,) >= 0 per unit of length."""

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 3), unit d (N, 3), row (N,) -> density (N,), channels (N, C)."""


@runtime_checkable
class RayMarcher(Protocol):
    """Turns rays into composited channels; sees points, directions and row numbers only.

    `exploring`: training has yet to find where the surfaces are, so no place may be passed over
    for what was seen so far.
    """

    exploring: bool

    def march(self, field: Field, rays: RayBundle) -> Rendered:
        """Integrate `field` along `rays`."""

    def refresh(self, field: Field, step: int) -> None:
        """Learn which cells of space the field fills."""

    def discover(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        """Learn from nothing where a field is that nobody trained on; fields of one row."""

    def reveal(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        """Learn of poses and views that training did not show, each a field of one row."""
