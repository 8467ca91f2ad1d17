"""What moves the head: continuous, bounded, and a function of the frame's number alone."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from talkhead_cli.contracts import (
    FPS,
    SAMPLES_PER_FRAME,
    MisuseError,
    SilentProgress,
    TalkheadError,
)
from talkhead_cli.jobs import backends, drive, landmark_track, script
from talkhead_cli.jobs.footage import SpeechStats
from talkhead_cli.jobs.landmark_track import LandmarkTrack

Array = NDArray[np.floating[Any]]


@pytest.fixture
def footage() -> dict[str, NDArray[Any]]:
    """60 frames, 12 of them without a face, in which every value is told apart."""
    n, rng = 60, np.random.default_rng(0)
    walk = np.cumsum(rng.normal(0, 0.01, (n, 6)), axis=0)
    usable = np.ones(n, bool)
    usable[:12] = False
    return {
        "pose": (walk + [0, 0, 0, 0, 0, 4]).astype(np.float32),
        "body": np.cumsum(rng.normal(0, 0.01, (n, 4)), axis=0).astype(np.float32),
        "eye": rng.uniform(0.5, 1, (n, 2)).astype(np.float32),
        "gaze": rng.uniform(-0.1, 0.1, (n, 2)).astype(np.float32),
        "brow": rng.uniform(-0.1, 0.1, (n, 2)).astype(np.float32),
        "usable": usable,
        "k": np.array([[600, 0, 256], [0, 600, 256], [0, 0, 1]], np.float32),
    }


def drive_of(
    footage: dict[str, NDArray[Any]], n_frames: int, as_filmed: Any = None, **moves: Any
) -> drive.Drive:
    return drive.make(footage, n_frames, drive.MotionOptions(**moves), as_filmed=as_filmed)


def test_lids_of_a_landmark_track_move_one_picture_too(tmp_path: Path) -> None:
    player: Any = SimpleNamespace(run=SimpleNamespace(drive=lambda: {"pose": np.zeros((1, 6))}))
    marks = np.zeros((5, 68, 3), np.float32)
    path = tmp_path / "track.npz"
    for eye, blink in ((np.ones((5, 2), np.float32), "footage"), (None, "auto")):
        landmark_track.write(path, LandmarkTrack(marks, marks[0], eye))
        moves = drive.MotionOptions(landmarks=path)
        assert script.with_available_motion(player, moves, SilentProgress()).blink == blink


# ---------------------------------------------------------------- silence


def test_silence_says_nothing_of_a_microphone() -> None:
    ear = backends.voice_of("mel")
    rng = np.random.default_rng(0)
    sound = (rng.normal(0, 3000, 16_000 * 12)).astype(np.int16)
    padded = np.concatenate([sound, np.zeros(16_000 * 20, np.int16)])
    footage = SpeechStats(np.zeros(ear.n_features), np.ones(ear.n_features), ear.rate_hz)
    (alone, _), (with_silence, silent) = (
        script.speech_stats(pcm, ear, footage) for pcm in (sound, padded)
    )
    assert not silent
    np.testing.assert_allclose(with_silence.mean, alone.mean, atol=0.02)
    np.testing.assert_allclose(with_silence.std, alone.std, rtol=0.05)


def test_somebody_talks_until_silence_lasts() -> None:
    frames = np.zeros(150, np.float32)
    frames[10:40] = 0.1
    frames[44:60] = 0.1  # a pause of 0.16 s
    pcm = (np.repeat(frames, SAMPLES_PER_FRAME) * 32767).astype(np.int16)
    talks = script.talking(pcm, 150)
    assert (talks[5:65] == 1).all(), "0.2 s before the first sound, and after the last"
    ending = talks[64:73]
    assert (np.diff(ending) <= 0).all() and 0 < ending[4] < 1 and ending[-1] == 0
    assert not talks[75:].any()
    np.testing.assert_allclose(talks[:5], talks[69:64:-1], atol=1e-6)
    assert not script.talking(np.zeros(3000, np.int16), 5).any()
    long = np.zeros(FPS * 130 * SAMPLES_PER_FRAME, np.int16)
    long[-10 * SAMPLES_PER_FRAME :] = 3000
    assert script.talking(long, FPS * 130)[-12:].all() and not script.talking(long, 3200).any()


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("n", [2, 3, 5, 20, 21, 22, 100])
def test_replay_is_bounded_periodic_and_never_jumps(n: int) -> None:
    place = drive.eased_replay(n)
    frames = np.arange(6 * n)
    at = place(frames)
    assert at.min() >= 0 and at.max() <= n - 1
    assert np.abs(np.diff(at)).max() <= 1 + 1e-9
    np.testing.assert_allclose(place(frames + 2 * (n - 1)), at)
    np.testing.assert_allclose(place(-frames), at)  # what comes back went there


@pytest.mark.parametrize("n", [5, 20, 22, 100])
def test_replay_turns_without_a_jerk(n: int) -> None:
    at = drive.eased_replay(n)(np.linspace(0, 4 * n, 40 * n + 1))
    speed = np.diff(at) * 10  # in frames per frame
    turn = min(drive.TURN, (n - 1) / 2)
    assert np.abs(np.diff(speed)).max() <= 0.1 / turn + 1e-6  # a triangle wave's would be 2
    assert np.abs(speed[0]) < 0.1 / turn


def test_replay_plays_the_middle_at_its_own_speed() -> None:
    at = drive.eased_replay(100)(np.arange(200))
    np.testing.assert_allclose(at[10:90], np.arange(10, 90))
    np.testing.assert_allclose(at[110:188], 198 - np.arange(110, 188))


def test_replay_does_not_depend_on_what_was_asked_before() -> None:
    place = drive.eased_replay(30)
    whole = place(np.arange(200))
    np.testing.assert_array_equal(place(np.array([150, 3, 77])), whole[[150, 3, 77]])


def test_replay_of_one_frame_stands_still() -> None:
    np.testing.assert_array_equal(drive.eased_replay(1)(np.arange(5)), np.zeros(5))


def test_a_film_is_replayed_row_by_row_and_back() -> None:
    rows = drive.triangle_replay(4)(np.arange(9))
    np.testing.assert_array_equal(rows, [0, 1, 2, 3, 2, 1, 0, 1, 2])
    np.testing.assert_array_equal(drive.triangle_replay(1)(np.arange(3)), [0, 0, 0])


def test_as_filmed_the_rows_that_are_named_are_replayed(footage: dict[str, np.ndarray]) -> None:
    """From the first on, whether a face was found in them or not: frames of a film go with them."""
    frames = np.arange(len(footage["pose"]))
    rows = frames.copy()
    rows[30] = 29
    made = drive_of(footage, 2 * len(frames), as_filmed=rows)
    np.testing.assert_array_equal(made.rows(frames), frames)
    np.testing.assert_allclose(made.pose(frames)[0], footage["pose"][rows], atol=1e-6)
    np.testing.assert_allclose(made.eyes(frames)[0], footage["eye"][rows], atol=1e-6)
    assert drive_of(footage, 60).rows(frames).min() > 11


def test_between_is_linear_and_holds_the_end() -> None:
    values = np.array([[0.0, 5.0], [2.0, 5.0], [6.0, 7.0]])
    found = drive.between(values, np.array([0, 0.5, 1.25, 2]))
    np.testing.assert_allclose(found, np.array([[0, 5], [1, 5], [3, 5.5], [6, 7]]))


def test_longest_run() -> None:
    assert drive.longest_run(np.array([1, 1, 0, 1, 1, 1, 0], bool)) == (3, 5)
    assert drive.longest_run(np.ones(4, bool)) == (0, 3)
    with pytest.raises(TalkheadError, match="usable"):
        drive.longest_run(np.zeros(4, bool))


# ---------------------------------------------------------------- blinks


def test_blinks_come_at_a_natural_rate() -> None:
    minutes = 10
    for seed in range(3):
        track = drive.blink_track(minutes * 60 * FPS, seed)
        shut = track < 0.1
        blinks = int((np.diff(shut.astype(int)) == 1).sum())
        assert 10 <= blinks / minutes <= 25
        assert track.min() == 0 and track.max() == 1
        begins = np.flatnonzero(np.diff(shut.astype(int)) == 1)
        assert np.diff(begins).min() >= drive.BLINK_MIN_S * FPS - 1
        assert 0.5 < (track == 1).mean() < 0.98


def test_blinks_follow_the_seed() -> None:
    one, two = drive.blink_track(3000, 1), drive.blink_track(3000, 2)
    np.testing.assert_array_equal(drive.blink_track(3000, 1), one)
    assert (one != two).any()


@pytest.mark.parametrize("n", [0, 1, 15, 40])
def test_a_short_film_gets_a_track_of_its_length(n: int) -> None:
    assert drive.blink_track(n, 0).shape == (n,)


# ---------------------------------------------------------------- the drive as a whole


def test_footage_pose_stays_within_the_usable_stretch(footage: dict[str, NDArray[Any]]) -> None:
    poses, bodies = drive_of(footage, 300).pose(np.arange(300))
    assert poses.shape == (300, 6) and bodies.shape == (300, 4)
    used = footage["pose"][12:]
    assert (poses >= used.min(0) - 1e-6).all() and (poses <= used.max(0) + 1e-6).all()
    steps = np.abs(np.diff(poses, axis=0)).max(0)
    assert (steps <= np.abs(np.diff(used, axis=0)).max(0) + 1e-6).all()


@pytest.mark.parametrize("pose", ["footage", "still"])
@pytest.mark.parametrize("blink", ["footage", "auto", "none"])
def test_a_frame_does_not_depend_on_its_batch(
    footage: dict[str, NDArray[Any]], pose: str, blink: str
) -> None:
    made = drive_of(footage, 120, pose=pose, blink=blink, seed=3)
    frames = np.arange(120)
    whole = [*made.pose(frames), *made.eyes(frames)]
    for part in (np.array([7]), np.array([119, 0]), np.arange(40, 55)):
        for all_of, some in zip(whole, [*made.pose(part), *made.eyes(part)], strict=True):
            np.testing.assert_allclose(some, all_of[part], atol=1e-12)


def test_still_pose_is_the_constant_median(footage: dict[str, NDArray[Any]]) -> None:
    poses, bodies = drive_of(footage, 50, pose="still").pose(np.arange(50))
    assert (poses == poses[0]).all() and (bodies == bodies[0]).all()
    np.testing.assert_allclose(poses[0], np.median(footage["pose"][12:], axis=0))


def test_a_head_sways_a_little_begins_at_rest_and_follows_the_seed(
    footage: dict[str, NDArray[Any]],
) -> None:
    n = 25 * 120
    made = [drive_of(footage, n, pose="auto", seed=s).pose(np.arange(n)) for s in (1, 1, 2)]
    (pose, body), (again, _), (other, _) = made
    assert np.array_equal(pose, again) and not np.allclose(pose, other)
    rest = drive_of(footage, n, pose="still").pose(np.arange(1))[0][0]
    assert np.allclose(pose[0, 3:], rest[3:]) and np.ptp(body, axis=0).max() == 0
    turn = (Rotation.from_rotvec(pose[:, :3]) * Rotation.from_rotvec(rest[:3]).inv()).as_rotvec()
    assert np.abs(turn[0]).max() < 1e-6 and 1.0 < np.degrees(np.abs(turn).max()) < 15
    assert np.degrees(np.abs(np.diff(turn, axis=0)).max()) < 1.2, "no faster than heads turn"
    part = drive_of(footage, n, pose="auto", seed=1).pose(np.arange(700, 720))[0]
    assert np.allclose(part, pose[700:720])
    assert np.degrees(np.abs(turn.mean(0)).max()) < 1.5, "it sways round its rest"


def test_eyes_are_footage_awake_or_blinking(footage: dict[str, NDArray[Any]]) -> None:
    frames = np.arange(250)
    awake = np.median(footage["eye"][12:], axis=0)
    none = drive_of(footage, 250, blink="none").eyes(frames)[0]
    np.testing.assert_allclose(none, np.tile(awake, (250, 1)))
    auto = drive_of(footage, 250, blink="auto", seed=5).eyes(frames)[0]
    np.testing.assert_allclose(auto, drive.blink_track(250, 5)[:, None] * awake)
    assert auto.min() == 0
    replayed = drive_of(footage, 250).eyes(frames)[0]
    assert (replayed != none).any() and replayed.shape == (250, 2)


def test_blinks_of_a_file_are_held_at_its_end(
    footage: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "eyes.txt"
    path.write_text("1\n0.5\n0\n")
    eye = drive_of(footage, 5, blink=str(path)).eyes(np.arange(5))[0]
    np.testing.assert_allclose(eye, np.repeat([1, 0.5, 0, 0, 0], 2).reshape(5, 2))


def test_pose_of_a_file_is_played_as_it_is(
    footage: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    given = np.random.default_rng(0).normal(0, 0.1, (40, 6))
    np.save(tmp_path / "pose.npy", given)
    with pytest.raises(TalkheadError, match="face heights from the camera"):
        drive_of(footage, 40, pose=str(tmp_path / "pose.npy"))
    given[:, 5] += 4
    np.save(tmp_path / "pose.npy", given)
    poses, bodies = drive_of(footage, 40, pose=str(tmp_path / "pose.npy")).pose(np.arange(40))
    np.testing.assert_allclose(poses, given)
    np.testing.assert_allclose(bodies, np.tile(np.median(footage["body"][12:], 0), (40, 1)))
    longer = drive_of(footage, 100, pose=str(tmp_path / "pose.npy")).pose(np.arange(100))[0]
    np.testing.assert_allclose(longer[:40], given)
    np.testing.assert_allclose(longer[39:79], given[::-1], err_msg="there and back")


@pytest.mark.parametrize("angle", [{"yaw_deg": 45.1}, {"pitch_deg": -46.0}, {"yaw_deg": 180.0}])
def test_angles_beyond_the_limit_are_misuse(
    footage: dict[str, NDArray[Any]], angle: dict[str, float]
) -> None:
    with pytest.raises(MisuseError, match="45 degrees"):
        drive_of(footage, 5, **angle)


@pytest.mark.parametrize("pose", ["still", "auto"])
def test_eyes_do_not_go_on_looking_where_the_head_does_not_go(
    footage: dict[str, NDArray[Any]], pose: str
) -> None:
    _, gaze, brow = drive_of(footage, 100, pose=pose).eyes(np.arange(100))
    assert np.ptp(gaze, 0).max() == 0 == np.ptp(brow, 0).max()


def test_poses_of_frames_without_a_face_count_as_never_filmed(
    footage: dict[str, NDArray[Any]],
) -> None:
    told = []
    for yaw in (None, -0.6, 0.6):
        if yaw is not None:
            footage["pose"][0, :3] = [0, yaw, 0]  # of a row that is not usable
        told.append(drive.beyond(footage, drive_of(footage, 5, yaw_deg=30.0), 5))
    assert told[0] and told[0] == told[1] == told[2]


@pytest.mark.parametrize(("option", "axis"), [("yaw_deg", [0, 1, 0]), ("pitch_deg", [-1, 0, 0])])
def test_the_camera_circles_the_head(
    footage: dict[str, NDArray[Any]], option: str, axis: list[int]
) -> None:
    pose = drive_of(footage, 5).pose(np.arange(5))[0]
    straight = drive_of(footage, 5).camera(pose, 128, np.arange(5))
    made = drive_of(footage, 5, **{option: 30.0})
    turned = made.camera(pose, 128, np.arange(5))
    here, there = straight.c2w.numpy()[:, :3], turned.c2w.numpy()[:, :3]
    around = np.einsum("tij,tkj->tik", there[..., :3], here[..., :3])
    vector = Rotation.from_matrix(around).as_rotvec(degrees=True)
    np.testing.assert_allclose(vector, np.tile(30.0 * np.array(axis), (5, 1)), atol=1e-3)
    # the place turns with the view: what was in the picture's middle stays there
    np.testing.assert_allclose(
        there[..., 3], np.einsum("tij,tj->ti", around, here[..., 3]), atol=1e-5
    )
    assert (turned.k == straight.k).all()
    gone = there[..., 3] - here[..., 3]  # x to the person's left, y down
    assert (gone[:, 0] < 0).all() if option == "yaw_deg" else (gone[:, 1] < 0).all()


@pytest.mark.parametrize(("yaw", "pitch"), [(20.0, 20.0), (-45.0, 45.0), (30.0, -10.0)])
def test_a_turned_and_lifted_camera_stays_level(
    footage: dict[str, NDArray[Any]], yaw: float, pitch: float
) -> None:
    footage["pose"] = np.tile([0.0, 0, 0, 0, 0, 5], (len(footage["pose"]), 1))
    made = drive_of(footage, 1, yaw_deg=yaw, pitch_deg=pitch)
    c2w = made.camera(made.pose(np.arange(1))[0], 128, np.arange(1)).c2w[0].numpy()
    assert c2w[1, 0] == pytest.approx(0, abs=1e-6), "the horizon is level"
    x, y, z = c2w[:3, 3] / 5  # y down, z away from where the face looks
    assert np.degrees(np.arctan2(-x, -z)) == pytest.approx(yaw, abs=1e-3)
    assert np.degrees(np.arcsin(-y)) == pytest.approx(pitch, abs=1e-3)


def test_the_camera_swings_to_either_side_and_back(footage: dict[str, NDArray[Any]]) -> None:
    frames = np.array([0, 50, 100, 150, 200])  # eight seconds, by quarters
    pose = np.tile(footage["pose"][12].astype(np.float32), (5, 1))
    straight = drive_of(footage, 201).camera(pose, 128, frames).c2w.numpy()[:, :3, :3]
    swung = drive_of(footage, 201, orbit=True).camera(pose, 128, frames).c2w.numpy()[:, :3, :3]
    around = Rotation.from_matrix(np.einsum("tij,tkj->tik", swung, straight))
    np.testing.assert_allclose(around.as_rotvec(degrees=True)[:, 1], [0, 30, 0, -30, 0], atol=1e-3)
    with pytest.raises(MisuseError, match="within 15 beside --orbit"):
        drive_of(footage, 5, orbit=True, yaw_deg=16.0)


@pytest.mark.parametrize("n_frames", [3, 150, 2301, 4601])
def test_some_frames_tell_all_views_of_a_swing(
    footage: dict[str, NDArray[Any]], n_frames: int
) -> None:
    """2301 frames: every hundredth looks straight ahead."""
    made = drive_of(footage, n_frames, orbit=True)
    at = made.sample_frames(24, n_frames)
    assert len(at) <= 24 and at.min() == 0 and at.max() <= n_frames - 1
    swing = np.sin(2 * np.pi * at / 200)
    whole = np.sin(2 * np.pi * np.arange(n_frames) / 200)
    assert swing.max() > whole.max() - 0.05 and swing.min() < whole.min() + 0.05
    plain = drive_of(footage, n_frames, yaw_deg=5).sample_frames(24, n_frames)
    assert plain.tolist() == np.unique(np.linspace(0, n_frames - 1, 24).astype(int)).tolist()


def test_the_camera_sees_the_head_where_the_pose_says(footage: dict[str, NDArray[Any]]) -> None:
    made = drive_of(footage, 5)
    pose = made.pose(np.arange(5))[0]
    camera = made.camera(pose, 256, np.arange(5))
    world = np.linalg.inv(camera.c2w.numpy().astype(float))
    np.testing.assert_allclose(world[:, :3, 3], pose[:, 3:], atol=1e-4)  # the head's origin
    k = np.array([[300, 0, 128], [0, 300, 128], [0, 0, 1]])
    np.testing.assert_allclose(camera.k[0].numpy(), k)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".npy"])
def test_tables_of_every_kind_are_read(tmp_path: Path, suffix: str) -> None:
    table = np.random.default_rng(0).normal(size=(7, 6)).round(4)
    path = tmp_path / f"pose{suffix}"
    if suffix == ".npy":
        np.save(path, table)
    else:
        np.savetxt(path, table, delimiter="," if suffix == ".csv" else " ")
    np.testing.assert_allclose(drive.read_table(path, (6,), "--pose"), table)
    np.testing.assert_allclose(drive.read_table(path, (2, 6), "--pose"), table)


def test_one_column_is_a_column(tmp_path: Path) -> None:
    (tmp_path / "eyes.txt").write_text("1\n0.5\n0\n", encoding="utf-8-sig")  # as Windows does
    found = drive.read_table(tmp_path / "eyes.txt", (1, 2), "--blink")
    np.testing.assert_allclose(found[:, 0], [1, 0.5, 0])
    assert found.shape == (3, 1)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("words.csv", "yaw,pitch\n1,2\n", "not a table"),
        ("ragged.csv", "1,2,3,4,5,6\n1,2\n", "not a table"),
        ("narrow.csv", "1,2,3\n", "6 columns"),
        ("spaced.csv", "1 2 3 4 5 6\n", "not a table"),
        ("holes.csv", "1,2,3,4,5,nan\n", "not numbers"),
        ("endless.csv", "1,2,3,4,5,inf\n", "not numbers"),
        ("odd.npy", "no array", "not a table"),
    ],
)
def test_a_bad_table_is_answered_with_the_option_and_the_file(
    tmp_path: Path, name: str, text: str, why: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TalkheadError, match=why) as error:
        drive.read_table(tmp_path / name, (6,), "--pose")
    assert "--pose" in str(error.value) and name in str(error.value)


def test_openness_beyond_shut_and_open_is_refused(
    footage: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    (tmp_path / "eyes.txt").write_text("1\n3\n-1\n")
    with pytest.raises(TalkheadError, match="from 0 .shut. to 1 .open., not from -1 to 3"):
        drive_of(footage, 3, blink=str(tmp_path / "eyes.txt"))


@pytest.mark.filterwarnings("ignore:loadtxt")
def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(TalkheadError, match="1 or 2 columns"):
        drive.read_table(tmp_path / "empty.csv", (1, 2), "--blink")


@pytest.mark.parametrize("word", ["foootage", "nosuch.csv", "."])
def test_an_unknown_word_is_taken_for_a_file_that_is_not_there(
    footage: dict[str, NDArray[Any]], word: str
) -> None:
    with pytest.raises(TalkheadError, match="no known word"):
        drive_of(footage, 5, pose=word)


def test_views_that_nobody_filmed_are_named(
    footage: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    def said(n: int = 50, **wishes: Any) -> str:
        return drive.beyond(footage, drive_of(footage, n, **wishes), n)

    for usual in ({}, {"pose": "still"}, {"pose": "auto"}, {"yaw_deg": 10.0}):
        assert not said(**usual)
    assert re.search(r"\b(2[5-9]|30) degrees beyond", said(yaw_deg=30.0))
    assert "degrees beyond" in said(n=200, orbit=True)
    far = np.tile(np.median(footage["pose"][footage["usable"]], 0), (5, 1))
    far[:, 5] += 1.5
    np.save(tmp_path / "far.npy", far)
    assert re.search(r"1\.\d face heights beyond", said(pose=str(tmp_path / "far.npy")))
