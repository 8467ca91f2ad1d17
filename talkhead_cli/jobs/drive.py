"""Head pose, body, eyes and camera for a video of new speech.

Every value is a function of the frame number alone, so that frames can be rendered in any order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkhead_cli.contracts import FPS, Camera, MisuseError, TalkheadError
from talkhead_cli.jobs.footage import head_camera
from talkhead_cli.track.spans import spans

Array = NDArray[np.floating[Any]]

POSES, EYES = ("pose", "body"), ("eye", "gaze", "brow")  # arrays of footage, by what they drive
TURN = 10  # frames over which a replay slows down before it reverses
MAX_ANGLE_DEG = 45.0
ORBIT_DEG, ORBIT_S = 30.0, 8.0  # swing of the camera to either side, and its period
# Spontaneous blinks in conversation: about 17 a minute, a third of a second each (Bentivoglio
# et al. 1997), shutting faster than they open.
BLINK_MEAN_S, BLINK_SPREAD, BLINK_MIN_S = 3.5, 0.5, 1.0
# Motion of `--pose auto`: slow random rotation by a few degrees.
SWAY_DEG = np.array([1.6, 2.4, 1.2])  # standard deviations of pitch, yaw, roll
SWAY_HZ = (0.07, 0.55)
N_WAVES = 5
TURNED_DEG, OFF = 15.0, 0.4  # degrees and face heights beyond the footage's, worth a word
N_LOOKED_AT = 200  # frames of a film that tell
NEAREST = 1.0  # face heights from the camera: nearer, and it is within the hair
EYE_ROOM = 0.5  # that tracked openness may lie beyond 0 and 1
BLINK_SHAPE = np.array([0.75, 0.35, 0.05, 0.0, 0.15, 0.4, 0.7, 0.9])


# Footage of a single frame, straight ahead, on which options can be tried out.
MOTIONLESS: Mapping[str, NDArray[Any]] = MappingProxyType(
    {
        "pose": np.array([[0.0, 0, 0, 0, 0, 5]]),
        "body": np.zeros((1, 4)),
        "k": np.eye(3),
        "eye": np.ones((1, 2)),
        "gaze": np.zeros((1, 2)),
        "brow": np.zeros((1, 2)),
        "usable": np.array([True]),
    }
)


@dataclass(frozen=True)
class MotionOptions:
    """What moves the person and the camera, beside speech.

    pose: footage, still, auto or a file · blink: footage, auto, none or a file · yaw_deg,
    pitch_deg: move the camera to the person's right, and up · orbit: swing the camera ORBIT_DEG to
    either side with period ORBIT_S · landmarks: track to use instead of what the speech predicts
    """

    pose: str = "footage"
    blink: str = "footage"
    yaw_deg: float = 0.0
    pitch_deg: float = 0.0
    orbit: bool = False
    seed: int = 0
    landmarks: Path | None = None


@dataclass(frozen=True)
class Drive:
    """Driving values of any frames (n,) of a video of new speech."""

    pose: Callable[[NDArray[Any]], tuple[Array, Array]]  # -> pose (n, 6), body (n, 4)
    eyes: Callable[[NDArray[Any]], tuple[Array, Array, Array]]  # -> eye, gaze, brow (n, 2)
    k: Tensor
    rows: Callable[[NDArray[Any]], Array]  # frames (n,) -> footage rows that they replay
    yaw_deg: float = 0.0
    pitch_deg: float = 0.0
    orbit: bool = False

    @property
    def moves_camera(self) -> bool:
        """Whether any frame has another camera than the footage."""
        return bool(self.yaw_deg or self.pitch_deg or self.orbit)

    def sample_frames(self, n: int, n_frames: int) -> NDArray[np.int64]:
        """Return at most n frames that sample the poses and camera views of the video."""
        spread = np.linspace(0, n_frames - 1, n)
        if self.orbit:  # even spacing may alias with the orbit: half the frames sample one period
            spread[::2] = np.linspace(0, min(n_frames, FPS * ORBIT_S) - 1, len(spread[::2]))
        return np.unique(spread.astype(int))

    def camera(self, pose: Array, size_px: int, frames: NDArray[Any]) -> Camera:
        """Return the camera of frames (n,): the footage's, rotated about the head's origin."""
        seen = head_camera(torch.from_numpy(pose).float(), self.k, size_px)
        if not self.moves_camera:
            return seen
        from scipy.spatial.transform import Rotation

        swing = ORBIT_DEG * np.sin(2 * np.pi * frames / (FPS * ORBIT_S)) if self.orbit else 0.0
        yaw = np.broadcast_to(self.yaw_deg + swing, frames.shape)
        angles = np.stack([yaw, np.full(len(frames), -self.pitch_deg)], 1)
        # yaw about the head's upright axis, then pitch about the turned one: no roll
        turn = Rotation.from_euler("YX", angles, degrees=True).as_matrix()
        carried = torch.eye(4).repeat(len(frames), 1, 1)
        carried[:, :3, :3] = torch.from_numpy(turn).float()
        return Camera(carried @ seen.c2w, seen.k, seen.size_px)


def make(
    footage: Mapping[str, NDArray[Any]],
    n_frames: int,
    moves: MotionOptions,
    *,
    as_filmed: NDArray[np.int64] | None = None,
) -> Drive:
    """Build the drive of a video of n_frames.

    footage: arrays of a run's drive.npz · as_filmed: replay these rows (T,) of the footage from the
    first on, for a video that has so many frames
    """
    furthest = abs(moves.yaw_deg) + (ORBIT_DEG if moves.orbit else 0)
    if not max(furthest, abs(moves.pitch_deg)) <= MAX_ANGLE_DEG:  # nan is refused too
        raise MisuseError(
            f"--yaw and --pitch must lie within {MAX_ANGLE_DEG:.0f} degrees, --yaw within "
            f"{MAX_ANGLE_DEG - ORBIT_DEG:.0f} beside --orbit"
        )
    if as_filmed is None:
        first, last = longest_run(footage["usable"])
    else:
        footage = {**footage} | {k: footage[k][as_filmed] for k in (*POSES, *EYES)}
        first, last = 0, len(as_filmed) - 1
    clip = {k: footage[k][first : last + 1] for k in (*POSES, *EYES)}
    replay = (eased_replay if as_filmed is None else triangle_replay)(last - first + 1)
    middle = {k: np.median(v, axis=0) for k, v in clip.items()}

    def from_footage(frames: NDArray[Any]) -> tuple[Array, Array]:
        at = replay(frames)
        return between(clip["pose"], at), between(clip["body"], at)

    def still(frames: NDArray[Any]) -> tuple[Array, Array]:
        tile = (len(frames), 1)
        return np.tile(middle["pose"], tile), np.tile(middle["body"], tile)

    pose: Callable[[NDArray[Any]], tuple[Array, Array]]
    if moves.pose == "footage":
        pose = from_footage
    elif moves.pose == "still":
        pose = still
    elif moves.pose == "auto":
        pose = _sway(middle["pose"], middle["body"], moves.seed)
    else:
        pose = _pose_file(Path(moves.pose), middle["body"])

    looks = replay if moves.pose == "footage" else None
    eyes = _eyes(moves.blink, clip, middle, replay, looks, n_frames, moves.seed)
    k = torch.from_numpy(footage["k"])
    return Drive(
        pose, eyes, k, lambda at: first + replay(at), moves.yaw_deg, moves.pitch_deg, moves.orbit
    )


def beyond(footage: dict[str, NDArray[Any]], drive: Drive, n_frames: int) -> str:
    """How far the views of a film lie beyond what the footage shows, in words; "" if they do not.

    The angle is that between the lines of sight, in the head's space, to the nearest of the
    footage's; distances and places of the head count from the footage's range.
    """
    own = footage["pose"][footage["usable"]]
    frames = drive.sample_frames(N_LOOKED_AT, n_frames)
    pose = drive.pose(frames)[0]
    filmed = head_camera(torch.from_numpy(own).float(), drive.k, 1)
    seen, known = (c.c2w[:, :3, 2].numpy() for c in (drive.camera(pose, 1, frames), filmed))
    turned = np.degrees(np.arccos(np.clip(seen @ known.T, -1, 1))).min(1).max()
    low, high = own[:, 3:].min(0), own[:, 3:].max(0)
    off = float(np.maximum(low - pose[:, 3:], pose[:, 3:] - high).max())
    told = []
    if turned > TURNED_DEG:
        told.append(f"the head is seen from up to {turned:.0f} degrees beyond the footage's views")
    if off > OFF:
        told.append(
            f"it stands up to {off:.1f} face heights beyond where the footage has it (places from "
            f"{_triple(low)} to {_triple(high)})"
        )
    return " and ".join(told)


def _triple(place: Array) -> str:
    return "(" + ", ".join(f"{value:.1f}" for value in place) + ")"


def longest_run(usable: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the first and last row of the longest usable stretch; TalkheadError if none."""
    stretches = spans(usable)
    if len(stretches) == 0:
        raise TalkheadError("the run's footage has no usable frame; preprocess it again")
    first, end = stretches[np.argmax(stretches[:, 1] - stretches[:, 0])]
    return int(first), int(end) - 1


def triangle_replay(n: int) -> Callable[[NDArray[Any]], Array]:
    """Map frame numbers to whole rows of a clip of n frames: a triangle wave from row 0 on."""
    last = max(1, n - 1)

    def place(frames: NDArray[Any]) -> Array:
        at = np.abs((np.asarray(frames, float) + last) % (2 * last) - last)
        return np.minimum(at, n - 1)

    return place


def eased_replay(n: int) -> Callable[[NDArray[Any]], Array]:
    """Map frame numbers to fractional rows of a clip of n frames: forward, then backward, eased.

    Within TURN frames of an end a parabola replaces the corner of the triangle wave, so that the
    motion slows to a stop before it reverses.
    """
    last, triangle = n - 1, triangle_replay(n)

    def place(frames: NDArray[Any]) -> Array:
        at = triangle(frames)
        if last <= 0:
            return at
        turn = min(TURN, last / 2)

        def eased(distance: Array) -> Array:
            return np.where(distance < turn, distance**2 / (2 * turn) + turn / 2, distance)

        # the parabola's vertex is turn / 2 from the end: rows beyond it are not replayed
        at = np.where(at < last / 2, eased(at), last - eased(last - at))
        return at

    return place


def between(values: Array, at: Array) -> Array:
    """Interpolate values (n, k) linearly at fractional rows (m,)."""
    low = np.floor(at).astype(int).clip(0, len(values) - 1)
    high = np.minimum(low + 1, len(values) - 1)
    share = (at - low)[:, None]
    return values[low] * (1 - share) + values[high] * share


def blink_track(n_frames: int, seed: int) -> Array:
    """Return random blinks at a natural rate: factors (n_frames,) on openness, 0 is shut."""
    rng = np.random.default_rng(seed)
    track = np.ones(n_frames)
    at = rng.uniform(0.5, BLINK_MEAN_S)
    while at * FPS < n_frames:
        first = int(at * FPS)
        shape = BLINK_SHAPE[: n_frames - first]
        track[first : first + len(shape)] = np.minimum(track[first : first + len(shape)], shape)
        at += max(BLINK_MIN_S, rng.lognormal(np.log(BLINK_MEAN_S), BLINK_SPREAD))
    return track


def _eyes(
    blink: str,
    clip: dict[str, Array],
    middle: dict[str, Array],
    replay: Callable[[NDArray[Any]], Array],
    looks: Callable[[NDArray[Any]], Array] | None,
    n_frames: int,
    seed: int,
) -> Callable[[NDArray[Any]], tuple[Array, Array, Array]]:
    awake = middle["eye"]
    if blink == "footage":

        def open_by(frames: NDArray[Any]) -> Array:
            return between(clip["eye"], replay(frames))
    elif blink == "none":

        def open_by(frames: NDArray[Any]) -> Array:
            return np.tile(awake, (len(frames), 1))
    elif blink == "auto":
        track = blink_track(n_frames, seed)

        def open_by(frames: NDArray[Any]) -> Array:
            return track[frames, None] * awake
    else:
        given = read_table(Path(blink), (1, 2), "--blink")
        if given.min() < -EYE_ROOM or given.max() > 1 + EYE_ROOM:
            raise TalkheadError(
                f"--blink {blink}: openness counts from 0 (shut) to 1 (open), not from "
                f"{given.min():g} to {given.max():g}"
            )

        def open_by(frames: NDArray[Any]) -> Array:
            rows = given[np.minimum(frames, len(given) - 1)]
            return np.broadcast_to(rows, (len(frames), 2)).copy()

    def eyes(frames: NDArray[Any]) -> tuple[Array, Array, Array]:
        if looks is None:
            tile = (len(frames), 1)
            return open_by(frames), np.tile(middle["gaze"], tile), np.tile(middle["brow"], tile)
        at = looks(frames)
        return open_by(frames), between(clip["gaze"], at), between(clip["brow"], at)

    return eyes


def _sway(pose: Array, body: Array, seed: int) -> Callable[[NDArray[Any]], tuple[Array, Array]]:
    """Return the motion of `--pose auto`: slow random sway about `pose` (6,), body at rest."""
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(seed)
    slow, fast = np.log(SWAY_HZ)
    hz = np.exp(rng.uniform(slow, fast, (3, N_WAVES)))
    phase = rng.uniform(0, 2 * np.pi, (3, N_WAVES))
    size = np.radians(SWAY_DEG) * np.sqrt(2 / N_WAVES)
    rest = Rotation.from_rotvec(pose[:3])

    def moves(frames: NDArray[Any]) -> tuple[Array, Array]:
        at = np.asarray(frames, float)[:, None, None] / FPS
        waves = np.sin(2 * np.pi * hz * at + phase) * (1 - np.exp(-at))  # starts at rest
        turn = Rotation.from_rotvec(size * waves.sum(-1)) * rest
        place = np.tile(pose[3:], (len(frames), 1))
        return np.concatenate([turn.as_rotvec(), place], 1), np.tile(body, (len(frames), 1))

    return moves


def _pose_file(path: Path, body: Array) -> Callable[[NDArray[Any]], tuple[Array, Array]]:
    """Poses of a file: 6 columns, rotation vector (rad) and place (face heights) of the head in the
    camera's space: x right, y down, z away.

    A file shorter than the video is replayed forward and backward.
    """
    given = read_table(path, (6,), "--pose")
    if given[:, 5].min() < NEAREST:
        raise TalkheadError(
            f"--pose {path}: the head is {given[:, 5].min():g} face heights from the camera (last "
            f"column), which must be {NEAREST:g} or more; videos have 2 to 9 (an identity's own "
            "poses are `pose` in its tracks.npz)"
        )
    replay = triangle_replay(len(given))

    def moves(frames: NDArray[Any]) -> tuple[Array, Array]:
        return between(given, replay(frames)), np.tile(body, (len(frames), 1))

    return moves


def read_table(path: Path, columns: tuple[int, ...], option: str) -> Array:
    """Read a .csv, .txt or .npy table (n, c), one row per frame; c must be one of `columns`."""
    if not path.is_file():
        raise MisuseError(f"{option} {path}: there is no such file (and it is no known word)")
    try:
        if path.suffix == ".npy":
            table = np.load(path, allow_pickle=False)
        else:
            between = "," if path.suffix == ".csv" else None
            with warnings.catch_warnings(action="ignore"):  # numpy's on an empty file
                table = np.loadtxt(path, delimiter=between, ndmin=2, encoding="utf-8-sig")
        table = np.asarray(table, float)
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise TalkheadError(f"{option} {path}: not a table of numbers ({error})") from error
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.shape[1] not in columns or not len(table):
        wanted = " or ".join(str(c) for c in columns)
        raise TalkheadError(
            f"{option} {path}: needs {wanted} columns, one row a frame (25 a second)"
        )
    if not np.isfinite(table).all():
        raise TalkheadError(f"{option} {path}: holds values that are not numbers")
    return table
