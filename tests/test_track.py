"""The track room: what it says of the synthetic speaker against what is known, and closed forms.

Run with `-s` to see the tracker's errors on the synthetic speaker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from talkhead_cli import media
from talkhead_cli.contracts import LABELS, TalkheadError
from talkhead_cli.store import Workspace
from talkhead_cli.track import face, matte, pose
from talkhead_cli.track.crop import Crop

Array = NDArray[np.floating[Any]]
Arrays = dict[str, NDArray[Any]]


def alike(a: Array, b: Array) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def aligned_error_deg(found: Array, true: Array) -> Array:
    """Angles (T,) between rotations (T, 3, 3) once one constant turn of the head's axes, which
    are a convention, is taken out (Wahba's problem, by the polar decomposition)."""
    u, _, vt = np.linalg.svd(np.einsum("tji,tjk->ik", true, found))
    axes = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    between = np.einsum("tji,tjk->tik", true @ axes, found)
    return np.degrees(Rotation.from_matrix(between).magnitude())


# ---------------------------------------------------------------- the synthetic speaker


@pytest.fixture(scope="module")
def space(speaker_home: Path) -> Workspace:
    return Workspace.open(speaker_home, "speaker")


@pytest.fixture(scope="module")
def tracks(space: Workspace) -> Arrays:
    return space.load("tracks")


@pytest.fixture(scope="module")
def crop(space: Workspace) -> Crop:
    return Crop(**space.manifest()["crop"])


@pytest.fixture(scope="module")
def head(space: Workspace, speaker_clip: Path) -> pose.HeadTrack:
    mesh, about = space.load("mesh"), media.probe(speaker_clip)
    points = mesh["points"].astype(np.float64)
    return pose.fit_head(points, mesh["found"], (about.width, about.height))


def test_every_frame_shows_the_speaker(space: Workspace, tracks: Arrays) -> None:
    manifest = space.manifest()
    assert manifest["n_found"] == manifest["n_frames"] == 200
    assert tracks["found"].all() and tracks["usable"].all()
    assert manifest["faces_seen"] == 1


def test_head_turns_as_it_truly_turns(tracks: Arrays, speaker_truth: Any) -> None:
    rotation = Rotation.from_rotvec(tracks["pose"][:, :3]).as_matrix()
    error = aligned_error_deg(rotation, speaker_truth.rotation)
    still = aligned_error_deg(np.tile(np.eye(3), (len(error), 1, 1)), speaker_truth.rotation)
    print(f"head rotation: mean {error.mean():.2f}, worst {error.max():.2f} degrees")
    print(f"  (a head that never turns would score {still.mean():.2f})")
    assert still.mean() > 4.0  # she moves: the figure means something
    assert error.mean() < 2.0
    assert error.max() < 4.0


def test_mouth_and_eyes_follow_the_truth(tracks: Arrays, speaker_truth: Any) -> None:
    mouth = alike(face.lip_aperture(tracks["mesh_fractions"]), speaker_truth.mouth)
    eye = alike(tracks["eye"].mean(1), speaker_truth.eye)
    print(f"lip aperture: r = {mouth:.3f}; eyes: r = {eye:.3f}")
    assert mouth > 0.95
    assert eye > 0.95


def test_eyes_are_seen_shut_in_every_blink_and_open_between(
    tracks: Arrays, speaker_truth: Any
) -> None:
    eye = tracks["eye"].mean(1)
    assert (speaker_truth.eye < 0.05).any()
    assert eye[speaker_truth.eye < 0.05].max() < 0.35
    assert eye[speaker_truth.eye > 0.8].min() > 0.6


def test_landmarks_lie_where_they_truly_are(tracks: Arrays, speaker_truth: Any, crop: Crop) -> None:
    seen = tracks["mesh_fractions"] * crop.side + [crop.x, crop.y]
    error = np.linalg.norm(seen - speaker_truth.landmarks_px, axis=-1)
    height = np.linalg.norm(np.diff(speaker_truth.landmarks_px[:, [10, 152]], axis=1), axis=-1)
    share = float(error.mean() / height.mean())
    print(f"mesh: mean error {error.mean():.2f} px, {100 * share:.2f} % of the face's height")
    assert share < 0.02


def test_shoulders_follow_the_truth(tracks: Arrays, speaker_truth: Any) -> None:
    """Right is compared up to one lever arm: where the shoulders turn is a convention."""
    right, down, roll = speaker_truth.body.T
    columns = np.stack([tracks["body"][:, 0], tracks["body"][:, 2]], 1)
    columns = columns - columns.mean(0)
    lever = np.linalg.lstsq(columns, right - right.mean(), rcond=None)[0]
    same_point = alike(columns @ lever, right)
    plain = alike(tracks["body"][:, 0], right)
    figures = [same_point, alike(tracks["body"][:, 1], down), alike(tracks["body"][:, 2], roll)]
    print("shoulders: right, down, roll r =", ", ".join(f"{r:.3f}" for r in figures))
    print(f"  (right about the tracker's own pivot: {plain:.3f})")
    assert lever[0] > 0  # right is right
    assert min(figures) > 0.95
    assert plain > 0.75


def test_shoulders_roll_by_as_much_as_they_do(tracks: Arrays, speaker_truth: Any) -> None:
    roll = speaker_truth.body[:, 2] - speaker_truth.body[:, 2].mean()
    assert np.degrees(np.abs(tracks["body"][:, 2] - roll)).mean() < 0.15


def in_crop(crop: Crop, size_px: int, n: int) -> NDArray[np.int64]:
    """Rows and columns (2, MAP_PX) of an n-pixel map of the whole picture that the crop shows."""
    at = (np.arange(matte.MAP_PX) + 0.5) / matte.MAP_PX * crop.side
    return np.floor(np.stack([crop.y + at, crop.x + at]) * n / size_px).astype(np.int64)


def test_labels_overlap_the_true_regions(space: Workspace, crop: Crop, speaker_truth: Any) -> None:
    rows, columns = in_crop(crop, 512, speaker_truth.labels.shape[1])
    true = speaker_truth.labels[:, rows[:, None], columns]
    found = np.stack([space.labels(i).argmax(0) for i in range(len(true))])
    overlap = {
        name: float(((true == k) & (found == k)).sum() / ((true == k) | (found == k)).sum())
        for k, name in enumerate(LABELS)
    }
    print("label IoU:", ", ".join(f"{name} {share:.3f}" for name, share in overlap.items()))
    least = {"face": 0.75, "mouth": 0.45, "hair": 0.68, "neck": 0.72}
    least |= {"torso": 0.88, "background": 0.94}
    assert {name for name in LABELS if overlap[name] < least[name]} == set()


def test_plate_is_the_backdrop_where_it_was_seen(
    space: Workspace, crop: Crop, speaker_truth: Any
) -> None:
    plate = cv2.imread(str(space.plate_file))[..., ::-1].astype(float)
    square = speaker_truth.plate[crop.y : crop.y + crop.side, crop.x : crop.x + crop.side]
    true = cv2.resize(square, plate.shape[:2]).astype(float)
    rows, columns = in_crop(crop, 512, speaker_truth.labels.shape[1])
    clear = (speaker_truth.labels[:, rows[:, None], columns] == LABELS.index("background")).all(0)
    clear = cv2.erode(clear.astype(np.uint8), np.ones((9, 9))) > 0
    seen = cv2.resize(clear.astype(np.uint8), plate.shape[:2]) > 0
    assert seen.mean() > 0.2
    assert np.abs(plate - true)[seen].mean() < 2.0  # of 255


def test_pose_projects_the_shape_onto_the_landmarks(head: pose.HeadTrack, space: Workspace) -> None:
    points = space.load("mesh")["points"][..., :2]
    apart = np.linalg.norm(head.project(head.shape)[:, pose.RIGID] - points[:, pose.RIGID], axis=-1)
    rms = np.sqrt((apart**2).mean(-1))
    print(f"reprojection of the rigid points: {rms.mean():.2f} px")
    assert rms.mean() < 1.5
    np.testing.assert_allclose(rms, head.residual_px, rtol=0.05)


def test_stored_pose_is_the_fitted_one(head: pose.HeadTrack, tracks: Arrays) -> None:
    np.testing.assert_allclose(tracks["pose"], head.pose, atol=1e-4)


def test_lifting_undoes_projecting(head: pose.HeadTrack) -> None:
    every = np.arange(face.N_MESH)
    pixels = head.project(head.shape)
    lifted = head.lift(pixels, every)
    np.testing.assert_allclose(lifted, np.broadcast_to(head.shape, lifted.shape), atol=1e-9)
    moved = pixels + np.random.default_rng(0).normal(0, 3, pixels.shape)
    np.testing.assert_allclose(head.project(head.lift(moved, every)), moved, atol=1e-6)


def test_head_axes_are_those_of_the_contract(head: pose.HeadTrack) -> None:
    shape = head.shape
    ears = shape[[pose.LEFT_EAR, pose.RIGHT_EAR]].mean(0)
    np.testing.assert_allclose(ears, 0, atol=1e-9)
    assert np.linalg.norm(shape[face.CHIN] - shape[face.TOP]) == pytest.approx(1)
    assert shape[face.CHIN, 1] > shape[face.TOP, 1]  # y down
    assert shape[pose.RIGHT_EAR, 0] > shape[pose.LEFT_EAR, 0]  # x right in the picture
    assert shape[4, 2] < -0.2  # the nose looks along -z
    assert (head.translation[:, 2] > 1).all()  # in front of the camera


def test_landmarks_come_in_ibug_order(tracks: Arrays) -> None:
    mark = face.to_68(tracks["mesh_fractions"]).mean(0)
    assert mark.shape == (68, 2)
    assert (np.diff(mark[1:16, 0]) > 0).all()  # jaw from left to right
    assert mark[:, 1].argmax() == 8  # chin
    brows, eyes = mark[17:27], mark[36:48]
    assert (np.diff(brows[:, 0]) > 0).all()
    assert eyes[:6, 0].max() < mark[27, 0] < eyes[6:, 0].min()
    assert brows[:, 1].max() < eyes[:, 1].min()
    assert mark[48, 0] < mark[54, 0] and mark[51, 1] < mark[57, 1]  # mouth
    assert mark[62, 1] <= mark[66, 1]


# ---------------------------------------------------------------- head pose, by construction


class Film:
    """A known rigid head that moves smoothly, as a noisy mesh (T, 478, 3) in pixels.

    Seen from 6.5 face heights away (1.3 m) through a lens that the fit does not know.
    """

    focal, size = 1024.0, (512, 512)

    def __init__(self, shape: Array, n: int = 160, noise_px: float = 1.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        walk = gaussian_filter1d(rng.standard_normal((n, 6)), 9, axis=0, mode="reflect")
        walk /= walk.std(0)
        self.rotation = Rotation.from_rotvec(walk[:, :3] * np.radians([4, 9, 3])).as_matrix()
        self.translation = np.array([0, 0, 6.5]) + walk[:, 3:] * [0.05, 0.05, 0.08]
        self.shape = shape
        camera = self.rotation @ shape.T + self.translation[..., None]
        x, y, z = camera[:, 0], camera[:, 1], camera[:, 2]
        scale = self.focal / self.translation[:, 2:]
        middle = self.size[0] / 2
        exact = [self.focal * x / z + middle, self.focal * y / z + middle]
        clean = np.stack([*exact, (z - self.translation[:, 2:]) * scale], -1)
        self.points = clean + rng.normal(0, noise_px, clean.shape)
        self.found = np.ones(n, bool)

    def by_frame(self) -> Array:
        """Rotations (T, 3, 3) of a PnP that knows shape and camera but no time."""
        k = np.array([[self.focal, 0, 256], [0, self.focal, 256], [0, 0, 1]])
        found = [
            cv2.solvePnP(
                self.shape[pose.RIGID], p[pose.RIGID, :2], k, np.zeros(4), r, t.copy(), True
            )[1]
            for p, r, t in zip(
                self.points,
                Rotation.from_matrix(self.rotation).as_rotvec(),
                self.translation,
                strict=True,
            )
        ]
        return Rotation.from_rotvec(np.array(found).reshape(-1, 3)).as_matrix()


def shake_deg(found: Array, true: Array) -> float:
    """How much the error of a rotation changes from frame to frame."""
    error = np.einsum("tji,tjk->tik", true, found)
    change = np.einsum("tji,tjk->tik", error[:-1], error[1:])
    return float(np.degrees(Rotation.from_matrix(change).magnitude()).mean())


@pytest.fixture(scope="module")
def rigid_shape(speaker_truth: Any) -> Array:
    return np.asarray(speaker_truth.shape, float)


def test_known_motion_is_recovered_from_noise(rigid_shape: Array) -> None:
    film = Film(rigid_shape)
    track = pose.fit_head(film.points, film.found, film.size)
    error = aligned_error_deg(track.rotation, film.rotation)
    assert error.mean() < 0.7
    assert track.residual_px.mean() == pytest.approx(np.sqrt(2), rel=0.15)  # the noise itself


def test_fit_shakes_less_than_a_pose_per_frame(rigid_shape: Array) -> None:
    film = Film(rigid_shape)
    track = pose.fit_head(film.points, film.found, film.size)
    by_frame = shake_deg(film.by_frame(), film.rotation)
    assert by_frame > 0.05  # the noise does shake a fit that knows no time
    assert shake_deg(track.rotation, film.rotation) < 0.3 * by_frame


def test_ten_missing_frames_are_bridged(rigid_shape: Array) -> None:
    film = Film(rigid_shape)
    gap = slice(70, 80)
    film.found[gap] = False
    film.points[gap] = np.nan
    track = pose.fit_head(film.points, film.found, film.size)
    assert np.isfinite(track.pose).all()
    assert np.isnan(track.residual_px[gap]).all() and np.isfinite(track.residual_px[:70]).all()
    error = aligned_error_deg(track.rotation, film.rotation)
    moved = np.degrees(Rotation.from_matrix(film.rotation[69].T @ film.rotation[75]).magnitude())
    assert error[gap].max() < max(2.0, 0.5 * moved)
    assert error[film.found].mean() < 0.7
    steps = np.linalg.norm(np.diff(track.pose[65:85], axis=0), axis=1)
    assert steps.max() < 3 * np.linalg.norm(np.diff(track.pose[:65], axis=0), axis=1).max()


@pytest.mark.parametrize("ends", [slice(0, 6), slice(154, 160)])
def test_missing_ends_stay_finite(rigid_shape: Array, ends: slice) -> None:
    film = Film(rigid_shape)
    film.found[ends] = False
    film.points[ends] = np.nan
    track = pose.fit_head(film.points, film.found, film.size)
    assert np.isfinite(track.pose).all()
    rows = np.arange(len(film.found))
    nearest = rows[film.found][np.abs(rows[film.found] - rows[:, None]).argmin(1)]
    # where nobody is seen, nobody leaves the picture
    np.testing.assert_allclose(track.pose, track.pose[nearest], atol=1e-12)
    assert aligned_error_deg(track.rotation, film.rotation).max() < 8


# ---------------------------------------------------------------- faces


def test_apertures_do_not_depend_on_size_place_or_roll(a_face: Array) -> None:
    turn = np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    moved = 0.37 * a_face @ turn.T + [30, -12]
    assert face.lip_aperture(moved) == pytest.approx(face.lip_aperture(a_face))
    np.testing.assert_allclose(face.lid_gap(moved), face.lid_gap(a_face))
    assert face.lip_aperture(np.stack([a_face] * 3)).shape == (3,)


def test_gaze_is_the_iris_in_eye_widths(a_face: Array) -> None:
    moved = a_face.copy()
    for outer, inner, _, iris in face.EYES:
        moved[iris] += [0.1 * np.linalg.norm(a_face[outer] - a_face[inner]), 0]
    shift = face.gaze(moved[None]) - face.gaze(a_face[None])
    np.testing.assert_allclose(shift, [[0.1, 0]], atol=1e-9)


def test_brows_are_measured_upwards() -> None:
    mesh = np.zeros((4, face.N_MESH, 3))
    mesh[2, list(face.BROWS[0]), 1] = -0.08  # y is down
    height = face.brow_height(mesh)
    np.testing.assert_allclose(height[:, 0], [0, 0, 0.08, 0])
    np.testing.assert_allclose(height[:, 1], 0)


def test_eye_scale_of_one_who_blinks() -> None:
    gap = np.full((300, 2), 0.3)
    gap[::3] = 0.32
    gap[50:56] = 0.06
    scale = face.fit_eye_scale(gap)
    np.testing.assert_allclose(scale.shut, 0.06)
    openness = scale.openness(gap)
    np.testing.assert_allclose(openness[50:56], 0)
    assert openness[60:].min() > 0.9 and openness.max() <= 1.2


def test_eye_scale_of_one_who_does_not_blink_leaves_the_eyes_open() -> None:
    gap = 0.3 + 0.01 * np.random.default_rng(0).standard_normal((100, 2))
    scale = face.fit_eye_scale(gap)
    np.testing.assert_allclose(scale.shut, 0.45 * scale.open)
    assert scale.openness(gap).min() > 0.8
    np.testing.assert_allclose(scale.openness(np.stack([scale.shut, scale.open])).mean(1), [0, 1])


def test_gaps_are_filled_linearly_and_ends_held() -> None:
    values = np.arange(8.0)[:, None, None] * [[1.0, -2.0]]
    found = np.array([False, True, True, False, False, True, True, False])
    broken = np.where(found[:, None, None], values, np.nan)
    filled = face.fill_gaps(broken, found)
    np.testing.assert_allclose(filled[1:7], values[1:7])
    np.testing.assert_allclose(filled[[0, 7]], values[[1, 6]])
    assert np.isnan(broken[0]).all()  # the input is left alone


def test_gaps_without_any_face_are_refused() -> None:
    with pytest.raises(TalkheadError, match="no face"):
        face.fill_gaps(np.full((5, 2), np.nan), np.zeros(5, bool))
