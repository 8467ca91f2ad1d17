"""Choose the networks that track a film and its sound: the best whose weights are there, or those
that are named."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError
from talkhead_cli.store import weights
from talkhead_cli.track import embedding, face
from talkhead_cli.track.embedding import EmbeddingVoice
from talkhead_cli.track.voice import MelVoice

# By kind: what `auto` chooses from, best first; the last needs no weights but the wheels'.
BEST_FIRST = {
    "voice": ("hubert", "wav2vec2", "embedding"),
    "detector": ("retinaface", "mediapipe"),
    "mesh": ("face-landmarker", "mediapipe"),
    "landmarks": ("mesh",),
    "labels": ("bisenet", "colour+motion"),
}
# Only when named: mel predicts lips less well than the embedding does; whether the others are
# better than the mesh's was not measured.
ON_REQUEST = {"voice": ("mel",), "landmarks": ("fan2d", "fan3d")}
# Seconds per picture on two cores; the defaults take hundredths.
SLOW_S = {"bisenet": 0.25, "fan2d": 0.6, "fan3d": 0.6}

Chosen = dict[str, str]  # kind -> backend


class Voice(Protocol):
    """Speech features, `rate_hz` rows a second, a whole number of rows per video frame."""

    name: str
    n_features: int
    rate_hz: int

    def features(
        self,
        samples: NDArray[Any],
        n_rows: int | None = None,
        *,
        first: int = 0,
        scale: float = 1.0,
    ) -> NDArray[np.float32]: ...


class Detector(Protocol):
    """Returns boxes (n, 4) of all faces in a picture (H, W, 3), largest first."""

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]: ...


class Mesh(Protocol):
    """Tracks the mesh (478, 3), in pixels, of one face through consecutive pictures (H, W, 3)."""

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32] | None: ...


def choose(wanted: Sequence[str] = ()) -> Chosen:
    """Choose a backend for every kind; `wanted` names some as kind=name.  Never downloads.

    "auto" is the best whose weights are on this machine.
    """
    names = dict.fromkeys(BEST_FIRST, "auto")
    for text in wanted:
        kind, _, name = text.partition("=")
        if kind not in BEST_FIRST:
            raise MisuseError(
                f"--backend must be kind=name with a kind of {', '.join(BEST_FIRST)}, not '{text}'"
            )
        names[kind] = name
    return {kind: _one(kind, name) for kind, name in names.items()}


def warnings(chosen: Chosen) -> list[str]:
    """Return a sentence for each chosen backend that is slow, if there is no GPU."""
    slow = {kind: name for kind, name in chosen.items() if name in SLOW_S}
    if not slow:
        return []
    import torch  # takes three seconds, so only if needed

    if torch.cuda.is_available():
        return []
    return [
        f"{kind} by {name} take about {SLOW_S[name]} s a frame on two cores "
        f"(--backend {kind}={BEST_FIRST[kind][-1]} is many times faster)"
        for kind, name in slow.items()
    ]


def _one(kind: str, name: str) -> str:
    *better, last = BEST_FIRST[kind]
    if name == "auto":
        return next((b for b in better if weights.find(b) is not None), last)
    known = (*BEST_FIRST[kind], *ON_REQUEST.get(kind, ()))
    if name not in known:
        raise MisuseError(f"--backend {kind}= must be auto, {', '.join(known)}, not '{name}'")
    if name in weights.KNOWN:
        weights.need(name)
    return name


def voice_of(backend: str) -> Voice:
    """Return the speech features of a backend."""
    if backend == "mel":
        return MelVoice()
    if backend == "embedding":
        return EmbeddingVoice(weights.shipped(embedding.WEIGHTS))
    from talkhead_cli.track.ssl import SslVoice

    return SslVoice(backend, weights.load(backend))


def detector_of(backend: str) -> AbstractContextManager[Detector]:
    """Return the face detector of a backend."""
    if backend == "mediapipe":
        return face.FaceDetector()
    from talkhead_cli.track.facenets import RetinaDetector

    return RetinaDetector(lambda net: _fill(net, backend, "facexlib"))


def mesh_of(backend: str) -> AbstractContextManager[Mesh]:
    """Return the face mesh tracker of a backend."""
    return face.FaceMesh() if backend == "mediapipe" else face.TaskMesh(weights.verified(backend))


def landmarks_of(backend: str) -> Any:
    """Return what places 68 landmarks on a face with a known mesh; None: the mesh's own."""
    if backend == "mesh":
        return None
    from talkhead_cli.track.facenets import FanLandmarks

    return FanLandmarks(
        lambda net: _fill(net, backend, "face-alignment"), in_space=backend == "fan3d"
    )


def parser_of(backend: str) -> Any:
    """Return the network that labels single pictures; None: use skin colour and motion."""
    if backend == "colour+motion":
        return None
    from talkhead_cli.track.facenets import FaceParser

    return FaceParser(lambda net: _fill(net, backend, "facexlib"))


def _fill(net: Any, backend: str, library: str) -> None:
    weights.load_into(net, backend, weights.load(backend), library)
