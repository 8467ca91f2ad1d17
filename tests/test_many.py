"""Many videos at once: the same workspaces, past bad files, and what is refused beforehand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT
from typer.testing import CliRunner, Result

from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs import preprocess_many as job
from talkhead_cli.store import Workspace


def preprocess(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["preprocess", *(str(w) for w in words)])


def test_a_folder_of_videos_is_tracked_past_its_bad_files(
    speaker_clip: Path, speaker_home: Path, tmp_path: Path
) -> None:
    folder, home = tmp_path / "films", tmp_path / "home"
    folder.mkdir()
    shutil.copy(speaker_clip, folder / "one person.mp4")
    (folder / "broken.mov").write_text("no film")
    (folder / "notes.txt").write_text("not a film, and not taken for one")
    result = preprocess(folder, "--home", home, "--jobs", "2", "--json")
    assert result.exit_code == 1 and "1 of 2 videos" in result.stderr
    answer = json.loads(result.stdout)
    assert [Path(p).name for p in answer["paths"]] == ["one-person"]
    good = next(v for v in answer["videos"] if v["error"] is None)
    bad = next(v for v in answer["videos"] if v["error"] is not None)
    assert good["id"] == "one-person" and good["n_frames"] > 100
    assert Path(bad["video"]).name == "broken.mov" and "Traceback" not in result.stderr
    assert not (home / "broken" / "manifest.json").exists()
    alone, among = (
        Workspace.open(*who).load("tracks")
        for who in ((speaker_home, "speaker"), (home, "one-person"))
    )
    assert alone.keys() == among.keys()
    for name, value in alone.items():
        assert np.array_equal(value, among[name], equal_nan=value.dtype.kind == "f"), name


def test_ray_does_the_same(speaker_clip: Path, speaker_home: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'talkhead[ray]'")
    folder, home = tmp_path / "films", tmp_path / "home"
    folder.mkdir()
    shutil.copyfile(speaker_clip, folder / "one.mp4")
    (folder / "broken.mov").write_bytes(b"no film")
    result = preprocess(folder, "--home", home, "--engine", "ray", "--json")
    assert result.exit_code == 1 and "1 of 2 videos" in result.stderr, result.stderr
    outcomes = {Path(v["video"]).name: v for v in json.loads(result.stdout)["videos"]}
    assert outcomes["one.mp4"]["error"] is None and outcomes["broken.mov"]["error"]
    alone, among = (
        Workspace.open(*who).load("tracks") for who in ((speaker_home, "speaker"), (home, "one"))
    )
    assert np.array_equal(alone["pose"], among["pose"])


def test_without_ray_its_engine_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "ray", None)
    refused = preprocess(tmp_path, "--home", tmp_path / "home", "--engine", "ray")
    assert refused.exit_code == 1 and "pip install 'talkhead[ray]'" in refused.stderr
    for words in (["--engine", "cloud"], ["--address", "host:6379"]):
        refused = preprocess(tmp_path, "--home", tmp_path / "home", *words)
        assert refused.exit_code == 2 and "--engine" in refused.stderr


def test_videos_come_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b.MP4", "a.mkv", "c.txt", "._b.MP4", ".part-1.mp4"):
        (tmp_path / name).touch()
    first = tmp_path / "b.MP4"
    assert job.videos_of([first, tmp_path]) == [first, tmp_path / "a.mkv"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(TalkheadError, match="no video in the folder"):
        job.videos_of([tmp_path / "empty"])


def test_two_videos_of_one_id_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "alice.mp4").touch()
    with pytest.raises(MisuseError, match="one id: .*alice.mp4.*alice.mp4"):
        job.preprocess_many(
            job.videos_of([tmp_path / "x", tmp_path / "y"]), tmp_path / "home", SilentProgress()
        )
    assert not (tmp_path / "home").exists()
    for words in (["--id", "bob"], ["--jobs", "-1"]):
        refused = preprocess(tmp_path / "x", tmp_path / "y", "--home", tmp_path / "home", *words)
        assert refused.exit_code == 2 and refused.stdout == ""


def test_a_name_that_is_taken_stops_no_other_video(speaker_clip: Path, tmp_path: Path) -> None:
    Workspace(tmp_path / "home", "a").note(
        finished=True, source={"name": "a.mp4", "sha256": "0" * 64}
    )
    videos = [Path(shutil.copy(speaker_clip, tmp_path / "a.mp4")), tmp_path / "b.mp4"]
    found = job.preprocess_many(videos, tmp_path / "home", SilentProgress(), jobs=1)
    assert "another 'a' already" in (found[0].error or "")
    assert "b.mp4 is not there" in (found[1].error or "")


def die(video: Path, home: Path, options: dict[str, Any]) -> job.Outcome:
    """A worker that is killed."""
    if video.stem == "b":
        os._exit(9)
    return job.Outcome(str(video), video.stem, n_frames=100)


def test_a_worker_that_is_killed_takes_nobody_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "preprocess_one", die)
    videos = [tmp_path / f"{name}.mp4" for name in "abcdef"]
    progress = SilentProgress()
    found = job.preprocess_many(videos, tmp_path, progress, jobs=2)
    assert [Path(o.video).stem for o in found] == list("abcdef")
    assert [Path(o.video).stem for o in found if o.error] == ["b"]
    assert "its process was killed, probably for memory" in (found[1].error or "")
    assert any("go one at a time" in note for note in progress.notes)


def err(
    video: Path, home: Path, options: dict[str, Any], one: Any = job.preprocess_one
) -> job.Outcome:
    """A worker in which preprocess has a fault."""
    with mock.patch("talkhead_cli.jobs.preprocess.preprocess", side_effect=ZeroDivisionError):
        outcome: job.Outcome = one(video, home, options)
    outcome.notes = [str(os.getpid())]
    return outcome


def test_a_fault_of_ours_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time, too, each has a process of its own."""
    monkeypatch.setattr(job, "preprocess_one", err)
    videos = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    found = job.preprocess_many(videos, tmp_path / "home", SilentProgress(), jobs=1)
    assert [o.id for o in found] == ["a", "b"]
    assert all("ZeroDivisionError" in (o.error or "") for o in found)
    assert len({o.notes[0] for o in found} | {str(os.getpid())}) == 3


def test_an_interruption_ends_it_at_once(speaker_clip: Path, tmp_path: Path) -> None:
    """Those that are being tracked go down with it, and nobody waits for them."""
    for name in "abc":
        shutil.copy(speaker_clip, tmp_path / f"{name}.mp4")
    words = [
        sys.executable,
        "-c",
        "from talkhead_cli.cli.app import main; main()",
        "preprocess",
        str(tmp_path),
        "--jobs",
        "2",
    ]
    job = subprocess.Popen(
        [*words, "--home", str(tmp_path / "home")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "home").glob("*/.lock")) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.terminate()  # SIGINT would be ignored where the tests run in the background of a shell
    _, told = job.communicate(timeout=20)
    assert job.returncode == 143 and "terminated" in told and "Traceback" not in told
