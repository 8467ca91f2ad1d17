"""Sound against lips: shifts that are known are found, what cannot be known is said."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from talkhead_cli import media
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, MisuseError, SilentProgress
from talkhead_cli.jobs.preprocess import preprocess
from talkhead_cli.media import ffmpeg
from talkhead_cli.store import Workspace
from talkhead_cli.track import lipsync, voice
from talkhead_cli.track.lipsync import N_STEPS, Offset, Talk, lip_motion, measure, train

N_INPUTS = N_STEPS * voice.N_MEL


def babble(seconds: float, seed: int) -> np.ndarray:
    """Features (rows, A) that are noise, smooth as speech is."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(round(seconds * voice.RATE_HZ) + 20, voice.N_FEATURES))
    return np.stack([np.convolve(r, np.hanning(13), "valid") for r in rows.T], 1).astype(np.float32)


def ear(seed: int = 0) -> np.ndarray:
    """A map from speech to lips that listens to the middle of the window."""
    rng = np.random.default_rng(seed)
    taps = np.exp(-(((np.arange(N_STEPS) - N_STEPS // 2) / 6.0) ** 2))
    return (taps[:, None, None] * rng.normal(size=(1, voice.N_MEL, 3))).reshape(N_INPUTS, 3)


def talk(seconds: float, late_s: float, seed: int, noise: float = 1.0) -> Talk:
    """Somebody whose lips move as `ear` says, in a film whose sound is late by `late_s`."""
    stream = babble(seconds, seed)
    frames = np.arange(int(len(stream) * FPS / voice.RATE_HZ))
    lips = lipsync.windows(stream, frames, round(late_s * voice.RATE_HZ)) @ ear()
    lips /= lips.std(0)
    lips += noise * np.random.default_rng(seed + 1).normal(size=lips.shape)
    lips = lipsync.without_slow(lips)
    return Talk(stream, frames, lips / lips.std(0))


def test_windows_are_about_the_middle_of_their_frame() -> None:
    """A frame lasts from step 4 t to 4 t + 4 of the features."""
    stream = np.zeros((400, voice.N_FEATURES))
    stream[4 * 50 + 2] = 1.0
    heard = lipsync.windows(stream, np.array([50])).reshape(N_STEPS, -1)
    assert heard.sum(1).argmax() == N_STEPS // 2


@pytest.mark.parametrize("late_s", [-0.4, -0.11, -0.02, 0.0, 0.07, 0.2, 0.35])
def test_a_known_shift_is_found_to_a_third_of_a_frame(late_s: float) -> None:
    one = talk(12, late_s, seed=3)
    found = measure(one.stream, one.frames, one.lips, ear())
    assert found is not None and found.is_sure
    assert found.sound_after_lips_s == pytest.approx(late_s, abs=0.014)


@pytest.mark.parametrize("late_s", [0.6, 0.64, -0.62])
def test_what_may_lie_beyond_what_is_tried_is_not_believed(late_s: float) -> None:
    one = talk(12, late_s, seed=3)
    found = measure(one.stream, one.frames, one.lips, ear())
    assert found is not None and not found.is_sure


def test_missing_frames_do_not_matter() -> None:
    one = talk(14, 0.16, seed=5)
    kept = np.r_[0:100, 150:200, 220:340]
    found = measure(one.stream, one.frames[kept], one.lips[kept], ear())
    assert found is not None and found.sound_after_lips_s == pytest.approx(0.16, abs=0.014)


def test_sound_of_somebody_else_is_not_believed() -> None:
    sure = []
    for seed in range(20):
        lips, other = talk(10, 0, seed=seed), babble(10, seed=100 + seed)
        found = measure(other, lips.frames, lips.lips, ear())
        sure.append(found is not None and found.is_sure)
    assert sum(sure) <= 2


def test_what_cannot_say_says_nothing() -> None:
    one = talk(7.5, 0.2, seed=1)
    assert measure(one.stream, one.frames, one.lips, ear()) is None, "too short"
    long = talk(12, 0.2, seed=1)
    assert measure(long.stream, long.frames, 0 * long.lips, ear()) is None, "a still mouth"
    nothing = np.zeros(0, int)
    assert measure(long.stream, nothing, np.zeros((0, 3)), ear()) is None


def test_training_finds_the_map_and_everybodys_own_offset() -> None:
    true = np.array([0.0, 0.12, -0.08, 0.0, 0.04, -0.04])
    talks = [talk(20, s, seed=10 + i, noise=0.5) for i, s in enumerate(true)]
    weight, late = train(talks)
    assert weight.shape == (N_INPUTS, 3)
    assert np.abs((late - true) - np.median(late - true)).max() < 0.03
    new = talk(12, 0.2, seed=77)
    found = measure(new.stream, new.frames, new.lips, weight)
    assert found is not None
    zero = measure((still := talk(12, 0.0, seed=77)).stream, still.frames, still.lips, weight)
    assert zero is not None
    assert found.sound_after_lips_s - zero.sound_after_lips_s == pytest.approx(0.2, abs=0.02)


def test_lips_are_read_alike_at_any_size_and_place() -> None:
    rng = np.random.default_rng(0)
    mesh = rng.uniform(0, 100, (478, 3)) + rng.normal(0, 2, (60, 478, 3)).cumsum(0) * 0.1
    lips = lip_motion(mesh)
    assert lips.shape == (60, 3) and np.allclose(lips.std(0), 1)
    assert np.allclose(lip_motion(3.7 * mesh + 50), lips)


def test_the_shipped_map_is_whole() -> None:
    weight = lipsync.shipped()
    assert weight.shape == (N_INPUTS, 3) and np.isfinite(weight).all()
    assert weight.std(0).min() > 0


def test_an_offset_reads_as_a_person_would_say_it() -> None:
    assert str(Offset(0.2, 0.3, 0.2)) == "200 ms after the lips"
    assert str(Offset(-0.084, 0.3, 0.05)) == "84 ms before the lips"
    assert not Offset(-0.084, 0.3, 0.05).is_sure


# -- preprocess ----------------------------------------------------------------------------------


@pytest.mark.parametrize("late_s", [0.2, -0.13])
def test_a_named_offset_is_undone(
    speaker_clip: Path, speaker_home: Path, tmp_path: Path, late_s: float
) -> None:
    space = preprocess(speaker_clip, tmp_path, SilentProgress(), name="s", offset=str(late_s))
    about = space.manifest()["offset"]
    assert about["corrected_s"] == late_s
    before = media.read_wav(Workspace.open(speaker_home, "speaker").audio)
    after = media.read_wav(space.audio)
    moved = round(late_s * SAMPLE_RATE_HZ)
    assert len(after) == len(before)
    if moved > 0:
        assert np.array_equal(after[: -2 * moved], before[moved:-moved])
    else:
        assert np.array_equal(after[-moved:], before[:moved]) and not after[:-moved].any()


def test_what_was_measured_is_undone_when_it_is_sure(
    speaker_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Offset | None] = {"it": Offset(0.118, 0.3, 0.2)}
    monkeypatch.setattr(lipsync, "measure", lambda *_: told["it"])
    progress = SilentProgress()
    space = preprocess(speaker_clip, tmp_path, progress, name="s")
    assert space.manifest()["offset"]["corrected_s"] == 0.12
    assert any("118 ms after the lips" in note for note in progress.notes)
    for offset, corrected in (
        (Offset(0.118, 0.3, 0.05), 0),
        (Offset(0.05, 0.3, 0.3), 0),
        (None, 0),
        (Offset(-0.09, 0.3, 0.2), -0.09),
    ):
        told["it"] = offset
        space.note(stages={k: v for k, v in space.manifest()["stages"].items() if k != "sound"})
        again = preprocess(speaker_clip, tmp_path, SilentProgress(), name="s")
        assert again.manifest()["offset"]["corrected_s"] == corrected
    told["it"] = Offset(0.118, 0.3, 0.2)
    left = preprocess(speaker_clip, tmp_path, SilentProgress(), name="s", offset="none")
    about = left.manifest()["offset"]
    assert about["corrected_s"] == 0 and about["sound_after_lips_s"] == 0.118


@pytest.mark.parametrize("offset", ["soon", "nan", "11", "", "inf"])
def test_an_offset_that_is_none_is_refused(speaker_clip: Path, tmp_path: Path, offset: str) -> None:
    with pytest.raises(MisuseError, match="--offset must be auto, none, or seconds"):
        preprocess(speaker_clip, tmp_path, SilentProgress(), offset=offset)
    assert not list(tmp_path.iterdir())


# -- real films ----------------------------------------------------------------------------------


def shifted(clip: Path, out: Path, late_s: float) -> Path:
    """The clip with its sound baked in late."""
    sound = f"adelay={round(1000 * late_s)}:all=1" if late_s > 0 else f"atrim=start={-late_s}"
    words = ["-loglevel", "error", "-y", "-i", str(clip), "-af", f"{sound},asetpts=N/SR/TB",
             "-c:v", "copy", "-c:a", "aac", str(out)]  # fmt: skip
    subprocess.run([ffmpeg.executable(), *words], check=True)
    return out


def test_real_films_that_were_shifted_are_put_right(shared: Path, tmp_path: Path) -> None:
    clip = shared / "clips" / "carl.mp4"
    found = {}
    for late_s in (0.0, 0.2, -0.24):
        film = shifted(clip, tmp_path / f"late{late_s}.mp4", late_s)
        answer = CliRunner().invoke(app, ["check", str(film), "--json"])
        found[late_s] = json.loads(answer.stdout)["figures"]["sound_after_lips_s"]
    assert found[0.2] - found[0.0] == pytest.approx(0.2, abs=0.04)
    assert found[-0.24] - found[0.0] == pytest.approx(-0.24, abs=0.04)


def test_a_real_late_sound_is_found_and_undone(shared: Path, tmp_path: Path) -> None:
    film = shared / "hard" / "audio_late_200ms_baked.mp4"
    space = preprocess(film, tmp_path, SilentProgress(), name="late")
    assert space.manifest()["offset"]["corrected_s"] == pytest.approx(0.2, abs=0.05)
