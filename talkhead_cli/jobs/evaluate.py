"""Evaluate a run on footage that it was not trained on.

Protocol: the held-out end of the clip, driven by its own sound; head pose, shoulders, eyes,
gaze and brows are the footage's (an oracle, as in the literature).  Truth and rendering are
measured by the same face mesh on pictures of the same size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap

from talkhead_cli import __version__, march, media
from talkhead_cli.blocks.speech import ridge_by_blocks, ridge_map
from talkhead_cli.contracts import FPS, SAMPLES_PER_FRAME, Progress, Signals, TalkheadError
from talkhead_cli.jobs import expert, footage, loss_networks
from talkhead_cli.jobs import maps as sheets
from talkhead_cli.jobs.footage import Footage, SpeechStats
from talkhead_cli.jobs.player import Player, to_bytes
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.store import Run, Workspace, weights
from talkhead_cli.track import face, voice
from talkhead_cli.track.pose import RIGID

MEASURE_PX = 512
BLOCK = 12  # frames per block of the bootstrap: syllables are not independent samples
BASELINE_STEPS = 57  # +- 280 ms of log-mel
BASELINE_RIDGES = (1e2, 3e2, 1e3, 3e3, 1e4, 3e4, 1e5)
N_CONTROLS = 3  # stretches of other speech

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Measured:
    """The face mesh tracked in a film: mesh (T, 478, 3) in px at MEASURE_PX, found (T,)."""

    mesh: Array
    found: NDArray[np.bool_]


def evaluate(
    home: Path,
    name: str,
    progress: Progress,
    *,
    run_name: str | None = None,
    device: str = "auto",
    maps: bool = False,
) -> tuple[dict[str, Any], list[Path]]:
    """Return metrics of a run on its held-out frames, and the files written into the run; with
    `maps` also a sheet of the method's auxiliary maps."""
    space = Workspace.open(home, name)
    run = pick_run(space, run_name, progress)
    space.refuse_without_footage("score it on")
    player = Player.load(run, march.device_of(device))
    if player.preset.data.holdout == 0:
        raise TalkheadError(
            f"run '{run.name}' was trained on the whole clip (data.holdout: 0), so nothing is "
            "left to evaluate on; train one with data.holdout above 0"
        )
    refuse_stale(space, run)
    if (run.meta().get("prior") or {}).get("knew_person"):
        progress.note(
            f"the prior of run '{run.name}' was trained on '{name}': these figures are too good"
        )
    clip = footage.load(space, player.preset.data, progress, stats=player.stats)
    if len(clip.held) < 2 * BLOCK:
        raise TalkheadError("fewer than a second of held-out frames has a face; nothing to score")
    judge = expert.newest(home, run.meta()["speech"])
    held = clip.held.numpy()
    truth = np.ascontiguousarray(clip.pictures[held])
    signals = clip.signals[clip.held]

    progress.stage("render held-out", len(held))
    # includes the speech before the held-out frames that the method needs as context
    first = max(0, int(held[0]) - player.avatar.past)
    stretch, own = clip.signals[first : int(held[-1]) + 1], clip.held - first
    heard = player.listen(stretch)[own]
    rendered, heads, seconds, n_points = _render(player, heard, progress)
    seen_truth, seen = _measure(truth, progress), _measure(rendered, progress)
    others, controls = _other_speech(clip, len(stretch)), []
    for index, audio in enumerate(others):
        progress.stage(f"control {index + 1} of {len(others)}", len(held))
        mute, *_ = _render(player, player.listen(stretch.with_(audio=audio))[own], progress)
        controls.append(_measure(mute, progress))

    sound = media.read_wav(space.audio)
    boxes = face_boxes(space.load("tracks")["mesh_px"][held], clip.size_px)
    figures = {
        "identity": name, "run": run.name, "talkhead": __version__,
        "protocol": {
            "frames": [int(held[0]), int(held[-1])], "n_frames": len(held), "fps": FPS,
            "size_px": clip.size_px,
            "driven_by": "held-out sound; pose, shoulders, eyes, gaze, brows of the footage",
            "face_box": "bounding box of the tracked face mesh, per frame",
            "average": "mean over frames",
            "interval": f"90 %, block bootstrap, blocks of {BLOCK} frames",
        },
        "picture": _picture_figures(truth, rendered, boxes),
        "pasted": None if heads is None else _pasted_figures(clip, held, truth, heads, boxes),
        "lips": _lip_figures(seen_truth, seen, controls, _linear_baseline(clip, sound)),
        "eyes": _eye_figures(seen_truth, seen),
        "likeness": _likeness_figures(clip, held, truth, rendered, seen_truth, seen),
        "lmd_px_at_512": _lmd(seen_truth, seen),
        "sync": _sync_figures(judge, space, (truth, seen_truth), (rendered, seen), signals,
                              progress),
        "jitter_px_at_512": _jitter_figures(seen_truth, seen),
        "face_found": float(seen.found.mean()),
        "render": {
            "frames_per_second": round(len(held) / seconds, 2),
            "points_per_frame": round(n_points / len(held)),
            "note": "marching and compositing alone, without encoding",
        },
        "training_seconds": run.meta().get("seconds"),
        "prior": run.meta().get("prior"),
    }  # fmt: skip
    made = _write_films(run.evaluation, truth, rendered, sound, held)
    if maps:
        made.append(sheets.draw(player, heard, truth, run.evaluation / "maps.png"))
    # last: where the figures exist, the films do
    return figures, [run.write_figures(figures), *made]


def refuse_stale(space: Workspace, run: Run) -> None:
    """Raise TalkheadError if the clip was preprocessed again since the run was trained on it."""
    if run.meta()["footage"] != space.fingerprint:
        raise TalkheadError(
            f"'{space.id}' was preprocessed again since run '{run.name}' was trained; train it anew"
        )


def _render(
    player: Player, signals: Signals, progress: Progress
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, float, int]:
    """Render pictures (T, s, s, 3) uint8; return them, the heads alone if the method marches heads
    only, the seconds spent and the number of field points."""
    pictures, heads, n_points, began = [], [], 0, time.perf_counter()
    for frame, points in player.pictures(signals):
        pictures.append(to_bytes(frame.rgb))
        if "head" in frame.parts:
            heads.append(to_bytes(frame.parts["head"]))
        n_points += points
        progress.advance()
    seconds = time.perf_counter() - began
    return np.stack(pictures), np.stack(heads) if heads else None, seconds, n_points


def _measure(pictures: NDArray[np.uint8], progress: Progress) -> Measured:
    progress.stage("measure", len(pictures))
    rows = []
    with face.FaceMesh() as mesh:
        for rgb in pictures:
            size = (MEASURE_PX, MEASURE_PX)
            rows.append(mesh(cv2.resize(rgb, size, interpolation=cv2.INTER_CUBIC)))
            progress.advance()
    found = np.array([r is not None for r in rows])
    if not found.any():
        raise TalkheadError("no face is found in the pictures; the run has not learnt one")
    blank = np.full((face.N_MESH, 3), np.nan)
    mesh_rows = np.stack([blank if r is None else r for r in rows])
    return Measured(face.fill_gaps(mesh_rows, found), found)


def _other_speech(clip: Footage, n: int) -> list[torch.Tensor]:
    """Return windows (n, W, A) of stretches of the same person's training speech."""
    heard = clip.speaking
    spare = len(heard) - n
    starts = np.linspace(0, spare, N_CONTROLS).astype(int)
    if spare < (N_CONTROLS - 1) * BLOCK:  # they would be one and the same: go round instead
        starts = np.arange(N_CONTROLS) * len(heard) // N_CONTROLS
        heard = heard.repeat((int(starts[-1]) + n) // len(heard) + 1)
    return [clip.signals.audio[heard[s : s + n]] for s in starts]


def face_boxes(mesh: Array, size_px: int) -> NDArray[np.int64]:
    """Convert mesh (T, 478, 2) in shares of the side to boxes (T, 4) x0 y0 x1 y1 in pixels."""
    low = np.floor(mesh.min(1) * size_px).clip(0, size_px - 8)
    high = np.ceil(mesh.max(1) * size_px).clip(8, size_px)
    return np.concatenate([low, high], 1).astype(np.int64)


def psnr(a: Array, b: Array) -> float:
    """Return the peak signal-to-noise ratio of two pictures in [0, 1], dB."""
    return float(-10 * np.log10(max(float(((a - b) ** 2).mean()), 1e-12)))


def _picture_figures(
    truth: NDArray[np.uint8], rendered: NDArray[np.uint8], boxes: NDArray[np.int64]
) -> dict[str, Any]:
    from torchmetrics.functional.image import structural_similarity_index_measure

    def ssim(a: Array, b: Array) -> float:
        one, two = (torch.from_numpy(x.transpose(2, 0, 1))[None] for x in (a, b))
        return float(torch.as_tensor(structural_similarity_index_measure(one, two, data_range=1.0)))

    rows: dict[str, list[float]] = {k: [] for k in ("pf", "sf", "p", "s")}
    for a8, b8, (x0, y0, x1, y1) in zip(truth, rendered, boxes, strict=True):
        a, b = a8.astype(np.float32) / 255, b8.astype(np.float32) / 255
        rows["pf"].append(psnr(a[y0:y1, x0:x1], b[y0:y1, x0:x1]))
        rows["sf"].append(ssim(a[y0:y1, x0:x1], b[y0:y1, x0:x1]))
        rows["p"].append(psnr(a, b))
        rows["s"].append(ssim(a, b))
    mean = {k: round(float(np.mean(v)), 4) for k, v in rows.items()}
    return {
        "face_box": {"psnr_db": mean["pf"], "ssim": mean["sf"]},
        "full": {"psnr_db": mean["p"], "ssim": mean["s"]},
        **_lpips_figures(truth, rendered, boxes),
    }


@torch.no_grad()
def _lpips_figures(
    truth: NDArray[np.uint8], rendered: NDArray[np.uint8], boxes: NDArray[np.int64]
) -> dict[str, Any]:
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
            "full": mean(lambda x, box: x), "net": "alex, version 0.1",
        }
    }  # fmt: skip


def _pasted_figures(
    clip: Footage, held: NDArray[np.int64], truth: NDArray[np.uint8], heads: NDArray[np.uint8],
    boxes: NDArray[np.int64],
) -> dict[str, Any]:  # fmt: skip
    """Return picture figures of the marched heads pasted on the true rest by the true labels, as
    part of the literature scores.  They flatter, so no table shows them with the others."""
    pasted = []
    for frame, true, head in zip(held, truth, heads, strict=True):
        label = clip.labels[frame, :3].astype(np.float32).sum(0).clip(0, 255) / 255
        size = (clip.size_px, clip.size_px)
        share = cv2.resize(label, size, interpolation=cv2.INTER_LINEAR)[..., None]
        pasted.append((share * head + (1 - share) * true).round().astype(np.uint8))
    return {
        **_picture_figures(truth, np.stack(pasted), boxes),
        "note": "true neck, torso and background; do not compare with 'picture'",
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
        (np.arange(len(blocks)),), resampled, n_resamples=1000, confidence_level=0.9,
        method="percentile", vectorized=True, random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return {
        "r": round(one(a, b), 4),
        "interval_90": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "spread": round(float(b.std() / max(a.std(), 1e-9)), 4),
    }


def _lip_figures(
    truth: Measured, seen: Measured, controls: list[Measured], baseline: Array
) -> dict[str, Any]:
    true = face.lip_aperture(truth.mesh)
    wrong = [correlation(true, face.lip_aperture(c.mesh)) for c in controls]
    return {
        "correlation": correlation(true, face.lip_aperture(seen.mesh)),
        "linear_baseline": correlation(true, baseline),
        "mismatched_control": {
            "r": round(float(np.median([w["r"] for w in wrong])), 4),
            "each": wrong,
            "note": f"median of {len(wrong)} other stretches of the person's speech",
        },
    }


def _linear_baseline(clip: Footage, sound: Array) -> Array:
    """Predict the held-out lip aperture (T,) from log-mel alone, by ridge regression.

    Trained on the person's own training frames; the ridge is chosen by block cross-validation
    there.
    """
    rows = clip.speaking
    stream = voice.features(sound)[:, : voice.N_MEL]
    stats = SpeechStats.of(stream, voice.RATE_HZ, clip.audible[: int(rows[-1]) + 1].numpy())
    frames = np.arange(len(clip.lip_truth))
    window = torch.from_numpy(stats.windows(stream, frames, BASELINE_STEPS)).flatten(1)
    target = torch.from_numpy(clip.lip_truth.astype(np.float32))[:, None]
    scale = target[rows].std()
    ridge, _ = ridge_by_blocks(window[rows], target[rows] / scale, BASELINE_RIDGES)
    weight, bias = ridge_map(window[rows], target[rows] / scale, ridge)
    return ((window[clip.held] @ weight + bias)[:, 0] * scale).numpy()


def _eye_figures(truth: Measured, seen: Measured) -> dict[str, Any]:
    true, made = face.lid_gap(truth.mesh).mean(1), face.lid_gap(seen.mesh).mean(1)
    return {"correlation": correlation(true, made), "blinks_in_truth": face.n_blinks(true)}


def _likeness_figures(
    clip: Footage, held: NDArray[np.int64], truth: NDArray[np.uint8],
    rendered: NDArray[np.uint8], seen_truth: Measured, seen: Measured,
) -> dict[str, Any]:  # fmt: skip
    """Return how far the mean face geometry and the mean face colour are from the truth."""
    shapes = []
    for measured in (seen_truth, seen):
        flat = measured.mesh[..., :2]
        rigid = flat[:, RIGID]
        size = face.face_height(flat)[:, None, None]
        shapes.append(((flat - rigid.mean(1, keepdims=True)) / size).mean(0))
    geometry = float(np.linalg.norm(shapes[0] - shapes[1], axis=-1).mean())
    colours = []
    for pictures in (truth, rendered):
        small = np.stack([cv2.resize(p, clip.labels.shape[2:], interpolation=cv2.INTER_AREA)
                          for p in pictures])  # fmt: skip
        skin = clip.labels[held, 0].astype(np.float64)[..., None]
        colours.append((small * skin).sum((0, 1, 2)) / skin.sum())
    return {
        "geometry_percent_of_face_height": round(100 * geometry, 3),
        "colour_of_255": round(float(np.abs(colours[0] - colours[1]).mean()), 2),
    }


def _lmd(truth: Measured, seen: Measured) -> float:
    """Return the mean distance of the mouth's 20 landmarks, each set centred, px at 512."""
    a, b = (face.to_68(m.mesh)[:, 48:68, :2] for m in (truth, seen))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return round(float(np.linalg.norm(a - b, axis=-1).mean()), 4)


def jitter(mesh: Array) -> float:
    """Return the mean norm of second time differences of rigid points; mesh (T, 478, >=2), px."""
    return float(np.linalg.norm(np.diff(mesh[:, RIGID, :2], 2, axis=0), axis=-1).mean())


def _jitter_figures(truth: Measured, seen: Measured) -> dict[str, float]:
    true, made = jitter(truth.mesh), jitter(seen.mesh)
    return {"truth": round(true, 4), "render": round(made, 4), "ratio": round(made / true, 4)}


def _sync_figures(
    found: expert.Judge | None, space: Workspace, truth: tuple[NDArray[np.uint8], Measured],
    rendered: tuple[NDArray[np.uint8], Measured], signals: Signals, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Return the scores of talkhead's own lip-sync expert, if there is one."""
    if found is None:
        return {"expert": None, "note": "no expert of this home; talkhead pretrain --expert"}
    if found.knows(space):
        progress.note(f"the lip-sync expert '{found.name}' was trained on '{space.id}'")
    try:
        judged = {
            name: found.judge(
                pictures,
                face.to_68(seen.mesh)[..., :2] / MEASURE_PX,
                signals.audio,
                signals.moment,
            )
            for name, (pictures, seen) in {"truth": truth, "render": rendered}.items()
        }
    except TalkheadError as error:
        progress.note(f"the lip-sync expert '{found.name}' says nothing: {error}")
        return {"expert": None, "note": str(error)}
    return {
        "expert": found.name, "knew_person": found.knows(space), **judged,
        "note": "talkhead's own expert; not comparable with SyncNet's LSE-C, LSE-D",
    }  # fmt: skip


def _write_films(
    folder: Path, truth: NDArray[np.uint8], rendered: NDArray[np.uint8], sound: Array,
    held: NDArray[np.int64],
) -> list[Path]:  # fmt: skip
    """Write truth.mp4 and render.mp4, near-lossless, sound.wav, and side_by_side.mp4 with sound."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    size = truth.shape[1]
    index = (held[:, None] * SAMPLES_PER_FRAME + np.arange(SAMPLES_PER_FRAME)).ravel()
    wav = folder / "sound.wav"
    media.write_wav(wav, sound[index])
    for name, pictures, tag in (("truth", truth, {}), ("render", rendered, TAG)):
        made.append(folder / f"{name}.mp4")
        with media.VideoWriter(made[-1], (size, size), crf=4, metadata=tag) as film:
            for rgb in pictures:
                film.write(rgb)
    made.append(folder / "side_by_side.mp4")
    both = (2 * size, size + sheets.STRIP_PX)
    with media.VideoWriter(made[-1], both, crf=12, audio=wav, metadata=TAG) as film:
        for true, made_up in zip(truth, rendered, strict=True):
            film.write(sheets.side_by_side([("truth", true), ("avatar", made_up)]))
    return made


TAG = {"comment": "synthetic: made by talkhead evaluate", "talkhead_synthetic": "true"}
