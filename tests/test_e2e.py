"""The main job through the real command line, end to end, on the synthetic speaker."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import n_frames_in
from typer.testing import CliRunner, Result

from talkhead_cli import media
from talkhead_cli.avatars import METHODS, avatar_class
from talkhead_cli.blocks.mouth import SHUT
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import (
    LOWER_LIP,
    SAMPLE_RATE_HZ,
    UPPER_LIP,
    Signals,
    SilentProgress,
    TalkheadError,
    unpacked,
)
from talkhead_cli.jobs import landmark_track, maps, script
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs import render as render_job
from talkhead_cli.jobs.drive import MotionOptions
from talkhead_cli.jobs.import_avatar import import_avatar
from talkhead_cli.jobs.player import Player
from talkhead_cli.media.ffmpeg import executable
from talkhead_cli.store import Run, Workspace

# Every method, none left out: a preset of its name over tiny.yaml, in seconds.
SMALL = ["data.size_px=64", "march.resolution=32", "march.n_steps=32"]
STEPS = {
    "speech": 150, "speech_all": 20, "shape": 150, "detail": 150, "torso": 40, "still": 100,
    "speak": 150, "upscale": 30, "pairs": 120, "finish": 20, "refine": 10, "sync": 3,
}  # fmt: skip


def quick(method: str) -> list[str]:
    """Options that train a method's own stages in seconds."""
    settings = list(SMALL)
    for name, stage in presets.load([method, "tiny"]).train.stages.items():
        settings.append(f"train.stages.{name}.steps={STEPS.get(name, 5)}")
        if stage.rays != "none":
            settings.append(f"train.stages.{name}.n_points=8000")
    return [word for setting in settings for word in ("-s", setting)]


def talkhead(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def ok(*words: str | Path) -> list[Path]:
    result = talkhead(*words)
    assert result.exit_code == 0, result.stderr
    return [Path(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def home(speaker_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the speaker trained by every method."""
    folder = tmp_path_factory.mktemp("e2e") / "home"
    shutil.copytree(speaker_home, folder)
    shutil.copytree(folder / "speaker", folder / "twin")
    for method in METHODS:
        ok("finetune", "--id", "speaker", "-p", method, "-p", "tiny", *quick(method),
           *prior_of(method, folder), "--home", folder)  # fmt: skip
    return folder


def prior_of(method: str, home: Path) -> list[str]:
    """For a method that draws whom it never met: a prior of two people, and the option for it."""
    if not avatar_class(method).needs_portrait:
        return []
    settings = [*SMALL, "pretrain.stages.pairs.n_points=8000"]
    stages = presets.load([method, "tiny"]).pretrain
    assert stages is not None
    for name in stages.stages:
        settings.append(f"pretrain.stages.{name}.steps={STEPS.get(name, 5)}")
    ok("pretrain", "--ids", "speaker,twin", "-p", method, "-p", "tiny", "-o", "strangers",
       *(word for setting in settings for word in ("-s", setting)), "--home", home)  # fmt: skip
    return ["--prior", "strangers", "--run", f"{method}+tiny"]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import formant_voice

    path = tmp_path_factory.mktemp("speech") / "new speech ü.wav"
    media.write_wav(path, formant_voice.speak(2.0, seed=7).sound)
    return path


def frames_of(film: Path) -> np.ndarray:
    return np.stack(list(media.frames(film)))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_run_holds_what_a_run_holds(home: Path, method: str) -> None:
    run = home / "speaker" / "runs" / f"{method}+tiny"
    assert {p.name for p in run.iterdir()} >= {
        "preset.yaml",
        "avatar.safetensors",
        "meta.json",
        "drive.npz",
        "plate.png",
    }
    assert not list(run.glob(".part-*"))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_film_has_the_speech_s_length_its_sound_and_its_marks(
    home: Path, speech: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "film.mp4"
    made = ok(
        "render", "--id", "speaker", "--run", f"{method}+tiny", "--audio", speech, "-o", out,
        "--home", home,
    )  # fmt: skip
    assert made[0] == out and n_frames_in(out) == 50
    probe = media.probe(out)
    assert (probe.width, probe.height, probe.has_audio) == (64, 64, True)
    heard, said = media.sound(out), media.sound(speech)
    n = min(len(heard), len(said))
    assert abs(len(heard) - len(said)) <= 640
    assert np.corrcoef(heard[:n], said[:n])[0, 1] > 0.9
    record = json.loads(out.with_name("film.mp4.json").read_text())
    assert record["synthetic"] is True
    assert record["talkhead_avatar"] == f"speaker/{method}+tiny"
    assert len(record["speech_sha256"]) == 64
    assert b"synthetic" in out.read_bytes()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_face_is_set_into_the_film_it_came_from(
    home: Path, speech: Path, speaker_clip: Path, tmp_path: Path, method: str
) -> None:
    """At the film's size, with the film's own pixels all round."""
    out = tmp_path / "film.mp4"
    words = ["render", "--id", "speaker", "--run", f"{method}+tiny", "--audio", speech, "-o", out,
             "--into", speaker_clip, "--home", home]  # fmt: skip
    ok(*words)
    set_in, film = frames_of(out), frames_of(speaker_clip)
    assert set_in.shape == (50, *film.shape[1:])
    off = np.abs(set_in.astype(float) - film[:50]).mean(-1)
    mouth = Workspace(home, "speaker").load("tracks")["mesh_fractions"][:50, [13, 14]].mean(1) * 512
    for index in (0, 30, 49):
        x, y = mouth[index].astype(int)
        assert off[index, :200].mean() < 2, "nothing but the codec"
        assert off[index, y - 20 : y + 20, x - 30 : x + 30].mean() > 3
    record = json.loads(out.with_name("film.mp4.json").read_text())
    assert record["film_px"] == [512, 512] and record["size_px"] == 64


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_frame_does_not_depend_on_what_was_rendered_before(
    home: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    drawn: list[list[np.ndarray]] = []
    write = media.VideoWriter.write

    def kept(self: media.VideoWriter, rgb: np.ndarray) -> None:
        drawn[-1].append(rgb.copy())  # as it is drawn: a codec makes much of a pixel's last bit
        write(self, rgb)

    monkeypatch.setattr(media.VideoWriter, "write", kept)
    for chunk in (50, 7):
        monkeypatch.setattr(script, "CHUNK", chunk)
        drawn.append([])
        ok("render", "--id", "speaker", "--run", f"{method}+tiny", "--audio", speech,
           "-o", tmp_path / f"by{chunk}.mp4", "--home", home)  # fmt: skip
    one, other = (np.stack(frames).astype(int) for frames in drawn)
    assert one.shape == other.shape == (50, 64, 64, 3)
    # sums in another order may round another way
    assert np.abs(one - other).max() <= 1 and (one != other).mean() < 1e-3


def test_a_film_names_consent_that_came_after_training(
    home: Path, speech: Path, tmp_path: Path
) -> None:
    (tmp_path / "yes.txt").write_text("I agree")
    space = Workspace.open(home, "speaker")
    kept = space.keep_consent(tmp_path / "yes.txt")
    try:
        film = tmp_path / "a.mp4"
        words = ["--run", "lokitalk+tiny", "--audio", speech, "-o", film, "--home", home]
        ok("render", "--id", "speaker", *words)
    finally:
        (space.root / "consent" / kept).unlink()
    record = json.loads(film.with_name("a.mp4.json").read_text())
    assert record["consent"] == [kept] and record["talkhead_consent"] == kept
    assert record["run_meta"]["steps"] and len(record["speech_sha256"]) == 64


@pytest.mark.parametrize("method", sorted(METHODS))
def test_mouths_are_shut_where_a_file_is_silent(home: Path, tmp_path: Path, method: str) -> None:
    import formant_voice

    sound = np.pad(formant_voice.speak(1.0, seed=7).sound, (0, 2 * SAMPLE_RATE_HZ))
    media.write_wav(tmp_path / "ends.wav", sound)
    words = ["--audio", tmp_path / "ends.wav", "-o", tmp_path / "ends.npz", "--no-picture"]
    ok("landmarks", "--id", "speaker", "--run", f"{method}+tiny", *words, "--home", home)
    track = landmark_track.read(tmp_path / "ends.npz")
    gap = track.landmarks[:, LOWER_LIP, 1] - track.landmarks[:, UPPER_LIP, 1]
    usual = track.neutral[LOWER_LIP, 1] - track.neutral[UPPER_LIP, 1]
    assert gap[:25].max() > gap[40:].max(), (gap[:25].max(), gap[40:].max())
    assert np.median(gap[40:]) < max(usual, SHUT + 1e-4)
    assert np.abs(np.diff(gap)).max() < 0.05, "eased"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_speech_said_can_be_seen_edited_and_drawn(
    home: Path, speech: Path, tmp_path: Path, method: str
) -> None:
    common = ["--id", "speaker", "--run", f"{method}+tiny", "--audio", speech, "--home", home]
    track, shut = tmp_path / "track.npz", tmp_path / "shut.npz"
    made = ok("landmarks", *common, "-o", track)
    assert made == [track, track.with_suffix(".png")] and made[1].stat().st_size > 10_000
    assert ok("landmarks", *common, "-o", shut, "--lips", "0", "--jaw", "0", "--no-picture") == [
        shut
    ]
    said, closed = landmark_track.read(track), landmark_track.read(shut)
    assert said.landmarks.shape == (50, 68, 3)
    assert np.abs(closed.landmarks[:, 48:68] - closed.neutral[48:68]).max() < 1e-6
    films = {}
    for name, words in {
        "plain": [],
        "said": ["--landmarks", track],
        "shut": ["--landmarks", shut],
    }.items():
        ok("render", *common, "-o", tmp_path / f"{name}.mp4", *words)
        films[name] = frames_of(tmp_path / f"{name}.mp4").astype(int)
    assert np.abs(films["plain"] - films["said"]).max() <= 2, "an unedited track changes nothing"
    assert np.abs(films["plain"] - films["shut"]).max() > 10
    blinks = talkhead("render", *common, "-o", tmp_path / "b.mp4", "--landmarks", track, "--blink",
                      "auto")  # fmt: skip
    assert ("--blink moves nothing" in blinks.stderr) == (method == "landmark"), blinks.stderr
    short = landmark_track.LandmarkTrack(said.landmarks[:9], said.neutral)
    landmark_track.write(track, short)
    refused = talkhead("render", *common, "-o", tmp_path / "no.mp4", "--landmarks", track)
    assert refused.exit_code == 1 and "9 rows" in refused.stderr
    assert not (tmp_path / "no.mp4").exists()
    assert talkhead("landmarks", *common, "-o", tmp_path / "t.csv").exit_code == 2
    assert talkhead("landmarks", *common, "-o", shut, "--lips", "-1").exit_code == 2


def test_runs_stand_side_by_side(home: Path) -> None:
    wanted = ",".join(sorted(METHODS))
    result = talkhead("evaluate", "--id", "speaker", "--compare", wanted, "--home", home, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    table, film = (Path(p) for p in answer["paths"])
    runs = [f"{m}+tiny" for m in sorted(METHODS)]
    rows = json.loads(table.read_text())["table"]
    assert all(list(values) == runs for values in rows.values())
    for run in runs:
        alone = json.loads((home / "speaker/runs" / run / "evaluate/metrics.json").read_text())
        assert rows["PSNR, full (dB)"][run] == alone["picture"]["full"]["psnr_db"]
        assert (alone["pasted"] is None) == (not run.startswith("landmark"))
    frames = frames_of(film).astype(int)
    strip = maps.STRIP_PX
    assert frames.shape[1:] == (64 + strip, 64 * (1 + len(runs)), 3)
    assert all((name > 60).any() for name in np.split(frames[0, :strip], 1 + len(runs), 1))
    frames = frames[:, strip:]
    assert len(frames) == answer["figures"]["protocol"]["n_frames"]
    assert media.probe(film).has_audio
    scored = {run: home / "speaker/runs" / run / "evaluate" for run in runs}
    columns = [scored[runs[0]] / "truth.mp4", *(scored[run] / "render.mp4" for run in runs)]
    own = [frames_of(path).astype(int) for path in columns]
    for index, shown in enumerate(np.split(frames, len(own), 2)):
        apart = [np.abs(shown - other).mean() for other in own]
        assert int(np.argmin(apart)) == index and apart[index] < 3
    # what was scored is not scored again, unless its films are gone or an older version scored it
    stamps = {run: (at / "metrics.json").stat().st_mtime_ns for run, at in scored.items()}
    (scored[runs[0]] / "render.mp4").unlink()
    older = json.loads((scored[runs[1]] / "metrics.json").read_text())
    del older["jitter_px_at_512"]
    (scored[runs[1]] / "metrics.json").write_text(json.dumps(older))
    ok("evaluate", "--id", "speaker", "--compare", wanted, "--home", home)
    again = {run: (at / "metrics.json").stat().st_mtime_ns for run, at in scored.items()}
    assert [run for run in runs if again[run] != stamps[run]] == runs[:2]
    assert "jitter_px_at_512" in json.loads((scored[runs[1]] / "metrics.json").read_text())
    for words in ("lokitalk", "lokitalk,lokitalk+tiny"):
        refused = talkhead("evaluate", "--id", "speaker", "--compare", words, "--home", home)
        assert refused.exit_code == 2 and "two different runs" in refused.stderr
    refused = talkhead("evaluate", "--id", "speaker", "--compare", "lokitalk,nerf", "--home", home)
    assert refused.exit_code == 1 and "no finished run 'nerf'" in refused.stderr


@pytest.mark.parametrize("method", sorted(METHODS))
def test_maps_show_what_a_method_does_where(home: Path, method: str) -> None:
    run = f"{method}+tiny"
    made = ok("evaluate", "--id", "speaker", "--run", run, "--maps", "--home", home)
    assert made[-1] == home / "speaker/runs" / run / "evaluate/maps.png"
    sheet = cv2.imread(str(made[-1]))
    named = sum(len(channels) for channels in avatar_class(method).maps.values())
    assert sheet.shape == ((3 + named) * maps.CELL_PX, maps.MARGIN_PX + 6 * maps.CELL_PX, 3)
    refused = talkhead("evaluate", "--id", "speaker", "--compare", "a,b", "--maps", "--home", home)
    assert refused.exit_code == 2 and "--maps" in refused.stderr


@pytest.mark.parametrize("method", ["lokitalk", "talk3d"])
def test_what_the_options_change(
    home: Path, speech: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{method}+tiny"
    base = ["render", "--id", "speaker", "--run", run, "--audio", speech, "--home", home]
    opened, honest = [], Player.open_views

    def spied(player: Player, signals: Signals) -> None:
        opened.append(len(signals))
        honest(player, signals)

    monkeypatch.setattr(Player, "open_views", spied)

    def film(name: str, *words: str) -> np.ndarray:
        ok(*base, "-o", tmp_path / name, *words)
        return frames_of(tmp_path / name).astype(int)

    plain = film("plain.mp4")
    green = film("green.mp4", "--background", "#00ff00")
    corner = green[:, :6, :6].reshape(-1, 3).mean(0)
    assert corner[1] > 180 > 80 > corner[0]
    middle = (slice(None), slice(24, 36), slice(26, 38))
    assert np.abs(green[middle] - plain[middle]).mean() < 12
    assert not opened, "views of the footage are known"
    turned = film("turned.mp4", "--yaw", "15")
    assert opened.pop() > 1
    assert np.abs(turned - plain).mean() > 1.5
    raised = film("raised.mp4", "--pitch", "15")
    assert np.abs(raised - plain).mean() > 1.5 < np.abs(raised - turned).mean()
    # frame 40 of an orbit looks from 28.5 degrees, frame 0 from straight ahead
    orbit, ahead, aside = (
        film(f"{at}.mp4", *words)
        for at, words in (
            ("orbit", ["--orbit"]),
            ("0", ["--yaw", "0.001"]),
            ("28", ["--yaw", "28.5"]),
        )
    )
    near, far = (np.abs(orbit - other).mean((1, 2, 3)) for other in (ahead, aside))
    assert near[0] < 0.7 * far[0] and far[40] < 0.7 * near[40]
    still = film("still.mp4", "--pose", "still", "--blink", "none")
    upper = still[:, :24]
    assert np.abs(np.diff(upper, axis=0)).mean() < np.abs(np.diff(plain[:, :24], axis=0)).mean()
    blinks = film("auto.mp4", "--pose", "still", "--blink", "auto", "--seed", "3")
    assert np.abs(blinks - still).max() > 10
    again = film("auto2.mp4", "--pose", "still", "--blink", "auto", "--seed", "3")
    assert np.array_equal(blinks, again)


def test_the_shortest_speech_makes_one_frame(home: Path, tmp_path: Path) -> None:
    media.write_wav(tmp_path / "tick.wav", np.full(400, 0.1, np.float32))  # 25 ms
    ok("render", "--id", "speaker", "--run", "lokitalk+tiny", "--audio", tmp_path / "tick.wav",
       "-o", tmp_path / "tick.mp4", "--home", home)  # fmt: skip
    assert n_frames_in(tmp_path / "tick.mp4") == 1


def stored(film: Path, form: str, channels: int, *decoder: str) -> np.ndarray:
    """Pictures (T, H, W, C) as a film stores them, in a form that ffmpeg names."""
    words = [executable(), "-v", "error", *decoder, "-i", str(film), "-f", "rawvideo"]
    raw = subprocess.run([*words, "-pix_fmt", form, "-"], capture_output=True, check=True).stdout
    kind = "<u2" if form.endswith("16le") else "u1"
    return np.frombuffer(raw, kind).reshape(-1, 64, 64, channels)


@pytest.mark.parametrize("method", ["lokitalk", "talk3d"])
def test_transparency_and_depth(home: Path, speech: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "clear.webm"
    base = ["render", "--id", "speaker", "--run", f"{method}+tiny", "--audio", speech]
    made = ok(*base, "-o", out, "--alpha", "--depth", "--home", home)
    assert out in made and tmp_path / "clear.depth.mkv" in made
    rgba = stored(out, "rgba", 4, "-c:v", "libvpx-vp9").astype(float)
    corner, face = (
        (slice(None), slice(0, 5), slice(0, 5)),
        (slice(None), slice(26, 34), slice(28, 36)),
    )
    assert rgba[corner][..., 3].mean() < 25 and rgba[face][..., 3].mean() > 220
    # straight colours: laid over green they make the film that has a green background
    ok(*base, "-o", tmp_path / "green.mp4", "--background", "#00ff00", "--home", home)
    share = rgba[..., 3:] / 255
    assert (tmp_path / "clear.depth.mkv").exists()
    laid = share * rgba[..., :3] + (1 - share) * np.array([0, 255, 0])
    assert np.abs(laid - frames_of(tmp_path / "green.mp4")).mean() < 8
    depth = stored(tmp_path / "clear.depth.mkv", "gray16le", 1).astype(float)
    unit = json.loads(out.with_name("clear.webm.json").read_text())["depth_unit_face_heights"]
    away = depth[face] * unit  # a face is some heads away from its camera, and nothing is behind
    assert len(depth) == 50 and 1 < away.mean() < 30 and away.std() < 1
    ok(*base, "-o", tmp_path / "clear.mp4", "--home", home)
    assert (tmp_path / "clear.depth.mkv").exists(), "it is the other film's"
    ok(*base, "-o", out, "--home", home)
    assert not (tmp_path / "clear.depth.mkv").exists(), "it was of a film that is gone"
    assert np.median(depth[corner]) == 65_535
    refused = talkhead(
        "render",
        "--id",
        "speaker",
        "--audio",
        speech,
        "-o",
        tmp_path / "x.mp4",
        "--alpha",
        "--home",
        home,
    )
    assert refused.exit_code in (1, 2) and not (tmp_path / "x.mp4").exists()


def test_a_run_of_footage_that_was_replaced_says_so_and_is_not_compared(
    home: Path, speech: Path, tmp_path: Path
) -> None:
    there = Path(shutil.copytree(home, tmp_path / "home"))
    space = Workspace.open(there, "speaker")
    run = Run.named(space.runs, "lokitalk+tiny")
    run.write_meta(source={"name": "before.mp4", "sha256": "0" * 64})
    base = ("--id", "speaker", "--home", there)
    said = talkhead("render", *base, "--run", run.name, "--audio", speech, "-o", tmp_path / "f.mp4")
    assert said.exit_code == 0 and "was trained on other footage (before.mp4)" in said.stderr
    torn = Run.named(space.runs, "talk3d+tiny")
    (torn.root / "avatar.safetensors").write_bytes(b"torn")
    shutil.rmtree(torn.evaluation, ignore_errors=True)  # what was scored is not scored again
    failed = talkhead("evaluate", *base, "--compare", "lokitalk,talk3d")
    assert failed.exit_code == 1 and "leave it out of --compare" in failed.stderr
    assert "talk3d+tiny" in failed.stderr.splitlines()[-1]
    with_table = talkhead("evaluate", *base, "--compare", "lokitalk,landmark")
    assert with_table.exit_code == 0 and "PSNR, face box (dB)" in with_table.stderr


def test_evaluate_writes_figures_and_films(home: Path) -> None:
    result = talkhead("evaluate", "--id", "speaker", "--home", home, "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)["figures"]
    folder = home / "speaker" / "runs" / f"{figures['run']}" / "evaluate"
    assert {p.name for p in folder.iterdir()} >= {
        "metrics.json",
        "truth.mp4",
        "render.mp4",
        "side_by_side.mp4",
    }
    truth, made = frames_of(folder / "truth.mp4"), frames_of(folder / "render.mp4")
    assert truth.shape == made.shape and len(truth) == figures["protocol"]["n_frames"]
    # the figure must be that of the films it stands beside
    error = ((truth.astype(float) - made) / 255) ** 2
    psnr = float(np.mean(-10 * np.log10(error.mean((1, 2, 3)))))
    assert psnr == pytest.approx(figures["picture"]["full"]["psnr_db"], abs=0.5)
    refused = talkhead("render", "--id", "speaker", "--audio", folder / "sound.wav",
                       "-o", folder / "side_by_side.mp4", "--home", home)  # fmt: skip
    assert refused.exit_code == 2 and "side_by_side.mp4 is there already" in refused.stderr
    assert figures["picture"]["full"]["psnr_db"] > 20
    low, high = figures["lips"]["correlation"]["interval_90"]
    assert -1 <= low <= figures["lips"]["correlation"]["r"] <= high <= 1
    assert figures["lips"]["linear_baseline"]["r"] > 0.5  # the speaker's mouth follows its sound


def test_a_run_folder_renders_without_the_footage(home: Path, speech: Path, tmp_path: Path) -> None:
    moved = tmp_path / "home"
    shutil.copytree(home, moved)
    for heavy in ("video.mp4", "tracks.npz", "mesh.npz", "film.npz", "voice.npz"):
        (moved / "speaker" / heavy).unlink()
    for folder in ("labels", "maps", "cache"):
        shutil.rmtree(moved / "speaker" / folder)
    ok("render", "--id", "speaker", "--audio", speech, "-o", tmp_path / "f.mp4", "--home", moved)


def test_errors_are_one_sentence_and_leave_nothing(
    home: Path, speech: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "no-sound.txt"
    picture.write_text("not sound")
    out, there = tmp_path / "never.mp4", tmp_path / "there.mp4"
    there.write_text("an older film")
    colour = ["--background", "#00ff00"]
    for words, code in (
        (["--id", "speaker", "--audio", tmp_path / "absent.wav", "-o", there], 1),
        (["--id", "speaker", "--audio", speech, "-o", there], 2),
        (["--id", "speaker", "--audio", speech, "--alpha", *colour], 2),
        (["--id", "speaker", "--audio", speech, "-o", there / "below.mp4"], 1),
        (["--id", "speaker", "--audio", picture], 1),
        (["--id", "speaker", "--audio", tmp_path / "absent.wav"], 1),
        (["--id", "nobody", "--audio", speech], 1),
        (["--id", "../speaker", "--audio", speech], 2),
        (["--id", "speaker", "--audio", speech, "--run", "other"], 1),
        (["--id", "speaker", "--audio", speech, "--background", "blue"], 2),
        (["--id", "speaker", "--audio", speech, "--yaw", "120"], 2),
        (["--id", "speaker", "--audio", speech, "--pose", "nowhere.csv"], 2),
    ):
        result = talkhead("render", "-o", out, *words, "--home", home)
        assert result.exit_code == code, (words, result.stderr)
        lines = [row for row in result.stderr.splitlines() if row.startswith("error:")]
        assert len(lines) == 1 and "Traceback" not in result.stderr
        assert list(tmp_path.glob("never*")) == []
    assert there.read_text() == "an older film"


def test_films_take_the_place_of_our_own_alone(home: Path, speech: Path, tmp_path: Path) -> None:
    said = ["--id", "speaker", "--run", "lokitalk+tiny", "--home", home]
    short = tmp_path / "short.wav"
    media.write_wav(short, media.read_wav(speech)[:3200])
    for _ in range(2):
        made = ok("render", *said, "--audio", short, "-o", tmp_path)
        assert made[0] == tmp_path / "speaker-short.mp4"
    made = ok("render", *said, "--audio", short, "-o", tmp_path / "plain.webm")
    assert frames_of(made[0]).shape == (5, 64, 64, 3)
    photo, track = tmp_path / "face.png", tmp_path / "face.npz"
    photo.write_bytes(b"a photo of mine")
    refused = talkhead("landmarks", *said, "--audio", short, "-o", track)
    assert refused.exit_code == 2 and "face.png is there already" in refused.stderr
    assert photo.read_bytes() == b"a photo of mine" and not track.exists()
    photo.unlink()
    for _ in range(2):
        assert ok("landmarks", *said, "--audio", short, "-o", track) == [track, photo]
    photo.write_bytes(b"a photo of mine")
    refused = talkhead("landmarks", *said, "--audio", short, "-o", track)
    assert refused.exit_code == 2 and "face.png is there already" in refused.stderr
    # a render that was killed after its film, before the record of it, can be repeated; a depth
    # film that is none of its own stays
    made[0].with_name("plain.webm.json").unlink()
    ok("render", *said, "--audio", short, "-o", made[0])
    own = ok("render", *said, "--audio", short, "-o", tmp_path / "own.mp4")[0]
    before = own.read_bytes()
    refused = talkhead("render", *said, "--audio", own, "-o", own)
    assert refused.exit_code == 2 and "overwrite the speech file" in refused.stderr
    assert own.read_bytes() == before
    depth = tmp_path / "plain.depth.mkv"
    depth.write_bytes(b"a film of mine")
    refused = talkhead("render", *said, "--audio", short, "-o", made[0], "--depth")
    assert refused.exit_code == 2 and "plain.depth.mkv is there already" in refused.stderr
    far = tmp_path / "far.csv"
    far.write_text("0,0,0,0,0,900\n")
    lost = talkhead("render", *said, "--audio", short, "--pose", far, "-o", tmp_path / "far.mp4")
    assert lost.exit_code == 0 and "nobody is seen in 5 of 5 frames" in lost.stderr
    far.write_text("0,0,0,0,0,0.4\n")
    within = talkhead("render", *said, "--audio", short, "--pose", far, "-o", tmp_path / "in.mp4")
    assert within.exit_code == 1 and "0.4 face heights from the camera" in within.stderr
    for words in (["-o", tmp_path / "x.avi"], ["--background", "green"], ["--pose", "sitting"]):
        misused = talkhead("render", *said, "--audio", short, "-o", tmp_path / "x.mp4", *words)
        assert misused.exit_code == 2 and misused.stdout == "", words


def test_homes_are_listed(home: Path, tmp_path: Path) -> None:
    (row,) = [
        json.loads(line)
        for line in talkhead("list", "--json", "--home", home).stdout.splitlines()
        if '"id": "speaker"' in line
    ]
    assert row["finished"] and row["seconds"] == pytest.approx(8.0)
    assert {"name": "lokitalk+tiny", "finished": True} in row["runs"]
    Workspace(tmp_path, "ghost").note(finished=False)
    assert talkhead("list", "--home", tmp_path).stdout == "ghost\t(unfinished)\tno runs\n"
    nobody = talkhead("list", "--home", tmp_path / "elsewhere")
    assert nobody.stdout == "" and "no identity in" in nobody.stderr


def test_a_film_is_named_by_all_of_the_speech_s_name(
    home: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(speech, tmp_path / "talk.part1.wav")
    made = ok("render", "--id", "speaker", "--audio", "talk.part1.wav", "--home", home)
    assert made[0] == Path("speaker-talk.part1.mp4")


def test_of_a_wide_background_the_middle_is_shown(tmp_path: Path) -> None:
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = (0, 0, 255)  # OpenCV's order: red
    cv2.imwrite(str(tmp_path / "wide.png"), wide)
    picture = render_job._background(str(tmp_path / "wide.png"))
    assert picture is not None
    shown = render_job._middle(picture, 8)
    assert shown.shape == (8, 8, 3) and torch.equal(shown[..., 0], torch.ones(8, 8))
    assert float(shown[..., 1:].max()) == 0
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(TalkheadError, match="no.png cannot be read as a picture"):
        render_job._background(str(tmp_path / "no.png"))


def test_frames_heard_alone_and_lids_that_an_option_or_a_track_moves(
    home: Path, speech: Path, tmp_path: Path
) -> None:
    player = Player.load(Run.named(home / "speaker" / "runs", "lokitalk+tiny"), torch.device("cpu"))
    track, *_ = ok(
        "landmarks", "--id", "speaker", "--run", "lokitalk+tiny", "--audio", speech, "--blink",
        "auto", "--seed", "3", "-o", tmp_path / "track.npz", "--home", home,
    )  # fmt: skip
    at = np.array([3, 40])
    eyes = []
    for blink in ("footage", "none"):
        moves = MotionOptions(pose="still", blink=blink, landmarks=track)
        with script.open_script(player, speech, moves, SilentProgress()) as film:
            alone, together = film.scattered(at), film.signals(np.arange(50))[torch.from_numpy(at)]
            for one, other in zip(unpacked(alone), unpacked(together), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            eyes.append(film.signals(np.arange(50)).eye)
    assert torch.equal(eyes[0], torch.from_numpy(landmark_track.read(track).eye).float())
    assert float(eyes[1].std(0).max()) == 0 < float(eyes[0].std(0).max())


def test_whole_clip_training_refuses_to_be_scored(speaker_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    shutil.copytree(speaker_home, folder)
    few = [w.replace("=150", "=2") for w in quick("lokitalk")]
    ok(
        "finetune", "--id", "speaker", "-p", "lokitalk", "-p", "tiny", *few,
        "-s", "data.holdout=0", "--home", folder,
    )  # fmt: skip
    result = talkhead("evaluate", "--id", "speaker", "--home", folder)
    assert result.exit_code == 1 and "data.holdout" in result.stderr


@pytest.fixture(scope="module")
def face(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture of the speaker, as a file."""
    path = tmp_path_factory.mktemp("face") / "my face.png"
    frame = next(iter(media.frames(home / "speaker" / "video.mp4")))
    cv2.imwrite(str(path), frame[..., ::-1])
    return path


def test_one_picture_speaks(home: Path, face: Path, speech: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "face.mp4", sorted(home.iterdir())
    made = ok("render", "--image", face, "--audio", speech, "-o", out, "--depth", "--home", home)
    assert made[0] == out and n_frames_in(out) == 50 and media.probe(out).has_audio
    assert sorted(home.iterdir()) == before, "nobody stays behind"
    record = json.loads(out.with_name("face.mp4.json").read_text())
    assert record["synthetic"] is True
    assert record["talkhead_avatar"] == "my-face/s3d+from-strangers"
    assert record["run_meta"]["source"]["name"] == "my face.png"
    frames = frames_of(out).astype(int)
    true = cv2.resize(cv2.imread(str(face))[..., ::-1], (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(frames[0] - true).mean() < 25, "it is the picture's person"
    assert np.ptp(frames, axis=0).max() > 30, "who moves"
    assert np.abs(np.diff(frames[:, :4, :4], axis=0)).max() <= 6, (
        "before a background that does not"
    )
    # of several pictures, and by presets as finetune takes them
    twice = tmp_path / "twice.mp4"
    other = tmp_path / "other.png"
    last = list(media.frames(home / "speaker" / "video.mp4"))[-30]
    cv2.imwrite(str(other), last[..., ::-1])
    ok("render", "-p", "s3d", "--image", face, "--image", other, "--audio", speech, "-o", twice,
       "--home", home)  # fmt: skip
    further = json.loads(twice.with_name("twice.mp4.json").read_text())["run_meta"]["source"]
    assert [f["name"] for f in further["further"]] == ["other.png"]
    again = tmp_path / "again.mp4"
    ok("render", "-p", "s3d", "--prior", "strangers", "--image", face, "--audio", speech, "-o",
       again, "--pose", "still", "--blink", "none", "--home", home)  # fmt: skip
    calm = frames_of(again).astype(int)
    assert np.abs(np.diff(calm, axis=0)).mean() < np.abs(np.diff(frames, axis=0)).mean()
    refused = talkhead("render", "-p", "s3d", "-p", "small", "--prior", "strangers", "--image",
                       face, "--audio", speech, "-o", out, "--home", home)  # fmt: skip
    assert refused.exit_code == 1 and "does not fit these presets" in refused.stderr


def test_a_picture_is_refused_in_one_sentence(
    home: Path, face: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "never.mp4"
    empty = tmp_path / "empty"
    with monkeypatch.context() as patch:
        patch.setattr(render_job, "enroll", lambda *_, **__: pytest.fail("enrolled first"))
        for words in (
            ["--pose", "nowhere.csv"],
            ["--background", "green"],
            ["--yaw", "90"],
            ["--alpha"],
            ["--landmarks", speech],
            ["--blink", "often"],
        ):
            result = talkhead(
                "render", "--home", home, "--image", face, "--audio", speech, "-o", out, *words
            )
            assert result.exit_code in (1, 2) and "enrolled first" not in str(result.exception)
            assert len([w for w in result.stderr.splitlines() if w.startswith("error:")]) == 1
    for words, code, why in (
        (["--image", face, "--id", "speaker"], 2, "one of them"),
        ([], 2, "one of them"),
        (["--image", tmp_path / "no.png"], 1, "there is no picture"),
        (["--image", speech], 1, "JPEG or PNG"),
        (["--image", face, "--run", "s3d+tiny"], 2, "--prior"),
        (["--image", face, "-p", "lokitalk"], 2, "learns a person from footage"),
        (["--image", face, "--prior", "nobody"], 1, "no finished prior"),
        (["--image", face, "--face", "middle"], 2, "--face must be"),
        (["--id", "speaker", "--prior", "strangers"], 2, "go with --image"),
        (["--image", face, "-p", "s3d", "-p", "tiny"], 1, "talkhead pretrain -p s3d"),
        (["--image", face, "--home", empty], 1, "talkhead pretrain -p s3d"),
    ):
        result = talkhead("render", "--home", home, *words, "--audio", speech, "-o", out)
        assert result.exit_code == code, (words, result.stderr)
        assert why in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
        assert not list(tmp_path.glob("never*"))


def test_an_expert_is_trained_and_heard(home: Path) -> None:
    ok("pretrain", "--expert", "-p", "tiny", "--ids", "speaker,twin", "-o", "ear", "--home", home,
       "-s", "pretrain.stages.match.steps=40", "-s", "data.size_px=128")  # fmt: skip
    result = talkhead(
        "evaluate", "--id", "speaker", "--run", "lokitalk+tiny", "--home", home, "--json"
    )
    assert result.exit_code == 0, result.stderr
    sync = json.loads(result.stdout)["figures"]["sync"]
    assert sync["expert"] == "ear" and sync["knew_person"] is True
    assert sync["truth"]["pairs_found"] > 0.55
    refused = talkhead("pretrain", "--expert", "-p", "s3d", "--home", home)
    assert refused.exit_code == 2 and "are two methods" in refused.stderr
    refused = talkhead("pretrain", "-p", "s3d", "-p", "tiny", "-o", "ear", "--home", home)
    assert refused.exit_code == 2 and "there already, of expert" in refused.stderr
    refused = talkhead(
        "finetune", "--id", "speaker", "-p", "s3d", "--prior", "none", "--home", home
    )
    assert refused.exit_code == 2 and "by a prior" in refused.stderr
    refused = talkhead("finetune", "--id", "speaker", "-p", "expert", "--home", home)
    assert refused.exit_code == 2 and "does not make avatars" in refused.stderr


def test_refining_bends_a_picture_s_person(home: Path) -> None:
    words = ["finetune", "--id", "twin", "-p", "s3d", "-p", "tiny", "--home", home, "--run", "bent",
             *(w for s in SMALL for w in ("-s", s))]  # fmt: skip
    assert talkhead(*words[:3], "-p", "lokitalk", "--refine", "3", "--home", home).exit_code == 2
    run = ok(*words, "--refine", "5")[0]
    meta = json.loads((run / "meta.json").read_text())
    assert meta["steps"] == 5 and meta["prior"]["knew_person"] is True


def test_a_full_disk_is_said_and_nothing_is_half_written(
    home: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise TalkheadError("the disk is full")

    monkeypatch.setattr(render_job.media.VideoWriter, "write", full)
    out = tmp_path / "film.mp4"
    result = talkhead("render", "--id", "speaker", "--audio", speech, "-o", out, "--home", home)
    assert result.exit_code == 1 and list(tmp_path.iterdir()) == []


def test_somebody_new_begins_from_others_and_speaks(
    home: Path, speech: Path, tmp_path: Path
) -> None:
    """Learnt of two, met, trained, filmed, carried to another home and filmed alike."""
    settings = [*SMALL, "pretrain.stages.speech.steps=40"]
    for name in ("shape", "detail"):
        settings += [f"pretrain.stages.{name}.{s}" for s in ("steps=20", "n_points=6000")]
    ok("pretrain", "--ids", "speaker,twin", "-p", "lokitalk", "-p", "tiny", "-o", "crowd",
       *(word for setting in settings for word in ("-s", setting)), "--home", home)  # fmt: skip
    shutil.copytree(home / "twin", tmp_path / "new" / "pat")
    shutil.copytree(home / ".priors", tmp_path / "new" / ".priors")
    own = tmp_path / "new"
    run = ok("finetune", "--id", "pat", "-p", "lokitalk", "-p", "tiny", *quick("lokitalk"),
             "-s", "train.scale=0.2", "--home", own)[0]  # fmt: skip
    assert run.name == "lokitalk+tiny+from-crowd"
    film = ok("render", "--id", "pat", "--audio", speech, "-o", tmp_path / "a.mp4", "--home", own)
    parcel = ok("export", "--id", "pat", "-o", tmp_path / "pat.talkhead", "--home", own)[0]
    ok("import", parcel, "--home", tmp_path / "other")
    again = ok("render", "--id", "pat", "--audio", speech, "-o", tmp_path / "b.mp4",
               "--home", tmp_path / "other")  # fmt: skip
    assert np.array_equal(frames_of(film[0]), frames_of(again[0]))
    for number, damage in enumerate((_undated, _without_usable_rows, _without_box)):
        hurt = tmp_path / f"hurt{number}"
        shutil.copytree(own / "pat", hurt / "pat")
        damage(hurt / "pat" / "runs" / run.name)
        parcel = ok("export", "--id", "pat", "--run", run.name, "-o", hurt / "pat.talkhead",
                    "--home", hurt)[0]  # fmt: skip
        with pytest.raises(TalkheadError, match="cannot be played"):
            import_avatar(parcel, tmp_path / "third")
        assert not list((tmp_path / "third").rglob("*"))


def _undated(run: Path) -> None:
    facts = json.loads((run / "meta.json").read_text())
    (run / "meta.json").write_text(json.dumps(facts | {"finished_at": "x"}))


def _without_usable_rows(run: Path) -> None:
    arrays = dict(np.load(run / "drive.npz"))
    del arrays["usable"]
    np.savez(run / "drive.npz", **arrays)


def _without_box(run: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(run / "avatar.safetensors")
    del tensors["avatar.aabb"]
    save_file(tensors, run / "avatar.safetensors")
