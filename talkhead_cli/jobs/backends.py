"""Which network reads what of a film and its sound: the best whose weights are there, or the one
that is named."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.blocks.perceptual import Perceptual
from talkhead_cli.contracts import MisuseError, Progress
from talkhead_cli.jobs.preset import Train
from talkhead_cli.store import weights
from talkhead_cli.track import face
from talkhead_cli.track.voice import MelVoice

# By kind: those that `auto` takes, best first; the last needs no weights but the wheel's.
BEST_FIRST = {
    "voice": ("hubert", "wav2vec2", "mel"),
    "detector": ("retinaface", "mediapipe"),
    "mesh": ("face-landmarker", "mediapipe"),
    "landmarks": ("mesh",),
    "labels": ("bisenet", "colour+motion"),
}
# Only when named: half a second a frame on two cores, and nobody has measured that they are better
# than the mesh's.
ON_REQUEST = {"landmarks": ("fan2d", "fan3d")}

LPIPS = ("lpips", "whole_lpips")  # losses by its word

Chosen = dict[str, str]  # kind -> backend


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


class Detector(Protocol):
    """Boxes (n, 4) of all faces in a picture (H, W, 3), largest first."""

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]: ...


class Mesh(Protocol):
    """The mesh (478, 3) of one face through consecutive pictures (H, W, 3), in pixels."""

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32] | None: ...


def choose(wanted: Sequence[str] = ()) -> Chosen:
    """A backend for every kind, of which `wanted` names some as kind=name; never downloads.

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


def _one(kind: str, name: str) -> str:
    *better, last = BEST_FIRST[kind]
    if name == "auto":
        return next((b for b in better if weights.find(b) is not None), last)
    known = (*BEST_FIRST[kind], *ON_REQUEST.get(kind, ()))
    if name not in known:
        raise MisuseError(f"--backend {kind}= must be auto, {', '.join(known)}, not '{name}'")
    if name != last:
        weights.need(name)
    return name


def voice_of(backend: str) -> Voice:
    """Speech features."""
    if backend == "mel":
        return MelVoice()
    from talkhead_cli.track.ssl import SslVoice

    return SslVoice(backend, weights.load(backend))


def detector_of(backend: str) -> AbstractContextManager[Detector]:
    """What finds faces."""
    if backend == "mediapipe":
        return face.FaceDetector()
    from talkhead_cli.track.facenets import RetinaDetector

    return RetinaDetector(lambda net: _fill(net, backend, "facexlib"))


def mesh_of(backend: str) -> AbstractContextManager[Mesh]:
    """What follows a face."""
    return face.FaceMesh() if backend == "mediapipe" else face.TaskMesh(weights.right(backend))


def landmarks_of(backend: str) -> Any:
    """What places 68 landmarks on a face whose mesh is known; None: the mesh's own."""
    if backend == "mesh":
        return None
    from talkhead_cli.track.facenets import FanLandmarks

    return FanLandmarks(
        lambda net: _fill(net, backend, "face-alignment"), in_space=backend == "fan3d"
    )


def parser_of(backend: str) -> Any:
    """What labels a picture by itself; None: by the skin's colour and by motion."""
    if backend == "colour+motion":
        return None
    from talkhead_cli.track.facenets import FaceParser

    return FaceParser(lambda net: _fill(net, backend, "facexlib"))


def perceptual(train: Train, progress: Progress) -> Perceptual | None:
    """LPIPS for stages that weigh it; None if none does or, with a word, without its weights."""
    stages = [name for name, stage in train.stages.items()
              if stage.steps and any(stage.weights.get(k) for k in LPIPS)]  # fmt: skip
    if not stages:
        return None
    if weights.find("lpips") is None:
        progress.note(
            f"stage '{stages[0]}' does without LPIPS, whose weights are not here (talkhead models "
            "pull lpips): SSIM and gradients alone keep pictures sharp"
        )
        return None
    return lpips()


def lpips() -> Perceptual:
    """LPIPS's network; refuses without its weights."""
    return Perceptual(lambda net: _fill(net, "lpips", "torchvision"))


def _fill(net: Any, backend: str, library: str) -> None:
    weights.fill(net, backend, weights.load(backend), library)
