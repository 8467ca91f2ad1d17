"""What the stages of preprocessing share: a film, where results go, and what was found so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from talkhead_cli import media
from talkhead_cli.contracts import FPS, Progress, UnfitError
from talkhead_cli.jobs.backends import Chosen
from talkhead_cli.store import FILM_PX, Workspace
from talkhead_cli.track import face
from talkhead_cli.track.crop import Crop, choose_crop
from talkhead_cli.track.cuts import Takes
from talkhead_cli.track.zoom import common_window

MIN_SECONDS = 3.0


@dataclass
class Material:
    """The part of a film to preprocess, by which networks, and the identity that gets the results.

    What is derived here from stored results may be asked for once the stage `mesh` is done.
    """

    space: Workspace
    part: media.Part
    probe: media.Probe
    progress: Progress
    chosen: Chosen
    with_audio: bool = True

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.part.path.name

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the film."""
        return self.probe.width, self.probe.height

    @property
    def n_declared(self) -> int:
        """Number of frames of the part, if the declared duration is right."""
        return self.part.n_frames or round(self.probe.duration_s * FPS) - self.part.first

    @cached_property
    def faces(self) -> face.Faces:
        """The tracked mesh with gaps interpolated; UnfitError if too little of a face is seen."""
        stored = self.space.load("mesh")
        found = stored["found"]
        if not found.any():
            raise UnfitError(f"no face was found in {self.name}; film one person facing the camera")
        for n_frames, what in (
            (len(found), f"of {self.name} could be read"),
            (int(self.kept.sum()), f"of {self.name} show one person in one picture, between cuts"),
            (int(found.sum()), f"of {self.name} show a face"),
        ):
            if n_frames < MIN_SECONDS * FPS:
                raise UnfitError(
                    f"only {n_frames / FPS:.1f} s {what}; at least {MIN_SECONDS:.0f} s of talking "
                    "are needed"
                )
        return face.Faces(face.fill_gaps(stored["points"], found), found)

    @cached_property
    def usable(self) -> NDArray[np.bool_]:
        """Which frames (T,) can be learnt from or scored: those with a face, none near a gap."""
        return ~(np.convolve(~self.faces.found, np.ones(5), "same") > 0)

    @property
    def n_frames(self) -> int:
        return len(self.faces.found)

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Which frames (T,) belong to the kept shots."""
        kept: NDArray[np.bool_] = self.space.load("shots")["kept"]
        return kept

    @cached_property
    def takes(self) -> Takes:
        """The kept shots."""
        return Takes.from_array(self.space.load("shots")["takes"])

    @cached_property
    def crop(self) -> Crop:
        """The square around the head, inside the area that all kept frames show; UnfitError if it
        is too small."""
        bounds = common_window([take.zoom for take in self.takes], self.size)
        return choose_crop(self.faces.points, self.faces.found, bounds)

    def cropped(self, n_frames: int, first: int = 0) -> Iterator[NDArray[np.uint8]]:
        """Yield crops (FILM_PX, FILM_PX, 3) from frame `first` on, with zooms undone."""
        for begin, end, zoom in self.takes.spans(first, first + n_frames):
            yield from self.part.frames(
                first=begin,
                n_frames=end - begin,
                crop=self.crop.zoomed(zoom, self.size),
                size=(FILM_PX, FILM_PX),
            )
