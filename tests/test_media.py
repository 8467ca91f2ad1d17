"""The media room: whatever a film holds becomes upright pictures in true colours."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from films import flash_and_beep, flat, lavfi, run_ffmpeg, sound_s, write

from talkhead_cli import media
from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, TalkheadError
from talkhead_cli.media import ffmpeg
from talkhead_cli.media.ffmpeg import knows

HARD = Path(__file__).parents[2] / "shared" / "hard"
SUFFIXES = (".mp4", ".mov", ".webm")
CLIPS = sorted(p for p in HARD.glob("*") if p.suffix in SUFFIXES) if HARD.is_dir() else []


def test_the_machine_has_what_the_room_needs() -> None:
    assert all(need.ok for need in media.check() if need.required)


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


def test_wide_colours_that_are_not_hdr_are_converted(tmp_path: Path) -> None:
    """BT.709's (200, 100, 50) is (175, 104, 62) or so in BT.2020."""
    told = "pin=709:tin=709:min=gbr:rin=pc"
    wide = f"zscale={told}:p=2020:t=2020_10:m=2020_ncl:r=tv,format=yuv420p10le"
    source = f"color=0xc86432:s=64x64:d=0.2,format=gbrp,{wide}"
    clip = lavfi(tmp_path / "a.mkv", source, "-c:v", "ffv1")
    assert "bt2020" in media.probe(clip).colour
    found = next(media.frames(clip)).astype(int)
    assert np.abs(found - (0xC8, 0x64, 0x32)).max() <= 4


def test_a_raw_stream_lasts_as_long_as_its_frames(tmp_path: Path) -> None:
    clip = lavfi(tmp_path / "a.h264", "testsrc=s=64x64:d=4", "-pix_fmt", "yuv420p")
    assert media.probe(clip).duration_s == pytest.approx(4, abs=0.05)


def test_a_name_that_is_no_text_is_refused_in_words(tmp_path: Path) -> None:
    clip = lavfi(tmp_path / "a.mkv", "testsrc=s=64x64:d=0.2").rename(tmp_path / "caf\udce9.mkv")
    for use in (media.probe, lambda path: next(media.frames(path))):
        with pytest.raises(TalkheadError, match=r"caf\\udce9.*UTF-8; rename"):
            use(clip)


@pytest.mark.parametrize("colours", ["yuv420p", "yuv420p10le", "bt2020"])
@pytest.mark.parametrize("crop", [(1, 1, 32, 32), (0, 0, 33, 33), (3, 2, 31, 40)])
def test_crops_at_odd_places_keep_their_colours(
    tmp_path: Path, colours: str, crop: tuple[int, int, int, int]
) -> None:
    """Two by two pixels share a colour: red ones on the left, and none anywhere else."""
    source = "color=0xc02020:s=16x65:d=0.2[a];color=0x606060:s=47x65:d=0.2[b];[a][b]hstack"
    tags = "setparams=color_primaries=bt2020:color_trc=bt2020-10:colorspace=bt2020nc:range=tv"
    narrow = "format=gbrp,scale=out_color_matrix=bt709:out_range=tv,format=" + colours
    wide = f"format=gbrp,scale=out_color_matrix=bt2020:out_range=tv,format=yuv420p10le,{tags}"
    made = f"{source},{wide if colours == 'bt2020' else narrow}"
    clip = lavfi(tmp_path / "a.mkv", made, "-c:v", "ffv1")
    whole = next(media.frames(clip)).astype(int)
    assert whole.shape == (65, 63, 3)
    x, y, w, h = crop
    part = next(media.frames(clip, crop=crop)).astype(int)
    assert part.shape == (h, w, 3)
    off = np.abs(part - whole[y : y + h, x : x + w])
    edge = np.abs(np.arange(x, x + w) - 15.5) < 3
    assert off[:, ~edge].max() <= 4 and off.mean() < 3
    assert part[5, 12 - x, 0] > part[5, 12 - x, 1] + 90, "red"
    assert np.ptp(part[5, 25 - x]) <= 6, "grey"


def _old(path: Path) -> str:
    """A program that probes as ffmpeg 7.0 does."""
    path.write_text(
        "#!/bin/sh\necho '  Stream #0:0: Audio: pcm_u8, 8000 Hz, stereo, u8, 128 kb/s'\n"
    )
    path.chmod(0o755)
    return str(path)


def test_an_ffmpeg_that_does_not_say_when_tracks_begin_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, old = ffmpeg.executable(), _old(tmp_path / "ffmpeg")
    for ours, others, used in ((good, old, good), (old, good, good), (None, good, good)):
        monkeypatch.setattr(ffmpeg, "_installed_with_us", lambda found=ours: found)
        monkeypatch.setattr(ffmpeg.shutil, "which", lambda _, found=others: found)
        assert ffmpeg.executable.__wrapped__() == used
    broken = str(tmp_path / "broken")
    Path(broken).write_bytes(b"\0" * 64)
    Path(broken).chmod(0o755)
    for wrong in (broken, str(tmp_path / "absent")):
        monkeypatch.setattr(ffmpeg, "_installed_with_us", lambda found=wrong: found)
        monkeypatch.setattr(ffmpeg.shutil, "which", lambda _: good)
        assert ffmpeg.executable.__wrapped__() == good
    for ours, words in ((old, "too old"), (broken, "cannot be run"), (None, "not found")):
        monkeypatch.setattr(ffmpeg, "_installed_with_us", lambda found=ours: found)
        monkeypatch.setattr(ffmpeg.shutil, "which", lambda _: None)
        with pytest.raises(TalkheadError, match=words):
            ffmpeg.executable.__wrapped__()


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
