"""Evaluate a run on footage that it was not trained on.

Protocol: the held-out end of the clip, driven by its own sound; head pose, shoulders, eyes,
gaze and brows are the footage's (an oracle, as in the literature).  Truth and rendering are
measured by the same face mesh on pictures of the same size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from talkhead_cli import __version__, march, media
from talkhead_cli.blocks.speech import ridge_by_blocks, ridge_map
from talkhead_cli.contracts import FPS, SAMPLES_PER_FRAME, Progress, Signals, TalkheadError
from talkhead_cli.jobs import expert, footage, scores
from talkhead_cli.jobs import maps as sheets
from talkhead_cli.jobs.footage import Footage, SpeechStats
from talkhead_cli.jobs.player import Player, to_bytes
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.jobs.scores import BLOCK, MEASURE_PX, Seen
from talkhead_cli.store import Run, Workspace
from talkhead_cli.track import face, voice

BASELINE_STEPS = 57  # +- 280 ms of log-mel
BASELINE_RIDGES = (1e2, 3e2, 1e3, 3e3, 1e4, 3e4, 1e5)
N_CONTROLS = 3  # stretches of other speech

Array = NDArray[np.floating[Any]]


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
        progress.note(flattered(run, name))
    clip = footage.load(space, player.preset.data, progress, stats=player.stats)
    if len(clip.held) < 2 * BLOCK:
        raise TalkheadError("fewer than a second of held-out frames has a face; nothing to score")
    judge = expert.newest(home, run.meta()["speech"])
    held = clip.held.numpy()
    true_pictures = np.ascontiguousarray(clip.pictures[held])

    progress.stage("render held-out", len(held))
    # includes the speech before the held-out frames that the method needs as context
    first = max(0, int(held[0]) - player.avatar.past)
    stretch, own = clip.signals[first : int(held[-1]) + 1], clip.held - first
    heard = player.listen(stretch)[own]
    made = _render(player, heard, progress)
    truth, rendered = measured(true_pictures, progress), measured(made.pictures, progress)
    others, controls = _other_speech(clip, len(stretch)), []
    for index, audio in enumerate(others):
        progress.stage(f"control {index + 1} of {len(others)}", len(held))
        mute = _render(player, player.listen(stretch.with_(audio=audio))[own], progress)
        seen = measured(mute.pictures, progress)
        controls.append(replace(seen, pictures=mute.pictures[:0]))  # its mesh is all that counts

    sound = media.read_wav(space.audio)
    boxes = scores.face_boxes(space.load("tracks")["mesh_fractions"][held], clip.size_px)
    figures = {
        "identity": name,
        "run": run.name,
        "talkhead": __version__,
        "protocol": {
            "frames": [int(held[0]), int(held[-1])],
            "n_frames": len(held),
            "fps": FPS,
            "size_px": clip.size_px,
            "driven_by": "held-out sound; pose, shoulders, eyes, gaze, brows of the footage",
            "of_the_whole_clip": "what tracking measures once: focal length, shape, eyes, mattes",
            "face_box": "bounding box of the tracked face mesh, per frame",
            "average": "mean over frames",
            "interval": f"90 %, block bootstrap, blocks of {BLOCK} frames",
        },
        "picture": scores.picture_scores(true_pictures, made.pictures, boxes),
        "pasted": _pasted_figures(clip, true_pictures, made.heads, boxes),
        "lips": scores.lip_scores(truth, rendered, controls, _linear_baseline(clip, sound)),
        "eyes": scores.eye_scores(truth, rendered),
        "likeness": scores.likeness_scores(truth, rendered, clip.labels[held, 0]),
        "lmd_px_at_512": scores.mouth_distance(truth, rendered),
        "sync": _sync_figures(judge, space, truth, rendered, clip.signals[clip.held], progress),
        "jitter_px_at_512": scores.jitter_scores(truth, rendered, held),
        "face_found": float(rendered.found.mean()),
        "render": {
            "frames_per_second": round(len(held) / made.seconds, 2),
            "points_per_frame": round(made.n_points / len(held)),
            "note": "marching and compositing alone, without encoding",
        },
        "training_seconds": run.meta().get("seconds"),
        "prior": run.meta().get("prior"),
    }
    files = _write_films(run.evaluation, true_pictures, made.pictures, sound, held)
    if maps:
        files.append(sheets.draw(player, heard, true_pictures, run.evaluation / "maps.png"))
    # last: where the figures exist, the films do
    return figures, [run.write_figures(figures), *files]


def flattered(run: Run, name: str) -> str:
    """Return what to say of figures whose prior has seen the person."""
    return f"the prior of run '{run.name}' was trained on '{name}': these figures are too good"


def refuse_stale(space: Workspace, run: Run) -> None:
    """Raise TalkheadError if the clip was preprocessed again since the run was trained on it."""
    if run.meta()["footage"] != space.fingerprint:
        raise TalkheadError(
            f"'{space.id}' was preprocessed again since run '{run.name}' was trained; train it anew"
        )


@dataclass(frozen=True)
class Rendering:
    """pictures (T, s, s, 3) uint8 · heads: the heads alone, if the method marches only heads ·
    seconds that it took · n_points of the field"""

    pictures: NDArray[np.uint8]
    heads: NDArray[np.uint8] | None
    seconds: float
    n_points: int


def _render(player: Player, signals: Signals, progress: Progress) -> Rendering:
    pictures, heads, n_points, began = [], [], 0, time.perf_counter()
    for frame, points in player.pictures(signals):
        pictures.append(to_bytes(frame.rgb))
        if "head" in frame.parts:
            heads.append(to_bytes(frame.parts["head"]))
        n_points += points
        progress.advance()
    seconds = time.perf_counter() - began
    return Rendering(np.stack(pictures), np.stack(heads) if heads else None, seconds, n_points)


def measured(pictures: NDArray[np.uint8], progress: Progress) -> Seen:
    """Track the face in a film (T, s, s, 3); TalkheadError if it is found in no frame."""
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
    return Seen(pictures, face.fill_gaps(mesh_rows, found), found)


def _other_speech(clip: Footage, n: int) -> list[torch.Tensor]:
    """Return windows (n, W, A) of stretches of the same person's training speech."""
    heard = clip.speaking
    spare = len(heard) - n
    starts = np.linspace(0, spare, N_CONTROLS).astype(int)
    if spare < (N_CONTROLS - 1) * BLOCK:  # they would be one and the same: go round instead
        starts = np.arange(N_CONTROLS) * len(heard) // N_CONTROLS
        heard = heard.repeat((int(starts[-1]) + n) // len(heard) + 1)
    return [clip.signals.audio[heard[s : s + n]] for s in starts]


def _pasted_figures(
    clip: Footage,
    truth: NDArray[np.uint8],
    heads: NDArray[np.uint8] | None,
    boxes: NDArray[np.int64],
) -> dict[str, Any] | None:
    """Return picture figures of the marched heads, if there are any, pasted on the true rest by the
    true labels, as part of the literature scores.  They flatter, so no table shows them with the
    others."""
    if heads is None:
        return None
    pasted = []
    for frame, true, head in zip(clip.held.numpy(), truth, heads, strict=True):
        label = clip.labels[frame, :3].astype(np.float32).sum(0).clip(0, 255) / 255
        size = (clip.size_px, clip.size_px)
        share = cv2.resize(label, size, interpolation=cv2.INTER_LINEAR)[..., None]
        pasted.append((share * head + (1 - share) * true).round().astype(np.uint8))
    return {
        **scores.picture_scores(truth, np.stack(pasted), boxes),
        "note": "true neck, torso and background; do not compare with 'picture'",
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


def _sync_figures(
    found: expert.Judge | None,
    space: Workspace,
    truth: Seen,
    rendered: Seen,
    signals: Signals,
    progress: Progress,
) -> dict[str, Any]:
    """Return the scores of talkhead's own lip-sync expert, if there is one."""
    if found is None:
        why = "this home has no lip-sync expert that hears as this run does"
        return {"expert": None, "note": f"{why}; talkhead pretrain --expert makes one"}
    if found.knows(space):
        progress.note(f"the lip-sync expert '{found.name}' was trained on '{space.id}'")
    try:
        judged = {
            name: found.judge(
                seen.pictures,
                face.to_68(seen.mesh)[..., :2] / MEASURE_PX,
                signals.audio,
                signals.moment,
            )
            for name, seen in {"truth": truth, "render": rendered}.items()
        }
    except TalkheadError as error:
        progress.note(f"the lip-sync expert '{found.name}' says nothing: {error}")
        return {"expert": None, "note": str(error)}
    return {
        "expert": found.name,
        "knew_person": found.knows(space),
        **judged,
        "note": "talkhead's own expert; not comparable with SyncNet's LSE-C, LSE-D",
    }


def _write_films(
    folder: Path,
    truth: NDArray[np.uint8],
    rendered: NDArray[np.uint8],
    sound: Array,
    held: NDArray[np.int64],
) -> list[Path]:
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
