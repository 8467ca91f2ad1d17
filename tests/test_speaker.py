"""The synthetic speaker: is she found, and does what is seen agree with what is known?"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from talkhead_cli.contracts import LABELS, SAMPLES_PER_FRAME

pytest.importorskip("mediapipe")
pytest.importorskip("skimage")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import formant_voice  # noqa: E402
import synthetic_speaker as speaker  # noqa: E402

SECONDS, SIZE = 3.0, 256
FACE, MOUTH, HAIR, NECK, TORSO, BACKGROUND = range(len(LABELS))


@pytest.fixture(scope="module")
def clip() -> tuple[np.ndarray, np.ndarray, speaker.Truth]:
    frames, sound, truth = speaker.make(SECONDS, SIZE, seed=0)
    return np.array(list(frames)), sound, truth


@pytest.fixture(scope="module")
def seen(clip) -> np.ndarray:
    """(T, 478, 2) what the face mesh of MediaPipe measures, in pixels; NaN where it is blind."""
    from mediapipe.python.solutions.face_mesh import FaceMesh

    out = np.full((len(clip[0]), 478, 2), np.nan)
    with FaceMesh(refine_landmarks=True) as find:
        for i, frame in enumerate(clip[0]):
            faces = find.process(frame).multi_face_landmarks
            if faces:
                out[i] = [(p.x * SIZE, p.y * SIZE) for p in faces[0].landmark]
    return out


def apart(points: np.ndarray, a: int, b: int) -> np.ndarray:
    return np.linalg.norm(points[:, a] - points[:, b], axis=1)


def alike(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def test_shapes(clip):
    frames, sound, truth = clip
    n = round(25 * SECONDS)
    assert frames.shape == (n, SIZE, SIZE, 3) and frames.dtype == np.uint8
    assert sound.shape == (n * SAMPLES_PER_FRAME,) and sound.dtype == np.float32
    assert 0.2 < abs(sound).max() <= 1
    assert truth.landmarks_px.shape == (n, 478, 2) and truth.shape.shape == (478, 3)
    assert truth.rotation.shape == (n, 3, 3) and truth.body.shape == (n, 3)
    assert truth.plate.shape == (SIZE, SIZE, 3)
    assert np.allclose(truth.rotation @ truth.rotation.transpose(0, 2, 1), np.eye(3), atol=1e-9)
    assert np.linalg.norm(truth.shape[10] - truth.shape[152]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("seconds", [1.0, 2.02, 3.33])
def test_sound_is_as_long_as_the_frames(seconds):
    speech = formant_voice.speak(seconds, seed=4)
    n = round(25 * seconds)
    assert len(speech.sound) == n * SAMPLES_PER_FRAME
    assert len(speech.jaw) == len(speech.width) == n


def test_face_is_found_in_every_frame_where_it_is(clip, seen):
    assert not np.isnan(seen).any()
    off = np.linalg.norm(seen - clip[2].landmarks_px, axis=2)
    assert off.mean() < 0.03 * apart(clip[2].landmarks_px, 10, 152).mean()


def test_mouth_and_lids_are_seen_as_they_are(clip, seen):
    truth = clip[2]
    assert alike(apart(seen, 13, 14) / apart(seen, 10, 152), truth.mouth) > 0.95
    lids = apart(seen, 159, 145) / apart(seen, 33, 133)
    lids = lids + apart(seen, 386, 374) / apart(seen, 263, 362)
    assert truth.eye.min() < 0.1 and truth.eye.max() > 0.8
    assert alike(lids, truth.eye) > 0.95


def test_pose_can_be_measured(clip, seen):
    truth = clip[2]
    k = np.array([[truth.focal_px, 0, SIZE / 2], [0, truth.focal_px, SIZE / 2], [0, 0, 1.0]])
    still = np.flatnonzero(truth.shape[:468, 1] < truth.shape[2, 1])  # above the mouth

    def degrees_off(points: np.ndarray) -> np.ndarray:
        out = []
        for i, picture in enumerate(points):
            flags = cv2.SOLVEPNP_SQPNP
            _, turn, _ = cv2.solvePnP(truth.shape[still], picture[still], k, None, flags=flags)
            off = cv2.Rodrigues(turn)[0] @ truth.rotation[i].T
            out.append(np.degrees(np.linalg.norm(cv2.Rodrigues(off)[0])))
        return np.array(out)

    assert degrees_off(truth.landmarks_px).max() < 0.5  # lids and cheeks move a little
    assert degrees_off(seen).mean() < 4


def test_labels_share_out_the_picture(clip):
    truth = clip[2]
    n, side = truth.labels.shape[:2]
    assert truth.labels.shape == truth.matte.shape == (n, 128, 128)
    assert truth.labels.dtype == truth.matte.dtype == np.uint8
    share = np.stack([(truth.labels == c).mean((1, 2)) for c in range(len(LABELS))], 1)
    assert np.allclose(share.sum(1), 1)  # each pixel has one class, and all are in LABELS
    assert share[:, [FACE, HAIR, TORSO, BACKGROUND]].min() > 0.03
    assert share[:, NECK].mean() > 0.003  # the chin may hide it for a moment
    assert share[truth.mouth > 0.1, MOUTH].min() > 0
    assert share[truth.mouth < 0.005, MOUTH].max() < 3e-4  # a pixel or two of the seam
    person = truth.labels != BACKGROUND
    assert (truth.matte[person] >= 127).all() and truth.matte[~person].max() < 230
    for i in range(0, n, 7):
        points = (truth.landmarks_px[i] * side / SIZE * 16 - 8).round().astype(np.int32)
        hull = np.zeros((side, side), np.uint8)
        cv2.fillConvexPoly(hull, cv2.convexHull(points), 1, cv2.LINE_8, 4)
        face = (truth.labels[i] == FACE) | (truth.labels[i] == MOUTH)
        assert face[hull > 0].mean() > 0.8  # a fringe hides some of the forehead
        around = cv2.dilate(hull, np.ones((11, 11), np.uint8))  # the ears are face too
        assert not face[around == 0].any()
        assert (face & (hull == 0)).sum() < 0.06 * face.sum()


def test_background_is_the_plate(clip):
    frames, _, truth = clip
    clear = cv2.resize(truth.matte[5], (SIZE, SIZE)) == 0
    clear = cv2.erode(clear.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    off = frames[5][clear].astype(float) - truth.plate[clear]
    assert clear.mean() > 0.2 and 0.5 < off.std() < 1.5 and abs(off.mean()) < 0.1


def test_mouth_is_shut_while_she_is_silent(clip):
    _, sound, truth = clip
    loud = np.sqrt((sound.reshape(-1, SAMPLES_PER_FRAME) ** 2).mean(1)) > 2e-3
    near = np.convolve(loud, np.ones(5), "same") > 0  # a stop is silent too, but not so long
    assert (~near).sum() >= 5
    assert truth.mouth[~near].max() < 0.01
    assert alike(loud.astype(float), truth.mouth) > 0.5


def test_same_seed_same_clip(clip):
    frames, sound, truth = speaker.make(SECONDS, SIZE, seed=0)
    assert np.array_equal(next(frames), clip[0][0])
    assert np.array_equal(sound, clip[1])
    assert np.array_equal(truth.landmarks_px, clip[2].landmarks_px)
    _, other, else_ = speaker.make(1.0, 64, seed=1)
    assert not np.array_equal(other, sound[: len(other)])
    assert not np.allclose(else_.rotation, truth.rotation[: len(else_.rotation)])


def test_truth_survives_the_disk(clip, tmp_path):
    clip[2].save(tmp_path / "a.truth.npz")
    back = speaker.Truth.load(tmp_path / "a.truth.npz")
    assert np.array_equal(back.labels, clip[2].labels)
    assert back.focal_px == clip[2].focal_px
