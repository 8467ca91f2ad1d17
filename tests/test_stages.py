"""Stages of preprocessing: a killed job is finished by the same command, nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import n_frames_in
from films import beginning
from typer.testing import CliRunner, Result

from talkhead_cli import media
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import SilentProgress, TalkheadError
from talkhead_cli.jobs import preprocess as job
from talkhead_cli.jobs import stages
from talkhead_cli.store import Workspace
from talkhead_cli.track import face, matte
from talkhead_cli.track.scout import Scene

STAGES = ["mesh", "sound", "film", "tracks", "labels"]


def talkhead(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


class KnownMesh:
    """Stands in for the face mesh with what it once found in the speaker's film."""

    points: Any

    def __init__(self) -> None:
        self.index = -1

    def __enter__(self) -> KnownMesh:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, _rgb: object) -> Any:
        self.index += 1
        return self.points[self.index]


@pytest.fixture
def short(
    tmp_path: Path, speaker_clip: Path, speaker_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The speaker's first 3.2 s, in which her face need not be looked for."""
    KnownMesh.points = Workspace(speaker_home, "speaker").load("mesh")["points"]
    monkeypatch.setattr(face, "FaceMesh", KnownMesh)
    monkeypatch.setattr(stages.mesh, "scout", lambda _frames, size, *_: Scene(1, (0, 0, *size)))
    crop_to(64, monkeypatch)
    return beginning(speaker_clip, 80, tmp_path / "short.mp4", speaker_clip)


def track(film: Path, home: Path, **options: Any) -> Workspace:
    return job.preprocess(film, home, SilentProgress(), **options)


def files(space: Workspace) -> dict[str, int]:
    """When each file was written; the manifest is looked at by its content."""
    return {
        str(p.relative_to(space.root)): p.stat().st_mtime_ns
        for p in space.root.rglob("*")
        if p.is_file() and p.name not in ("manifest.json", ".lock")
    }


def arrays(space: Workspace) -> dict[str, Any]:
    names = ("mesh", "voice", "film", "tracks")
    out = {f"{n}.{key}": value for n in names for key, value in space.load(n).items()}
    n_frames = space.manifest()["n_frames"]
    return out | {"labels": np.stack([space.labels(i) for i in range(n_frames)])}


def crop_to(size_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stages.film, stages.material, stages.order, stages.tracks):
        monkeypatch.setattr(module, "FILM_PX", size_px)


def crash(*_: object, **__: object) -> None:
    raise RuntimeError("power cut")


def test_what_a_crash_left_is_finished_by_the_same_command(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    done: dict[str, int] = {}
    for stage in STAGES:  # each time, one stage further
        with monkeypatch.context() as patched:
            patched.setattr(getattr(stages, stage), "run", crash)
            with pytest.raises(RuntimeError):
                track(short, home)
        with pytest.raises(TalkheadError, match="not preprocessed to the end|no identity"):
            Workspace.open(home, "short")
        space = Workspace(home, "short")
        assert list(space.manifest()["stages"]) == STAGES[: STAGES.index(stage)]
        assert done.items() <= files(space).items()  # nothing was made twice
        done = files(space)
    resumed = track(short, home)
    assert Workspace.open(home, "short").manifest()["n_frames"] == 80
    whole = arrays(track(short, tmp_path / "other"))
    for name, value in arrays(resumed).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


def test_a_film_that_is_half_written_is_not_there(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(matte.Segmenter):
        n_frames = 0

        def __call__(self, rgb: Any) -> Any:
            self.n_frames += 1
            if self.n_frames == 40:
                raise KeyboardInterrupt
            return super().__call__(rgb)

    home = tmp_path / "home"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(matte, "Segmenter", Dying)
        track(short, home)
    space = Workspace(home, "short")
    assert not space.video.exists()
    assert [p for p in space.root.rglob(".part-*")] == []
    assert n_frames_in(track(short, home).video) == 80


def test_another_size_redoes_the_film_and_keeps_the_faces(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = track(short, tmp_path / "home")
    before, mesh = files(space), space.load("mesh")["points"]
    crop_to(96, monkeypatch)
    track(short, tmp_path / "home")
    after = files(space)
    same = {name for name in before if before[name] == after[name]}
    assert {"mesh.npz", "voice.npz", "audio.wav"} <= same
    assert not same & {"video.mp4", "tracks.npz", "plate.png"}
    assert space.manifest()["size_px"] == media.probe(space.video).width == 96
    np.testing.assert_array_equal(space.load("mesh")["points"], mesh)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture or sound can be looked at."""
    for stage in STAGES:
        monkeypatch.setattr(getattr(stages, stage), "run", crash)


def test_the_same_command_again_does_nothing(home: Path, speaker_clip: Path, idle: None) -> None:
    space = Workspace(home, "speaker")
    before, manifest = files(space), space.manifest()
    again = talkhead("preprocess", speaker_clip, "--id", "speaker", "--home", home)
    assert again.exit_code == 0, again.output
    assert again.stdout.split() == [str(space.root)]
    assert files(space) == before
    assert space.manifest() == manifest  # also the seconds that it took


def test_json_says_what_is_known(home: Path, speaker_clip: Path, idle: None) -> None:
    words = ["preprocess", speaker_clip, "--id", "speaker", "--home", home, "--json"]
    said = json.loads(talkhead(*words).stdout)
    assert said["paths"] == [str(home / "speaker")]
    assert said["manifest"] == Workspace(home, "speaker").manifest()
    assert json.loads(talkhead("info", "speaker", "--home", home).stdout)["n_frames"] == 200


def test_consent_is_kept(home: Path, speaker_clip: Path, tmp_path: Path, idle: None) -> None:
    words = ["preprocess", speaker_clip, "--id", "speaker", "--home", home]
    for name in ("yes.txt", "also.txt"):
        (tmp_path / name).write_text(f"I agree ({name})")
        assert talkhead(*words, "--consent", tmp_path / name).exit_code == 0
    assert talkhead(*words).exit_code == 0
    space = Workspace(home, "speaker")
    also, yes = space.manifest()["consent"]
    assert also.startswith("also-") and yes.startswith("yes-") and yes.endswith(".txt")
    assert (space.root / "consent" / yes).read_text() == "I agree (yes.txt)"


def test_two_jobs_do_not_write_at_once(home: Path, speaker_clip: Path, idle: None) -> None:
    with Workspace(home, "speaker").locked():
        result = talkhead("preprocess", speaker_clip, "--id", "speaker", "--home", home)
    assert result.exit_code == 1 and "another talkhead" in " ".join(result.stderr.split())
