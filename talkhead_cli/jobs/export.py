"""Export a workspace in the dataset layout of RAD-NeRF, which ER-NeRF, SyncTalk and others read.

    ID.mp4  aud.wav  bc.jpg  au.csv  transforms_train.json  transforms_val.json
    transforms.json       the same cameras for nerfstudio
    aud.npy aud_ds.npy    speech features (N, 16, 29)
    ori_imgs/{i}.jpg {i}.lms   gt_imgs/{i}.jpg   parsing/{i}.png   torso_imgs/{i}.png
    bs.npy (N, 52)  parsing/{i}_face.png      read by SyncTalk in addition
    teeth_mask/{i}.npy                        read by TalkingGaussian and InsTaG in addition

Files whose networks pip cannot install hold substitutes: the features have DeepSpeech's shape and
hold our log-mel bands; action units and blend shapes are derived from our tracks of lids, brows and
lips, the others are 0; the inner mouth stands in for teeth.  The split is ours, so that both sides
hold out the same frames.  Readers of the layout assume that the principal point is the picture's
centre; ours are crops, so the cameras are rotated, and the pictures warped, until it is.
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
from talkhead_cli.jobs.footage import head_camera, split_rows
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.store import FILM_PX, Workspace
from talkhead_cli.store.parcel import pack
from talkhead_cli.store.pictures import read_picture
from talkhead_cli.track import face, voice
from talkhead_cli.track.face import MESH_TO_68

SHAPE = (16, 29)  # steps of 20 ms and channels of DeepSpeech's features
# Readers of the layout multiply translations by 4 and march within a cube of half-width 1; a
# face height of 0.8 in there leaves room for hair and neck.
UNIT = 0.8 / 4
TURNED = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenCV axes (y down, z forward) to OpenGL's, and back
WHITE = 255
# RGB.  TalkingGaussian distinguishes hair and the inner mouth from the rest of the head.
HEAD = (0, 0, WHITE)
PARSING = {
    "face": HEAD,
    "mouth": (100, 100, 100),
    "hair": (0, 0, 0),
    "neck": (0, WHITE, 0),
    "torso": (WHITE, 0, 0),
    "background": (WHITE, WHITE, WHITE),
}
# Top of OpenFace's scale of action units; tracked values are scaled to reach it at *_REACH.
STRONGEST = 5.0
BROW_REACH, LID_REACH, LIP_REACH = 0.04, 0.2, 0.12  # face heights, openness above 1, face heights
# Indices of MediaPipe's blend shapes in SyncTalk's order; left is the person's.
BROWS_DOWN, BROWS_UP, BLINKS, JAW_OPEN = (0, 1), (2, 3, 4), (8, 9), 24


def export_avatar(
    home: Path, name: str, out: Path, progress: Progress, *, run_name: str | None = None
) -> Path:
    """Write a finished run of identity `name` into the file `out`.  Of the footage's pictures it
    holds only the background, and the portrait if the avatar is made from one."""
    space = Workspace.open(home, name)
    run = pick_run(space, run_name, progress)
    return pack(space, run, out)


def export_dataset(
    home: Path, name: str, out: Path, progress: Progress, *, holdout: float = 1 / 11
) -> Path:
    """Write identity `name` as a dataset folder `out`, which must not exist yet."""
    space = Workspace.open(home, name)
    space.refuse_without_footage("write; -o NAME.talkhead carries the avatar")
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
    for folder in ("ori_imgs", "gt_imgs", "parsing", "torso_imgs", "teeth_mask"):
        (out / folder).mkdir(parents=True)
    shutil.copyfile(space.video, out / f"{space.id}.mp4")
    shutil.copyfile(space.audio, out / "aud.wav")
    seen = _Straight(tracks["k"], size)
    plate = cv2.resize(
        read_picture(space.plate_file, cure="run preprocess again")[..., ::-1],
        (size, size),
        interpolation=cv2.INTER_AREA,
    )
    plate = seen.picture(plate)
    _save(out / "bc.jpg", plate)
    features = speech_features(voice.features(media.sound(space.audio)), n_frames)
    for file in ("aud.npy", "aud_ds.npy"):  # readers' scripts and loader use different names
        np.save(out / file, features)
    units = action_units(tracks)
    with (out / "au.csv").open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["frame", *(f" AU{unit:02d}_r" for unit in units)])  # with leading spaces
        for i, row in enumerate(np.stack(list(units.values()), 1)):
            rows.writerow([i + 1, *(f"{value:.3f}" for value in row)])
    np.save(out / "bs.npy", blend_shapes(tracks))
    c2w = seen.cameras(tracks["pose"])
    poses = transforms(c2w)
    train, held = split_rows(tracks["usable"], holdout)
    for label, frames in (("train", train.tolist()), ("val", held.tolist())):
        text = json.dumps(
            {
                "focal_len": seen.focal,
                "cx": size / 2,
                "cy": size / 2,
                "frames": [
                    {"img_id": int(i), "aud_id": int(i), "transform_matrix": poses[i].tolist()}
                    for i in frames
                ],
            }
        )
        (out / f"transforms_{label}.json").write_text(text)
    _write_nerfstudio(
        out, c2w, usable=torch.cat([train, held]).tolist(), focal=seen.focal, size=size
    )
    marks = seen.points(tracks["mesh_fractions"][:, MESH_TO_68] * size)
    progress.stage("export", n_frames)
    stream = media.frames(space.video, size=(size, size), n_frames=n_frames)
    for i, rgb in enumerate(followed(progress, stream)):
        labels = seen.picture(_grown(space.labels(i), size)).transpose(2, 0, 1)
        _write_frame(out, i, seen.picture(rgb[..., ::-1]), labels, plate)
        np.savetxt(out / "ori_imgs" / f"{i}.lms", marks[i], fmt="%.3f")


class _Straight:
    """A crop's camera, rotated to look at the crop's centre, and the homography to its view."""

    def __init__(self, k: NDArray[np.float32], size: int) -> None:
        """k (3, 3) of the crop at FILM_PX · size: of pictures, in pixels"""
        self.k, self.size = k, size
        scaled = np.diag([size / FILM_PX, size / FILM_PX, 1.0]) @ k.astype(np.float64)
        ahead = np.linalg.solve(scaled, [size / 2, size / 2, 1.0])
        # the smallest rotation; the focal length keeps the scale at the centre
        axis = np.cross(ahead, [0.0, 0.0, 1.0])
        angle = float(np.arctan2(np.linalg.norm(axis), ahead[2]))
        self.turn = cv2.Rodrigues(axis / max(float(np.linalg.norm(axis)), 1e-12) * angle)[0]
        self.focal = float(scaled[0, 0] * np.linalg.norm(ahead))
        straight = np.array([[self.focal, 0, size / 2], [0, self.focal, size / 2], [0, 0, 1]])
        self.homography = straight @ self.turn @ np.linalg.inv(scaled)

    def cameras(self, pose: NDArray[np.float32]) -> NDArray[np.float64]:
        """Poses (T, 6) of the head -> camera-to-head matrices (T, 4, 4), OpenCV axes."""
        camera = head_camera(torch.from_numpy(pose), torch.from_numpy(self.k), FILM_PX)
        c2w: NDArray[np.float64] = camera.c2w.double().numpy()
        c2w[:, :3, :3] = c2w[:, :3, :3] @ self.turn.T
        return c2w

    def points(self, at: NDArray[Any]) -> NDArray[np.float64]:
        """Map points (T, N, 2) of the crop to the rotated view, in pixels."""
        seen = np.concatenate([at, np.ones_like(at[..., :1])], -1) @ self.homography.T
        return seen[..., :2] / seen[..., 2:]

    def picture(self, crop: NDArray[Any]) -> NDArray[Any]:
        """Warp a crop (s, s, C) to the rotated view; beyond the crop its border is replicated."""
        to_corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV: 0 is a pixel's centre
        return cv2.warpPerspective(
            np.ascontiguousarray(crop),
            np.linalg.inv(to_corner) @ self.homography @ to_corner,
            (self.size, self.size),
            borderMode=cv2.BORDER_REPLICATE,
        )


def _write_nerfstudio(
    out: Path, c2w: NDArray[np.float64], *, usable: list[int], focal: float, size: int
) -> None:
    """Write transforms.json: cameras around the head, OpenGL axes, z up, in face heights."""
    stands = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    poses = stands @ c2w @ TURNED
    (out / "transforms.json").write_text(json.dumps({
        "camera_model": "OPENCV", "fl_x": focal, "fl_y": focal, "cx": size / 2, "cy": size / 2,
        "w": size, "h": size,
        "frames": [{"file_path": f"ori_imgs/{i}.jpg", "transform_matrix": poses[i].tolist()}
                   for i in usable],
    }))  # fmt: skip


def _write_frame(
    out: Path, i: int, bgr: NDArray[np.uint8], labels: NDArray[np.float32], plate: NDArray[np.uint8]
) -> None:
    """Write all pictures of frame i; labels (6, s, s) in [0, 1]."""
    of = dict(zip(LABELS, labels, strict=True))
    _save(out / "ori_imgs" / f"{i}.jpg", bgr)
    person = (1 - of["background"])[..., None]
    _save(out / "gt_imgs" / f"{i}.jpg", _bytes(person * bgr + (1 - person) * plate))
    colours = np.array([PARSING[label][::-1] for label in LABELS], np.uint8)
    parts = labels.argmax(0)
    _save(out / "parsing" / f"{i}.png", colours[parts])
    mouth = parts == LABELS.index("mouth")
    pasted = mouth | (parts == LABELS.index("face"))
    white = np.array(PARSING["background"], np.uint8)
    _save(out / "parsing" / f"{i}_face.png", np.where(pasted[..., None], HEAD[::-1], white))
    np.save(out / "teeth_mask" / f"{i}.npy", mouth)
    torso = _bytes(255 * (of["torso"] + of["neck"]))[..., None]
    _save(out / "torso_imgs" / f"{i}.png", np.concatenate([bgr, torso], -1))


def action_units(tracks: dict[str, NDArray[Any]]) -> dict[int, NDArray[np.float64]]:
    """Return intensities (T,), 0 to 5, of the action units that readers of the layout use."""
    brow, eye = tracks["brow"].mean(1), tracks["eye"].mean(1)
    lips = face.lip_aperture(tracks["mesh_fractions"])

    def strength(share: NDArray[Any]) -> NDArray[np.float64]:
        return STRONGEST * share.clip(0, 1).astype(np.float64)

    nothing = np.zeros(len(eye))
    return {
        1: strength(brow / BROW_REACH),
        4: strength(-brow / BROW_REACH),
        5: strength((eye - 1) / LID_REACH),
        6: nothing,
        7: nothing,
        25: strength(lips / LIP_REACH),
        45: 2 * (1 - eye.clip(0, 1).astype(np.float64)),
    }


def blend_shapes(tracks: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Return MediaPipe blend shape scores (T, 52) in [0, 1], in SyncTalk's order."""
    shapes = np.zeros((len(tracks["eye"]), 52))
    left, right = 1, 0  # of the person; columns of tracks are left, right of the picture
    brow = tracks["brow"] / BROW_REACH
    shapes[:, BROWS_DOWN] = -brow[:, (left, right)]
    shapes[:, BROWS_UP] = np.stack([brow.mean(1), brow[:, left], brow[:, right]], 1)
    shapes[:, BLINKS] = 1 - tracks["eye"][:, (left, right)]
    shapes[:, JAW_OPEN] = face.lip_aperture(tracks["mesh_fractions"]) / LIP_REACH
    return shapes.clip(0, 1)


def transforms(c2w: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert camera-to-head matrices (T, 4, 4) from OpenCV axes to the layout's axes and unit."""
    scaled = c2w.copy()
    scaled[:, :3, 3] *= UNIT
    return TURNED @ scaled @ TURNED


def speech_features(stream: NDArray[np.float32], n_frames: int) -> NDArray[np.float32]:
    """Resample features (n, A), mel bands first, one row per 10 ms, to windows (n_frames, 16, 29)
    of 20 ms steps around each frame."""
    mel = stream[:, : voice.N_MEL]
    bands = (mel - mel.mean(0)) / (mel.std(0) + 1e-3)
    steps, channels = SHAPE
    fewer = cv2.resize(bands, (channels, len(bands)), interpolation=cv2.INTER_AREA)
    slow = fewer[::2]
    middle = np.arange(n_frames) * (voice.RATE_HZ // FPS // 2)
    index = (middle[:, None] + np.arange(steps) - steps // 2).clip(0, len(slow) - 1)
    return slow[index].astype(np.float32)


def _grown(labels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """Resize labels (6, 128, 128) uint8 to (size, size, 6) in [0, 1]."""
    hwc = labels.transpose(1, 2, 0).astype(np.float32) / 255
    return np.asarray(cv2.resize(hwc, (size, size), interpolation=cv2.INTER_LINEAR), np.float32)


def _bytes(picture: NDArray[Any]) -> NDArray[np.uint8]:
    return picture.round().clip(0, 255).astype(np.uint8)


def _save(path: Path, bgr: NDArray[np.uint8]) -> None:
    options = [cv2.IMWRITE_JPEG_QUALITY, 98] if path.suffix == ".jpg" else []
    if not cv2.imwrite(str(path), bgr, options):
        raise OSError(f"{path.name} cannot be written")
