"""The media room: every file becomes 25 upright frames per second on one clock with its sound."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import n_frames_in

from talkhead_cli import media
from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, TalkheadError
from talkhead_cli.media import ffmpeg
from talkhead_cli.media.ffmpeg import executable, knows

HARD = Path(__file__).parents[2] / "shared" / "hard"
SUFFIXES = (".mp4", ".mov", ".webm")
CLIPS = sorted(p for p in HARD.glob("*") if p.suffix in SUFFIXES) if HARD.is_dir() else []


def run_ffmpeg(*words: object) -> bytes:
    argv = [executable(), "-hide_banner", "-loglevel", "error", "-y", *map(str, words)]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, check=True, capture_output=True).stdout


def lavfi(path: Path, source: str, *words: object) -> Path:
    run_ffmpeg("-f", "lavfi", "-i", source, *words, path)
    return path


def flat(colour: tuple[int, ...], size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.full((size[1], size[0], len(colour)), colour, np.uint8)


def write(path: Path, pictures: list[np.ndarray], **options: object) -> Path:
    height, width = pictures[0].shape[:2]
    with media.VideoWriter(path, (width, height), **options) as video:  # type: ignore[arg-type]
        for picture in pictures:
            video.write(picture)
    return path


def flash_and_beep(path: Path, *, frame: int = 25, n_frames: int = 50) -> Path:
    """One white frame and one frame of sound, both at `frame`."""
    pictures = [flat((0, 0, 0)) for _ in range(n_frames)]
    pictures[frame][:] = 255
    samples = np.zeros(n_frames * SAMPLES_PER_FRAME, np.float32)
    beep = slice(frame * SAMPLES_PER_FRAME, (frame + 1) * SAMPLES_PER_FRAME)
    samples[beep] = 0.8 * np.sin(np.arange(SAMPLES_PER_FRAME) * 2 * np.pi * 1000 / SAMPLE_RATE_HZ)
    media.write_wav(path.with_suffix(".wav"), samples)
    return write(path, pictures, audio=path.with_suffix(".wav"))


def flash_s(path: Path) -> float:
    return int(np.argmax([f.mean() for f in media.frames(path)])) / FPS


def beep_s(path: Path) -> float:
    return int(np.argmax(np.abs(media.sound(path)) > 0.2)) / SAMPLE_RATE_HZ


def sound_s(path: Path) -> float:
    return len(media.sound(path)) / SAMPLE_RATE_HZ


def numbered(path: Path, n_frames: int, *words: object, rate: object = FPS) -> Path:
    """Frame i shows i in ten bits, a bar for each."""
    bits = np.arange(n_frames)[:, None] >> np.arange(10) & 1
    pictures = np.repeat(np.repeat(255 * bits.astype(np.uint8), 16, 1)[:, None], 64, 1)
    raw = path.with_suffix(".raw")
    raw.write_bytes(np.repeat(pictures[..., None], 3, 3).tobytes())
    form = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "160x64", "-r", rate)
    run_ffmpeg(*form, "-i", raw, *words, path)
    return path


def number_of(picture: np.ndarray) -> int:
    return sum(int(picture[20:44, 16 * b + 5 : 16 * b + 11].mean() > 128) << b for b in range(10))


def test_the_machine_has_what_the_room_needs() -> None:
    assert all(need.ok for need in media.check() if need.required)


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


def test_crop_and_scale(tmp_path: Path) -> None:
    picture = np.zeros((90, 160, 3), np.uint8)
    picture[20:60, 101:131] = (200, 100, 50)
    clip = write(tmp_path / "a.mp4", [picture] * 3, crf=1)
    (frame, *_) = media.frames(clip, crop=(103, 22, 26, 36), size=(13, 18))
    assert frame.shape == (18, 13, 3)
    assert np.abs(frame.astype(int) - (200, 100, 50)).max() <= 8
    assert next(media.frames(clip, max_side=80)).shape == (45, 80, 3)
    assert next(media.frames(clip, max_side=800)).shape == (90, 160, 3)
    with pytest.raises(ValueError, match="leaves the picture"):
        next(media.frames(clip, crop=(100, 0, 61, 10)))


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


def test_woven_fields_of_another_size_are_taken_apart_too(tmp_path: Path) -> None:
    parts = []
    for index, size in enumerate(("320x240", "160x120")):
        part = tmp_path / f"{index}.ts"
        moving = f"testsrc=s={size}:r=50:d=2,tinterlace=interleave_top,setfield=tff"
        words = ("-flags", "+ildct+ilme", "-output_ts_offset", 2 * index)
        run_ffmpeg("-f", "lavfi", "-i", moving, "-c:v", "mpeg2video", "-b:v", "2M", *words, part)
        parts.append(part.read_bytes())
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    assert "first" in media.probe(tmp_path / "a.ts").colour
    assert len(list(media.frames(tmp_path / "a.ts"))) in (99, 100, 101)


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


def test_pictures_of_a_reader_that_was_killed_are_not_the_whole(tmp_path: Path) -> None:
    clip = lavfi(tmp_path / "a.mp4", "testsrc=s=640x480:r=25:d=8")
    some = media.frames(clip)
    next(some)
    subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "-f", str(clip)], check=True)
    with pytest.raises(TalkheadError, match="killed.*run the command again"):
        list(some)


@pytest.mark.parametrize(
    ("form", "tags"),
    [("yuvj420p", ()), ("yuyv422", ()), ("nv12", ()), ("yuv420p", ("bt470bg",) * 3)],
)
def test_untagged_hd_is_bt709_in_every_layout(
    tmp_path: Path, form: str, tags: tuple[str, ...]
) -> None:
    matrix = "bt601" if tags else "bt709"
    source = f"color=0xc8785a:s=1280x720:r=25:d=0.4,scale=out_color_matrix={matrix},format={form}"
    source += ",setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown"
    words = [f"-{key}" for key in ("colorspace", "color_primaries", "color_trc")]
    told = [word for pair in zip(words, tags, strict=False) for word in pair]
    coder = "rawvideo" if form in ("yuyv422", "nv12") else "libx264"
    clip = lavfi(tmp_path / "a.mkv", source, "-pix_fmt", form, "-c:v", coder, "-qp", 1, *told)
    assert ("bt470bg" in media.probe(clip).colour) == bool(tags)
    assert "709" not in media.probe(clip).colour
    middle = next(media.frames(clip))[300:400, 600:700].reshape(-1, 3).mean(0)
    np.testing.assert_allclose(middle, (200, 120, 90), atol=4.5)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_is_undone(tmp_path: Path, turn: int) -> None:
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:16, :16] = (255, 255, 255)  # a mark in the upper left
    stored = np.ascontiguousarray(np.rot90(upright, turn // 90))  # anticlockwise
    clip = write(tmp_path / "a.mp4", [stored] * 3)
    tagged = tmp_path / "b.mp4"
    run_ffmpeg("-display_rotation", -turn, "-i", clip, "-c", "copy", tagged)
    about = media.probe(tagged)
    assert (about.width, about.height, about.rotation_deg) == (96, 64, turn)
    frame = next(media.frames(tagged))
    assert frame.shape == (64, 96, 3)
    assert frame[2:14, 2:14].min() > 240 and frame[32:].max() < 15


def test_pixels_become_square(tmp_path: Path) -> None:
    clip = lavfi(tmp_path / "a.mp4", "testsrc=s=64x64:d=0.2,setsar=3/2")
    assert media.probe(clip).width == 96
    assert next(media.frames(clip)).shape == (64, 96, 3)
    whole = next(media.frames(clip)).astype(int)
    part = next(media.frames(clip, crop=(30, 0, 48, 64))).astype(int)
    assert np.abs(part[:, 6:-6] - whole[:, 36:72]).mean() < 8


def test_odd_size_and_ten_bits(tmp_path: Path) -> None:
    words = ("-c:v", "ffv1", "-pix_fmt", "yuv444p10le")
    clip = lavfi(tmp_path / "a.mkv", "color=0x4080c0:s=63x35:d=0.4", *words)
    pictures = list(media.frames(clip))
    assert len(pictures) == 10 and pictures[0].shape == (35, 63, 3)
    assert np.abs(pictures[0].astype(int) - (0x40, 0x80, 0xC0)).max() <= 3


def test_untagged_hd_is_bt709(tmp_path: Path) -> None:
    convert = "format=gbrp,scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"
    source = f"color=0xc04020:s=320x720:d=0.1,{convert},setparams=colorspace=unknown"
    clip = lavfi(tmp_path / "a.mp4", source, "-crf", 1)
    assert "bt709" not in media.probe(clip).colour
    assert np.abs(next(media.frames(clip)).astype(int) - (0xC0, 0x40, 0x20)).max() <= 4


@pytest.mark.skipif(not knows("filters", "zscale"), reason="this ffmpeg has no zscale filter")
@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_tone_mapped(tmp_path: Path, transfer: str) -> None:
    # white paper (58 % signal is 200 nits in PQ) must neither burn nor go dark
    tags = f"color_primaries=bt2020:color_trc={transfer}:colorspace=bt2020nc:range=tv"
    source = f"color=0x949494:s=64x64:d=0.2,format=yuv420p10le,lutyuv=u=512:v=512,setparams={tags}"
    clip = lavfi(tmp_path / "a.mkv", source, "-c:v", "ffv1")
    assert transfer in media.probe(clip).colour
    frame = next(media.frames(clip))
    assert 100 < frame.mean() < 245 and frame.max() - frame.min() <= 4


@pytest.mark.parametrize("colour", [(200, 30, 60), (20, 180, 90), (40, 60, 230), (128, 128, 128)])
@pytest.mark.parametrize("intra", [False, True])
def test_colours_survive(tmp_path: Path, colour: tuple[int, int, int], intra: bool) -> None:
    clip = write(tmp_path / "a.mp4", [flat(colour)] * 5, intra=intra)
    assert "bt709" in media.probe(clip).colour
    for frame in media.frames(clip):
        assert np.abs(frame.astype(int) - colour).max() <= 3


def test_names_with_blanks_signs_and_letters(tmp_path: Path) -> None:
    folder = tmp_path / "été 100%d 'x' [1]"
    folder.mkdir()
    clip = flash_and_beep(folder / "talk: häuser, 話.mp4", n_frames=30)
    assert n_frames_in(clip) == 30 == sum(1 for _ in media.frames(clip))
    assert media.sound(clip, n_samples=99).shape == (99,)


@pytest.mark.parametrize("seconds", [0.5, 5.0])
def test_sound_gets_the_length_of_the_pictures(tmp_path: Path, seconds: float) -> None:
    n_samples = int(seconds * SAMPLE_RATE_HZ)
    media.write_wav(tmp_path / "a.wav", np.full(n_samples, 0.1, np.float32))
    clip = write(tmp_path / "a.mp4", [flat((9, 9, 9))] * 50, audio=tmp_path / "a.wav")
    assert n_frames_in(clip) == 50
    assert abs(sound_s(clip) - 2.0) <= 1 / FPS


def test_nothing_half_written(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="halt"),
        media.VideoWriter(tmp_path / "a.mp4", (64, 64)) as video,
    ):
        video.write(flat((1, 2, 3)))
        raise RuntimeError("halt")
    with pytest.raises(TalkheadError, match="no frames"), media.VideoWriter(video.path, (64, 64)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_failures_to_write_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TalkheadError, match="No such file"):
        write(tmp_path / "nowhere" / "a.mp4", [flat((1, 2, 3))] * 400)
    with pytest.raises(TalkheadError, match="even"):
        media.VideoWriter(tmp_path / "a.mp4", (63, 64))
    with pytest.raises(TalkheadError, match=r"\.webm or \.mov"):
        media.VideoWriter(tmp_path / "a.mp4", (64, 64), alpha=True)
    with (
        media.VideoWriter(tmp_path / "a.mp4", (64, 64)) as video,
        pytest.raises(ValueError, match="not"),
    ):
        video.write(flat((1, 2, 3)))
        video.write(flat((1, 2, 3), (32, 32)))


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    code = """
import resource, signal, sys, numpy as np
from talkhead_cli import media
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
try:
    with media.VideoWriter(sys.argv[1], (256, 256), intra=True) as video:
        for _ in range(300):
            video.write(noise)
except media.TalkheadError as error:
    print(error)
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "a.mp4")]
    root = Path(__file__).parents[1]
    said = subprocess.run(argv, capture_output=True, text=True, cwd=root, timeout=60).stdout
    assert "could not be written" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_metadata_comes_back(tmp_path: Path) -> None:
    said = {"comment": "made by talkhead = synthetic", "talkhead_run": "alice/lokitalk"}
    clip = write(tmp_path / "a.mp4", [flat((1, 2, 3))] * 3, metadata=said)
    text = run_ffmpeg("-i", clip, "-f", "ffmetadata", "-").decode().replace("\\=", "=")
    assert all(f"{key}={value}\n" in text for key, value in said.items())


@pytest.mark.parametrize("suffix", [".webm", ".mov"])
def test_transparency_comes_back(tmp_path: Path, suffix: str) -> None:
    picture = flat((200, 60, 30, 255))
    picture[:, 32:, 3] = 0
    media.write_wav(tmp_path / "a.wav", np.zeros(8000, np.float32))
    clip = write(tmp_path / f"a{suffix}", [picture] * 5, alpha=True, audio=tmp_path / "a.wav")
    assert media.probe(clip).has_audio
    decoder = ("-c:v", "libvpx-vp9") if suffix == ".webm" else ()
    raw = run_ffmpeg(*decoder, "-i", clip, "-f", "rawvideo", "-pix_fmt", "rgba", "-")
    back = np.frombuffer(raw, np.uint8).reshape(5, 64, 64, 4).astype(int)
    assert np.abs(back[:, :, :28] - (200, 60, 30, 255)).max() <= 6
    assert back[:, :, 36:, 3].max() <= 6


def test_depth_is_lossless(tmp_path: Path) -> None:
    depth = np.random.default_rng(0).integers(0, 65536, (33, 45)).astype(np.uint16)
    clip = write(tmp_path / "a.mkv", [depth, depth // 2], gray16=True)
    raw = run_ffmpeg("-i", clip, "-f", "rawvideo", "-pix_fmt", "gray16le", "-")
    assert np.array_equal(np.frombuffer(raw, "<u2").reshape(2, 33, 45), [depth, depth // 2])


def test_files_that_are_no_video(tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("this is a text\n" * 100)
    script = tmp_path / "notes.txt"
    script.write_text("this is a text\n" * 100)
    for path in (text, script, tmp_path / "absent.mp4", tmp_path):
        for reader in (
            media.probe,
            media.sound,
            lambda p: next(media.frames(p)),
        ):
            with pytest.raises(TalkheadError):
                reader(path)
    silent = write(tmp_path / "silent.mp4", [flat((1, 2, 3))] * 3)
    with pytest.raises(TalkheadError, match="no sound"):
        media.sound(silent)
    with pytest.raises(TalkheadError, match="no sound"):
        media.sound_to_file(silent, tmp_path / "a.raw")
    assert not (tmp_path / "a.raw").exists()


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    cover = lavfi(tmp_path / "c.png", "color=red:s=64x64", "-frames:v", 1)
    song = tmp_path / "a.m4a"
    tone = ("-f", "lavfi", "-i", "sine=d=1", "-i", cover, "-map", "0", "-map", "1")
    run_ffmpeg(*tone, "-c:v", "png", "-disposition:v:0", "attached_pic", song)
    about = media.probe(song)
    assert about.has_audio and not about.has_video
    with pytest.raises(TalkheadError, match="no picture"):
        next(media.frames(song))


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


def test_memory_stays_small_and_ffmpeg_dies(tmp_path: Path) -> None:
    clip = lavfi(tmp_path / "a.mkv", "testsrc=s=640x480:r=25:d=24", "-c:v", "mjpeg")
    stream: Iterator[np.ndarray] = media.frames(clip)
    next(stream)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in islice(stream, 500)) == 500  # 460 MB of pixels
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000
    start = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 2


@pytest.mark.skipif(not CLIPS, reason=f"no private test clips in {HARD}")
@pytest.mark.parametrize("clip", CLIPS, ids=lambda p: p.stem)
def test_hard_clips(clip: Path) -> None:
    if clip.stem == "truncated_no_index":
        with pytest.raises(TalkheadError, match="index is missing"):
            next(media.frames(clip))
        return
    about, warnings = media.probe(clip), list[str]()
    pictures = [f.shape for f in media.frames(clip, max_side=128, on_warning=warnings.append)]
    if clip.stem == "truncated_faststart":
        assert len(warnings) == 1 and "of 10.1 seconds could be read" in warnings[0]
        assert 100 < len(pictures) < 200
        return
    assert not warnings
    # two were cut without encoding: their last frame is stamped beyond the declared end
    assert abs(len(pictures) - round(FPS * about.duration_s)) <= 3
    assert len(set(pictures)) == 1
    height, width, _ = pictures[0]
    assert (width > height) == (about.width > about.height)
    if clip.stem == "rotated_meta":
        assert (about.width, about.height) == (1280, 720)
    if clip.stem == "vertical_1080x1920":
        assert height > width
    if about.has_audio:
        assert sound_s(clip) <= about.duration_s + 0.05
    if clip.stem == "audio_late_200ms":
        samples = media.sound(clip)
        assert about.audio_start_s > 0.15
        assert not samples[: int(0.17 * SAMPLE_RATE_HZ)].any() and samples.any()


# -- films as cameras and old programs write them ------------------------------------------------


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


@pytest.mark.parametrize("order", ["tff", "bff"])
def test_fields_that_are_woven_are_taken_apart(tmp_path: Path, order: str) -> None:
    """A bar that moves by 12 pixels from a field to the next has teeth where it is interlaced."""
    scene = "color=black:s=320x120:r=50:d=2[b];color=white:s=24x120:r=50:d=2[w];"
    moving = f"{scene}[b][w]overlay=x='mod(12*n\\,290)',tinterlace=interleave_top"
    if order == "bff":
        moving = moving.replace("interleave_top", "interleave_bottom")
    clip = tmp_path / "a.mkv"
    run_ffmpeg("-filter_complex", f"{moving},setfield={order}", "-c:v", "ffv1", clip)
    assert "first" in media.probe(clip).colour
    pictures = list(media.frames(clip))
    assert len(pictures) == 50
    teeth = [np.abs(np.diff(p[..., 0].astype(int), axis=0))[20:-20].mean() for p in pictures[5:45]]
    woven = np.frombuffer(
        run_ffmpeg("-i", clip, "-f", "rawvideo", "-pix_fmt", "gray", "-"), np.uint8
    ).reshape(-1, 120, 320)
    were = np.abs(np.diff(woven.astype(int), axis=1))[5:45, 20:-20].mean()
    assert were > 5 and np.mean(teeth) < 0.2 * were


def test_what_titles_say_is_not_taken_for_facts(tmp_path: Path) -> None:
    clip = flash_and_beep(tmp_path / "a.mp4", n_frames=50)
    titled = tmp_path / "b.mkv"
    said = "Duration: 00:00:00.50, start: 9.0 rotation of 90 degrees"
    words = ("-metadata", f"comment={said}", "-metadata", f"description=first\n{said}")
    track = ("-metadata:s:v", "title=(attached pic) 7 fps : Audio: , start 3.0")
    run_ffmpeg("-i", clip, "-c", "copy", *words, *track, titled)
    about = media.probe(titled)
    assert about.has_video and about.has_audio and about.rotation_deg == 0
    assert about.duration_s == pytest.approx(2.0, abs=0.1) and about.fps == 25
    assert about.video_start_s < 0.1 and about.audio_start_s < 0.1


def test_fields_in_another_order_than_they_are_stored_are_read(tmp_path: Path) -> None:
    """ffmpeg writes brackets within brackets then."""
    line = (
        "0:0: Video: dvvideo, yuv420p(tv, bottom coded first (swapped)), 720x576 [SAR 1:1], 25 fps"
    )
    assert ffmpeg._picture(line)[:2] == (720, 576)
    assert ffmpeg._picture(line)[3] == "yuv420p(tv, bottom coded first (swapped))"


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


@pytest.mark.parametrize("layout", ["5.1(side)", "2.1", "16"])
@pytest.mark.parametrize("suffix", [".webm", ".mp4"])
def test_sound_of_any_channels_goes_into_films(tmp_path: Path, suffix: str, layout: str) -> None:
    n = int(layout) if layout.isdigit() else int(layout[0]) + 1
    silent = tmp_path / "a.wav"
    how = ("-af", f"aformat=channel_layouts={layout}") if "." in layout else ("-ac", n)
    run_ffmpeg("-f", "lavfi", "-i", "sine=d=0.5", *how, silent)
    film = write(tmp_path / f"a{suffix}", [flat((1, 2, 3))] * 10, audio=silent)
    assert sound_s(film) == pytest.approx(0.4, abs=0.05)
    assert np.abs(media.sound(film)).max() > 0.01


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


# -- parts ---------------------------------------------------------------------------------------


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


def test_before_and_after_a_film_it_is_silent(speaker_clip: Path) -> None:
    sound = media.sound(speaker_clip)
    early = media.Part(speaker_clip).sound(8000, late_s=-0.25)
    assert not early[:4000].any() and np.array_equal(early[4000:], sound[:4000])
    late = media.Part(speaker_clip).sound(len(sound), late_s=0.25)
    assert not late[-4000:].any() and np.array_equal(late[:-4000], sound[4000:])
