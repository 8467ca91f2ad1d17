"""Speech features of a small network that comes with the package: Google's speech embedding.

A stack of 1 x 3 and 3 x 1 convolutions over 32 mel bands, trained so that small models can tell
words apart by it (Lin et al. 2020, arXiv 2002.01322).  What the middle of it says of a moment
goes with lips far better than mel bands do.  It is fully convolutional in time, so a whole sound
is one pass, and its two poolings by two make its clock that of the video: one row a frame.

numpy alone, as voice.py.  `benchmarks/embedding.py` made the weights' file; NOTICE says of what.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from talkhead_cli.contracts import FPS, SAMPLES_PER_FRAME
from talkhead_cli.track.voice import HOP, mel_filters, power_spectra

Array = NDArray[np.float32]

WEIGHTS = Path(__file__).with_name("embedding.safetensors")
N_MEL, LOW_HZ, HIGH_HZ = 32, 60.0, 3800.0
PCM = 32768.0  # the network knows samples as 16-bit numbers
# Of the power of such samples.  The published front end cuts 80 dB under a clip's loudest moment,
# which a part of a sound does not know.
FLOOR_DB = 30.0
LEAK, LEAST = 0.2, -0.4  # the activation: max(x, LEAK x, LEAST)
# Layers that pooling follows, by (rows, bands); reading ends with layer 18.
POOLED = {2: (2, 2), 6: (1, 2), 10: (2, 2), 14: (1, 2)}
N_LAYERS = 19
FINE, COARSE = 14, 18  # the layers that are read: their rows hear 400 and 560 ms
N_FEATURES = 96 * 4 + 96 * 2  # channels times bands of either
ROWS = SAMPLES_PER_FRAME // HOP  # of mel, a frame
FIELD = 56  # mel rows that a row hears
BEFORE = 26  # of these, how many come before the frame's first
FINE_LAG = 2  # rows of FINE that lie before the one in the middle of the field
BLOCK = 100  # frames at once, so that they stay in the cache


class EmbeddingVoice:
    """Speech features of the network's middle and upper layers. Same interface as MelVoice."""

    name = "embedding"
    n_features = N_FEATURES
    rate_hz = FPS

    def __init__(self, held: Mapping[str, NDArray[Any]]) -> None:
        """held: the arrays of WEIGHTS."""
        self._layers = [
            (held[f"weight{i}"].astype(np.float32), held[f"bias{i}"].astype(np.float32))
            for i in range(N_LAYERS)
        ]

    def features(
        self, samples: NDArray[Any], n_rows: int | None = None, *, first: int = 0,
        scale: float = 1.0,
    ) -> Array:  # fmt: skip
        """Mono 16 kHz samples (N,), [-1, 1] after `scale` -> rows first ... of (n_rows, 576).

        One row per video frame, about its middle; rows of a part equal those of the whole, and
        what lies beyond the sound is silent.
        """
        n_rows = len(samples) // SAMPLES_PER_FRAME - first if n_rows is None else n_rows
        out = [
            self._hear(samples, first + a, min(BLOCK, n_rows - a), scale)
            for a in range(0, n_rows, BLOCK)
        ]
        return np.concatenate(out) if out else np.zeros((0, N_FEATURES), np.float32)

    def _hear(self, samples: NDArray[Any], first: int, n_rows: int, scale: float) -> Array:
        n_mel = ROWS * (n_rows - 1) + FIELD
        power = power_spectra(samples, ROWS * first - BEFORE, n_mel, scale * PCM)
        decibel = 10 * np.log10(np.maximum(power @ mel_filters(N_MEL, LOW_HZ, HIGH_HZ).T, 1e-10))
        x = (np.maximum(decibel, FLOOR_DB) / 10 + 2).astype(np.float32)[:, :, None]
        for layer, (weight, bias) in enumerate(self._layers):
            x = _convolved(x, weight) + bias
            np.maximum(np.maximum(x, LEAK * x, out=x), LEAST, out=x)
            if layer == FINE:
                fine = x[FINE_LAG : FINE_LAG + n_rows].reshape(n_rows, -1)
            if layer in POOLED:
                x = _pooled(x, *POOLED[layer])
        return np.concatenate([fine, x.reshape(n_rows, -1)], 1)


def _convolved(x: Array, weight: Array) -> Array:
    """Rows, bands and channels (T, F, C) * kernel (O, C, t, f), whole rows alone, bands padded."""
    n_out, _, n_time, n_band = weight.shape
    edge = n_band // 2
    seen = sliding_window_view(
        np.pad(x, ((0, 0), (edge, edge), (0, 0))),
        (n_time, n_band),
        axis=(0, 1),  # type: ignore[call-overload]
    )
    rows, bands = seen.shape[:2]
    made: Array = seen.reshape(rows * bands, -1) @ weight.reshape(n_out, -1).T
    return made.reshape(rows, bands, n_out)


def _pooled(x: Array, by_rows: int, by_bands: int) -> Array:
    """The greatest of each by_rows x by_bands."""
    rows, bands = len(x) // by_rows, x.shape[1] // by_bands
    cut = x[: rows * by_rows].reshape(rows, by_rows, bands, by_bands, -1)
    greatest: Array = cut.max((1, 3))
    return greatest
