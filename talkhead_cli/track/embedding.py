"""Speech features of Google's speech embedding, a small network that ships with the package.

A stack of 1 x 3 and 3 x 1 convolutions over 32 mel bands, trained so that small models on top can
tell words apart (Lin et al. 2020, arXiv 2002.01322).  Its middle layers predict lips far better
than mel bands do.  It is fully convolutional in time, so any stretch of sound takes one pass; two
poolings by two in time reduce the 10 ms mel rows to the video's clock, one row per frame.

numpy alone, like voice.py.  `benchmarks/embedding.py` made the weights file; NOTICE has its source.
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
PCM = 32768.0  # the network expects samples on the 16-bit scale
# Floor of the mel power of such samples.  The published front end clips 80 dB below the clip's
# maximum instead, which is not known when only a part of the sound is processed.
FLOOR_DB = 30.0
LEAK, LEAST = 0.2, -0.4  # activation: max(x, LEAK * x, LEAST)
# Max pooling (rows, bands) after these layers; layer 18 is the last one evaluated.
POOLED = {2: (2, 2), 6: (1, 2), 10: (2, 2), 14: (1, 2)}
N_LAYERS = 19
FINE, COARSE = 14, 18  # layers used as features; receptive fields of 400 and 560 ms
N_FEATURES = 96 * 4 + 96 * 2  # channels times bands of each
ROWS = SAMPLES_PER_FRAME // HOP  # mel rows per frame
FIELD = 56  # receptive field of a feature row, in mel rows
BEFORE = 26  # how many of these precede the frame's first mel row
FINE_LAG = 2  # rows of FINE before the one in the middle of the receptive field
BLOCK = 100  # frames per pass, so that activations stay in the CPU cache


class EmbeddingVoice:
    """Speech features from a middle and an upper layer. Same interface as MelVoice."""

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
        self,
        samples: NDArray[Any],
        n_rows: int | None = None,
        *,
        first: int = 0,
        scale: float = 1.0,
    ) -> Array:
        """Return features (n_rows, 576) from row `first` on of mono 16 kHz samples (N,).

        Samples are in [-1, 1] after `scale`, with silence beyond their ends.  One row per video
        frame, about its middle; rows of a part equal those of the whole.
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
    """Convolve x (T, F, C) with a kernel (O, C, t, f): no padding in time, zeros in bands."""
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
    """Max-pool x (T, F, C) over windows of by_rows x by_bands."""
    rows, bands = len(x) // by_rows, x.shape[1] // by_bands
    cut = x[: rows * by_rows].reshape(rows, by_rows, bands, by_bands, -1)
    return cut.max((1, 3))
