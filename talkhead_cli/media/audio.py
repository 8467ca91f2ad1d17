"""Sound of a media file as mono 16 kHz samples on the file's common clock."""

from __future__ import annotations

import os
import wave
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import ffmpeg as graphs
import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import SAMPLE_RATE_HZ, TalkheadError
from talkhead_cli.media.ffmpeg import Run, beside, probe, url

Samples = NDArray[np.float32]
TRUNCATION_S = 0.5  # that a file may declare and not hold


def sound(
    path: Path | str, *, n_samples: int | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Samples:  # fmt: skip
    """(N,) float32 in [-1, 1]; sample 0 is at time 0 of the file, where a late track is silent.

    Padded with silence or cut to `n_samples` when given, and not read further.  `on_warning` is
    told in one sentence when the file ends before its declared duration.  TalkheadError without
    sound.
    """
    stream = _pcm(path, "f32le", n_samples, on_warning)
    samples = np.frombuffer(bytearray().join(stream), "<f4")
    np.nan_to_num(samples, copy=False)
    np.clip(samples, -1.0, 1.0, out=samples)
    if n_samples is None or len(samples) == n_samples:
        return samples
    return np.pad(samples[:n_samples], (0, max(0, n_samples - len(samples))))


def sound_to_file(
    path: Path | str, out_path: Path | str, *, on_warning: Callable[[str], None] | None = None
) -> int:
    """Write what `sound` hears to a raw 16-bit little-endian file, in constant memory.

    Returns the number of samples. TalkheadError without sound, and then nothing is left.
    """
    part = beside(Path(out_path))
    try:
        with open(part, "wb") as file:
            stream = _pcm(path, "s16le", on_warning=on_warning)
            n_bytes = sum(file.write(chunk) for chunk in stream)
        os.replace(part, out_path)
    except OSError as error:
        raise TalkheadError(f"{out_path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return n_bytes // 2


def write_wav(path: Path | str, samples: Samples) -> None:
    """Write (N,) floats in [-1, 1] as 16-bit mono 16 kHz PCM."""
    part = beside(Path(path))
    whole = (np.clip(samples, -1.0, 1.0) * 32767.0).round().astype("<i2")
    try:
        with wave.open(str(part), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE_HZ, len(whole), "NONE", "not compressed"))
            file.writeframes(whole.tobytes())
        os.replace(part, path)
    except OSError as error:
        raise TalkheadError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def read_wav(path: Path | str) -> Samples:
    """(N,) float32 of a file that `write_wav` made; TalkheadError for any other format."""
    try:
        with wave.open(str(path), "rb") as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise TalkheadError(f"{path} cannot be read as WAV: {error}") from error
    if form != (1, 2, SAMPLE_RATE_HZ):
        raise TalkheadError(f"{path} is not 16-bit mono 16 kHz WAV; preprocess the footage again")
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32767.0)


def on_common_clock(path: Path | str, rate_hz: int) -> Any:
    """An ffmpeg-python stream of the first sound track: late starts and gaps become silence."""
    if not probe(path).has_audio:
        raise TalkheadError(f"{path} has no sound; give a file that has a sound track")
    track = graphs.input(url(path))["a:0"]
    return track.filter("aresample", rate_hz, first_pts=0, **{"async": 1})


def _pcm(
    path: Path | str, form: str, n_samples: int | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Iterator[bytes]:  # fmt: skip
    """Raw samples ("f32le", "s16le"), a mebibyte at a time; of them all, or about so many."""
    track = on_common_clock(path, SAMPLE_RATE_HZ)
    limit = {} if n_samples is None else {"t": n_samples / SAMPLE_RATE_HZ}
    graph = track.output("pipe:1", format=form, ac=1, ar=SAMPLE_RATE_HZ, **limit)
    n_bytes = 0
    with closing(Run(graph)) as run:
        while chunk := run.out.read(1 << 20):
            n_bytes += len(chunk)
            yield chunk
        run.finish()
        if not n_bytes and n_samples != 0:
            raise TalkheadError(f"{path} has a sound track that cannot be read: {run.complaint}")
    heard_s = n_bytes / {"f32le": 4, "s16le": 2}[form] / SAMPLE_RATE_HZ
    declared_s = probe(path).duration_s
    wanted_s = min(declared_s, limit.get("t", declared_s))
    if on_warning is not None and run.messages and heard_s < wanted_s - TRUNCATION_S:
        on_warning(
            f"the sound of {Path(path).name} is damaged: {heard_s:.1f} of {declared_s:.1f} seconds "
            "could be read"
        )
