"""Paste-back: blend the avatar's face into the source video that the crop was cut from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from talkhead_cli import media
from talkhead_cli.contracts import FPS, MisuseError, TalkheadError
from talkhead_cli.media import Part
from talkhead_cli.store import Run, Workspace
from talkhead_cli.store.files import sha256_of
from talkhead_cli.track.crop import Crop
from talkhead_cli.track.face import CHIN, EYES, FACE_OVAL, TOP
from talkhead_cli.track.shots import Takes
from talkhead_cli.track.zoom import STILL

NOSE, MOUTH_CORNERS = 2, (61, 291)  # mesh points; NOSE is where the nose meets the lip
# How far the mask reaches below the jaw, times nose to chin: it must cover the chin of the video
# and the avatar's, whichever hangs lower.
BELOW_CHIN = 0.3
LIDS = (0.7, 0.5)  # half axes of the ellipse that is pasted around an eye, in eye widths
FEATHER = 0.035  # standard deviation of the mask's blur, face heights
MASK_PX = 160  # side that masks are drawn at; being blurred, they can be enlarged


@dataclass(frozen=True)
class Original:
    """The source video of a clip, at full size, and the location of the face in each frame.

    filmed (w, h) in pixels · mesh (T, 478, 2) as fractions of the crop's side · found (T,) whether
    a face was tracked; frames without one are left unchanged
    """

    part: Part
    filmed: tuple[int, int]
    crop: Crop
    takes: Takes
    mesh: NDArray[np.float32]
    found: NDArray[np.bool_]

    @classmethod
    def of(cls, space: Workspace, run: Run, film: Path) -> Original:
        """Open `film`, the source video of `space`; TalkheadError if it is another file, or if
        `run` was trained on another tracking of it."""
        space.refuse_without_footage("paste into the film it came from")
        known = space.manifest()
        source = known["source"]
        if not film.is_file():
            raise MisuseError(f"--into {film}: there is no such file")
        if known.get("dataset") is not None or sha256_of(film) != source["sha256"]:
            raise TalkheadError(
                f"--into takes the very film that '{space.id}' was preprocessed from "
                f"({source['name']}), and {film.name} is another file; frames would not fit"
            )
        if run.meta().get("footage") != space.fingerprint:
            raise TalkheadError(
                f"run '{run.name}' learnt from another track of the film than '{space.id}' holds "
                "now, and its face would be out of place; train it again"
            )
        about, tracks = media.probe(film), space.load("tracks")
        return cls(
            Part(film, *source.get("part", [source["first_frame"], None])),
            (about.width, about.height),
            Crop(**known["crop"]), Takes.from_array(space.load("shots")["takes"]),
            tracks["mesh_px"], tracks["found"],
        )  # fmt: skip

    @property
    def size(self) -> tuple[int, int]:
        """Output width and height, rounded down to even numbers as most containers require."""
        width, height = self.filmed
        return width // 2 * 2, height // 2 * 2

    def warnings(self, rows: NDArray[np.integer[Any]], side_px: int) -> Iterator[str]:
        """Yield warnings about a video of these rows (n,) with faces rendered at `side_px`."""
        if self.crop.side > 1.5 * side_px:
            yield (
                f"the head's square is {self.crop.side} px in the film, and the avatar draws it at "
                f"{side_px}: the mouth is softer than what is round it"
            )
        if len(rows) > len(self.found):
            yield (
                f"the speech is longer than the film ({len(self.found) / FPS:.1f} s), which is "
                "played backwards and forwards again"
            )
        n_lost = int((~self.found[rows]).sum())
        if n_lost:
            yield f"no face was tracked in {n_lost} of the frames: they stay as they were filmed"

    def with_faces(
        self, rows: NDArray[np.integer[Any]], faces: Iterable[NDArray[np.uint8]], *, eyes: bool
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield source frames (h, w, 3) in the order of `rows`, each with its face (s, s, 3).

        Only the region from the nose to below the chin is pasted and, with `eyes`, the eyes; all
        else stays as filmed."""
        whole = (0, 0, *self.size)
        zooms = {}
        for begin, end, zoom in self.takes.spans(0, len(self.found)):
            zooms.update(dict.fromkeys(range(begin, end), zoom))
        film = self.part.played(rows, crop=whole, size=self.size)
        for frame, row, face in zip(film, rows.tolist(), faces, strict=True):
            if self.found[row]:
                square = self.crop.zoomed(zooms.get(row, STILL), self.filmed)
                _paste(frame, face, face_mask(self.mesh[row], eyes=eyes), square)
            yield frame


def face_mask(mesh: NDArray[np.float32], *, eyes: bool) -> NDArray[np.float32]:
    """Return the blend mask (MASK_PX, MASK_PX) in [0, 1], soft at its edge, of a mesh (478, 2) in
    fractions of the crop's side."""
    nose, oval = mesh[NOSE], mesh[FACE_OVAL]
    cheeks = oval[oval[:, 1] > nose[1]]
    jaw = oval[oval[:, 1] > mesh[MOUTH_CORNERS, 1].mean()]
    outlines = [np.concatenate([cheeks, jaw + BELOW_CHIN * (mesh[CHIN] - nose)])]
    if eyes:
        outlines += [_round_eye(*mesh[list(corners)]) for *corners, _, _ in EYES]
    mask = np.zeros((MASK_PX, MASK_PX), np.float32)
    for outline in outlines:
        hull = cv2.convexHull((outline * MASK_PX * 16).round().astype(np.int32))
        cv2.fillConvexPoly(mask, hull, 1.0, lineType=cv2.LINE_8, shift=4)
    height = float(np.linalg.norm(mesh[TOP] - mesh[CHIN])) * MASK_PX
    soft: NDArray[np.float32] = cv2.GaussianBlur(mask, (0, 0), FEATHER * height)
    return soft


def _round_eye(outer: NDArray[np.float32], inner: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return an ellipse (n, 2) around an eye that covers its lids, shut or open."""
    along = (inner - outer) * LIDS[0]
    across = np.array([-along[1], along[0]]) * (LIDS[1] / LIDS[0])
    at = np.linspace(0, 2 * np.pi, 24)[:, None]
    ring: NDArray[np.float32] = (outer + inner) / 2 + np.cos(at) * along + np.sin(at) * across
    return ring


def _paste(
    frame: NDArray[np.uint8], face: NDArray[np.uint8], mask: NDArray[np.float32],
    square: tuple[int, int, int, int],
) -> None:  # fmt: skip
    """Blend a face over the square (x, y, w, h) of a frame, in place."""
    x, y, width, height = square
    how = cv2.INTER_AREA if width < len(face) else cv2.INTER_CUBIC
    over = cv2.resize(face, (width, height), interpolation=how).astype(np.float32)
    share = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    under = frame[y : y + height, x : x + width]  # `size` may have dropped a last row or column
    within = slice(under.shape[0]), slice(under.shape[1])
    under[:] = (under + share[within] * (over[within] - under)).round().astype(np.uint8)
