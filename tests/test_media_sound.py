"""The media room: sound lies where its pictures are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from films import beep_s, flash_and_beep, flash_s, flat, run_ffmpeg, sound_s, write

from talkhead_cli import media
from talkhead_cli.contracts import SAMPLE_RATE_HZ, TalkheadError


def test_sound_and_picture_agree(tmp_path: Path) -> None:
    clip = flash_and_beep(tmp_path / "a.mp4")
    assert flash_s(clip) == 1.0
    assert beep_s(clip) == pytest.approx(1.0, abs=0.005)
    assert sound_s(clip) == pytest.approx(2.0, abs=0.04)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("late", ["sound", "picture"])
def test_a_late_track_is_late(tmp_path: Path, late: str, suffix: str) -> None:
    """Read alone, each track of a .ts begins at 0 for ffmpeg."""
    clip = flash_and_beep(tmp_path / "a.mp4")
    shifted = tmp_path / f"b{suffix}"
    tracks = ("1:v", "0:a") if late == "sound" else ("0:v", "1:a")
    maps = [word for track in tracks for word in ("-map", track)]
    run_ffmpeg("-itsoffset", 0.4, "-i", clip, "-i", clip, *maps, "-c", "copy", shifted)
    about = media.probe(shifted)
    assert (about.audio_start_s, about.video_start_s)[late == "picture"] > 0.3
    flash, beep = flash_s(shifted), beep_s(shifted)
    # the sound of a .ts begins with what its coder needs before the first sample
    assert flash == pytest.approx(1.4 if late == "picture" else 1.0, abs=0.041)
    assert beep == pytest.approx(1.4 if late == "sound" else 1.0, abs=0.022)
    assert beep - flash == pytest.approx(0.4 if late == "sound" else -0.4, abs=0.022)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_sound_that_begins_late_in_a_film_is_late(tmp_path: Path, suffix: str) -> None:
    film = tmp_path / f"a{suffix}"
    picture = ("-f", "lavfi", "-i", "testsrc=s=64x64:r=25:d=16")
    beep = ("-itsoffset", 13, "-f", "lavfi", "-i", "sine=f=900:d=2")
    run_ffmpeg(*picture, *beep, "-map", "0:v", "-map", "1:a", "-pix_fmt", "yuv420p", film)
    samples = media.sound(film)
    loud = np.flatnonzero(np.abs(samples) > 0.05) / SAMPLE_RATE_HZ
    assert loud.min() == pytest.approx(13, abs=0.05) and loud.max() == pytest.approx(15, abs=0.1)
    assert not media.sound(film, n_samples=10 * SAMPLE_RATE_HZ).any()
    some = media.sound(film, n_samples=14 * SAMPLE_RATE_HZ)
    np.testing.assert_array_equal(some, samples[: len(some)])


def test_wav_and_raw_sound_agree(tmp_path: Path) -> None:
    samples = np.sin(np.arange(20_000, dtype=np.float32) / 9).astype(np.float32)
    media.write_wav(tmp_path / "a.wav", samples)
    assert np.abs(media.read_wav(tmp_path / "a.wav") - samples).max() < 1e-4
    assert np.abs(media.sound(tmp_path / "a.wav") - samples).max() < 1e-4
    assert media.sound_to_file(tmp_path / "a.wav", tmp_path / "a.raw") == 20_000
    raw = np.fromfile(tmp_path / "a.raw", "<i2") / 32767
    assert np.abs(raw - samples).max() < 1e-4
    padded = media.sound(tmp_path / "a.wav", n_samples=30_000)
    assert padded.shape == (30_000,) and not padded[20_000:].any()
    run_ffmpeg("-i", tmp_path / "a.wav", "-ar", 8000, tmp_path / "b.wav")
    with pytest.raises(TalkheadError, match="16 kHz"):
        media.read_wav(tmp_path / "b.wav")


def test_sound_that_is_damaged_is_said(tmp_path: Path) -> None:
    samples = np.sin(np.arange(20 * SAMPLE_RATE_HZ, dtype=np.float32) / 9).astype(np.float32)
    media.write_wav(tmp_path / "a.wav", samples)
    whole, cut = tmp_path / "a.m4a", tmp_path / "b.m4a"
    run_ffmpeg("-i", tmp_path / "a.wav", "-c:a", "aac", "-movflags", "+faststart", whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    said: list[str] = []
    assert media.sound_to_file(whole, tmp_path / "a.raw", on_warning=said.append) > 310_000
    assert not said
    n = media.sound_to_file(cut, tmp_path / "b.raw", on_warning=said.append)
    assert n < 200_000 and "the sound of b.m4a is damaged" in said[0]
    media.sound(cut, n_samples=SAMPLE_RATE_HZ, on_warning=said.append)
    assert len(said) == 1, "what is asked for was there"


def test_sound_that_ends_before_it_says_is_said_where_ffmpeg_says_nothing(tmp_path: Path) -> None:
    media.write_wav(tmp_path / "a.wav", np.zeros(20 * SAMPLE_RATE_HZ, np.float32))
    run_ffmpeg("-i", tmp_path / "a.wav", "-c:a", "libmp3lame", tmp_path / "a.mp3")
    data, said = (tmp_path / "a.mp3").read_bytes(), list[str]()
    (tmp_path / "b.mp3").write_bytes(data[: len(data) // 2])
    quiet_first = np.concatenate([np.zeros(300_000), np.sin(np.arange(150_000) / 5)])
    media.write_wav(tmp_path / "c.wav", quiet_first.astype(np.float32))
    run_ffmpeg("-i", tmp_path / "c.wav", tmp_path / "c.aac")  # which declares no length
    media.sound(tmp_path / "c.aac", on_warning=said.append)
    for name in "ab":
        media.sound(tmp_path / f"{name}.mp3", on_warning=said.append)
    assert len(said) == 1 and "the sound of b.mp3 is damaged: 9.9 of 20.0" in said[0]


def test_samples_that_are_no_numbers_are_silent(tmp_path: Path) -> None:
    samples = np.full(SAMPLE_RATE_HZ, 0.25, "<f4")
    samples[100:110] = np.nan
    raw = tmp_path / "a.raw"
    raw.write_bytes(samples.tobytes())
    run_ffmpeg("-f", "f32le", "-ar", SAMPLE_RATE_HZ, "-ac", 1, "-i", raw,
               "-c:a", "pcm_f32le", tmp_path / "a.mov")  # fmt: skip
    heard = media.sound(tmp_path / "a.mov")
    media.sound_to_file(tmp_path / "a.mov", tmp_path / "b.raw")
    filed = np.fromfile(tmp_path / "b.raw", "<i2") / 32768
    for samples in (heard, filed):
        assert np.abs(samples[100:110]).max() == 0 and np.allclose(samples[200:], 0.25)


def test_before_and_after_a_film_it_is_silent(speaker_clip: Path) -> None:
    sound = media.sound(speaker_clip)
    early = media.Part(speaker_clip).sound(8000, late_s=-0.25)
    assert not early[:4000].any() and np.array_equal(early[4000:], sound[:4000])
    late = media.Part(speaker_clip).sound(len(sound), late_s=0.25)
    assert not late[-4000:].any() and np.array_equal(late[:-4000], sound[4000:])


@pytest.mark.parametrize("damage", ["amount='if(lt(n,8),1,0)'", "drop='between(n,30,33)'"])
def test_sound_keeps_its_time_where_packets_are_damaged_or_lost(
    tmp_path: Path, damage: str
) -> None:
    """The first packets cannot be decoded; 85 ms in the middle are missing."""
    clip, hurt = flash_and_beep(tmp_path / "a.mp4"), tmp_path / "b.mkv"
    run_ffmpeg("-i", clip, "-c", "copy", "-bsf:a", f"noise={damage}", hurt)
    assert beep_s(hurt) == pytest.approx(beep_s(clip), abs=0.002)


def test_sound_whose_coder_starts_slowly_is_as_late_in_a_film(tmp_path: Path) -> None:
    flash_and_beep(tmp_path / "a.mp4")
    run_ffmpeg("-i", tmp_path / "a.wav", "-c:a", "wmav2", tmp_path / "a.wma")
    film = write(tmp_path / "b.mkv", [flat((9, 9, 9))] * 50, audio=tmp_path / "a.wma")
    assert beep_s(film) == pytest.approx(beep_s(tmp_path / "a.wma"), abs=0.005)
