"""The media room: what is written comes back, and nothing is half written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import n_frames_in
from films import flash_and_beep, flat, run_ffmpeg, sound_s, write

from talkhead_cli import media
from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, TalkheadError


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
