"""Per-pixel maps of the person: matte, skin, shoulder motion, soft labels, background plate.

Offline defaults only: MediaPipe's selfie segmentation for the matte, a colour model of
the person's own face for skin, image registration for the shoulders, and, for hair
against torso, which motion (the head's or the shoulders') explains the pixel better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solveh_banded
from scipy.special import expit

from talkhead_cli.contracts import FPS, LABELS
from talkhead_cli.track.face import CHIN, FACE_OVAL, INNER_LIPS, TOP, face_height

Array = NDArray[np.floating[Any]]
Picture = NDArray[np.uint8]

MAP_PX = 128  # side of label and skin maps
MATTE_PX = 256
TRACE = 40  # matte value, of 255, above which a pixel is foreground
FIXED = 0.15  # share of the frames above which an object beside the person is furniture
BODY_PX = 160  # side of the pictures in which the shoulders are registered
N_CLEAR = 3  # frames that must leave a pixel clear; mattes of one or two may be mistaken


class Segmenter:
    """Segmentation of person and background. Use as a context manager."""

    def __init__(self) -> None:
        import mediapipe as mp

        self._net = mp.solutions.selfie_segmentation.SelfieSegmentation(model_selection=0)

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: object) -> None:
        self._net.close()

    def __call__(self, rgb: Picture) -> Picture:
        """rgb (H, W, 3) -> matte (MATTE_PX, MATTE_PX), 255 = person."""
        small = cv2.resize(rgb, (MATTE_PX, MATTE_PX), interpolation=cv2.INTER_AREA)
        mask = self._net.process(small).segmentation_mask
        return np.clip(mask * 255 + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class SkinModel:
    """Gaussian of the person's skin in (log luma, Cr, Cb)."""

    mean: Array
    precision: Array

    @staticmethod
    def _space(rgb: Array) -> Array:
        ycc = cv2.cvtColor(rgb.reshape(1, -1, 3).astype(np.uint8), cv2.COLOR_RGB2YCrCb)[0]
        ycc = ycc.astype(np.float32)
        ycc[:, 0] = 24 * np.log2(ycc[:, 0] + 8)  # brightness weighs less than hue
        return ycc

    @classmethod
    def fit(cls, colours: Array) -> SkinModel:
        """colours (n, 3) RGB 0..255 of cheeks, nose and forehead."""
        samples = cls._space(colours)
        middle = np.median(samples, 0)
        keep = np.abs(samples - middle) < 3 * np.median(np.abs(samples - middle), 0) * 1.48 + 2
        samples = samples[keep.all(1)] if keep.all(1).sum() > 20 else samples
        # widened: neck and shoulders are lit differently from the face
        spread = np.cov(samples.T) + np.diag([25.0**2, 3.0**2, 3.0**2])
        return cls(samples.mean(0), np.linalg.inv(spread))

    def __call__(self, rgb: Picture) -> Picture:
        """rgb (H, W, 3) -> likeness to skin (MAP_PX, MAP_PX), 255 = the face's own colour."""
        small = cv2.resize(rgb, (MAP_PX, MAP_PX), interpolation=cv2.INTER_AREA)
        off = self._space(small) - self.mean
        distance = np.einsum("ni,ij,nj->n", off, self.precision, off)
        likeness = expit((12 - distance) / 2)
        return (255 * likeness).astype(np.uint8).reshape(MAP_PX, MAP_PX)


def skin_samples(rgb: Picture, mesh: Array) -> Array:
    """Colours (n, 3) at the mesh's cheeks, nose and forehead; mesh in pixels of rgb."""
    places = np.array([50, 280, 205, 425, 4, 5, 195, 151, 9, 108, 337, 101, 330, 36, 266, 117, 346])
    at = np.clip(mesh[places, :2].astype(int), 0, np.array(rgb.shape[1::-1]) - 1)
    return rgb[at[:, 1], at[:, 0]].astype(np.float32)


class BodyTracker:
    """Registers the shoulders of each frame to a reference frame.

    Maximises the enhanced correlation coefficient (Evangelidis and Psarakis 2008) of a rigid
    motion over the torso of the reference.
    """

    def __init__(self, reference: Picture, torso: Picture) -> None:
        """reference (H, W, 3); torso (MAP_PX, MAP_PX), 255 where the reference shows it."""
        self._reference = self._grey(reference)
        self._mask = cv2.resize(torso, (BODY_PX, BODY_PX)) // 128 * 255
        self._warp = np.eye(2, 3, dtype=np.float32)

    @staticmethod
    def _grey(rgb: Picture) -> Picture:
        small = cv2.resize(rgb, (BODY_PX, BODY_PX), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)

    def __call__(self, rgb: Picture) -> NDArray[np.float32] | None:
        """Return the affine (2, 3) from frame to reference, in fractions of the side, or None."""
        criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 1e-4)
        try:
            _, warp = cv2.findTransformECC(
                self._grey(rgb),
                self._reference,
                self._warp.copy(),
                cv2.MOTION_EUCLIDEAN,
                criteria,
                self._mask,
                5,
            )
        except cv2.error:  # no convergence: the next frame starts from the identity
            self._warp = np.eye(2, 3, dtype=np.float32)
            return None
        self._warp = warp
        unit = warp.copy()
        unit[:, 2] /= BODY_PX
        return unit


def body_motion(warps: Array, found: NDArray[np.bool_], pivot: Array) -> Array:
    """Convert frame-to-reference affines (T, 2, 3) to smooth motion of the shoulders (T, 3).

    Right and down of the pivot (2,), in fractions of the side, and roll (rad), all minus the
    clip's mean, so that the mean posture is the canonical one.
    """
    rows = np.arange(len(warps))
    angle = np.arctan2(warps[:, 1, 0], warps[:, 0, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    # reference = R p + b, so the reference's pivot lies at R^T (pivot - b) in the frame
    seen = np.einsum("tji,tj->ti", rotation, pivot - warps[:, :, 2])
    motion = np.concatenate([seen - pivot, -angle[:, None]], -1)
    if not found.any():
        return np.zeros_like(motion)
    jump = np.abs(motion - np.median(motion[found], 0)).max(-1)
    trusted = found & (jump < 0.25)
    if not trusted.any():
        return np.zeros_like(motion)
    for column in range(3):
        motion[~trusted, column] = np.interp(rows[~trusted], rows[trusted], motion[trusted, column])
    motion = smooth(motion, cutoff_hz=4.0)
    return motion - motion.mean(0)


def smooth(values: Array, cutoff_hz: float) -> Array:
    """Whittaker smoothing of (T, k) with second differences; half amplitude at cutoff_hz."""
    n = len(values)
    if n < 3:
        return values
    lam = 1 / (2 * np.sin(np.pi * cutoff_hz / FPS)) ** 4
    band = np.zeros((3, n))
    stencil = (1.0, -2.0, 1.0)
    for a in range(3):
        for b in range(a, 3):
            band[b - a, a : a + n - 2] += lam * stencil[a] * stencil[b]
    band[0] += 1
    return solveh_banded(band, values, lower=True)


def similarity(source: Array, target: Array) -> NDArray[np.float32]:
    """Least-squares 2D similarity (2, 3) that maps points source (n, 2) onto target (n, 2)."""
    a, b = source - source.mean(0), target - target.mean(0)
    norm = (a**2).sum()
    cos = (a * b).sum() / norm
    sin = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / norm
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([turn, (target.mean(0) - turn @ source.mean(0))[:, None]], 1).astype(
        np.float32
    )


def _polygon(points: Array) -> Array:
    """Filled polygon (n, 2) in shares of the side -> antialiased (MAP_PX, MAP_PX) in [0, 1]."""
    canvas = np.zeros((MAP_PX, MAP_PX), np.uint8)
    fixed = np.round((points * MAP_PX - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], 255, cv2.LINE_AA, 4)
    return canvas.astype(np.float32) / 255


def torso_prior(mesh: Array) -> Array:
    """Probability that a pixel of the person is torso rather than hair, by position alone.

    mesh (478, 2) in fractions of the side -> (MAP_PX, MAP_PX) in [0, 1]
    """
    y, x = (np.mgrid[:MAP_PX, :MAP_PX].astype(np.float32) + 0.5) / MAP_PX
    height = face_height(mesh)
    middle = mesh[[CHIN, TOP], 0].mean()
    # shoulders slope: the torso begins lower further out
    line = mesh[CHIN, 1] + height * (0.12 + 0.10 * ((x - middle) / height) ** 2)
    return 1 / (1 + np.exp(-(y - line) / (0.06 * height)))


@dataclass(frozen=True)
class RegionMaps:
    """Torso-or-hair map of the reference frame (MAP_PX, MAP_PX) in [0, 1], its mesh (478, 2)."""

    torso: Array
    mesh: Array

    def moved(self, mesh: Array, body: Array, pivot: Array) -> tuple[Array, Array]:
        """Return (hair, torso) maps, warped by the head's mesh and the body's motion (3,)."""
        to_map = np.array([[MAP_PX, 0], [0, MAP_PX]], np.float32)
        head = similarity(self.mesh[FACE_OVAL] @ to_map, mesh[FACE_OVAL] @ to_map)
        cos, sin = np.cos(body[2]), np.sin(body[2])
        turn = np.array([[cos, -sin], [sin, cos]])
        shift = (pivot + body[:2] - turn @ pivot) * MAP_PX
        shoulders = np.concatenate([turn, shift[:, None]], 1).astype(np.float32)
        size = (MAP_PX, MAP_PX)
        edge = {"borderMode": cv2.BORDER_REPLICATE}
        hair = cv2.warpAffine(1 - self.torso, head, size, **edge)
        torso = cv2.warpAffine(self.torso, shoulders, size, **edge)
        return hair, torso


def motion_evidence(
    reference: Picture,
    frames: list[Picture],
    meshes: list[Array],
    reference_mesh: Array,
    to_reference: list[Array],
) -> Array:
    """Log-odds (MAP_PX, MAP_PX) that a pixel moves with the shoulders, not the head.

    frames are (MAP_PX, MAP_PX, 3); `to_reference` their body affines in fractions of the side.
    Each frame is warped onto the reference by either motion; the smaller residual wins.
    """
    evidence = np.zeros((MAP_PX, MAP_PX), np.float32)
    calm = cv2.GaussianBlur(reference.astype(np.float32), (0, 0), 0.8)
    size = (MAP_PX, MAP_PX)
    for frame, mesh, affine in zip(frames, meshes, to_reference, strict=True):
        head = similarity(mesh[FACE_OVAL] * MAP_PX, reference_mesh[FACE_OVAL] * MAP_PX)
        body = affine.copy()
        body[:, 2] *= MAP_PX
        moved = cv2.GaussianBlur(frame.astype(np.float32), (0, 0), 0.8)
        errors = [
            np.abs(cv2.warpAffine(moved, m, size, borderMode=cv2.BORDER_REPLICATE) - calm).mean(-1)
            for m in (head, body)
        ]
        evidence += cv2.GaussianBlur(np.clip(errors[0] - errors[1], -20, 20), (0, 0), 2.0)
    return evidence / (4.0 * max(len(frames), 1) ** 0.5)


def fixtures(mattes: Sequence[Picture]) -> Array:
    """Share of the frames in which each pixel (MATTE_PX, MATTE_PX) is foreground apart from the
    person.  High for an ornament that the network takes for a face in every frame, low for a hand
    that comes and goes."""
    seen = np.zeros((MATTE_PX, MATTE_PX), np.float32)
    for mask in mattes:
        parts, person = _parts(mask)
        seen += (parts > 0) & (parts != person)
    return seen / max(len(mattes), 1)


def without(mask: Picture, furniture: Array) -> Picture:
    """Return the matte without objects that `fixtures` finds in over FIXED of the frames."""
    parts, person = _parts(mask)
    kept = mask.copy()
    for part in range(1, int(parts.max()) + 1):
        where = parts == part
        if part != person and furniture[where].mean() > FIXED:
            faint = cv2.dilate(where.astype(np.uint8), np.ones((7, 7))) > 0  # with its faint rim
            kept[faint & (parts != person)] = 0
    return kept


def _parts(mask: Picture) -> tuple[NDArray[np.int32], int]:
    """Number connected components (MATTE_PX, MATTE_PX), 0: background; also return the largest."""
    n, parts, stats, _ = cv2.connectedComponentsWithStats((mask > TRACE).astype(np.uint8))
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()) if n > 1 else 0
    return np.asarray(parts, np.int32), largest


def label_maps(
    mesh: Array, matte: Picture, skin: Picture, hair: Array, torso: Array
) -> NDArray[np.uint8]:
    """Return soft labels (len(LABELS), MAP_PX, MAP_PX), 255 = certain, that sum to 255 (rounded).

    mesh (478, 2) in shares of the side · matte (MATTE_PX, MATTE_PX) · skin (MAP_PX, MAP_PX)
    · hair, torso from RegionMaps.moved
    """
    person = cv2.resize(matte, (MAP_PX, MAP_PX), interpolation=cv2.INTER_AREA) / np.float32(255)
    oval = _polygon(mesh[FACE_OVAL])
    mouth = _polygon(mesh[INNER_LIPS]) * oval
    person = np.maximum(person, oval)
    y, x = (np.mgrid[:MAP_PX, :MAP_PX].astype(np.float32) + 0.5) / MAP_PX
    height = face_height(mesh)
    jaw = mesh[[172, 397]]
    half = 0.5 * np.linalg.norm(jaw[0] - jaw[1])
    beside = np.abs(x - jaw[:, 0].mean()) - half
    below = y - mesh[CHIN, 1]
    # The neck is skin under the jaw, as far as 0.3 face heights below the chin and as wide as the
    # jaw, with soft edges; what else is of the person is hair or torso.
    under_jaw = y > mesh[[172, 397], 1].min()
    throat = under_jaw * expit((0.30 * height - below) / (0.05 * height))
    throat = throat * expit(-beside / (0.03 * height))
    neck = person * (1 - oval) * throat * (skin / np.float32(255))
    rest = np.clip(person - oval - neck, 0, 1)
    share = torso / np.maximum(hair + torso, 1e-3)
    maps = {
        "face": oval - mouth,
        "mouth": mouth,
        "hair": rest * (1 - share),
        "neck": neck,
        "torso": rest * share,
    }
    maps["background"] = np.clip(1 - sum(maps.values()), 0, 1)
    stack = np.stack([maps[name] for name in LABELS])
    stack /= np.maximum(stack.sum(0), 1e-6)
    return np.round(stack * 255).astype(np.uint8)


def parsed_labels(parsed: NDArray[np.uint8], own: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return soft labels (len(LABELS), MAP_PX, MAP_PX): the matte's person, a face parser's parts.

    parsed: the parser's labels of the picture · own: those of `label_maps`, which hold the matte
    and decide where the parser finds no part of a person (hands, held objects)
    """
    person = 255 - own[-1].astype(np.float32)
    share = parsed[:-1].astype(np.float32) + 0.02 * own[:-1]
    share /= np.maximum(share.sum(0), 1e-6)
    parts = np.floor(share * person)  # the rounding remainder goes to the background
    return np.concatenate([parts, 255 - parts.sum(0, keepdims=True)]).clip(0, 255).astype(np.uint8)


def make_plate(
    frames: list[Picture], mattes: list[Picture], n_first: int | None = None
) -> tuple[Picture, Array]:
    """Return the background (H, W, 3) behind the person, and the share of frames showing it (H, W).

    Each pixel is the median over the frames whose matte, grown by a margin, leaves it clear; frames
    from number `n_first` on count where fewer than N_CLEAR earlier ones do.  Pixels never seen are
    filled smoothly from around them (`_spread`).
    """
    side = frames[0].shape[0]
    grow = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
    stack = np.stack(frames).astype(np.float32)
    for layer, matte in zip(stack, mattes, strict=True):
        person = cv2.dilate((matte > 25).astype(np.uint8), grow)
        layer[cv2.resize(person, (side, side), interpolation=cv2.INTER_NEAREST) > 0] = np.nan
    if n_first is not None:
        stack[n_first:, np.isfinite(stack[:n_first, ..., 0]).sum(0) >= N_CLEAR] = np.nan
    seen = np.isfinite(stack[..., 0]).mean(0)
    with np.errstate(all="ignore"):
        ordered = np.sort(stack, axis=0)  # NaN sorts last
        count = np.isfinite(stack[..., 0]).sum(0)
        middle = np.maximum(count - 1, 0) // 2
        plate = np.take_along_axis(ordered, middle[None, ..., None], 0)[0]
    known = count > 0
    plate[~known] = 0
    return _spread(plate, known.astype(np.float32)).round().astype(np.uint8), seen


def _spread(picture: Array, known: Array) -> Array:
    """Fill a picture (H, W, 3) where its confidence `known` (H, W, 0 to 1) is low, with averages
    of the finest known scale nearby (pull and push; Gortler et al. 1996, section 3.4)."""
    sure, (height, width) = known[..., None], known.shape
    if min(height, width) <= 2:
        mean = (picture * sure).mean((0, 1)) / max(float(sure.mean()), 1e-6)
        return picture * sure + mean * (1 - sure)
    weight = cv2.pyrDown(known)
    half = cv2.pyrDown(picture * sure) / np.maximum(weight, 1e-6)[..., None]
    coarse = _spread(half, np.minimum(1, 4 * weight))
    return picture * sure + cv2.pyrUp(coarse, dstsize=(width, height)) * (1 - sure)


def background_change(frames: list[Picture], mattes: list[Picture], plate: Picture) -> float:
    """Median difference, of 255, of the frames from the plate (H, W, 3), over pixels clear of the
    person in each frame; 0 if there are none."""
    side = plate.shape[0]
    grow = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
    off = []
    for frame, mask in zip(frames, mattes, strict=True):
        person = cv2.dilate((mask > 25).astype(np.uint8), grow)
        clear = cv2.resize(person, (side, side), interpolation=cv2.INTER_NEAREST)[::4, ::4] == 0
        gap = np.abs(frame[::4, ::4].astype(np.float32) - plate[::4, ::4]).mean(-1)
        off.append(gap[clear])
    joined = np.concatenate(off)
    return float(np.median(joined)) if len(joined) else 0.0


def body_pivot(mesh: Array) -> Array:
    """Return the shoulders' pivot (2,), half a face height under the chin, mesh units."""
    height = face_height(mesh)
    return mesh[CHIN] + np.array([0.0, 0.5 * height])
