"""A workspace as tensors: signals of every frame, memory-mapped pixels and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkhead_cli import media
from talkhead_cli.blocks.regions import head_relief
from talkhead_cli.contracts import (
    EYES,
    FPS,
    LABELS,
    LIPS,
    N_LANDMARKS,
    RELIEF_SIDE,
    Camera,
    Portrait,
    Progress,
    Signals,
    TalkheadError,
    followed,
)
from talkhead_cli.jobs.holdout import split
from talkhead_cli.jobs.pixels import DevicePixels, DiskPixels, Pixels
from talkhead_cli.jobs.preset import Data
from talkhead_cli.store import FILM_PX, Workspace
from talkhead_cli.store.pictures import read_picture
from talkhead_cli.track import voice
from talkhead_cli.track.face import MESH_TO_68, fill_gaps, lip_aperture

N_SKIN = 468  # mesh points that lie on the face; the rest are irises

# Landmarks inside each region's boxes, and the factors by which these are wider and higher.  Around
# eyes there is room for what moves with the lids, up to the brows.
REGIONS = {
    "mouth": ((LIPS,), (1.3, 1.8)),
    "face": ((slice(0, N_LANDMARKS),), (1.1, 1.25)),
    "eyes": (EYES, (1.5, 2.4)),
    "around eyes": (EYES, (1.8, 4.0)),
}
HIDES_IRIS = 0.5  # openness up to which lids hide too much of the iris to tell the gaze
MIN_SPEAKING = FPS  # training rows with sound, by which mouth and voice are measured
NEAR_Z, FAR_Z = -0.95, 0.75  # depth of a head, from before the nose to behind the skull


@dataclass(frozen=True)
class SpeechStats:
    """Mean and std (A,) that speech features, `rate_hz` rows a second, are standardised by."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    rate_hz: int = voice.RATE_HZ

    @classmethod
    def of(cls, stream: NDArray[np.float32], rate_hz: int, heard: NDArray[np.bool_]) -> SpeechStats:
        """Of a stream's first frames, but for those (T,) in which the sound is dead."""
        per_frame = rate_hz // FPS
        own = stream[: len(heard) * per_frame]
        living = np.repeat(heard, per_frame)[: len(own)]
        own = own[living] if living.any() else own
        return cls(own.mean(0), own.std(0) + 1e-3, rate_hz)

    @classmethod
    def stored(cls, arrays: Mapping[str, NDArray[Any]]) -> SpeechStats:
        """Restore them from what `arrays` returned."""
        return cls(arrays["speech_mean"], arrays["speech_std"], int(arrays["speech_rate_hz"]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return them as arrays to save."""
        return {
            "speech_mean": self.mean,
            "speech_std": self.std,
            "speech_rate_hz": np.array(self.rate_hz),
        }

    def windows(
        self, stream: NDArray[np.float32], frames: NDArray[Any], window: int
    ) -> NDArray[np.float32]:
        """Return standardised windows (len(frames), W, A), about `window` steps of 10 ms long."""
        standard = ((stream - self.mean) / self.std).astype(np.float32, copy=False)
        n_steps = voice.n_steps(window, self.rate_hz)
        return voice.windows(standard, frames, n_steps, self.rate_hz)


@dataclass(frozen=True)
class Footage:
    """One person's clip, ready for training.

    signals   all T rows · train, held (n,) long: training rows, held-out rows
    audible   (T,) whether the frame has sound; pauses between words count as sound
    stored    pictures (T, s, s, 3) and labels (T, 6, 128, 128) · plate (s, s, 3) in [0, 1]
    mesh      (468, 3) rigid face in head space · lip_truth (T,) tracked lip aperture
    said      (T, 68, 3) landmarks predicted from speech, for stages that train on these, too
    pixels    where a step takes its pixels from: `stored`, or a copy on the training device
    """

    signals: Signals
    train: Tensor
    held: Tensor
    audible: Tensor
    stored: DiskPixels
    plate: Tensor
    stats: SpeechStats
    mesh: Tensor
    lip_truth: NDArray[np.float32]
    pixels: Pixels
    said: Tensor | None = None

    def on(self, device: torch.device) -> Footage:
        """Return a copy with all that training draws from on a device."""
        return replace(
            self,
            signals=self.signals.to(device),
            plate=self.plate.to(device),
            said=None if self.said is None else self.said.to(device),
            pixels=DevicePixels.of(self.stored, device),
        )

    @property
    def pictures(self) -> NDArray[np.uint8]:
        return self.stored.pictures

    @property
    def labels(self) -> NDArray[np.uint8]:
        return self.stored.labels

    @property
    def n_bytes(self) -> int:
        """Size of pictures and labels."""
        return self.pictures.nbytes + self.labels.nbytes

    @cached_property
    def speaking(self) -> Tensor:
        """The training rows (n,) that have sound."""
        return self.train[self.audible[self.train]]

    def refuse_mute(self, name: str) -> None:
        """Raise TalkheadError if there is too little speech to measure a mouth and a voice by."""
        if len(self.speaking) < MIN_SPEAKING:
            raise TalkheadError(
                f"sound is heard in only {len(self.speaking) / FPS:.1f} of the "
                f"{len(self.train) / FPS:.1f} s of '{name}' that are to be learnt from; give more "
                "of the clip, or another one"
            )

    @property
    def device(self) -> torch.device:
        """The device that training draws from."""
        return self.signals.pose.device

    @property
    def size_px(self) -> int:
        return int(self.plate.shape[0])

    @cached_property
    def relief(self) -> Tensor:
        """Depth of the rigid face, as in `Portrait.relief`."""
        return head_relief(self.mesh, RELIEF_SIDE)

    @cached_property
    def regions(self) -> dict[str, Tensor]:
        """Boxes to draw training pixels from, by region: centre and half-size (T, K, 2, 2) of each
        of its K boxes, in shares of the side."""
        marks, found = self.signals.landmarks_2d, {}
        for region, (parts, grow) in REGIONS.items():
            boxes = []
            for points in parts:
                low, high = marks[:, points].amin(1), marks[:, points].amax(1)
                half = (high - low) / 2
                half = torch.maximum(half, half.amax(1, keepdim=True) * 0.35)  # of shut eyes
                boxes.append(torch.stack([(low + high) / 2, half * marks.new_tensor(grow)], 1))
            found[region] = torch.stack(boxes, 1)
        return found

    @cached_property
    def rare(self) -> Tensor:
        """The 5 % of training rows with eyes most shut and the 5 % with mouths widest open."""
        rows = self.signals[self.train].to("cpu")
        mouth = rows.lip_gap
        n = max(1, len(self.train) // 20)
        shut, wide = rows.eye.mean(1).argsort()[:n], mouth.argsort(descending=True)[:n]
        return self.train[torch.cat([shut, wide]).unique()]

    @cached_property
    def opened(self) -> Tensor:
        """Eye openness of each training row, mean of both eyes, 0 to 1."""
        return self.signals.eye[self.train].mean(1).cpu().clamp(0, 1)

    def portrait(self, rows: Tensor) -> Portrait:
        """Return rows (P,) as a portrait that an avatar can be enrolled from."""
        frames = rows.numpy()
        return Portrait(
            pictures=torch.from_numpy(self.pictures[frames]).float() / 255,
            labels=torch.from_numpy(self.labels[frames]).float() / 255,
            signals=self.signals[rows],
            relief=self.relief.expand(len(rows), -1, -1, -1),
        )

    def best_likeness(self, n: int = 1) -> Tensor:
        """Return the n training rows that show the person best: facing the camera, eyes open, the
        mouth about as usual; fewer if there are not n of them half a second apart."""
        rows = self.signals[self.train]
        turned = rows.pose[:, :3].norm(dim=1) / 0.1
        shut = (1 - rows.eye.mean(1)).clamp_min(0) / 0.2
        mouth = rows.lip_gap.clamp_min(0)
        unusual = (mouth - mouth.median()).abs() / mouth.std().clamp_min(1e-4)
        found: list[int] = []
        for row in self.train[(turned + shut + unusual).argsort()].tolist():
            if all(abs(row - other) >= FPS // 2 for other in found):
                found.append(row)
            if len(found) == n:
                break
        return torch.tensor(found)


def split_rows(
    usable: NDArray[np.bool_], holdout: float, train_s: float = 0
) -> tuple[Tensor, Tensor]:
    """Return the usable rows to train on and those held out, (n,) long each.

    Shares are of usable rows: frames that were cut away or show no face do not count.
    """
    rows = torch.from_numpy(np.flatnonzero(usable))
    n_train = len(rows) - split(len(rows), holdout)
    n_learn = min(n_train, round(train_s * FPS) or n_train)
    return rows[:n_learn], rows[n_train:]


def load(
    space: Workspace,
    data: Data,
    progress: Progress,
    *,
    person: int = 0,
    pictures: bool = True,
    stats: SpeechStats | None = None,
) -> Footage:
    """Read a workspace at the preset's picture size; caches pixels on first use.

    person: number of the person, for its rows, where there are several · pictures: False skips
    pictures and labels, for speech-only stages.
    """
    tracks = space.load("tracks")
    n_frames = len(tracks["pose"])
    heard = torch.from_numpy(space.load("voice")["heard"])
    stream, rate_hz = speech_of(space)
    train, held = split_rows(tracks["usable"], data.holdout, data.train_s)
    if len(train) < 2 * FPS:
        raise TalkheadError(
            f"'{space.id}' has only {len(train) / FPS:.1f} s with a face to learn from; at least "
            "2 s are needed"
        )
    if stats is None:
        stats = SpeechStats.of(stream, rate_hz, heard[: int(train[-1]) + 1].numpy())
    signals = make_signals(tracks, stream, stats, data)
    n_seen = n_frames if pictures else 0
    stored = DiskPixels(
        _pictures(space, data.size_px, n_seen, progress), _labels(space, n_seen, progress)
    )
    return Footage(
        signals=signals.with_(person=torch.full((n_frames,), person)),
        train=train,
        held=held,
        audible=heard,
        stored=stored,
        pixels=stored,
        plate=read_plate(space.plate_file, data.size_px),
        stats=stats,
        mesh=torch.from_numpy(tracks["shape"][:N_SKIN]),
        lip_truth=lip_aperture(tracks["mesh_fractions"]),
    )


def speech_of(space: Workspace) -> tuple[NDArray[np.float32], int]:
    """Return the speech features (rows, A) of a clip, and how many rows make a second."""
    sound = space.load("voice")
    if "rate_hz" not in sound:
        raise TalkheadError(
            f"'{space.id}' was preprocessed by an older version, whose speech features are of "
            "another kind; preprocess the clip again"
        )
    return sound["stream"], int(sound["rate_hz"])


def make_signals(
    tracks: dict[str, NDArray[Any]],
    stream: NDArray[np.float32],
    stats: SpeechStats,
    data: Data,
) -> Signals:
    """Return the signals of all rows of a tracked clip."""
    n_frames = len(tracks["pose"])
    pose = torch.from_numpy(tracks["pose"])
    window = stats.windows(stream, np.arange(n_frames), data.window)
    marks = tracks["mesh_fractions"][:, MESH_TO_68]
    return Signals(
        audio=torch.from_numpy(window),
        eye=torch.from_numpy(tracks["eye"]),
        gaze=torch.from_numpy(_seen_gaze(tracks["gaze"], tracks["eye"])),
        brow=torch.from_numpy(tracks["brow"]),
        landmarks=torch.from_numpy(tracks["landmarks"]),
        landmarks_2d=torch.from_numpy(marks),
        pose=pose,
        body=torch.from_numpy(tracks["body"]),
        camera=head_camera(pose, torch.from_numpy(tracks["k"]), data.size_px),
        person=torch.zeros(n_frames, dtype=torch.long),
        moment=torch.arange(n_frames),
    )


def _seen_gaze(gaze: NDArray[Any], openness: NDArray[Any]) -> NDArray[Any]:
    """Return gaze (T, 2), interpolated in time where lids hide the iris: where it was tracked there
    is a guess, far from all that is seen of open eyes."""
    seen = openness.mean(1) > HIDES_IRIS
    return fill_gaps(gaze, seen) if seen.any() else gaze


def head_camera(pose: Tensor, k: Tensor, size_px: int) -> Camera:
    """Return the camera that sees a head in `pose` (T, 6); intrinsics k (3, 3) at FILM_PX."""
    from scipy.spatial.transform import Rotation

    turn = torch.from_numpy(Rotation.from_rotvec(pose[:, :3].numpy()).as_matrix()).float()
    c2w = torch.eye(4).repeat(len(pose), 1, 1)
    c2w[:, :3, :3] = turn.transpose(1, 2)
    c2w[:, :3, 3] = -(turn.transpose(1, 2) @ pose[:, 3:, None])[..., 0]
    return Camera(c2w, k.expand(len(pose), 3, 3), FILM_PX).resized(size_px)


def box_of(camera: Camera) -> Tensor:
    """Return the box (6,) of head space that holds what rays of the rows can meet of the person.

    Its depth is a head's, NEAR_Z to FAR_Z; its sides are where rays through the pictures' corners
    cross these depths: the 0.2 % and 99.8 % quantiles of these places, with a margin of 0.02.
    """
    size = float(camera.size_px)
    corner = torch.tensor([[0, 0], [size, 0], [0, size], [size, size]])
    k = camera.k[:, None]
    ray = torch.stack(
        [
            (corner[:, 0] - k[..., 0, 2]) / k[..., 0, 0],
            (corner[:, 1] - k[..., 1, 2]) / k[..., 1, 1],
            torch.ones(len(camera.k), 4),
        ],
        -1,
    )  # (T, 4, 3)
    ray = torch.einsum("tij,tcj->tci", camera.c2w[:, :3, :3], ray)
    origin = camera.c2w[:, None, :3, 3]
    sides = []
    for z in (NEAR_Z, FAR_Z):
        at = origin + ray * ((z - origin[..., 2:]) / ray[..., 2:])
        sides.append(at[..., :2].flatten(0, 1))
    xy = torch.cat(sides)
    low, high = xy.quantile(0.002, dim=0) - 0.02, xy.quantile(0.998, dim=0) + 0.02
    return torch.tensor([*low.tolist(), NEAR_Z, *high.tolist(), FAR_Z])


def read_plate(path: Path, size_px: int, *, cure: str = "run preprocess again") -> Tensor:
    """Read the background (s, s, 3) in [0, 1]; `cure` says what to do if it is missing."""
    picture = read_picture(path, cure=cure)
    way = cv2.INTER_AREA if picture.shape[1] > size_px else cv2.INTER_CUBIC
    small = cv2.resize(picture, (size_px, size_px), interpolation=way)
    return torch.from_numpy(small.astype(np.float32) / 255)


def _pictures(
    space: Workspace, size_px: int, n_frames: int, progress: Progress
) -> NDArray[np.uint8]:
    if not n_frames:
        return np.zeros((0, size_px, size_px, 3), np.uint8)
    cached = space.pixels("rgb", size_px)
    if cached is not None:
        return cached
    progress.stage("pictures", n_frames)
    stream = media.frames(space.video, size=(size_px, size_px), n_frames=n_frames)
    shape = (n_frames, size_px, size_px, 3)
    return space.save_pixels("rgb", size_px, shape, followed(progress, stream))


def _labels(space: Workspace, n_frames: int, progress: Progress) -> NDArray[np.uint8]:
    side = 128
    if not n_frames:
        return np.zeros((0, len(LABELS), side, side), np.uint8)
    cached = space.pixels("labels", side)
    if cached is not None:
        return cached
    progress.stage("labels", n_frames)

    def rows() -> Iterator[NDArray[np.uint8]]:
        for frame in range(n_frames):
            yield space.labels(frame)

    shape = (n_frames, len(LABELS), side, side)
    return space.save_pixels("labels", side, shape, followed(progress, rows()))
