"""Is a film worth training on: what `talkhead check` says of films that are spoilt on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from talkhead_cli import media
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import SilentProgress, TalkheadError
from talkhead_cli.jobs import check as job
from talkhead_cli.jobs.check import Report, _cuts, _Piece, _spread, check
from talkhead_cli.media import ffmpeg


def spoilt(clip: Path, out: Path, *filters: str) -> Path:
    words = ["-loglevel", "error", "-y", "-i", str(clip), *filters, "-crf", "12", "-preset",
             "veryfast", str(out)]  # fmt: skip
    subprocess.run([ffmpeg.executable(), *words], check=True)
    return out


def verdicts(report: Report) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in report.findings}


@pytest.fixture(scope="module")
def sound_one(speaker_clip: Path) -> Report:
    return check(speaker_clip, SilentProgress())


def test_a_sound_film_passes_but_for_its_length(sound_one: Report) -> None:
    said = verdicts(sound_one)
    assert said.pop("length") == "warn", "eight seconds"
    assert set(said.values()) == {"pass"}, said
    assert sound_one.verdict == "warn"
    assert all(f.cure for f in sound_one.findings if f.verdict in ("warn", "fail", "unknown"))


@pytest.mark.parametrize(
    ("name", "worse", "filters"),
    [
        ("sharpness", {"warn", "fail"}, ["-vf", "gblur=sigma=9"]),
        ("light", {"warn", "fail"}, ["-vf", "eq=brightness=-0.45"]),
        ("head", {"warn"}, ["-vf", "scale=160:160"]),
        ("clipping", {"warn", "fail"}, ["-af", "volume=40dB", "-c:a", "pcm_s16le"]),
        ("sound", {"warn", "fail"}, ["-af", "volume=-40dB"]),
        ("background", {"warn", "fail"},
         ["-vf", "crop=iw-120:ih-120:60+55*sin(n/5):60+55*cos(n/7)"]),
    ],
)  # fmt: skip
def test_what_is_spoilt_is_named(
    speaker_clip: Path, sound_one: Report, tmp_path: Path, name: str, worse: set[str],
    filters: list[str],
) -> None:  # fmt: skip
    film = spoilt(speaker_clip, tmp_path / "spoilt.mov", *filters)
    said = verdicts(check(film, SilentProgress()))
    assert said[name] in worse and verdicts(sound_one)[name] == "pass"


def test_a_film_without_sound_fails(speaker_clip: Path, tmp_path: Path) -> None:
    silent = spoilt(speaker_clip, tmp_path / "silent.mp4", "-an")
    assert verdicts(check(silent, SilentProgress()))["sound"] == "fail"


def test_sound_that_is_late_is_named(speaker_clip: Path, tmp_path: Path) -> None:
    late = spoilt(speaker_clip, tmp_path / "late.mp4", "-af", "adelay=240:all=1")
    report = check(late, SilentProgress())
    assert verdicts(report)["lip sync"] == "warn"
    assert report.figures["sound_after_lips_s"] == pytest.approx(0.24, abs=0.06)


def test_sound_that_goes_on_after_the_picture_does_no_harm(
    speaker_clip: Path, tmp_path: Path
) -> None:
    longer = spoilt(speaker_clip, tmp_path / "longer.mp4", "-af", "apad=pad_dur=4")
    report = check(longer, SilentProgress())
    assert verdicts(report)["picture"] == "warn" and verdicts(report)["face"] == "pass"


def test_native_libraries_are_not_heard(speaker_clip: Path, tmp_path: Path) -> None:
    film = spoilt(speaker_clip, tmp_path / "short.mp4", "-t", "4")
    words = [sys.executable, "-m", "talkhead_cli.cli.app", "check", str(film)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(": " in line and "W0000" not in line for line in done.stderr.splitlines())
    assert "looking for faces" in done.stderr and "TensorFlow" not in done.stderr


def test_a_film_of_nobody_fails_at_once(tmp_path: Path) -> None:
    film = tmp_path / "wall.mp4"
    with media.VideoWriter(film, (128, 128)) as out:
        for _ in range(100):
            out.write(np.full((128, 128, 3), 120, np.uint8))
    report = check(film, SilentProgress())
    assert report.verdict == "fail" and verdicts(report)["face"] == "fail"
    assert "sharpness" not in verdicts(report)


def test_cuts_are_found_where_they_are() -> None:
    rng = np.random.default_rng(0)
    scenes = [rng.uniform(0, 255, (36, 64, 3)) for _ in range(3)]
    frames = [scenes[0]] * 20 + [scenes[1]] * 11 + [scenes[2]] * 5
    thumbs = np.stack(frames) + rng.normal(0, 2, (36, 36, 64, 3))
    empty = np.zeros((36, 0, 3))
    every = np.ones(36, bool)
    piece = _Piece(0, empty, every, np.zeros(36), np.zeros((36, 2)), thumbs)
    assert _cuts(piece) == [20, 31]


def test_long_films_are_looked_at_in_pieces() -> None:
    assert _spread(9.0) == [(0, 225)]
    assert _spread(25.0) == [(0, 250), (250, 250), (500, 125)]
    pieces = _spread(3600.0)
    assert len(pieces) == job.MAX_PIECES and pieces[-1] == (3600 * 25 - 250, 250)


def test_the_command_says_it_in_words_and_in_json(speaker_clip: Path, tmp_path: Path) -> None:
    words = ["check", str(speaker_clip)]
    plain = CliRunner().invoke(app, words)
    assert plain.exit_code == 0 and "all in all" in plain.stdout
    answer = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert answer["verdict"] == "warn" and answer["figures"]["found"] == 1.0
    silent = spoilt(speaker_clip, tmp_path / "silent.mp4", "-an")
    assert CliRunner().invoke(app, ["check", str(silent)]).exit_code == 1
    text = tmp_path / "text.mp4"
    text.write_text("no film")
    refused = CliRunner().invoke(app, ["check", str(text)])
    assert refused.exit_code == 1 and refused.stderr.startswith("error:")


def test_what_is_no_film_raises(tmp_path: Path) -> None:
    wav = tmp_path / "sound.wav"
    media.write_wav(wav, np.zeros(16_000, np.float32))
    with pytest.raises(TalkheadError, match="no picture"):
        check(wav, SilentProgress())
