"""The media room: every file becomes 25 frames per second on one clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from films import lavfi, number_of, numbered, run_ffmpeg, sound_s

from talkhead_cli import media
from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, TalkheadError


@pytest.mark.parametrize("rate", ["60", "30", "30000/1001", "24000/1001", "25", "10"])
def test_any_rate_becomes_25(tmp_path: Path, rate: str) -> None:
    clip = lavfi(tmp_path / "a.mp4", f"testsrc=s=64x64:r={rate}:d=3")
    about = media.probe(clip)
    top, _, bottom = rate.partition("/")
    assert about.fps == pytest.approx(int(top) / int(bottom or 1), abs=0.01)
    assert abs(sum(1 for _ in media.frames(clip)) - round(FPS * about.duration_s)) <= 1


def test_variable_rate_keeps_time(tmp_path: Path) -> None:
    # brightness tells the time: 0..255 over 4 s; every third and most later frames are missing
    source = "color=black:s=64x64:r=50:d=4,format=gray,geq=lum='T/4*255'"
    holes = "select='mod(n,3)*(lt(t,2)+not(mod(n,4)))'"
    clip = lavfi(tmp_path / "a.mkv", f"{source},{holes}", "-fps_mode", "vfr", "-c:v", "ffv1")
    seen = np.array([f.mean() for f in media.frames(clip)]) / 255 * 4
    assert abs(len(seen) - 100) <= 3
    late_s = np.arange(len(seen)) / FPS - seen
    assert late_s.min() > -0.03 and late_s[:-3].max() < 0.17  # of the holes: 8 frames of 50


def test_seek_and_stride_land_on_the_same_frames(tmp_path: Path) -> None:
    clip = lavfi(tmp_path / "a.mp4", "testsrc=s=64x64:r=30000/1001:d=4")
    whole = list(media.frames(clip))
    part = list(media.frames(clip, start_s=2.52, n_frames=10, stride=3))
    assert len(part) == 10
    assert all(np.array_equal(a, b) for a, b in zip(part, whole[63::3], strict=False))
    with pytest.raises(TalkheadError, match="no frames at 9 s"):
        list(media.frames(clip, start_s=9))


def test_what_changes_midway_keeps_its_time(tmp_path: Path) -> None:
    """Pictures that grow, as in calls, and sound that loses a channel, as in broadcasts."""
    parts = []
    for index, (size, channels) in enumerate([("160x64", 2), ("320x128", 1)]):
        some = numbered(tmp_path / f"{index}.mkv", 50, "-c:v", "ffv1")
        part = tmp_path / f"{index}.ts"
        beep = "sine=f=900:d=2,volume='lt(t,0.1)':eval=frame"
        words = ("-s", size, "-ac", channels, "-output_ts_offset", 2 * index)
        pictures = ("-sws_flags", "neighbor", "-c:v", "mpeg2video", "-b:v", "2M", "-c:a", "mp2")
        run_ffmpeg("-i", some, "-f", "lavfi", "-i", beep, *words, *pictures, part)
        parts.append(part.read_bytes())
    clip = tmp_path / "whole.ts"
    clip.write_bytes(b"".join(parts))
    for crop in (None, (0, 0, 160, 64)):
        seen = [number_of(picture) for picture in media.frames(clip, crop=crop)]
        assert len(seen) in (99, 100, 101)
        assert seen[:49] == list(range(49)) and seen[-50:] == list(range(50)), crop
    samples = media.sound(clip)
    assert sound_s(clip) == pytest.approx(4.0, abs=0.1)
    loud = np.flatnonzero(np.abs(samples) > 0.02) / SAMPLE_RATE_HZ
    assert np.median(loud[loud > 1]) == pytest.approx(2.08, abs=0.05)


@pytest.mark.parametrize("n_between", [0, 2])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".flv", ".ts", ".m2ts", ".mpg"])
def test_a_film_begins_where_it_is_asked_to(tmp_path: Path, suffix: str, n_between: int) -> None:
    """Files without an index of the pictures that stand alone are not sought in."""
    coder = "mpeg2video" if suffix == ".mpg" else "libx264"
    words = ("-c:v", coder, "-g", 60, "-bf", n_between, "-pix_fmt", "yuv420p", "-b:v", "1M")
    clip = numbered(tmp_path / f"a{suffix}", 140, *words)
    whole = [number_of(picture) for picture in media.frames(clip)]
    assert whole == list(range(140))
    for first in (1, 30, 61, 100):
        some = media.frames(clip, start_s=first / FPS, n_frames=5)
        assert [number_of(picture) for picture in some] == whole[first : first + 5]


@pytest.mark.parametrize("rate", ["30", "60", "50", "30000/1001"])
def test_a_part_of_a_faster_film_shows_the_pictures_of_the_whole(tmp_path: Path, rate: str) -> None:
    clip = numbered(tmp_path / "a.mp4", 200, "-g", 48, "-pix_fmt", "yuv420p", rate=rate)
    whole = [number_of(picture) for picture in media.frames(clip)]
    for first in range(1, len(whole) - 2, 3):
        some = media.frames(clip, start_s=first / FPS, n_frames=2)
        assert [number_of(picture) for picture in some] == whole[first : first + 2], first


def test_a_still_that_lasts_is_met_wherever_one_begins(tmp_path: Path) -> None:
    gap = ("-vf", "select='lt(n,20)+gt(n,119)'", "-fps_mode", "vfr", "-pix_fmt", "yuv420p")
    clip = numbered(tmp_path / "a.mp4", 140, *gap)
    assert number_of(next(media.frames(clip, start_s=100 / FPS))) == 19


def test_a_part_is_the_film_from_where_it_begins(speaker_clip: Path) -> None:
    whole = list(media.frames(speaker_clip, size=(64, 64)))
    sound = media.sound(speaker_clip)
    part = media.Part(speaker_clip, 50, 100)
    seen = list(part.frames(size=(64, 64)))
    assert np.array_equal(seen, whole[50:150])
    later = list(part.frames(first=90, n_frames=30, size=(64, 64)))
    assert len(later) == 10 and np.array_equal(later[0], whole[140])
    assert len(list(part.frames(stride=12, size=(64, 64)))) == 9, "0, 12 ... 96"
    assert np.array_equal(part.sound(8000), sound[32_000:40_000])
    assert np.array_equal(part.sound(8000, late_s=0.1), sound[33_600:41_600])
    assert np.array_equal(part.sound(8000, late_s=-0.1), sound[30_400:38_400])


def test_the_sound_of_a_part_ends_where_the_film_does(speaker_clip: Path) -> None:
    """Whatever a file declares, no silence is made up."""
    whole = len(media.sound(speaker_clip))
    rest = media.Part(speaker_clip, 25).heard()
    assert len(rest) == whole - 25 * SAMPLES_PER_FRAME
    assert len(media.Part(speaker_clip, 25, 50).heard()) == 50 * SAMPLES_PER_FRAME
