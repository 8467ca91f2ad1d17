"""Scores of a rendered film against the true one, both measured by the same face mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap

from talkhead_cli.contracts import LIPS
from talkhead_cli.jobs import loss_networks
from talkhead_cli.store import weights
from talkhead_cli.track import face
from talkhead_cli.track.pose import RIGID

MEASURE_PX = 512
BLOCK = 12  # frames per block of the bootstrap: syllables are not independent samples

Array = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Seen:
    """A film and the face in it: pictures (T, s, s, 3) uint8 · mesh (T, 478, 3) in px at
    MEASURE_PX, gaps interpolated · found (T,)."""

    pictures: Pixels
    mesh: Array
    found: NDArray[np.bool_]


def face_boxes(mesh: Array, size_px: int) -> NDArray[np.int64]:
    """Convert mesh (T, 478, 2) in shares of the side to boxes (T, 4) x0 y0 x1 y1 in pixels."""
    low = np.floor(mesh.min(1) * size_px).clip(0, size_px - 8)
    high = np.ceil(mesh.max(1) * size_px).clip(8, size_px)
    return np.concatenate([low, high], 1).astype(np.int64)


def psnr(a: Array, b: Array) -> float:
    """Return the peak signal-to-noise ratio of two pictures in [0, 1], dB."""
    return float(-10 * np.log10(max(float(((a - b) ** 2).mean()), 1e-12)))


def picture_scores(truth: Pixels, rendered: Pixels, boxes: NDArray[np.int64]) -> dict[str, Any]:
    """Return PSNR, SSIM and, with its weights, LPIPS of pictures (T, s, s, 3), in the face's boxes
    (T, 4) and of the whole, means over frames."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    def ssim(a: Array, b: Array) -> float:
        one, two = (torch.from_numpy(x.transpose(2, 0, 1))[None] for x in (a, b))
        return float(torch.as_tensor(structural_similarity_index_measure(one, two, data_range=1.0)))

    scores: dict[str, list[tuple[float, float]]] = {"face_box": [], "full": []}
    for a8, b8, (x0, y0, x1, y1) in zip(truth, rendered, boxes, strict=True):
        a, b = a8.astype(np.float32) / 255, b8.astype(np.float32) / 255
        face_a, face_b = a[y0:y1, x0:x1], b[y0:y1, x0:x1]
        scores["face_box"].append((psnr(face_a, face_b), ssim(face_a, face_b)))
        scores["full"].append((psnr(a, b), ssim(a, b)))
    found: dict[str, Any] = {}
    for where, each in scores.items():
        decibels, similarity = np.mean(each, 0)
        found[where] = {"psnr_db": round(float(decibels), 4), "ssim": round(float(similarity), 4)}
    return found | _lpips_scores(truth, rendered, boxes)


@torch.no_grad()
def _lpips_scores(truth: Pixels, rendered: Pixels, boxes: NDArray[np.int64]) -> dict[str, Any]:
    """Return LPIPS (AlexNet) of face boxes and of whole pictures, if its weights are found."""
    if weights.find("lpips") is None:
        return {"lpips": None, "lpips_note": "its weights are not here: talkhead models pull lpips"}
    distance = loss_networks.lpips()

    def mean(cut: Callable[[Array, NDArray[np.int64]], Array]) -> float:
        pairs = (
            [torch.from_numpy(cut(x, box)).float()[None] / 255 for x in pair]
            for *pair, box in zip(truth, rendered, boxes, strict=True)
        )
        return round(float(np.mean([float(distance(a, b)) for a, b in pairs])), 4)

    return {
        "lpips": {
            "face_box": mean(lambda x, box: x[box[1] : box[3], box[0] : box[2]]),
            "full": mean(lambda x, box: x),
            "net": "alex, version 0.1",
        }
    }


def correlation(a: Array, b: Array) -> dict[str, Any]:
    """Return the Pearson correlation of series (T,), its 90 % block-bootstrap interval, spread."""
    n = len(a) // BLOCK * BLOCK
    blocks = np.arange(n).reshape(-1, BLOCK)

    def one(x: Array, y: Array) -> float:
        if x.std() < 1e-9 or y.std() < 1e-9:
            return 0.0
        return float(np.corrcoef(x, y)[0, 1])

    def resampled(pick: NDArray[Any], axis: int = -1) -> Array:
        picks = np.atleast_2d(pick).astype(int)
        values = [one(a[blocks[p].ravel()], b[blocks[p].ravel()]) for p in picks]
        return np.array(values) if pick.ndim > 1 else np.array(values[0])

    interval = bootstrap(
        (np.arange(len(blocks)),),
        resampled,
        n_resamples=1000,
        confidence_level=0.9,
        method="percentile",
        vectorized=True,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return {
        "r": round(one(a, b), 4),
        "interval_90": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "spread": round(float(b.std() / max(a.std(), 1e-9)), 4),
    }


def lip_scores(
    truth: Seen, rendered: Seen, controls: Sequence[Seen], baseline: Array
) -> dict[str, Any]:
    """Return how lips follow the truth's: rendered, of a linear predictor (T,), and driven by other
    speech."""
    true = face.lip_aperture(truth.mesh)
    wrong = [correlation(true, face.lip_aperture(c.mesh)) for c in controls]
    return {
        "correlation": correlation(true, face.lip_aperture(rendered.mesh)),
        "linear_baseline": correlation(true, baseline),
        "mismatched_control": {
            "r": round(float(np.median([w["r"] for w in wrong])), 4),
            "each": wrong,
            "note": f"median of {len(wrong)} other stretches of the person's speech",
        },
    }


def eye_scores(truth: Seen, rendered: Seen) -> dict[str, Any]:
    """Return how the lids' opening follows the truth's."""
    true, made = face.lid_gap(truth.mesh).mean(1), face.lid_gap(rendered.mesh).mean(1)
    return {"correlation": correlation(true, made), "blinks_in_truth": face.n_blinks(true)}


def likeness_scores(truth: Seen, rendered: Seen, skin: Array) -> dict[str, float]:
    """Return how far the mean face geometry and the mean face colour are from the truth; skin
    (T, h, w): how far each pixel shows the face."""
    shapes = []
    for film in (truth, rendered):
        flat = film.mesh[..., :2]
        rigid = flat[:, RIGID]
        size = face.face_height(flat)[:, None, None]
        shapes.append(((flat - rigid.mean(1, keepdims=True)) / size).mean(0))
    geometry = float(np.linalg.norm(shapes[0] - shapes[1], axis=-1).mean())
    colours = []
    weight = skin.astype(np.float64)[..., None]
    for film in (truth, rendered):
        small = np.stack(
            [cv2.resize(p, skin.shape[2:0:-1], interpolation=cv2.INTER_AREA) for p in film.pictures]
        )
        colours.append((small * weight).sum((0, 1, 2)) / weight.sum())
    return {
        "geometry_percent_of_face_height": round(100 * geometry, 3),
        "colour_of_255": round(float(np.abs(colours[0] - colours[1]).mean()), 2),
    }


def mouth_distance(truth: Seen, rendered: Seen) -> float:
    """Return the LMD: mean distance of the mouth's 20 landmarks, each set centred, px at 512."""
    a, b = (face.to_68(m.mesh)[:, LIPS, :2] for m in (truth, rendered))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return round(float(np.linalg.norm(a - b, axis=-1).mean()), 4)


def jitter(mesh: Array, frames: NDArray[np.integer[Any]]) -> float | None:
    """Return the mean norm of second time differences of rigid points; mesh (T, 478, >=2) in px of
    frames number (T,), of which only three in a row count.  None if there are not three."""
    change = np.linalg.norm(np.diff(mesh[:, RIGID, :2], 2, axis=0), axis=-1)
    change = change[frames[2:] - frames[:-2] == 2]
    return round(float(change.mean()), 4) if len(change) else None


def jitter_scores(
    truth: Seen, rendered: Seen, frames: NDArray[np.integer[Any]]
) -> dict[str, float | None]:
    """Return how much the head trembles in frames number (T,), and the truth's; None where that
    cannot be told, of frames too few or a truth that does not move."""
    true, made = jitter(truth.mesh, frames), jitter(rendered.mesh, frames)
    ratio = round(made / true, 4) if made is not None and true else None
    return {"truth": true, "render": made, "ratio": ratio}
