"""Films made by ffmpeg, and what is seen and heard in them, for tests of the media room."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

from talkhead_cli import media
from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from talkhead_cli.media.ffmpeg import executable


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


def beginning(film: Path, n_frames: int, out: Path, sound: Path | None = None) -> Path:
    """The first frames of a film, with another sound."""
    about = media.probe(film)
    size = (about.width, about.height)
    with media.VideoWriter(out, size, audio=sound, preset="ultrafast") as writer:
        for frame in media.frames(film, n_frames=n_frames):
            writer.write(frame)
    return out
