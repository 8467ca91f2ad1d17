"""Datasets of others come in: what export wrote is read back, and what is broken is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from talkhead_cli import media
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs import export
from talkhead_cli.jobs import import_dataset as job
from talkhead_cli.jobs.import_dataset import import_dataset, read_cameras, reprojection_errors
from talkhead_cli.store import Workspace


@pytest.fixture(scope="module")
def exported(speaker_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "speaker"
    return export.export_dataset(speaker_home, "speaker", out, SilentProgress())


@pytest.fixture(scope="module")
def brought(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return import_dataset(exported, tmp_path_factory.mktemp("home"), SilentProgress())


def test_what_was_exported_comes_back(
    exported: Path, brought: Workspace, speaker_home: Path
) -> None:
    """Frames, sound and cameras: the round trip adds the loss of two encodings, and no more."""
    own = Workspace.open(speaker_home, "speaker")
    before, after = own.load("tracks"), brought.load("tracks")
    assert brought.id == "speaker" and len(after["pose"]) == len(before["pose"])
    degrees = np.degrees(np.abs(after["pose"][:, :3] - before["pose"][:, :3]))
    assert np.median(degrees) < 1 and np.percentile(degrees, 95) < 2.5
    eyes = np.corrcoef(after["eye"].mean(1), before["eye"].mean(1))[0, 1]
    assert eyes > 0.97
    heard, known = media.read_wav(brought.audio), media.read_wav(own.audio)
    assert np.abs(heard - known).mean() < 0.03 * np.abs(known).mean()


def test_the_datasets_cameras_are_put_to_the_test(exported: Path, brought: Workspace) -> None:
    about = brought.manifest()["dataset"]
    assert about["cameras_px"] < 3 and about["tracked_px"] < 3
    cameras = read_cameras(exported)
    assert cameras is not None and cameras.n_held > 0
    assert missed(brought, cameras) == pytest.approx(about["cameras_px"], abs=0.01)


def missed(space: Workspace, cameras: job.Cameras) -> float:
    found = reprojection_errors(space, cameras)
    assert found is not None
    return found[0]


def test_a_folder_whose_name_is_no_id_gets_one(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    shutil.copyfile(exported / "speaker.mp4", folder / "film.mp4")
    shutil.copyfile(exported / "aud.wav", folder / "aud.wav")
    assert import_dataset(folder, tmp_path / "home", SilentProgress()).id == "my-data"
    with pytest.raises(MisuseError):
        import_dataset(folder, tmp_path / "away", SilentProgress(), name="../x")
    assert not (tmp_path / "away").exists()


def test_cameras_of_other_frames_are_found_out(exported: Path, brought: Workspace) -> None:
    """Cameras that lag behind, or whose axes are another reader's, do not fit the face."""
    cameras = read_cameras(exported)
    assert cameras is not None
    good = missed(brought, cameras)
    lagging = job.Cameras(
        cameras.frames, np.roll(cameras.c2w, 40, 0), cameras.focal, cameras.centre, cameras.n_held
    )
    turned = job.Cameras(
        cameras.frames, np.linalg.inv(cameras.c2w), cameras.focal, cameras.centre, cameras.n_held
    )
    assert missed(brought, lagging) > 3 * good
    assert missed(brought, turned) > 3 * good
    few = job.Cameras(cameras.frames[:5], cameras.c2w[:5], cameras.focal, cameras.centre, 0)
    assert reprojection_errors(brought, few) is None


def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "data"))


def test_a_film_stands_in_for_pictures(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    shutil.rmtree(folder / "ori_imgs")
    for file in folder.glob("transforms*.json"):
        file.unlink()
    space = import_dataset(folder, tmp_path / "home", SilentProgress(), name="film")
    assert space.id == "film" and space.manifest()["dataset"] is None


def break_gap(folder: Path) -> None:
    (folder / "ori_imgs" / "7.jpg").unlink()


def break_picture(folder: Path) -> None:
    (folder / "ori_imgs" / "9.jpg").write_bytes(b"no picture")


def break_size(folder: Path) -> None:
    cv2.imwrite(str(folder / "ori_imgs" / "5.jpg"), np.zeros((64, 64, 3), np.uint8))


def break_sound(folder: Path) -> None:
    (folder / "aud.wav").unlink()
    (folder / "speaker.mp4").unlink()


def break_all(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def break_json(folder: Path) -> None:
    (folder / "transforms_train.json").write_text('{"frames": [')


def break_camera(folder: Path) -> None:
    file = folder / "transforms_val.json"
    facts = json.loads(file.read_text())
    facts["frames"][0]["transform_matrix"] = [[1, 2], [3, 4]]
    file.write_text(json.dumps(facts))


def break_focal(folder: Path) -> None:
    file = folder / "transforms_val.json"
    facts = json.loads(file.read_text())
    del facts["focal_len"]
    file.write_text(json.dumps(facts))


def break_into_films(folder: Path) -> None:
    break_all(folder)
    for name in ("one.mp4", "two.mp4"):
        (folder / name).touch()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_gap, "lacks picture 7"),
        (break_picture, "9.jpg is damaged"),
        (break_size, "5.jpg is damaged, or of another size"),
        (break_sound, "has no sound"),
        (break_all, "is no dataset"),
        (break_into_films, "tracked by: talkhead preprocess"),
        (break_json, "cannot be read as JSON"),
        (break_camera, "has no camera of 4 x 4"),
        (break_focal, "lacks what the layout has"),
    ],
)
def test_a_broken_dataset_is_named_and_nothing_is_left(
    exported: Path, tmp_path: Path, spoil: object, words: str
) -> None:
    folder = copied(exported, tmp_path)
    assert callable(spoil)
    spoil(folder)
    home = tmp_path / "home"
    with pytest.raises(TalkheadError, match=words):
        import_dataset(folder, home, SilentProgress())
    assert not home.exists() or not list(home.iterdir())


def test_what_could_hold_code_is_never_opened(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    for name in ("track_params.pt", "aud.npy", "aud_ds.npy"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    words = ["import", str(folder), "--id", "safe", "--home", str(tmp_path / "home")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "cameras see rigid landmarks" in done.stderr
    assert not Path("pwned").exists()


def test_nerfstudios_cameras_see_the_face_where_it_is(exported: Path, speaker_home: Path) -> None:
    """Through nerfstudio's conventions: OpenGL camera, world z up."""
    tracks = Workspace.open(speaker_home, "speaker").load("tracks")
    facts = json.loads((exported / "transforms.json").read_text())
    for frame in facts["frames"][::50]:
        i = int(Path(frame["file_path"]).stem)
        marks = tracks["landmarks"][i].astype(np.float64)
        world = np.stack([marks[:, 0], marks[:, 2], -marks[:, 1]], 1)
        c2w = np.array(frame["transform_matrix"])
        local = (world - c2w[:3, 3]) @ c2w[:3, :3]
        assert (local[:, 2] < 0).all(), "before the camera, which looks along -z"
        x = facts["cx"] + facts["fl_x"] * local[:, 0] / -local[:, 2]
        y = facts["cy"] - facts["fl_y"] * local[:, 1] / -local[:, 2]
        known = np.loadtxt(exported / "ori_imgs" / f"{i}.lms")
        assert np.abs(np.stack([x, y], 1) - known).mean() < 0.5
    assert (exported / facts["frames"][0]["file_path"]).is_file()
