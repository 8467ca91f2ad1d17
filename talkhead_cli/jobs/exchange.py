"""A workspace in the dataset layout that RAD-NeRF began and ER-NeRF, SyncTalk and others read.

    ID.mp4  aud.wav  bc.jpg  au.csv  transforms_train.json  transforms_val.json
    transforms.json       the same cameras for nerfstudio
    aud.npy aud_ds.npy    speech features (N, 16, 29)
    ori_imgs/{i}.jpg {i}.lms   gt_imgs/{i}.jpg   parsing/{i}.png   torso_imgs/{i}.png

Whose networks cannot be had by pip stands in: the features have DeepSpeech's shape and hold our
log-mel bands, and eyes are opened by our tracker's openness, not by OpenFace.  The split is ours,
so that the same frames are held out on both sides.  Pictures are shifted by the few pixels that
bring the optical axis to their middle, where readers of the layout take it to be.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from talkhead_cli import media
from talkhead_cli.contracts import FPS, LABELS, Progress, TalkheadError, followed
from talkhead_cli.jobs import player
from talkhead_cli.jobs.footage import STORED_PX, SpeechStats, head_camera, split_rows
from talkhead_cli.store import Workspace
from talkhead_cli.store.parcel import pack
from talkhead_cli.track import voice
from talkhead_cli.track.face import MESH_TO_68

SHAPE = (16, 29)  # steps of 20 ms and channels of DeepSpeech's features
# Readers of the layout multiply translations by 4 and march within a cube of half-width 1; a
# face height of 0.8 in there leaves room for hair and neck.
UNIT = 0.8 / 4
TURNED = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenCV axes (y down, z forward) to OpenGL's, and back
WHITE = 255
# Colours as a viewer shows them: head blue, neck green, torso red, background white.
PARSING = {"neck": (0, WHITE, 0), "torso": (WHITE, 0, 0), "background": (WHITE, WHITE, WHITE)}
HEAD = (0, 0, WHITE)


def export_avatar(
    home: Path, name: str, out: Path, progress: Progress, *, run_name: str | None = None
) -> Path:
    """Write a finished run of identity `name` into the file `out`: of the footage's pictures
    nothing but the background, and the portrait where an avatar is made from one."""
    space = Workspace.open(home, name)
    run, by_default = player.pick_run(space, run_name)
    if by_default:
        progress.note(f"run: {run.name}")
    return pack(space, run, out)


def export_dataset(
    home: Path, name: str, out: Path, progress: Progress, *, holdout: float = 1 / 11
) -> Path:
    """Write identity `name` as a dataset folder `out`, which must not exist yet."""
    space = Workspace.open(home, name)
    if out.exists():
        raise TalkheadError(f"{out} is there already; give a folder that is not")
    if not space.manifest()["has_audio"]:
        raise TalkheadError(f"'{name}' was preprocessed without sound; the layout needs it")
    part = out.with_name(f".part-{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(space, part, progress, holdout)
        part.rename(out)
    except OSError as error:
        raise TalkheadError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _write(space: Workspace, out: Path, progress: Progress, holdout: float) -> None:
    tracks = space.load("tracks")
    n_frames = len(tracks["pose"])
    size = int(space.manifest()["size_px"])
    for folder in ("ori_imgs", "gt_imgs", "parsing", "torso_imgs"):
        (out / folder).mkdir(parents=True)
    shutil.copyfile(space.video, out / f"{space.id}.mp4")
    shutil.copyfile(space.audio, out / "aud.wav")
    shift = size / 2 - tracks["k"][:2, 2].astype(float) * size / STORED_PX
    plate = cv2.resize(_read(space.plate_file), (size, size), interpolation=cv2.INTER_AREA)
    plate = _shifted(plate, shift)
    _save(out / "bc.jpg", plate)
    features = speech_features(space.load("voice")["stream"], n_frames)
    for file in ("aud.npy", "aud_ds.npy"):  # one name in the scripts, another in the loader
        np.save(out / file, features)
    with (out / "au.csv").open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["frame", " AU45_r"])  # the leading space is part of the name
        shut = 1 - tracks["eye"].mean(1).clip(0, 1)
        rows.writerows([i + 1, f"{2 * s:.3f}"] for i, s in enumerate(shut))
    poses = transforms(tracks["pose"], tracks["k"])
    train, held = split_rows(tracks["usable"], holdout)
    focal = float(tracks["k"][0, 0]) * size / STORED_PX
    for label, frames in (("train", train.tolist()), ("val", held.tolist())):
        text = json.dumps({
            "focal_len": focal, "cx": size / 2, "cy": size / 2,
            "frames": [{"img_id": int(i), "aud_id": int(i),
                        "transform_matrix": poses[i].tolist()} for i in frames],
        })  # fmt: skip
        (out / f"transforms_{label}.json").write_text(text)
    _write_nerfstudio(out, tracks, usable=torch.cat([train, held]).tolist(), focal=focal, size=size)
    marks = tracks["mesh_px"][:, MESH_TO_68] * size + shift
    progress.stage("export", n_frames)
    stream = media.frames(space.video, size=(size, size), n_frames=n_frames)
    for i, rgb in enumerate(followed(progress, stream)):
        labels = _shifted(_grown(space.labels(i), size), shift).transpose(2, 0, 1)
        _write_frame(out, i, _shifted(rgb[..., ::-1], shift), labels, plate)
        np.savetxt(out / "ori_imgs" / f"{i}.lms", marks[i], fmt="%.3f")


def _write_nerfstudio(
    out: Path, tracks: dict[str, NDArray[Any]], *, usable: list[int], focal: float, size: int
) -> None:
    """transforms.json: cameras round the head, OpenGL axes, z up, face heights."""
    pose, k = torch.from_numpy(tracks["pose"]), torch.from_numpy(tracks["k"])
    c2w = head_camera(pose, k, STORED_PX).c2w.double().numpy() @ TURNED
    stands = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    poses = stands @ c2w
    (out / "transforms.json").write_text(json.dumps({
        "camera_model": "OPENCV", "fl_x": focal, "fl_y": focal, "cx": size / 2, "cy": size / 2,
        "w": size, "h": size,
        "frames": [{"file_path": f"ori_imgs/{i}.jpg", "transform_matrix": poses[i].tolist()}
                   for i in usable],
    }))  # fmt: skip


def _write_frame(
    out: Path, i: int, bgr: NDArray[np.uint8], labels: NDArray[np.float32],
    plate: NDArray[np.uint8],
) -> None:  # fmt: skip
    """Pictures of frame i; labels (6, s, s) in [0, 1]."""
    of = dict(zip(LABELS, labels, strict=True))
    _save(out / "ori_imgs" / f"{i}.jpg", bgr)
    person = (1 - of["background"])[..., None]
    _save(out / "gt_imgs" / f"{i}.jpg", _bytes(person * bgr + (1 - person) * plate))
    colours = np.array([PARSING.get(label, HEAD)[::-1] for label in LABELS], np.uint8)
    _save(out / "parsing" / f"{i}.png", colours[labels.argmax(0)])
    torso = _bytes(255 * (of["torso"] + of["neck"]))[..., None]
    _save(out / "torso_imgs" / f"{i}.png", np.concatenate([bgr, torso], -1))


def transforms(pose: NDArray[np.float32], k: NDArray[np.float32]) -> NDArray[np.float64]:
    """Poses (T, 6) -> camera-to-world matrices (T, 4, 4) as the layout's readers want them."""
    c2w = head_camera(torch.from_numpy(pose), torch.from_numpy(k), STORED_PX).c2w.double().numpy()
    c2w[:, :3, 3] *= UNIT
    turned: NDArray[np.float64] = TURNED @ c2w @ TURNED
    return turned


def speech_features(stream: NDArray[np.float32], n_frames: int) -> NDArray[np.float32]:
    """Rows of 10 ms (n, A) -> windows (n_frames, 16, 29) of 20 ms steps around each frame."""
    stats = SpeechStats.of(stream)
    bands = ((stream - stats.mean) / stats.std)[:, : voice.N_MEL]
    steps, channels = SHAPE
    fewer = cv2.resize(bands, (channels, len(bands)), interpolation=cv2.INTER_AREA)
    slow = fewer[::2]
    middle = np.arange(n_frames) * (voice.RATE_HZ // FPS // 2)
    index = (middle[:, None] + np.arange(steps) - steps // 2).clip(0, len(slow) - 1)
    return slow[index].astype(np.float32)


def _grown(labels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """(6, 128, 128) uint8 -> (size, size, 6) in [0, 1]."""
    hwc = labels.transpose(1, 2, 0).astype(np.float32) / 255
    return np.asarray(cv2.resize(hwc, (size, size), interpolation=cv2.INTER_LINEAR), np.float32)


def _shifted(picture: NDArray[Any], by: NDArray[np.float64]) -> NDArray[Any]:
    """(s, s, C) moved right and down by (2,) pixels; the border is repeated."""
    move = np.array([[1, 0, by[0]], [0, 1, by[1]]])
    size = picture.shape[1::-1]
    moved: NDArray[Any] = cv2.warpAffine(
        np.ascontiguousarray(picture), move, size, borderMode=cv2.BORDER_REPLICATE
    )
    return moved


def _bytes(picture: NDArray[Any]) -> NDArray[np.uint8]:
    return picture.round().clip(0, 255).astype(np.uint8)


def _read(path: Path) -> NDArray[np.uint8]:
    picture = cv2.imread(str(path))
    if picture is None:
        raise TalkheadError(f"{path} is missing or damaged; run preprocess again")
    return np.asarray(picture, np.uint8)


def _save(path: Path, bgr: NDArray[np.uint8]) -> None:
    options = [cv2.IMWRITE_JPEG_QUALITY, 98] if path.suffix == ".jpg" else []
    if not cv2.imwrite(str(path), bgr, options):
        raise OSError(f"{path.name} cannot be written")
