"""The stages of preprocessing in their order, each done once for the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from talkhead_cli.contracts import FPS
from talkhead_cli.jobs.stages import film, labels, mesh, sound, tracks
from talkhead_cli.jobs.stages.material import Material
from talkhead_cli.store import FILM_PX
from talkhead_cli.store.files import digest

# A stage's version is part of its key: raise it when its result changes.
VERSIONS = {"sound": 4, "mesh": 7, "film": 6, "tracks": 6, "labels": 2}


class Stages:
    """The stages; one is skipped if its stored key matches its inputs."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.n_done = 0
        self._keys: dict[str, str] = {}

    def run(self, source: str, which_face: str, offset_s: float | None) -> None:
        """Do all stages.

        source: sha256 of the video · which_face: see `scout` · offset_s: delay of the sound to
        correct; None measures it
        """
        material, chosen = self.material, self.material.chosen
        if material.with_audio:
            sound.require_audible(material)
        place = [material.part.first, material.part.n_frames]
        networks = [chosen[kind] for kind in ("detector", "mesh", "landmarks")]
        self.do("mesh", lambda: mesh.run(material, which_face), source, which_face, place, networks)
        self.do(
            "sound",
            lambda: sound.run(material, offset_s),
            material.with_audio,
            chosen["voice"],
            offset_s,
            needs=("mesh",),
        )
        crop = material.crop  # refuses a face that is seen too little or too small
        material.space.forget_aside()
        if crop.side < FILM_PX:
            material.progress.note(
                f"the head's square is {crop.side} px in the video; it is enlarged to {FILM_PX} px"
            )
        square = [crop.x, crop.y, crop.side, FILM_PX]
        self.do("film", lambda: film.run(material), square, chosen["labels"], needs=("mesh",))
        self.do("tracks", lambda: tracks.run(material), needs=("film",))
        self.do("labels", lambda: labels.run(material), needs=("tracks",))

    def do(
        self, stage: str, work: Callable[[], None], *inputs: Any, needs: tuple[str, ...] = ()
    ) -> None:
        """Run a stage unless it was done from exactly these inputs and `needs` stages."""
        space = self.material.space
        key = digest(VERSIONS[stage], inputs, [self._keys[n] for n in needs])
        self._keys[stage] = key
        if not space.is_done(stage, key):
            self.n_done += 1
            space.mark_undone(stage)
            work()
            space.mark_done(stage, key)

    def facts(self) -> dict[str, Any]:
        """Return what the manifest records of the stages' results."""
        material = self.material
        crop, with_audio = material.crop, material.with_audio
        return {
            "fps": FPS,
            "size_px": FILM_PX,
            "n_frames": material.n_frames,
            "n_found": int(material.faces.found.sum()),
            "n_cut_away": int((~material.kept).sum()),
            "crop": {"x": crop.x, "y": crop.y, "side": crop.side},
            "backends": {
                **material.chosen,
                "matte": "mediapipe-selfie",
                "voice": material.chosen["voice"] if with_audio else "none",
            },
            "has_audio": with_audio,
            "offset": sound.recorded_offset(material) if with_audio else None,
            "faces_seen": int(material.space.load("mesh")["n_faces"]),
        }
