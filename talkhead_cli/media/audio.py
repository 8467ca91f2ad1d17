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
from talkhead_cli.media.ffmpeg import Probe, Run, beside, opened, probe, url

Samples = NDArray[np.float32]
MAX_DRIFT_S = 0.03  # between samples and time stamps, which jitter, before samples follow them
TRUNCATION_S = 0.5  # by how much a file may fall short of its declared duration


def sound(
    path: Path | str,
    *,
    n_samples: int | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Samples:
    """Return the sound (N,), float32 in [-1, 1], from time 0 of the file; late tracks are padded.

    Padded with silence or cut to `n_samples` when given, and not read further.  `on_warning` gets
    one sentence when a file ends before the duration it declares.  TalkheadError if there is no
    sound.
    """
    chunks = list(_heard(path, n_samples, on_warning))
    samples = np.concatenate(chunks) if chunks else np.empty(0, np.float32)
    if n_samples is None or len(samples) == n_samples:
        return samples
    return np.pad(samples[:n_samples], (0, max(0, n_samples - len(samples))))


def sound_to_file(
    path: Path | str, out_path: Path | str, *, on_warning: Callable[[str], None] | None = None
) -> int:
    """Write the samples of `sound` to a raw 16-bit little-endian file, in constant memory.

    Returns the number of samples. TalkheadError if there is no sound; no file is left then.
    """
    part = beside(Path(out_path))
    try:
        with open(part, "wb") as file:
            stream = _heard(path, None, on_warning)
            n_bytes = sum(file.write(_as_shorts(chunk, 32768.0)) for chunk in stream)
        os.replace(part, out_path)
    except OSError as error:
        raise TalkheadError(f"{out_path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return n_bytes // 2


def write_wav(path: Path | str, samples: Samples) -> None:
    """Write (N,) floats in [-1, 1] as 16-bit mono 16 kHz PCM."""
    part = beside(Path(path))
    whole = _as_shorts(np.clip(samples, -1.0, 1.0), 32767.0)
    try:
        with wave.open(str(part), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE_HZ, len(samples), "NONE", "not compressed"))
            file.writeframes(whole)
        os.replace(part, path)
    except OSError as error:
        raise TalkheadError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def read_wav(path: Path | str) -> Samples:
    """Read a file that `write_wav` made, (N,) float32; TalkheadError for any other format."""
    try:
        with wave.open(str(path), "rb") as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise TalkheadError(f"{path} cannot be read as WAV: {error}") from error
    if form != (1, 2, SAMPLE_RATE_HZ):
        raise TalkheadError(f"{path} is not 16-bit mono 16 kHz WAV; preprocess the footage again")
    return np.frombuffer(data, "<i2", len(data) // 2).astype(np.float32) / np.float32(32767.0)


def on_common_clock(path: Path | str, about: Probe, rate_hz: int) -> Any:
    """Return an ffmpeg-python stream of the first sound track, gaps silent."""
    if not about.has_audio:
        raise TalkheadError(f"{path} has no sound; give a file that has a sound track")
    # The filter's own silence before a late start (`first_pts`) would come again wherever the
    # number of channels or the rate changes.
    track = opened(path, about, "a:0")
    return track.filter("aresample", rate_hz, **{"async": 1, "min_hard_comp": MAX_DRIFT_S})


def _heard(
    path: Path | str, n_samples: int | None, on_warning: Callable[[str], None] | None
) -> Iterator[Samples]:
    """Yield samples in [-1, 1], 1 MiB at a time: all of them, or about `n_samples`."""
    about = probe(path)
    track = on_common_clock(path, about, SAMPLE_RATE_HZ)
    limit = {} if n_samples is None else {"t": n_samples / SAMPLE_RATE_HZ}
    graph = track.output("pipe:1", format="f32le", ac=1, ar=SAMPLE_RATE_HZ, **limit)
    n_heard, late = 0, _first_sample(path, about)
    start_s = late / SAMPLE_RATE_HZ
    late = late if n_samples is None else min(late, n_samples)
    for first in range(0, late, 1 << 18):
        yield np.zeros(min(1 << 18, late - first), np.float32)
    if late and late == n_samples:
        return
    with closing(Run(graph)) as run:
        while chunk := run.out.read(1 << 20):
            samples = np.nan_to_num(np.frombuffer(chunk, "<f4", len(chunk) // 4))
            n_heard += len(samples)
            yield np.clip(samples, -1.0, 1.0, out=samples)
        run.finish_reading(path)
        if not n_heard and n_samples != 0:
            why = run.complaint or "it holds no samples"
            raise TalkheadError(f"{path} has a sound track that cannot be read: {why}")
    if on_warning is None:
        return
    heard_s = start_s + n_heard / SAMPLE_RATE_HZ
    wanted_s = min(about.duration_s, limit.get("t", np.inf))
    # the sound of a film may simply be shorter than its pictures
    is_sure = run.messages or not (about.has_video or about.is_estimated)
    if heard_s < wanted_s - TRUNCATION_S and is_sure:
        on_warning(
            f"the sound of {Path(path).name} is damaged: {heard_s:.1f} of "
            f"{about.duration_s:.1f} seconds could be read"
        )


def _first_sample(path: Path | str, about: Probe) -> int:
    """Return which sample is the first that can be decoded; the track may begin with packets that
    cannot, or that only prepare the decoder."""
    track = graphs.input(url(path))["a:0"].filter("aresample", SAMPLE_RATE_HZ)
    graph = track.output("pipe:1", format="framecrc", copyts=None, **{"frames:a": 1})
    with closing(Run(graph)) as run:
        lines = run.out.read().decode().splitlines()
        run.finish_reading(path)
    times = [line.split(",")[2] for line in lines if line and not line.startswith("#")]
    return max(0, int(times[0]) - round(about.origin_s * SAMPLE_RATE_HZ)) if times else 0


def _as_shorts(samples: Samples, full: float) -> bytes:
    """Convert floats in [-1, 1] to 16-bit bytes; 1.0 becomes `full`."""
    return (samples * full).round().clip(-32768, 32767).astype("<i2").tobytes()
