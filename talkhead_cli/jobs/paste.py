"""Paste-back: blend the avatar's face into the source video that the crop was cut from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
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
from talkhead_cli.track.cuts import Takes
from talkhead_cli.track.face import CHIN, EYES, FACE_OVAL, MESH_TO_68, face_height
from talkhead_cli.track.zoom import STILL, Zoom

NOSE, MOUTH_CORNERS = 2, (61, 291)  # mesh points; NOSE is where the nose meets the lip
# How far the mask reaches below the jaw, times nose to chin: it must cover the chin of the video
# and the avatar's, whichever hangs lower.
BELOW_CHIN = 0.3
LIPS = 1.5  # times as large as the outline of the lips is what is always pasted
LIDS = (0.7, 0.5)  # half axes of the ellipse that is pasted around an eye, in eye widths
MASK_PX = 160  # side that masks are drawn at; being blurred, they can be enlarged
# In face heights: blur of the masks; blur before the avatar is compared with the video, and reach
# and blur of where they differ.
FEATHER, SAME_BLUR, REACH, CHANGED_BLUR = 0.035, 0.02, 0.09, 0.04
# Of 255: up to the first, avatar and video show the same; from the second on, the avatar counts.
SAME, OTHER = 8.0, 24.0
FADE = 0.85  # share of the last frame's difference that lasts, so that the paste does not flicker

Mask = NDArray[np.float32]


@dataclass(frozen=True)
class Original:
    """The source video of a clip, at full size, and the location of the face in each frame.

    filmed (w, h) in pixels · mesh (T, 478, 2) as fractions of the crop's side · stands (T,) the
    tracked row whose face is pasted into each frame, -1 for none: usually its own
    """

    part: Part
    filmed: tuple[int, int]
    crop: Crop
    takes: Takes
    mesh: NDArray[np.float32]
    stands: NDArray[np.int64]

    @classmethod
    def of(cls, space: Workspace, run: Run, film: Path) -> Original:
        """Open `film`, the source video of `space`; TalkheadError if it is another file, or if
        `run` was trained on another tracking of it."""
        if not space.video.exists():
            raise TalkheadError(
                f"'{space.id}' is here without its footage, as an imported avatar is; run first: "
                f"talkhead preprocess {film.name} --id {space.id}"
            )
        known = space.manifest()
        source = known["source"]
        if not film.is_file():
            raise MisuseError(f"--into {film}: there is no such file; give the video itself")
        if known.get("dataset") is not None or sha256_of(film) != source["sha256"]:
            raise TalkheadError(
                f"--into takes the very video that '{space.id}' was preprocessed from "
                f"({source['name']}), and {film.name} is another file; frames would not fit"
            )
        if run.meta().get("footage") != space.fingerprint:
            raise TalkheadError(
                f"run '{run.name}' learnt from another track of the video than '{space.id}' holds "
                "now, and its face would be out of place; train it again"
            )
        about, tracks = media.probe(film), space.load("tracks")
        takes = Takes.from_array(space.load("shots")["takes"])
        return cls(
            Part(film, *source.get("part", [source["first_frame"], None])),
            (about.width, about.height),
            Crop(**known["crop"]),
            takes,
            tracks["mesh_fractions"],
            stand_ins(tracks["found"], takes),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Output width and height, rounded down to even numbers as most containers require."""
        width, height = self.filmed
        return width // 2 * 2, height // 2 * 2

    def warnings(self, rows: NDArray[np.integer[Any]], side_px: int) -> Iterator[str]:
        """Yield warnings about a video of these rows (n,) with faces rendered at `side_px`."""
        if self.crop.side > 1.5 * side_px:
            yield (
                f"the head's square is {self.crop.side} px in the video, and the avatar draws it "
                f"at {side_px}: the mouth is softer than what is round it"
            )
        if len(rows) > len(self.stands):
            yield (
                f"the speech is longer than what was preprocessed of the video "
                f"({len(self.stands) / FPS:.1f} s), which is played backwards and forwards again"
            )
        n_lost = int((self.stands[rows] < 0).sum())
        if n_lost:
            yield (
                f"{n_lost} of the frames show no face that was tracked, or belong to shots that "
                "were left out: they stay as they were filmed, old mouth and all"
            )

    def with_faces(
        self, rows: NDArray[np.integer[Any]], faces: Iterable[NDArray[np.uint8]], *, eyes: bool
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield source frames (h, w, 3) in the order of `rows`, each with its face (s, s, 3).

        The mouth is always pasted and, with `eyes`, the eyes; the rest of the lower face, down to
        below the chin, where the avatar shows another face than the video.  All else stays as
        filmed."""
        whole = (0, 0, *self.size)
        zooms = {}
        for begin, end, zoom in self.takes.spans(0, len(self.stands)):
            zooms.update(dict.fromkeys(range(begin, end), zoom))
        changed: Mask | None = None
        with closing(self.part.played(rows, crop=whole, size=self.size)) as film:
            for row, face in zip(rows.tolist(), faces, strict=True):
                frame = next(film, None)
                if frame is None:
                    raise TalkheadError(
                        f"{self.part.path.name} ends before the frames that were tracked in it; "
                        "preprocess it again"
                    )
                zoom = zooms.get(int(self.stands[row]), STILL)  # at cuts, of the frame beside
                changed = self._pasted(frame, row, face, zoom, changed, eyes)
                yield frame

    def _pasted(
        self,
        frame: NDArray[np.uint8],
        row: int,
        face: NDArray[np.uint8],
        zoom: Zoom,
        changed: Mask | None,
        eyes: bool,
    ) -> Mask | None:
        """Paste a face into a frame, in place; return where it differs, given that of the frame
        before, or None without a face."""
        if self.stands[row] < 0:
            return None
        x, y, width, height = self.crop.zoomed(zoom, self.filmed)
        under = frame[y : y + height, x : x + width]
        seen = np.zeros((height, width, 3), np.uint8)  # `size` may have dropped a row or column
        seen[: under.shape[0], : under.shape[1]] = under
        mesh = self.mesh[self.stands[row]]
        now = difference(face, seen, float(face_height(mesh)))
        changed = now if changed is None else np.maximum(now, FADE * changed)
        always, maybe = face_masks(mesh, eyes=eyes)
        share = np.maximum(always, maybe * cv2.resize(changed, (MASK_PX, MASK_PX)))
        under[:] = _blended(seen, face, share)[: under.shape[0], : under.shape[1]]
        return changed


def stand_ins(found: NDArray[np.bool_], takes: Takes) -> NDArray[np.int64]:
    """Return for each row (T,) the row whose face stands for it: itself where one was found, else
    the neighbour's at the cuts that bound a take, whose frames trackers leave out, else -1."""
    stands = np.where(found, np.arange(len(found)), -1)
    for first, end, _ in takes:
        for edge, inner in ((first - 1, first), (end, end - 1)):
            if 0 <= edge < len(found) and stands[edge] < 0 and found[inner]:
                stands[edge] = inner
    return stands


def face_masks(mesh: Mask, *, eyes: bool) -> tuple[Mask, Mask]:
    """Return masks (MASK_PX, MASK_PX) in [0, 1], soft at their edges, of a mesh (478, 2) in
    fractions of the crop's side: of what is always pasted, and of the whole lower face."""
    nose, oval = mesh[NOSE], mesh[FACE_OVAL]
    cheeks = oval[oval[:, 1] > nose[1]]
    jaw = oval[oval[:, 1] > mesh[MOUTH_CORNERS, 1].mean()]
    lower = np.concatenate([cheeks, jaw + BELOW_CHIN * (mesh[CHIN] - nose)])
    lips = mesh[MESH_TO_68[48:60]]
    always = [lips.mean(0) + LIPS * (lips - lips.mean(0))]
    if eyes:
        always += [_round_eye(*mesh[list(corners)]) for *corners, _, _ in EYES]
    blur = FEATHER * float(face_height(mesh))
    return _filled(always, blur), _filled([lower], blur)


def difference(face: NDArray[np.uint8], seen: NDArray[np.uint8], height: float) -> Mask:
    """Return where an avatar's face (s, s, 3) differs from the video's square (h, h, 3), (s, s) in
    [0, 1]; `height`: of the face, in fractions of the side."""
    side = face.shape[1::-1]
    small = cv2.resize(seen, side, interpolation=cv2.INTER_AREA).astype(np.float32)
    px = height * len(face)
    off = np.abs(cv2.GaussianBlur(face - small, (0, 0), SAME_BLUR * px)).max(-1)
    reach = np.ones((max(1, round(REACH * px)),) * 2, np.uint8)
    off = cv2.GaussianBlur(cv2.dilate(off, reach), (0, 0), CHANGED_BLUR * px)
    share = np.clip((off - SAME) / (OTHER - SAME), 0, 1)
    return share * share * (3 - 2 * share)


def _filled(outlines: list[Mask], blur: float) -> Mask:
    """Return the mask of convex outlines (n, 2); everything in fractions of the side."""
    mask = np.zeros((MASK_PX, MASK_PX), np.float32)
    for outline in outlines:
        hull = cv2.convexHull((outline * MASK_PX * 16).round().astype(np.int32))
        cv2.fillConvexPoly(mask, hull, 1.0, lineType=cv2.LINE_8, shift=4)
    return cv2.GaussianBlur(mask, (0, 0), blur * MASK_PX)


def _round_eye(outer: Mask, inner: Mask) -> Mask:
    """Return an ellipse (n, 2) around an eye that covers its lids, shut or open."""
    along = (inner - outer) * LIDS[0]
    across = np.array([-along[1], along[0]]) * (LIDS[1] / LIDS[0])
    at = np.linspace(0, 2 * np.pi, 24)[:, None]
    return (outer + inner) / 2 + np.cos(at) * along + np.sin(at) * across


def _blended(seen: NDArray[np.uint8], face: NDArray[np.uint8], share: Mask) -> NDArray[np.uint8]:
    """Return the square (h, h, 3) with so much of the face (s, s, 3) as the share says."""
    side = seen.shape[1::-1]
    how = cv2.INTER_AREA if side[0] < len(face) else cv2.INTER_CUBIC
    over = cv2.resize(face, side, interpolation=how).astype(np.float32)
    weight = cv2.resize(share, side, interpolation=cv2.INTER_LINEAR)[..., None]
    return (seen + weight * (over - seen)).round().clip(0, 255).astype(np.uint8)
