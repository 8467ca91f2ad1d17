"""Speech features on the video's clock, from samples alone: log-mel bands and formants.

Rows of the feature stream come every 10 ms; row i is centred on sample i * 160.  Everything
is numpy, so that a machine that only renders needs no audio package, and works on any
stretch of a longer sound: rows near an inner cut equal those of the whole.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ

Array = NDArray[np.floating[Any]]

HOP = 160  # 10 ms
WINDOW = 400  # 25 ms
N_FFT = 512
N_MEL = 40
N_FORMANTS = 3
LPC_ORDER = 10
_HANN = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
RATE_HZ = SAMPLE_RATE_HZ // HOP
FEATURE_NAMES = (
    *(f"mel{i}" for i in range(N_MEL)),
    "f1",
    "f2",
    "f3",
    "energy",
    "voicing",
    "flatness",
)
N_FEATURES = len(FEATURE_NAMES)


def _hz_to_mel(hz: Array) -> Array:
    """Slaney's scale: linear to 1 kHz, logarithmic above."""
    low = hz * 3 / 200
    return np.where(hz < 1000, low, 15 + np.log(np.maximum(hz, 1e-9) / 1000) * 27 / np.log(6.4))


def _mel_to_hz(mel: Array) -> Array:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


@lru_cache
def mel_filters(n_mel: int = N_MEL, low_hz: float = 60.0, high_hz: float = 7600.0) -> Array:
    """Triangular filters of unit area, (n_mel, N_FFT // 2 + 1)."""
    edges = _mel_to_hz(
        np.linspace(_hz_to_mel(np.array(low_hz)), _hz_to_mel(np.array(high_hz)), n_mel + 2)
    )
    bins = np.fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE_HZ)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]


def features(
    samples: NDArray[Any], n_rows: int | None = None, *, first: int = 0, scale: float = 1.0
) -> NDArray[np.float32]:
    """Return features (n_rows, N_FEATURES) from row `first` on of mono 16 kHz samples (N,).

    Samples are in [-1, 1] after `scale`.  One row per 10 ms; rows of a part equal those of the
    whole.  Mel bands are log power; formants are kHz; energy is log RMS; voicing is the largest
    autocorrelation at pitch lags (45 to 229 samples), relative to lag 0, and 0 in silence;
    flatness is log geometric over arithmetic mean of the power spectrum.
    """
    n_rows = len(samples) // HOP - first if n_rows is None else n_rows
    out = [_block(samples, first + a, min(4096, n_rows - a), scale) for a in range(0, n_rows, 4096)]
    return np.concatenate(out) if out else np.zeros((0, N_FEATURES), np.float32)


def _pieces(samples: NDArray[Any], first: int, n_rows: int, scale: float) -> Array:
    """Return windowed samples (n_rows, WINDOW) from row `first` on; silence beyond the ends."""
    begin = first * HOP - WINDOW // 2
    end = begin + (n_rows - 1) * HOP + WINDOW
    piece = np.asarray(samples[max(0, begin) : max(0, end)], np.float32) * scale
    piece = np.pad(piece, (max(0, -begin), 0))
    piece = np.pad(piece, (0, end - begin - len(piece)))
    return sliding_window_view(piece, WINDOW)[::HOP] * _HANN


def power_spectra(samples: NDArray[Any], first: int, n_rows: int, scale: float) -> Array:
    """Return power spectra (n_rows, N_FFT // 2 + 1) from row `first` on."""
    return np.square(np.abs(np.fft.rfft(_pieces(samples, first, n_rows, scale), N_FFT)))


def _block(samples: NDArray[Any], first: int, n_rows: int, scale: float) -> NDArray[np.float32]:
    pieces = _pieces(samples, first, n_rows, scale)
    power = np.abs(np.fft.rfft(pieces, N_FFT)) ** 2
    mel = np.log(power @ mel_filters().T + 1e-6)
    energy = np.log(np.sqrt((pieces**2).mean(-1)) + 1e-5)
    flat = np.log(power[:, 4:240] + 1e-9)
    flatness = flat.mean(-1) - np.log(power[:, 4:240].mean(-1) + 1e-9)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(pieces, 1024)) ** 2)[:, : WINDOW // 2 + 60]
    pitch = correlation[:, 45:230].max(-1) / np.maximum(correlation[:, 0], 1e-9)
    return np.concatenate(
        [
            mel,
            formants(pieces),
            energy[:, None],
            np.where(energy > -9, pitch, 0.0)[:, None],
            flatness[:, None],
        ],
        -1,
    ).astype(np.float32)


def formants(pieces: Array) -> Array:
    """Windowed pieces (n, WINDOW) -> the lowest N_FORMANTS resonances (n, 3) in kHz.

    Linear prediction by the autocorrelation method (Makhoul 1975) at 8 kHz; resonances are
    poles with a bandwidth under 500 Hz.  Missing ones are set to those of a
    neutral vocal tract: 0.5, 1.5, 2.5 kHz.
    """
    emphasised = pieces[:, 1:] - 0.95 * pieces[:, :-1]
    # half rate by dropping the upper half of the spectrum
    spectrum = np.fft.rfft(emphasised, N_FFT)[:, : N_FFT // 4 + 1]
    auto = np.fft.irfft(np.abs(spectrum) ** 2)[:, : LPC_ORDER + 1]
    auto[:, 0] = auto[:, 0] * (1 + 1e-4) + 1e-9
    index = np.abs(np.arange(LPC_ORDER)[:, None] - np.arange(LPC_ORDER)[None])
    predictor = np.linalg.solve(auto[:, index], auto[:, 1:, None])[..., 0]
    companion = np.zeros((len(pieces), LPC_ORDER, LPC_ORDER))
    companion[:, 0] = predictor
    companion[:, np.arange(1, LPC_ORDER), np.arange(LPC_ORDER - 1)] = 1.0
    poles = np.linalg.eigvals(companion)
    rate = SAMPLE_RATE_HZ / 2
    hz = np.angle(poles) * rate / (2 * np.pi)
    bandwidth = -np.log(np.maximum(np.abs(poles), 1e-9)) * rate / np.pi
    usable = (hz > 150) & (hz < 3800) & (bandwidth < 500)
    ordered = np.sort(np.where(usable, hz, np.inf), -1)[:, :N_FORMANTS] / 1000
    return np.where(np.isfinite(ordered), ordered, np.array([0.5, 1.5, 2.5]))


class MelVoice:
    """Mel bands and formants, behind the interface that all voices share."""

    name = "mel"
    n_features = N_FEATURES
    rate_hz = RATE_HZ

    features = staticmethod(features)


def n_steps(window: int, rate_hz: int) -> int:
    """Return how many rows at `rate_hz` span `window` steps of 10 ms; odd, so one is central."""
    return window * rate_hz // RATE_HZ | 1


def windows(
    stream: Array, frames: NDArray[np.integer[Any]], n_steps: int, rate_hz: int = RATE_HZ
) -> Array:
    """Cut windows (len(frames), n_steps, A) around video frames from a feature stream (rows, A).

    Frame i is shown from i / 25 s, so its middle is row 4 i + 2 of a 10 ms stream.  End rows are
    repeated.  Windows of consecutive frames are overlapping views, to save memory: do not write
    to them.
    """
    every = rate_hz // FPS
    first = np.asarray(frames) * every + every // 2 - n_steps // 2
    before = max(0, -int(first.min(initial=0)))
    after = max(0, int(first.max(initial=0)) + n_steps - len(stream))
    padded = np.pad(stream, ((before, after), (0, 0)), mode="edge")
    view = sliding_window_view(padded, n_steps, axis=0, writeable=True).transpose(0, 2, 1)
    if len(first) and bool((np.diff(first) == every).all()):
        return view[first[0] + before : first[-1] + before + 1 : every]
    return view[first + before]


def is_audible(
    samples: Array, n_frames: int, *, floor_db: float = -65.0, hold_s: float = 1.5
) -> Any:
    """Return which video frames have live sound, (n_frames,) bool.

    Live is within `hold_s` of a frame above `floor_db` (of full scale): pauses between words
    count, a longer silence is a dead microphone.
    """
    per_frame = len(samples) // max(n_frames, 1)
    blocks = samples[: n_frames * per_frame].reshape(n_frames, per_frame)
    loud = 20 * np.log10(np.sqrt((blocks**2).mean(-1)) + 1e-9) > floor_db
    if not loud.any():
        return np.zeros(n_frames, bool)
    at = np.flatnonzero(loud)
    rows = np.arange(n_frames)
    place = np.searchsorted(at, rows)
    before = rows - at[np.maximum(place - 1, 0)]
    after = at[np.minimum(place, len(at) - 1)] - rows
    near = np.minimum(np.abs(before), np.abs(after))
    return near <= hold_s * 25
