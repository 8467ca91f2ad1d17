"""The track room: what it says of the synthetic speaker against what is known, and closed forms.

Run with `-s` to see the tracker's errors on the synthetic speaker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from talkhead_cli import media
from talkhead_cli.contracts import FPS, LABELS, TalkheadError
from talkhead_cli.store import Workspace
from talkhead_cli.track import face, matte, pose
from talkhead_cli.track import scout as scouting
from talkhead_cli.track.crop import MIN_FACE_PX, Crop, choose_crop
from talkhead_cli.track.zoom import STILL, Zoom

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
    mouth = alike(face.lip_aperture(tracks["mesh_px"]), speaker_truth.mouth)
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
    seen = tracks["mesh_px"] * crop.side + [crop.x, crop.y]
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
    mark = face.to_68(tracks["mesh_px"]).mean(0)
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
    assert aligned_error_deg(track.rotation, film.rotation).max() < 8


# ---------------------------------------------------------------- faces


@pytest.fixture(scope="module")
def a_face(speaker_truth: Any) -> Array:
    """Mesh (478, 2) in pixels of a 512-pixel picture."""
    return np.asarray(speaker_truth.landmarks_px[0], float)


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


# ---------------------------------------------------------------- the crop

SQUARE = (0, 0, 512, 512)


def test_crop_lies_inside_the_picture_and_holds_the_face(a_face: Array) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        width, height = (int(v) for v in rng.integers(200, 2000, 2))
        tall = rng.uniform(MIN_FACE_PX + 2, 0.6 * min(width, height))
        mesh = (a_face - a_face.mean(0)) * tall / np.linalg.norm(a_face[10] - a_face[152])
        room = np.array([width, height]) - np.ptp(mesh, axis=0)
        mesh += rng.uniform(0, 1, 2) * room - mesh.min(0)
        points = mesh + rng.normal(0, 0.02 * tall, (6, 1, 2))
        square = choose_crop(points.astype(np.float32), np.ones(6, bool), (0, 0, width, height))
        assert square.side % 2 == 0
        assert 0 <= square.x <= width - square.side and 0 <= square.y <= height - square.side
        inside = (mesh >= [square.x, square.y]) & (mesh <= [square.x + square.side] * 2 + np.array(
            [0, square.y - square.x]
        ))  # fmt: skip
        assert inside.mean() > 0.95


def test_crop_of_a_face_with_room_is_roomy_and_level(a_face: Array) -> None:
    mesh = a_face * 0.5 + 600
    square = choose_crop(mesh[None].astype(np.float32), np.ones(1, bool), (0, 0, 2000, 2000))
    tall = np.linalg.norm(mesh[10] - mesh[152])
    assert 2.0 * tall < square.side < 3.0 * tall
    centre = (mesh.min(0) + mesh.max(0)) / 2
    assert square.x + square.side / 2 == pytest.approx(centre[0], abs=2)
    assert centre[1] < square.y + square.side / 2  # more room below, for the shoulders
    assert square.scale(512) == 512 / square.side


def test_the_crop_is_where_a_nearer_shot_shows_it() -> None:
    square, size = Crop(100, 80, 200), (1000, 600)
    assert square.zoomed(STILL, size) == (100, 80, 200, 200)
    assert square.zoomed(Zoom(1.5, (-50.0, 20.4)), size) == (100, 140, 300, 300)
    # rounding leads nowhere outside
    assert square.zoomed(Zoom(3.001, (-300.0, -240.0)), size) == (0, 0, 600, 600)


def test_crop_ignores_frames_without_a_face(a_face: Array) -> None:
    points = np.stack([a_face, np.full_like(a_face, np.nan)]).astype(np.float32)
    found = np.array([True, False])
    assert choose_crop(points, found, SQUARE) == choose_crop(points[:1], found[:1], SQUARE)


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_tiny_face_is_refused_with_its_size(a_face: Array, share: float) -> None:
    tall = np.linalg.norm(a_face[10] - a_face[152])
    mesh = a_face * share * MIN_FACE_PX / tall
    with pytest.raises(TalkheadError, match=f"only {share * MIN_FACE_PX:.0f} pixels"):
        choose_crop(mesh[None].astype(np.float32), np.ones(1, bool), SQUARE)


def test_a_film_without_a_face_has_no_crop() -> None:
    nothing = np.full((3, face.N_MESH, 3), np.nan, np.float32)
    with pytest.raises(TalkheadError, match="no face"):
        choose_crop(nothing, np.zeros(3, bool), SQUARE)


# ---------------------------------------------------------------- the scout


Boxes = list[list[float]]
Scout = Callable[..., scouting.Scene]


@pytest.fixture
def scout(monkeypatch: pytest.MonkeyPatch) -> Scout:
    """Scout a film of 400 x 200 whose detector finds given boxes, in shares of the sides."""

    def look(film: list[Boxes], which: str = "largest") -> scouting.Scene:
        answers: Iterator[Boxes] = iter(film)

        class Fake:
            def __enter__(self) -> Fake:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
                height, width = rgb.shape[:2]
                boxes = np.array(next(answers), np.float32).reshape(-1, 4)
                return boxes * np.array([width, height] * 2, np.float32)

        monkeypatch.setattr(scouting, "FaceDetector", Fake)
        frames = [np.zeros((50, 100, 3), np.uint8)] * len(film)
        return scouting.scout(frames, (400, 200), which)

    return look


LEFT, RIGHT = [0.1, 0.2, 0.25, 0.5], [0.7, 0.2, 0.9, 0.6]


def test_scout_links_two_faces_whatever_their_order(scout: Scout) -> None:
    film = [[LEFT, RIGHT], [RIGHT, LEFT]] * 5
    assert scout(film).n_faces == 2


def test_scout_cuts_half_way_between_two_faces(scout: Scout) -> None:
    film = [[LEFT, RIGHT]] * 10
    left, right = scout(film, "left"), scout(film, "right")
    assert scout(film) == right  # the larger one
    between = 400 * (LEFT[2] + RIGHT[0]) / 2
    assert left.roi[0] + left.roi[2] <= between <= right.roi[0] + 1
    for scene, box in ((left, LEFT), (right, RIGHT)):
        x, y, w, h = scene.roi
        assert x <= 400 * box[0] and 400 * box[2] <= x + w <= 400
        assert y <= 200 * box[1] and 200 * box[3] <= y + h <= 200
        assert min(x, y) >= 0


@pytest.mark.parametrize("which", [0, 1])
def test_scout_cuts_between_faces_that_stand_one_above_the_other(scout: Scout, which: int) -> None:
    boxes = [[0.3, 0.05, 0.72, 0.35], [0.25, 0.6, 0.68, 0.9]]
    boxes[which] = [*boxes[which][:2], boxes[which][2] + 0.05, boxes[which][3] + 0.02]  # largest
    x, y, w, h = scout([boxes] * 10).roi
    mine = boxes[which]
    assert x <= 400 * mine[0] and 400 * mine[2] <= x + w
    assert y <= 200 * mine[1] and 200 * mine[3] <= y + h + 1
    assert (y + h <= 200 * 0.6) if which == 0 else (y >= 200 * 0.35 - 1)


def test_scout_gives_one_person_the_whole_picture(scout: Scout) -> None:
    moving = [[[0.1 + 0.05 * i, 0.2, 0.3 + 0.05 * i, 0.6]] for i in range(10)]
    assert scout(moving) == scouting.Scene(1, (0, 0, 400, 200), frozenset(range(10)))


def test_scout_overlooks_a_passer_by_and_a_face_on_the_wall(scout: Scout) -> None:
    passer = [[RIGHT, LEFT]] * 2 + [[RIGHT]] * 8
    assert scout(passer).n_faces == 1
    tiny = [0.1, 0.2, 0.12, 0.24]
    assert scout([[RIGHT, tiny]] * 10).n_faces == 1


def test_scout_leaves_the_last_word_to_the_mesh(scout: Scout) -> None:
    assert scout([[]] * 4) == scouting.Scene(0, (0, 0, 400, 200))


def test_scout_refuses_faces_that_cross(scout: Scout) -> None:
    a = [[0.05 + 0.09 * i, 0.2, 0.25 + 0.09 * i, 0.6] for i in range(9)]
    b = [[0.75 - 0.09 * i, 0.75, 0.95 - 0.09 * i, 0.98] for i in range(9)]
    with pytest.raises(TalkheadError, match="cover"):
        scout([[p, q] for p, q in zip(a, b, strict=True)])


# ---------------------------------------------------------------- matte, shoulders, plate


@pytest.mark.parametrize("cutoff_hz", [1.0, 4.0])
def test_smoothing_halves_a_sine_at_its_cutoff(cutoff_hz: float) -> None:
    t = np.arange(1000) / FPS
    wave = np.sin(2 * np.pi * cutoff_hz * t)[:, None]
    inner = slice(200, -200)
    gain = matte.smooth(wave, cutoff_hz)[inner].std() / wave[inner].std()
    assert gain == pytest.approx(0.5, rel=0.03)


def test_smoothing_keeps_straight_lines_and_passes_slow_waves() -> None:
    rows = np.arange(50.0)
    line = np.stack([3 * rows - 7, np.full(50, 2.0)], -1)
    np.testing.assert_allclose(matte.smooth(line, 2.0), line, atol=1e-8)
    slow = np.sin(2 * np.pi * 0.5 * np.arange(500) / FPS)[:, None]
    np.testing.assert_allclose(matte.smooth(slow, 4.0)[50:-50], slow[50:-50], atol=0.01)
    np.testing.assert_array_equal(matte.smooth(line[:2], 2.0), line[:2])


def test_similarity_recovers_a_known_transform() -> None:
    rng = np.random.default_rng(0)
    source: Array = rng.normal(size=(30, 2))
    turn = 1.7 * np.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
    target: Array = source @ turn.T + np.array([4.0, -5.0])
    found = matte.similarity(source, target)
    np.testing.assert_allclose(found, np.column_stack([turn, [4, -5]]), atol=1e-5)
    back = matte.similarity(target, source)
    np.testing.assert_allclose(found[:, :2] @ back[:, :2], np.eye(2), atol=1e-5)


def warps_of(motion: Array, pivot: Array) -> Array:
    """Frame-to-reference affines (T, 2, 3) of shoulders that moved by (T, 3) from it."""
    out = []
    for right, down, roll in motion:
        c, s = np.cos(roll), np.sin(roll)
        forth = np.array([[c, -s], [s, c]])
        shift = pivot + [right, down] - forth @ pivot
        out.append(np.column_stack([forth.T, -forth.T @ shift]))
    return np.array(out)


def test_body_motion_recovers_what_the_warps_say() -> None:
    t = np.arange(200) / FPS
    slow = [0.03 * np.sin(t), 0.02 * np.cos(0.7 * t), 0.05 * np.sin(0.5 * t)]
    motion = np.stack(slow, -1)
    pivot = np.array([0.5, 0.8])
    warps, tracked = warps_of(motion, pivot), np.ones(200, bool)
    found = matte.body_motion(warps, tracked, pivot)
    np.testing.assert_allclose(found, motion - motion.mean(0), atol=1e-3)
    tracked[90:95] = False
    warps[90:95] = np.eye(2, 3)
    warps[120] = np.array([[1, 0, 0.6], [0, 1, 0]])  # a registration that ran away
    bridged = matte.body_motion(warps, tracked, pivot)
    np.testing.assert_allclose(bridged, motion - motion.mean(0), atol=2e-3)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_body_that_was_never_registered_stands_still() -> None:
    warps = np.tile(np.eye(2, 3), (20, 1, 1))
    still = matte.body_motion(warps, np.zeros(20, bool), np.array([0.5, 0.8]))
    np.testing.assert_array_equal(still, np.zeros((20, 3)))


def test_body_tracker_registers_a_shift() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (320, 320, 3)).astype(np.uint8)
    picture = cv2.GaussianBlur(noise, (0, 0), 6)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)
    register = matte.BodyTracker(picture, np.full((matte.MAP_PX,) * 2, 255, np.uint8))
    shift = np.array([[1, 0, 6], [0, 1, -4]], np.float32)
    moved = cv2.warpAffine(picture, shift, (320, 320), borderMode=cv2.BORDER_REFLECT)
    warp = register(np.asarray(moved, np.uint8))
    assert warp is not None
    # frame to reference: where a reference pixel is seen in the frame
    np.testing.assert_allclose(warp[:, :2], np.eye(2), atol=5e-3)
    np.testing.assert_allclose(np.abs(warp[:, 2]), [6 / 320, 4 / 320], atol=2e-3)


def test_body_tracker_says_when_it_is_lost() -> None:
    flat = np.full((64, 64, 3), 90, np.uint8)
    register = matte.BodyTracker(flat, np.full((matte.MAP_PX,) * 2, 255, np.uint8))
    assert register(flat) is None


def plate_film(n: int) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]], Array]:
    """A black square that wanders over a shaded background, its mattes, the background."""
    y, x = np.mgrid[:128, :128]
    background = np.stack([60 + x, 80 + y, 200 - x // 2], -1).astype(np.uint8)
    frames, mattes = [], []
    for i in range(n):
        frame, mask = background.copy(), np.zeros((matte.MATTE_PX,) * 2, np.uint8)
        left = 24 + (48 * i) // max(1, n - 1)
        frame[40:80, left : left + 30] = 0
        mask[80:160, 2 * left : 2 * left + 60] = 255
        frames.append(frame)
        mattes.append(mask)
    return frames, mattes, background


def test_plate_is_the_background_behind_a_moving_person() -> None:
    frames, mattes, background = plate_film(9)
    plate, seen = matte.make_plate(frames, mattes)
    np.testing.assert_array_equal(plate, background)
    assert seen.min() > 0 and seen[0, 0] == 1


def test_plate_takes_the_median_of_what_was_seen() -> None:
    level = [10, 10, 10, 250, 12]
    frames = [np.full((32, 32, 3), v, np.uint8) for v in level]
    plate, _ = matte.make_plate(frames, [np.zeros((64, 64), np.uint8)] * 5)
    np.testing.assert_array_equal(plate, 10)


def test_plate_fills_smoothly_what_was_never_seen() -> None:
    frames, mattes, background = plate_film(1)
    plate, seen = matte.make_plate(frames, mattes)
    hidden = seen == 0
    assert 0.05 < hidden.mean() < 0.25
    error = np.abs(plate.astype(int) - background)
    assert error[hidden].mean() < 6  # of 255; the square itself is black
    far = cv2.dilate(hidden.astype(np.uint8), np.ones((25, 25))) == 0
    assert error[far].max() <= 1
    steps = (np.abs(np.diff(plate.astype(int), axis=axis)).max() for axis in (0, 1))
    assert max(steps) <= 4  # no seams where sides of the gap meet


def test_plate_of_one_colour_is_of_one_colour_behind_the_person_too() -> None:
    wall = np.full((96, 96, 3), (40, 120, 200), np.uint8)
    mask = np.zeros((matte.MATTE_PX,) * 2, np.uint8)
    mask[100:, 60:190] = 255
    person = cv2.resize(mask, (96, 96), interpolation=cv2.INTER_NEAREST) > 0
    plate, _ = matte.make_plate([np.where(person[..., None], 0, wall).astype(np.uint8)], [mask])
    assert np.abs(plate.astype(int) - wall).max() <= 1
    everywhere, _ = matte.make_plate([wall], [np.full_like(mask, 255)])
    assert everywhere.max() == 0  # nothing was seen, and nothing is made up


def test_plate_does_not_take_hair_that_the_matte_lost_once_for_the_wall() -> None:
    wall = np.full((96, 96, 3), 180, np.uint8)
    hidden = np.zeros((matte.MATTE_PX,) * 2, np.uint8)
    hidden[64:192, 64:192] = 255
    frames, mattes = [wall.copy() for _ in range(25)], [hidden.copy() for _ in range(25)]
    for frame in frames:
        frame[24:72, 24:72] = 0
    mattes[7][:] = 0
    plate, seen = matte.make_plate(frames, mattes)
    assert 0 < seen[48, 48] < matte.SELDOM
    assert plate[48, 48].min() > 170


def test_labels_are_shares_of_one_and_keep_the_mouth_in_the_face(a_face: Array) -> None:
    mesh = a_face / 512
    person = np.full((matte.MATTE_PX,) * 2, 255, np.uint8)
    person[:20] = 0
    skin = np.full((matte.MAP_PX,) * 2, 255, np.uint8)
    torso = matte.torso_prior(mesh)
    labels = matte.label_maps(mesh, person, skin, 1 - torso, torso)
    assert labels.shape == (len(LABELS), matte.MAP_PX, matte.MAP_PX)
    assert np.abs(labels.astype(int).sum(0) - 255).max() <= len(LABELS) / 2
    at = {name: labels[k] for k, name in enumerate(LABELS)}
    x, y = (mesh[4] * matte.MAP_PX).astype(int)  # the nose
    assert at["face"][y, x] > 250
    assert (at["background"][:8] > 250).all()
    assert at["torso"][-1].min() > 200
    chin = int(mesh[face.CHIN, 1] * matte.MAP_PX)
    assert at["neck"][: chin - 20].max() < 60 and at["neck"][chin + 3].max() > 150
    assert at["hair"][20].max() > 200


def test_regions_follow_head_and_shoulders(a_face: Array) -> None:
    mesh = a_face / 512
    maps = matte.RegionMaps(matte.torso_prior(mesh), mesh)
    pivot = matte.body_pivot(mesh)
    still_hair, still_torso = maps.moved(mesh, np.zeros(3), pivot)
    np.testing.assert_allclose(still_torso, maps.torso, atol=1e-5)
    np.testing.assert_allclose(still_hair, 1 - maps.torso, atol=0.02)
    _, down = maps.moved(mesh, np.array([0, 10 / matte.MAP_PX, 0]), pivot)
    np.testing.assert_allclose(down[20:], maps.torso[10:-10], atol=1e-4)


def test_skin_model_knows_the_skin_it_was_fitted_to() -> None:
    rng = np.random.default_rng(0)
    skin = np.clip(rng.normal([200, 150, 130], 6, (300, 3)), 0, 255)
    model = matte.SkinModel.fit(skin)
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[:64], picture[64:] = [200, 150, 130], [40, 90, 200]
    likeness = model(picture)
    assert likeness[:60].min() > 240 and likeness[68:].max() < 20


def test_two_faces_of_a_film_are_told_apart(shared: Path) -> None:
    film = shared / "hard" / "two_faces.mp4"
    about = media.probe(film)
    stills = media.frames(film, max_side=640, stride=50)
    scene = scouting.scout(stills, (about.width, about.height), "left")
    assert scene.n_faces == 2
    assert scene.roi[0] + scene.roi[2] < 0.7 * about.width


def test_manifest_is_plain_json(space: Workspace) -> None:
    assert json.loads(json.dumps(space.manifest())) == space.manifest()


def test_a_background_that_moves_is_told_from_one_that_stands() -> None:
    rng = np.random.default_rng(0)
    mattes = [np.zeros((matte.MATTE_PX, matte.MATTE_PX), np.uint8) for _ in range(9)]
    for mask in mattes:
        mask[64:, 64:192] = 255
    wall = rng.integers(0, 256, (128, 128, 3)).astype(np.uint8)
    still = [wall.copy() for _ in mattes]
    for frame in still:  # the person may do what he likes
        frame[32:, 32:96] = rng.integers(0, 256, (96, 64, 3))
    plate, _ = matte.make_plate(still, mattes)
    assert matte.unrest(still, mattes, plate) == 0
    moving = [np.roll(frame, 8 * i, 1) for i, frame in enumerate([wall] * len(mattes))]
    plate, _ = matte.make_plate(moving, mattes)
    assert matte.unrest(moving, mattes, plate) > 30
    everywhere = [np.full_like(mask, 255) for mask in mattes]
    assert matte.unrest(still, everywhere, plate) == 0
