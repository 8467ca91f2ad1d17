"""Turn a picture file into a tracked portrait and the background behind the person."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from talkhead_cli.blocks.regions import head_relief
from talkhead_cli.contracts import RELIEF_SIDE, Portrait, Progress, Signals, TalkheadError
from talkhead_cli.jobs.footage import N_SKIN, head_camera
from talkhead_cli.store import FILM_PX
from talkhead_cli.track import face, matte, pose
from talkhead_cli.track.crop import MIN_FACE_PX, choose_crop
from talkhead_cli.track.scout import scout

MAX_SIDE = 4096  # pixels; larger pictures are shrunk to it
MESH_SIDE = 1280
DETECT_PX = 320
SURE = 0.6  # detector score: people's faces get 0.67 and more, animals' less than this
CLEARLY = 0.1  # by how much more, if the face stands on its head
LYING_DEG = 60.0  # roll of a face on its side; people tilt their heads by up to 40
MIN_TILE = 600  # side of the smallest part of a picture in which faces are looked for, pixels
TURNED_DEG, AWAY_DEG = 25.0, 50.0  # a head turned beyond: poor results; refused
PAPER = 235  # grey level behind transparent pictures


@dataclass(frozen=True)
class Photo:
    """One picture of a person, tracked.

    portrait at `size_px` · plate (FILM_PX, FILM_PX, 3) uint8 background · k (3, 3) intrinsics
    at FILM_PX
    """

    portrait: Portrait
    plate: NDArray[np.uint8]
    k: NDArray[np.float32]


def read(path: Path) -> NDArray[np.uint8]:
    """Read a picture (H, W, 3), rotated upright by its EXIF tag, alpha blended over PAPER."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise TalkheadError(f"there is no picture file {path}")
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            upright.thumbnail((MAX_SIDE, MAX_SIDE))
            if upright.mode.startswith(("I", "F")):  # 16 bits and more a channel
                upright = Image.fromarray(_eight_bits(np.asarray(upright, np.float64)))
            layers = upright.convert("RGBA")
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise TalkheadError(
            f"{path.name} cannot be read as a picture ({error}); give a JPEG or PNG"
        ) from error
    paper = Image.new("RGBA", layers.size, (PAPER,) * 3 + (255,))
    return np.asarray(Image.alpha_composite(paper, layers).convert("RGB")).copy()


def _eight_bits(grey: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return grey levels of any range in 8 bits; white is what can be meant by it (4095: cameras
    with 12 bits)."""
    grey = np.nan_to_num(grey)
    ranges = [white for white in (1.0, 255.0, 4095.0, 65_535.0) if grey.max() <= white]
    white = ranges[0] if ranges else grey.max()
    return (255 * grey.clip(0) / white).round().astype(np.uint8)


def portrait_of(
    path: Path, size_px: int, progress: Progress, *, which_face: str = "largest"
) -> Photo:
    """Track the person in a picture: pose, landmarks, labels and background.

    `which_face` is largest, left or right, as seen in the picture.
    """
    mesh, rgb = _mesh(path, read(path), which_face, progress)
    height, width = rgb.shape[:2]
    points, found = mesh[None], np.array([True])
    head = pose.fit_head(points, found, (width, height))
    _look_at_turn(path, head.rotation[0], progress)
    tall = float(face.face_height(mesh[:, :2]))
    if tall < MIN_FACE_PX:
        raise TalkheadError(
            f"the face in {path.name} is only {tall:.0f} pixels tall; give a larger picture, in "
            f"which it has at least {MIN_FACE_PX} (150 or more looks good)"
        )
    crop = choose_crop(points, found, (0, 0, width, height))
    if crop.side < size_px:
        progress.note(
            f"the head's square is {crop.side} px in {path.name}; it is enlarged to {size_px} px"
        )
    cut = rgb[crop.y : crop.y + crop.side, crop.x : crop.x + crop.side]
    way = cv2.INTER_AREA if crop.side > FILM_PX else cv2.INTER_CUBIC
    square = cv2.resize(cut, (FILM_PX, FILM_PX), interpolation=way)
    in_crop = crop.fractions(mesh)
    labels, plate = _regions(square, in_crop)
    k = crop.intrinsics(head.focal_px, head.centre_px, FILM_PX).astype(np.float32)
    way = cv2.INTER_AREA if size_px < FILM_PX else cv2.INTER_CUBIC
    small = cv2.resize(square, (size_px, size_px), interpolation=way)
    portrait = Portrait(
        pictures=torch.from_numpy(small)[None].float() / 255,
        labels=torch.from_numpy(labels)[None].float() / 255,
        signals=_signals(mesh, in_crop, head, torch.from_numpy(k), size_px),
        relief=head_relief(torch.from_numpy(head.shape[:N_SKIN]).float(), RELIEF_SIDE)[None],
    )
    return Photo(portrait, plate, k)


def _mesh(
    path: Path, rgb: NDArray[np.uint8], which: str, progress: Progress
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Return the mesh (478, 3) of the chosen face, in pixels of the part of the picture around it,
    and that part.  A picture that lies on its side or its head is turned first."""
    found, turns = _found(rgb, which), 0
    if found is None:
        tries = [_found(_turned(rgb, n), which) for n in (1, 2, 3)]
        turns = 1 + int(np.argmax([-1 if one is None else one.scores[0] for one in tries]))
        found = tries[turns - 1]
    elif (wanted := _turns_needed(found)) and (upright := _found(_turned(rgb, wanted), which)):
        found, turns = upright, wanted
    if found is None:
        raise TalkheadError(
            f"no face is found in {path.name}; give a picture of one person who faces the camera"
        )
    if turns:
        how = ("a quarter turn to the left", "upside down", "a quarter turn to the right")
        progress.note(f"{path.name} does not stand upright; it was turned {how[turns - 1]}")
    if found.n_faces > 1:
        progress.note(
            f"{found.n_faces} faces are in {path.name}; the {which} one speaks "
            "(--face left|right|largest chooses)"
        )
    if found.scores[0] < SURE:
        progress.note(f"{path.name} may not show a person's face; the result may look wrong")
    return found.mesh, found.part


@dataclass(frozen=True)
class _Found:
    """A face: its mesh (478, 3) in pixels of `part`, the number of faces in the picture, and the
    detector's scores (4,) of it after 0 to 3 quarter turns to the left."""

    mesh: NDArray[np.float32]
    part: NDArray[np.uint8]
    n_faces: int
    scores: NDArray[np.float32]


def _turned(rgb: NDArray[np.uint8], turns: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.rot90(rgb, turns))


def _turns_needed(found: _Found) -> int:
    """Return by how many quarter turns to the left the face would stand upright.  The mesh follows
    faces on their side, but on an upside-down face it stands upright: there the scores decide."""
    x, y = found.mesh[face.CHIN, :2] - found.mesh[face.TOP, :2]
    roll = float(np.degrees(np.arctan2(x, y)))
    if abs(roll) > LYING_DEG:
        return -round(roll / 90) % 4
    return 2 if found.scores[2] > found.scores[0] + CLEARLY else 0


def _found(rgb: NDArray[np.uint8], which: str) -> _Found | None:
    """Return the chosen face of a picture, None if there is none."""
    height, width = rgb.shape[:2]
    scene = scout([rgb], (width, height), which, _Detector, narrow=False)
    x, y, w, h = scene.roi
    part = np.ascontiguousarray(rgb[y : y + h, x : x + w])
    with _Detector() as detect:
        boxes = detect(part)
    mesh = _seen(part)
    if mesh is None and len(boxes):  # too small in the whole picture: retry on an enlarged crop
        x0, y0, x1, y1 = boxes[0]
        grow = 0.75 * max(x1 - x0, y1 - y0)
        a, b = max(0, int(y0 - grow)), max(0, int(x0 - grow))
        close = np.ascontiguousarray(part[a : int(y1 + grow), b : int(x1 + grow)])
        mesh = _seen(close)
        if mesh is not None:
            mesh = mesh + np.array([b, a, 0], np.float32)
    return None if mesh is None else _Found(mesh, part, scene.n_faces, _scores(part, mesh))


class _Detector(face.FaceDetector):
    """Boxes of all faces, largest first; of a picture that shows the detector none, those in
    overlapping tiles of a half, then of a quarter of its longer side."""

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        height, width = rgb.shape[:2]
        found = super().__call__(rgb)
        for share in (2, 4):
            side = max(height, width) // share
            if len(found) or side < MIN_TILE:
                break
            corners = (
                (x, y)
                for y in range(0, max(1, height - side // 2), side // 2)
                for x in range(0, max(1, width - side // 2), side // 2)
            )
            tiles = [
                self.scored(np.ascontiguousarray(rgb[y : y + side, x : x + side]))[0]
                + np.array([x, y, x, y], np.float32)
                for x, y in corners
            ]
            found = _once_each(np.concatenate(tiles))
        return found


def _once_each(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return boxes (n, 4), the largest first, without those that lie half inside a larger one: the
    same face in another tile."""
    kept: list[NDArray[np.float32]] = []
    for box in sorted(boxes, key=_area, reverse=True):
        shared = (
            np.concatenate([np.maximum(box[:2], b[:2]), np.minimum(box[2:], b[2:])]) for b in kept
        )
        if all(_area(both) < 0.5 * _area(box) for both in shared):
            kept.append(box)
    return np.array(kept, np.float32).reshape(-1, 4)


def _area(box: NDArray[np.float32]) -> float:
    return float(np.maximum(box[2:] - box[:2], 0).prod())


def _scores(rgb: NDArray[np.uint8], mesh: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the detector's scores (4,) of the face as it is and after each quarter turn to the
    left.  They depend on the face's size, so the face is scaled to a fixed one."""
    middle = mesh[:, :2].mean(0)
    half = 1.1 * float(face.face_height(mesh[:, :2]))
    scale = DETECT_PX / (2 * half)
    place = np.array(
        [[scale, 0, scale * (half - middle[0])], [0, scale, scale * (half - middle[1])]]
    )
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    shown = cv2.warpAffine(
        rgb, place, (DETECT_PX, DETECT_PX), flags=way, borderMode=cv2.BORDER_REPLICATE
    )
    with face.FaceDetector() as detect:
        found = [detect.scored(np.ascontiguousarray(np.rot90(shown, n)))[1] for n in range(4)]
    return np.array([score[0] if len(score) else 0.0 for score in found], np.float32)


def _seen(rgb: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    height, width = rgb.shape[:2]
    shrink = MESH_SIDE / max(height, width)
    size = (max(2, round(width * shrink)), max(2, round(height * shrink)))
    way = cv2.INTER_AREA if shrink < 1 else cv2.INTER_CUBIC
    small = cv2.resize(rgb, size, interpolation=way)
    with face.FaceMesh() as mesh:
        found = mesh(small)
        again = mesh(small)  # the second pass tracks from the first result
    found = again if again is not None else found
    return None if found is None else found / np.float32(shrink)


def _look_at_turn(path: Path, rotation: NDArray[Any], progress: Progress) -> None:
    yaw, pitch, _ = Rotation.from_matrix(rotation).as_euler("yxz", degrees=True)
    turned = max(abs(yaw), abs(pitch) - 10)  # single-picture meshes are biased in pitch
    if turned > AWAY_DEG:
        raise TalkheadError(
            f"the head in {path.name} is turned away by {turned:.0f} degrees; give a picture in "
            f"which it faces the camera (up to {TURNED_DEG:.0f} degrees looks right)"
        )
    if turned > TURNED_DEG:
        progress.note(
            f"the head in {path.name} is turned by {turned:.0f} degrees; what the picture does "
            "not show is guessed, and shows when it turns back"
        )


def _regions(
    square: NDArray[np.uint8], mesh: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return soft labels (6, 128, 128) and the background (FILM_PX, FILM_PX, 3)."""
    with matte.Segmenter() as segment:
        mask = segment(square)
    colours = matte.skin_samples(square, mesh * FILM_PX)
    skin = matte.SkinModel.fit(colours)(square)
    maps = matte.RegionMaps(matte.torso_prior(mesh), mesh)
    hair, torso = maps.moved(mesh, np.zeros(3), matte.body_pivot(mesh))
    plate, _ = matte.make_plate([square], [mask])
    return matte.label_maps(mesh, mask, skin, hair, torso), plate


def _signals(
    mesh: NDArray[Any], in_crop: NDArray[Any], head: pose.HeadTrack, k: torch.Tensor, size_px: int
) -> Signals:
    """Return one row of signals.  Openness is set to 1: one picture cannot calibrate it."""
    points = np.arange(face.N_MESH)
    lifted = head.lift(mesh[None, :, :2].astype(np.float64), points)
    stance = torch.from_numpy(head.pose).float()
    return Signals(
        audio=torch.zeros(1, 0, 0),
        eye=torch.ones(1, 2),
        gaze=torch.from_numpy(face.gaze(mesh[None])).float(),
        brow=torch.zeros(1, 2),
        landmarks=torch.from_numpy(face.to_68(lifted)).float(),
        landmarks_2d=torch.from_numpy(in_crop[face.MESH_TO_68])[None].float(),
        pose=stance,
        body=torch.zeros(1, 4),
        camera=head_camera(stance, k, size_px),
        person=torch.zeros(1, dtype=torch.long),
        moment=torch.zeros(1, dtype=torch.long),
    )
