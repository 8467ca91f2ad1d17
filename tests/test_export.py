"""The exported dataset, read back the way its readers read it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from talkhead_cli.contracts import LABELS, SilentProgress, TalkheadError
from talkhead_cli.jobs import export
from talkhead_cli.jobs.holdout import split
from talkhead_cli.store import Workspace


@pytest.fixture(scope="module")
def dataset(speaker_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "speaker"
    return export.export_dataset(speaker_home, "speaker", out, SilentProgress())


def ngp(pose: np.ndarray, scale: float = 4.0) -> np.ndarray:
    """What readers of the layout make of a matrix: axes in another order, two columns negated."""
    a = np.concatenate([pose[:3, :3] * [1, -1, -1], pose[:3, 3:] * scale], 1)
    return np.concatenate([a[[1, 2, 0]], [[0, 0, 0, 1]]])


def test_every_frame_has_its_files(dataset: Path, speaker_home: Path) -> None:
    n = len(Workspace.open(speaker_home, "speaker").load("tracks")["pose"])
    for folder, suffixes in {
        "ori_imgs": (".jpg", ".lms"),
        "gt_imgs": (".jpg",),
        "parsing": (".png", "_face.png"),
        "torso_imgs": (".png",),
        "teeth_mask": (".npy",),
    }.items():
        found = {p.name for p in (dataset / folder).iterdir()}
        assert found == {f"{i}{suffix}" for suffix in suffixes for i in range(n)}, folder
    assert (dataset / "aud.wav").exists() and (dataset / "speaker.mp4").exists()
    for name in ("aud.npy", "aud_ds.npy"):
        features = np.load(dataset / name)
        assert features.shape == (n, 16, 29) and np.isfinite(features).all()
    with (dataset / "au.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == n and all(0 <= float(r[" AU45_r"]) <= 2 for r in rows)
    assert list(rows[0]) == ["frame", *(f" AU{i:02d}_r" for i in (1, 4, 5, 6, 7, 25, 45))]


def test_expressions_of_other_trackers_follow_ours(dataset: Path, speaker_truth: Any) -> None:
    shapes = np.load(dataset / "bs.npy")
    assert shapes.shape == (len(speaker_truth.eye), 52)
    assert shapes.min() >= 0 and shapes.max() <= 1
    for column, true in (
        (8, 1 - speaker_truth.eye),
        (9, 1 - speaker_truth.eye),
        (24, speaker_truth.mouth),
    ):
        assert np.corrcoef(shapes[:, column], true)[0, 1] > 0.9, column
    with (dataset / "au.csv").open() as handle:
        lips = [float(row[" AU25_r"]) for row in csv.DictReader(handle)]
    assert np.corrcoef(lips, speaker_truth.mouth)[0, 1] > 0.9


def test_left_and_right_of_blend_shapes_are_the_persons() -> None:
    tracks = {
        "eye": np.array([[0.0, 1.0]]),  # shut on the left of the picture: the person's right
        "brow": np.array([[0.04, -0.02]]),
        "mesh_fractions": np.random.default_rng(0).random((1, 478, 2)),
    }
    shapes = export.blend_shapes(tracks)[0]
    assert shapes[[8, 9]].tolist() == [0, 1]  # eyeBlinkLeft, eyeBlinkRight
    assert shapes[[3, 4]].tolist() == [0, 1]  # browOuterUpLeft, browOuterUpRight
    assert shapes[[0, 1]].tolist() == [0.5, 0]  # browDownLeft, browDownRight
    assert shapes[2] == 0.25  # browInnerUp


def test_landmarks_of_head_space_land_on_their_pixels(dataset: Path, speaker_home: Path) -> None:
    """Through the readers' own conversion, their pinhole and their scale."""
    tracks = Workspace.open(speaker_home, "speaker").load("tracks")
    views = {
        label: json.loads((dataset / f"transforms_{label}.json").read_text())
        for label in ("train", "val")
    }
    n = len(tracks["pose"])
    ids = [f["img_id"] for label in views for f in views[label]["frames"]]
    assert ids == sorted(ids) == np.flatnonzero(tracks["usable"]).tolist()
    assert views["val"]["frames"][0]["img_id"] >= n - split(n, 1 / 11)
    turned = export.TURNED[:3, :3]
    for frame in views["train"]["frames"][::40]:
        i = frame["img_id"]
        c2w = ngp(np.array(frame["transform_matrix"]))
        # Head space in the readers' world: our axes turned, scaled, and in their order.
        world = (tracks["landmarks"][i] @ turned.T * export.UNIT * 4)[:, [1, 2, 0]]
        seen = (world - c2w[:3, 3]) @ c2w[:3, :3]
        pixel = views["train"]["focal_len"] * seen[:, :2] / seen[:, 2:] + views["train"]["cx"]
        marks = np.loadtxt(dataset / "ori_imgs" / f"{i}.lms")
        assert marks.shape == (68, 2)
        assert np.linalg.norm(pixel - marks, axis=1).mean() < 0.5, i
        assert np.abs(c2w[:3, :3] @ c2w[:3, :3].T - np.eye(3)).max() < 1e-5
        assert np.abs(world).max() < 1, "inside the cube that is marched"


def test_a_crop_beside_the_optical_axis_is_seen_as_by_a_camera_that_looks_at_it() -> None:
    """Readers of the layout know no other principal point than the middle."""
    size, k = 256, np.array([[700.0, 0, -150], [0, 700, 610], [0, 0, 1]], np.float32)
    seen = export._Straight(k, size)
    pose = np.array([[0.2, -0.1, 0.05, 1.7, -1.8, 5.0]], np.float32)
    turn, place = cv2.Rodrigues(pose[0, :3].astype(float))[0], pose[0, 3:].astype(float)
    marks = np.random.default_rng(0).uniform(-0.3, 0.3, (50, 3))
    local = (marks @ turn.T + place) @ k.astype(float).T
    crop = local[:, :2] / local[:, 2:] * size / 512
    assert (crop > 0).all() and (crop < size).all(), "in the picture"
    found = seen.points(crop[None])[0]
    (c2w,) = seen.cameras(pose)
    ahead = (marks - c2w[:3, 3]) @ c2w[:3, :3]
    pixel = seen.focal * ahead[:, :2] / ahead[:, 2:] + size / 2
    assert np.abs(pixel - found).max() < 1e-3
    assert np.allclose(seen.points(np.array([[[size / 2, size / 2]]])), size / 2)
    steps = seen.points(np.array([[[size / 2, size / 2 + 1], [size / 2 + 1, size / 2]]])) - size / 2
    assert np.abs(np.linalg.norm(steps[0], axis=1) - 1).max() < 0.3, "of the same size"
    picture = np.zeros((size, size, 1), np.float32)
    picture[140:143, 60:63] = 1
    x, y = seen.points(np.array([[[61.5, 141.5]]]))[0, 0]
    rows, columns = np.nonzero(seen.picture(picture) > 0.5)
    assert np.allclose([columns.mean() + 0.5, rows.mean() + 0.5], [x, y], atol=0.6)


def test_pictures_follow_the_labels(dataset: Path, speaker_home: Path) -> None:
    space = Workspace.open(speaker_home, "speaker")
    at = np.arange(24, 488, 32)
    sure = (space.labels(10) > 250)[:, at // 4][:, :, at // 4]
    centres = np.stack(np.meshgrid(at, at), -1) + 0.5
    seen = export._Straight(space.load("tracks")["k"], 512).points(centres)
    columns, rows = seen.astype(int).transpose(2, 0, 1)
    parsing = cv2.imread(str(dataset / "parsing" / "10.png"))[..., ::-1][rows, columns]
    for name, colour in {
        "face": (0, 0, 255),
        "hair": (0, 0, 0),
        "torso": (255, 0, 0),
        "background": (255, 255, 255),
    }.items():
        where = sure[LABELS.index(name)]
        assert where.any() and (parsing[where] == colour).all(1).mean() > 0.9, name
    pasted = cv2.imread(str(dataset / "parsing" / "10_face.png"))[..., 1]  # green, as it is read
    mask = 1 - pasted[rows, columns] / 255
    assert mask[sure[LABELS.index("face")]].mean() > 0.9
    assert mask[sure[LABELS.index("hair")]].mean() < 0.1
    teeth = np.load(dataset / "teeth_mask" / "10.npy")
    grey = (cv2.imread(str(dataset / "parsing" / "10.png")) == 100).all(-1)
    assert teeth.dtype == bool and (teeth == grey).all()
    torso = cv2.imread(str(dataset / "torso_imgs" / "10.png"), cv2.IMREAD_UNCHANGED)
    alpha = torso[rows, columns, 3]
    assert torso.shape[2] == 4 and alpha[sure[LABELS.index("torso")]].mean() > 240
    assert alpha[sure[LABELS.index("background")]].mean() < 10
    ground, plate = (cv2.imread(str(dataset / p)) for p in ("gt_imgs/10.jpg", "bc.jpg"))
    behind = sure[LABELS.index("background")]
    gap = np.abs(ground.astype(int) - plate)[rows, columns][behind]
    assert gap.mean() < 6


def test_windows_of_speech_are_centred(speaker_home: Path) -> None:
    stream = np.zeros((400, 46), np.float32)
    stream[200] = 5.0  # at 2 s, frame 50
    features = export.speech_features(stream, 100)
    loud = np.abs(features - features[0]).sum((1, 2))
    heard = np.flatnonzero(loud > 1e-3)
    assert abs(heard.mean() - 50) <= 0.5 and features[50, 8].mean() > features[50, 4].mean()


def test_an_export_never_replaces_a_folder_nor_leaves_half_of_one(
    speaker_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(TalkheadError, match="there already"):
        export.export_dataset(speaker_home, "speaker", tmp_path / "there", SilentProgress())

    def torn(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_frame", torn)
    with pytest.raises(TalkheadError, match="No space"):
        export.export_dataset(speaker_home, "speaker", tmp_path / "new", SilentProgress())
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
