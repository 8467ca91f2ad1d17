"""Is a film worth training on: what `talkhead check` says of films that are spoilt on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from talkhead_cli import media
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs.check import Report, check, page, refuse_page
from talkhead_cli.jobs.check.judge import _best_part, _cuts, _segments
from talkhead_cli.jobs.check.look import MAX_PIECES, Piece, spread
from talkhead_cli.jobs.check.report import Curve, Finding, Segment
from talkhead_cli.media import ffmpeg
from talkhead_cli.track.face import CHIN, LOWER_LIP, TOP


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
        ("dead sound", {"warn"}, ["-af", "volume=enable='gt(t,4)':volume=0"]),
        (
            "background",
            {"warn", "fail"},
            ["-vf", "crop=iw-120:ih-120:60+55*sin(n/5):60+55*cos(n/7)"],
        ),
    ],
)
def test_what_is_spoilt_is_named(
    speaker_clip: Path,
    sound_one: Report,
    tmp_path: Path,
    name: str,
    worse: set[str],
    filters: list[str],
) -> None:
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
    assert "TensorFlow" not in done.stderr


def test_what_we_say_is_heard_while_native_libraries_are_not() -> None:
    script = (
        "import os; from talkhead_cli.cli.console import speaking\n"
        "with speaking(verbose=False) as progress:\n"
        "    os.write(2, b'W0000 native'); progress.note('ours')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "note: ours\n"


def test_sigterm_ends_a_job_as_ctrl_c_does(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from talkhead_cli.cli.console import speaking\n"
        "from talkhead_cli.store.files import atomic\n"
        "with speaking(verbose=False), atomic(Path(sys.argv[1])) as part:\n"
        "    part.write_text('half'); os.kill(os.getpid(), signal.SIGTERM)"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "whole.txt")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 143 and done.stderr.startswith("error: terminated; run the same")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_stderr_does_no_harm() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m talkhead_cli.cli.app presets 2>&-"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "lokitalk" in done.stdout


def test_a_film_of_nobody_fails_at_once(tmp_path: Path) -> None:
    film = tmp_path / "wall.mp4"
    with media.VideoWriter(film, (128, 128)) as out:
        for _ in range(100):
            out.write(np.full((128, 128, 3), 120, np.uint8))
    report = check(film, SilentProgress())
    assert report.verdict == "fail" and verdicts(report)["face"] == "fail"
    assert "sharpness" not in verdicts(report)


def test_a_film_that_was_cut_short_says_so(speaker_clip: Path, tmp_path: Path) -> None:
    film = spoilt(speaker_clip, tmp_path / "whole.mp4", "-movflags", "+faststart")
    data = film.read_bytes()
    film.write_bytes(data[: int(0.6 * len(data))])
    told = {f.name: f for f in check(film, SilentProgress()).findings}
    assert told["picture"].verdict == "warn" and "none from" in told["picture"].found


def test_cuts_are_found_where_they_are() -> None:
    rng = np.random.default_rng(0)
    scenes = [rng.uniform(0, 255, (36, 64, 3)) for _ in range(3)]
    frames = [scenes[0]] * 20 + [scenes[1]] * 11 + [scenes[2]] * 5
    thumbs = np.stack(frames) + rng.normal(0, 2, (36, 36, 64, 3))
    assert _cuts(piece_of(36, thumbs=thumbs)) == [20, 31]


def piece_of(n: int, **parts: Any) -> Piece:
    """n frames of a face that does not move, in a grey picture."""
    whole: dict[str, Any] = {
        "first": 0,
        "mesh": np.zeros((n, 478, 3)),
        "found": np.ones(n, bool),
        "angles": np.zeros((n, 3)),
        "sharpness": np.full(n, 0.2),
        "light": np.full((n, 2), 100.0),
        "thumbs": np.zeros((n, 36, 64, 3)),
        "shown": np.zeros((18, 32, 3), np.uint8),
    }
    whole["mesh"][:, TOP, 1], whole["mesh"][:, CHIN, 1] = -50, 50
    return Piece(**{**whole, **parts})


def talking(n: int, first: int, opening: float, turn: float) -> Piece:
    mesh = piece_of(n).mesh
    wave = np.sin(np.arange(n))
    mesh[:, LOWER_LIP, 1] = 100 * opening * (1 + wave)
    angles = np.zeros((n, 3))
    angles[:, 0] = turn * wave
    return piece_of(n, first=first, mesh=mesh, angles=angles)


def test_the_part_that_shows_most_comes_first() -> None:
    still, lively = talking(250, 0, 0.01, 1), talking(250, 250, 0.05, 8)
    assert [s.start_s for s in _segments([still, lively], None)] == [10, 0]
    lost = talking(250, 500, 0.05, 8)
    lost.found[:200] = False
    ranked = _segments([still, lively, lost], None)
    assert ranked[0].start_s == 10 and ranked[0].score > 0.9
    assert all(0 <= s.score <= 1 for s in ranked)


def test_of_a_long_film_a_minute_is_named_that_lies_in_it() -> None:
    for start, expected, length in (
        (0.0, 0.0, 300.0),
        (100.0, 75.0, 300.0),
        (290.0, 240.0, 300.0),
        (120.0, 65.0, 125.6),
    ):
        report = Report(segments=[Segment(start, start + 10, 0.05, 1.0, 8.0, 1.0, 1.0)])
        _best_part(report, length)
        assert report.figures["best_from_s"] == expected
        assert report.figures["best_to_s"] <= length
        assert f"--from {expected:.0f} --to {expected + 60:.0f}" in report.findings[0].cure
    short = Report(segments=[Segment(0, 10, 0.05, 1.0, 8.0, 1.0, 1.0)])
    _best_part(short, 60.0)
    assert not short.findings


def test_long_films_are_looked_at_in_pieces() -> None:
    assert spread(9.0) == [(0, 225)]
    assert spread(25.0) == [(0, 250), (250, 250), (500, 125)]
    pieces = spread(3600.0)
    assert len(pieces) == MAX_PIECES and pieces[-1] == (3600 * 25 - 250, 250)


class Balance(HTMLParser):
    """Which elements are open; closing another than the last is an error."""

    EMPTY = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """<polyline/> opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_replaces_no_file_but_a_page(tmp_path: Path) -> None:
    """Above all not the film."""
    film, old = tmp_path / "film.mp4", tmp_path / "old.html"
    film.write_bytes(b"precious")
    old.write_text(page(Report(), "f"))
    refuse_page(old)
    refuse_page(tmp_path / "new.html")
    for path, why in (
        (film, "no page of talkhead"),
        (tmp_path, "must name a file"),
        (tmp_path / "no" / "a.html", "must name a file"),
    ):
        with pytest.raises(MisuseError, match=why):
            refuse_page(path)


def test_the_page_needs_nothing_beside_it(sound_one: Report) -> None:
    text = page(sound_one, "<b>evil & film</b>.mp4")
    seen = Balance()
    seen.feed(text)
    assert not seen.open and "<b>" not in text
    assert seen.links and all(link.startswith("data:image/jpeg;base64,") for link in seen.links)
    assert text.count("<svg") == len(sound_one.curves) == 6
    assert all(f.name in text for f in sound_one.findings)


def test_a_curve_breaks_where_nothing_was_seen() -> None:
    values = np.sin(np.arange(100) / 5)
    values[40:50] = np.nan
    seconds = np.arange(100) / 25
    seconds[70:] += 60
    curve = Curve("c", "u", seconds, values, (0.5, 9))
    text = page(Report([Finding("x", "pass", "y")], curves=[curve]), "f")
    assert text.count('stroke="#2a5db0"') == 3, "two breaks"
    assert text.count("stroke-dasharray") == 1, "a limit far away is not drawn"
    hour = np.arange(0, 3600, 1.8)
    long = page(Report(curves=[Curve("c", "u", hour, np.sin(hour))]), "f")
    assert long.count('stroke="#2a5db0"') == 1, "sparse, but whole"
    nothing = page(Report(curves=[Curve("c", "u", seconds, values * np.nan)]), "f")
    assert "nothing seen" in nothing


def test_the_command_says_it_in_words_and_in_json(speaker_clip: Path, tmp_path: Path) -> None:
    words = ["check", str(speaker_clip)]
    plain = CliRunner().invoke(app, words)
    assert plain.exit_code == 0 and "all in all" in plain.stdout
    answer = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert answer["verdict"] == "warn" and answer["figures"]["found"] == 1.0
    out = tmp_path / "report.html"
    assert CliRunner().invoke(app, [*words, "--page", str(out)]).exit_code == 0
    assert out.read_text().startswith("<!doctype html>")
    for wrong in (tmp_path, tmp_path / "nowhere" / "r.html", out / "r.html"):
        refused = CliRunner().invoke(app, [*words, "--page", str(wrong)])
        assert refused.exit_code == 2 and "--page" in refused.stderr
    silent = spoilt(speaker_clip, tmp_path / "silent.mp4", "-an")
    assert CliRunner().invoke(app, ["check", str(silent)]).exit_code == 1
    text = tmp_path / "text.mp4"
    text.write_text("no film")
    refused = CliRunner().invoke(app, ["check", str(text)])
    assert refused.exit_code == 1 and refused.stderr.startswith("error:")


def test_several_films_are_looked_at_past_the_bad_ones(speaker_clip: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no film")
    words = ["check", str(speaker_clip), str(tmp_path)]
    plain = CliRunner().invoke(app, words)
    lines = plain.stdout.splitlines()
    assert plain.exit_code == 1 and lines[0] == "warn    speaker.mp4"
    assert lines[-1].startswith("fail    text.mp4  ") and "not a media file" in lines[-1]
    assert len(lines) > 2 and not any(line.startswith("    pass") for line in lines[1:-1])
    first, second = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["films"]
    assert first["verdict"] == "warn" and first["figures"]["found"] == 1.0
    assert second["verdict"] == "fail" and second["film"].endswith("text.mp4")
    alone = CliRunner().invoke(app, ["check", str(tmp_path), "--json"])
    assert alone.exit_code == 1 and len(json.loads(alone.stdout)["films"]) == 1, "a folder of one"
    page = CliRunner().invoke(app, [*words, "--page", str(tmp_path / "r.html")])
    assert page.exit_code == 2 and "--page is of one video" in page.stderr


def test_what_is_no_film_raises(tmp_path: Path) -> None:
    wav = tmp_path / "sound.wav"
    media.write_wav(wav, np.zeros(16_000, np.float32))
    with pytest.raises(TalkheadError, match="no picture"):
        check(wav, SilentProgress())


def test_a_small_face_in_a_large_picture_is_found(speaker_clip: Path, tmp_path: Path) -> None:
    """Of a whole picture, the mesh sees only faces that are a tenth of it or more."""
    far = "scale=360:-2,pad=1920:1080:1200:500:gray"
    report = check(spoilt(speaker_clip, tmp_path / "far.mp4", "-vf", far), SilentProgress())
    assert verdicts(report)["face"] == "pass" and verdicts(report)["head"] != "pass"


def test_sound_that_cannot_be_read_is_a_finding(speaker_clip: Path, tmp_path: Path) -> None:
    clip = spoilt(speaker_clip, tmp_path / "damaged.mkv", "-c:v", "copy", "-c:a", "flac")
    data = bytearray(clip.read_bytes())
    at = data.find(b"fLaC")
    assert at > 0
    data[at + 8 : at + 42] = bytes(34)  # what a reader must know of the sound
    clip.write_bytes(data)
    report = check(clip, SilentProgress())
    assert verdicts(report)["sound"] == "fail"
    (found,) = (f for f in report.findings if f.name == "sound")
    assert "cannot be read" in found.found
