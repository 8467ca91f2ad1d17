"""Import a dataset in RAD-NeRF's layout (see export.py) as a workspace.

Pictures and sound are the dataset's, tracking is ours: readers of the layout disagree on what its
speech features, eyes and labels are, and none of them measures what we train on.  The dataset's
cameras are only evaluated: one similarity transform of our rigid face into their world is fitted to
where the face was seen, and the error is reported.  No .pt or .npy, which may hold code, is opened.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from talkhead_cli import media
from talkhead_cli.contracts import Progress, TalkheadError
from talkhead_cli.jobs.export import TURNED, UNIT
from talkhead_cli.jobs.preprocess import id_from, preprocess
from talkhead_cli.store import Workspace, check_id
from talkhead_cli.track.pose import RIGID

SPLITS = ("train", "val")
N_ASKED = 60  # cameras that are evaluated
MAX_JSON = 200_000_000  # bytes
MAX_FRAMES = 10_000_000


@dataclass(frozen=True)
class Cameras:
    """Cameras of a dataset: frames (n,) · c2w (n, 4, 4) in its axes · focal length and principal
    point `centre` in pixels of its pictures · n_held: number of frames that it holds out."""

    frames: NDArray[np.int64]
    c2w: NDArray[np.float64]
    focal: float
    centre: NDArray[np.float64]
    n_held: int


def import_dataset(
    folder: Path, home: Path, progress: Progress, *, name: str | None = None
) -> Workspace:
    """Preprocess the dataset's pictures and sound into `home`, and report its cameras' error.

    Reads ori_imgs/{i}.jpg (or .png), else ID.mp4; aud.wav; transforms_train.json and _val.json.
    """
    name = id_from(folder.resolve()) if name is None else check_id(name)
    cameras = read_cameras(folder)
    pictures, sound = _sources(folder)
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=home) as scratch:
        film = _encoded(pictures, sound, Path(scratch) / f"{name}.mp4", progress)
        space = preprocess(film, home, progress, name=name)
    if cameras is None:
        return space
    share = cameras.n_held / len(cameras.frames)
    if 0 < share <= 0.25:
        progress.note(
            f"the dataset holds out {cameras.n_held} of {len(cameras.frames)} frames, the same "
            f"share as finetune -s data.holdout={share:.3f}"
        )
    found = reprojection_errors(space, cameras)
    if found is None:
        progress.note("fewer than ten of the dataset's cameras show a face; they were not tested")
        return space
    theirs, ours = found
    with space.locked():
        space.note(dataset={"cameras_px": round(theirs, 2), "tracked_px": round(ours, 2)})
    progress.note(
        f"the dataset's cameras see rigid landmarks {theirs:.1f} px from where they are (RMS, at "
        f"512 px), talkhead's {ours:.1f} px"
    )
    return space


def read_cameras(folder: Path) -> Cameras | None:
    """Read the cameras of transforms_train.json and transforms_val.json, sorted by frame; None if
    there are none."""
    frames: list[tuple[int, NDArray[np.float64]]] = []
    facts: dict[str, Any] = {}
    n_held = 0
    for split in SPLITS:
        path = folder / f"transforms_{split}.json"
        if not path.is_file():
            continue
        facts = _json(path)
        try:
            found = [
                (int(f["img_id"]), np.array(f["transform_matrix"], np.float64))
                for f in facts["frames"]
            ]
            focal = float(facts["focal_len"] if "focal_len" in facts else facts["fl_x"])
            centre = np.array([facts["cx"], facts["cy"]], np.float64)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise TalkheadError(
                f"{path.name} lacks what the layout has (img_id and transform_matrix of each "
                f"frame, focal_len, cx, cy): {error}"
            ) from error
        if not np.isfinite([focal, *centre]).all() or focal <= 0:
            raise TalkheadError(f"{path.name}: focal_len (above 0), cx and cy must be numbers")
        for index, matrix in found:
            known = 0 <= index < MAX_FRAMES
            if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not known:
                raise TalkheadError(f"{path.name}: frame {index} has no camera of 4 x 4 numbers")
        frames += found
        n_held += len(found) if split == "val" else 0
    if not frames:
        return None
    frames.sort(key=lambda frame: frame[0])
    return Cameras(
        np.array([i for i, _ in frames]), np.stack([m for _, m in frames]), focal, centre, n_held
    )


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON:
        raise TalkheadError(f"{path.name} is larger than {MAX_JSON // 10**6} MB; is it cameras?")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise TalkheadError(f"{path.name} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise TalkheadError(f"{path.name} is no table of cameras")
    return found


def _sources(folder: Path) -> tuple[list[Path], Path]:
    """Return the numbered pictures, or else the video, and the file that holds the sound."""
    sound = folder / "aud.wav"
    own = folder / f"{folder.resolve().name}.mp4"
    films = [own] if own.is_file() else sorted(folder.glob("*.mp4"))
    pictures = _pictures(folder / "ori_imgs")
    if len(films) > 1 and not (pictures and sound.is_file()):
        raise TalkheadError(
            f"{folder} holds {len(films)} videos, none of them named {own.name}; videos of people "
            "are tracked by: talkhead preprocess FOLDER"
        )
    if not pictures and not films:
        raise TalkheadError(
            f"{folder} is no dataset: it has neither ori_imgs/0.jpg ... nor ID.mp4 (RAD-NeRF's "
            "layout; talkhead export writes it)"
        )
    if not sound.is_file():
        if not films:
            raise TalkheadError(f"{folder} has no sound: neither aud.wav nor ID.mp4")
        sound = films[0]
    return pictures or films[:1], sound


def _encoded(pictures: list[Path], sound: Path, out: Path, progress: Progress) -> Path:
    """Encode pictures and sound as one video."""
    stream = _read(pictures)
    first = next(stream)
    height, width = (side // 2 * 2 for side in first.shape[:2])
    progress.stage("dataset", None)
    with media.VideoWriter(out, (width, height), audio=sound, crf=6, preset="ultrafast") as video:
        video.write(first[:height, :width])
        for picture in stream:
            video.write(picture[:height, :width])
            progress.advance()
    return out


def _pictures(folder: Path) -> list[Path]:
    """Return the pictures 0.jpg, 1.jpg ... in order; TalkheadError if one is missing."""
    numbered = {
        int(p.stem): p
        for p in folder.glob("*.*")
        if p.suffix in (".jpg", ".png") and p.stem.isdecimal()
    }
    missing = next((i for i in range(len(numbered)) if i not in numbered), None)
    if missing is not None:
        raise TalkheadError(
            f"{folder} lacks picture {missing}; they must be numbered from 0 without gaps"
        )
    return [numbered[i] for i in range(len(numbered))]


def _read(files: list[Path]) -> Iterator[NDArray[np.uint8]]:
    """Yield frames (H, W, 3) of numbered pictures, or of one video."""
    if files[0].suffix == ".mp4":
        yield from media.frames(files[0])
        return
    shape: tuple[int, ...] | None = None
    for file in files:
        bgr = cv2.imread(str(file))
        if bgr is None or shape not in (None, bgr.shape):
            raise TalkheadError(f"{file.name} is damaged, or of another size than the others")
        shape = bgr.shape
        yield np.ascontiguousarray(bgr[..., ::-1])


def reprojection_errors(space: Workspace, cameras: Cameras) -> tuple[float, float] | None:
    """Return the reprojection errors of the rigid face by the dataset's cameras and by our track:
    mean over frames of the RMS, pixels at 512.  None if fewer than ten cameras show a face."""
    tracks = space.load("tracks")
    crop, size = space.manifest()["crop"], int(space.manifest()["size_px"])
    usable = np.flatnonzero(tracks["usable"])
    asked = np.intersect1d(cameras.frames, usable)
    if len(asked) < 10:
        return None
    of = {int(frame): i for i, frame in enumerate(cameras.frames)}
    asked = asked[np.linspace(0, len(asked) - 1, min(N_ASKED, len(asked))).astype(int)]
    corner = [crop["x"], crop["y"]]
    seen = tracks["mesh_fractions"][asked][:, RIGID].astype(np.float64) * crop["side"] + corner
    c2w = TURNED @ cameras.c2w[[of[int(i)] for i in asked]] @ TURNED
    rigid = tracks["shape"][RIGID].astype(np.float64)

    def off(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
        turn = Rotation.from_rotvec(similarity[:3]).as_matrix()
        world = np.exp(similarity[6]) * rigid @ turn.T + similarity[3:6]
        local = (world - c2w[:, None, :3, 3]) @ c2w[:, :3, :3]
        depth = np.where(np.abs(local[..., 2:]) < 1e-6, 1e-6, local[..., 2:])
        return (cameras.focal * local[..., :2] / depth + cameras.centre - seen).ravel()

    start = np.array([0, 0, 0, 0, 0, 0, np.log(UNIT)])
    fitted = least_squares(off, start, loss="soft_l1", f_scale=4.0)
    missed = off(fitted.x).reshape(len(asked), -1, 2)
    theirs = np.sqrt((missed**2).sum(-1).mean(1)).mean()
    ours = float(np.nanmean(tracks["residual_px"][asked]))  # in pixels of the video
    return float(theirs) * size / crop["side"], ours * size / crop["side"]
