"""Which speech features to use: the best whose weights are there, or the one that is named."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError
from talkhead_cli.store import weights
from talkhead_cli.track.voice import MelVoice

BACKENDS = ("hubert", "wav2vec2", "mel")  # best first


class Voice(Protocol):
    """Speech features on a clock of 10 ms."""

    name: str
    n_features: int

    @property
    def names(self) -> list[str]: ...

    def features(
        self, samples: NDArray[Any], n_rows: int | None = None, *, first: int = 0,
        scale: float = 1.0,
    ) -> NDArray[np.float32]: ...  # fmt: skip


def choose(wanted: str) -> str:
    """auto, hubert, wav2vec2 or mel -> the backend's name; never downloads."""
    if wanted == "auto":
        return next(b for b in BACKENDS if b == "mel" or weights.find(b) is not None)
    if wanted not in BACKENDS:
        raise MisuseError(f"--voice must be auto, {', '.join(BACKENDS)}, not '{wanted}'")
    if wanted != "mel":
        weights.need(wanted)
    return wanted


def voice_of(backend: str) -> Voice:
    """The features of a backend that `choose` named, its weights loaded."""
    if backend == "mel":
        return MelVoice()
    from talkhead_cli.track.ssl import SslVoice

    return SslVoice(backend, weights.load(backend))
