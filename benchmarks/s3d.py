"""Evaluation of S3D-NeRF and the lip-sync expert on people outside their training set.

`strangers` trains on everybody but a group and renders each of the group from one frame;
`crowded` adds synthetic speakers with the others' faces; `deformations` reduces the deformation
step by step; `ears` tests the lip-sync expert on a group that it was not trained on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import acted
import numpy as np
import torch

from talkhead_cli.avatars import s3d
from talkhead_cli.contracts import SilentProgress
from talkhead_cli.jobs import expert, footage, runs
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.evaluate import evaluate
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.pretrain import pretrain
from talkhead_cli.store import Workspace
from talkhead_cli.store.checkpoint import Run

SHIFTS = (-8, -4, -2, 2, 4, 8)  # frames by which sound is shifted
PIECE_S = 10.0  # of footage per measured offset
PRESETS = ["s3d", "tiny"]
EXPERT_SCALE = 1.0  # of the expert's training steps


def strangers(
    home: Path,
    everybody: Sequence[str],
    groups: Sequence[Sequence[str]],
    preset_names: Sequence[str] = PRESETS,
) -> dict[str, Any]:
    """Return figures of each person of `groups`, from a prior of everybody outside the group."""
    rows: dict[str, Any] = {}
    for group in groups:
        others = _others(everybody, group)
        ear = _expert(home, others, "-".join(group))
        label = "-".join(["strangers", *preset_names[1:], *group])
        prior = _pretrained(home, others, label, 1.0, preset_names=preset_names)
        for name in group:
            rows[name] = {"expert": ear.name} | _scored(home, name, prior, preset_names)
    return {"groups": [list(g) for g in groups], "people": len(everybody), "rows": rows}


def crowded(
    home: Path, everybody: Sequence[str], group: Sequence[str], work: Path, *, scale: float
) -> dict[str, Any]:
    """Compare, on `group`, a prior of everybody else with one also trained on synthetic speakers
    with the same faces, in equally many steps."""
    others, left_out = _others(everybody, group), "-".join(group)
    _expert(home, others, left_out)
    made = acted.cast(home, others, work)
    asked = {"people": others, "and synthetic speakers": [*others, *made]}
    names = [f"{kind}-{left_out}" for kind in ("strangers", "crowded")]
    with ProcessPoolExecutor(len(asked), get_context("spawn")) as pool:
        priors = list(pool.map(partial(_alone, home, scale), asked.values(), names))
    # one after the other: both write to the same people
    scored = ({name: _scored(home, name, prior) for name in group} for prior in priors)
    rows = dict(zip(asked, scored, strict=True))
    return {
        "left_out": list(group),
        "scale": scale,
        "synthetic": made,
        "table": _table(rows),
        "rows": rows,
    }


def _alone(home: Path, scale: float, others: Sequence[str], name: str) -> Run:
    """Pretrain in one thread."""
    torch.set_num_threads(1)
    return _pretrained(home, others, name, scale)


def deformations(
    home: Path, everybody: Sequence[str], group: Sequence[str], *, scale: float
) -> dict[str, Any]:
    """Compare, on `group`, the kinds of deformation, and training without the expert's sync loss,
    at `scale` of the steps each."""
    others = _others(everybody, group)
    _expert(home, others, "-".join(group))
    rows: dict[str, Any] = {}
    left_out = "-".join(group)
    for kind in s3d.DEFORMATIONS:
        with _built_of(kind):
            prior = _pretrained(home, others, f"{kind}-{left_out}", scale)
            rows[kind] = {name: _scored(home, name, prior) for name in group}
    prior = _pretrained(
        home, others, f"unjudged-{left_out}", scale, "pretrain.stages.sync.weights.sync=0"
    )
    rows["without the expert's word"] = {name: _scored(home, name, prior) for name in group}
    return {"left_out": list(group), "scale": scale, "table": _table(rows), "rows": rows}


def _table(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return means over people, by kind."""
    return {
        kind: {
            key: _mean([_at(person["figures"], path) for person in people.values()])
            for key, path in _KEYS.items()
        }
        for kind, people in rows.items()
    }


_KEYS = {
    "lmd_px_at_512": ("lmd_px_at_512",),
    "lips_r": ("lips", "correlation", "r"),
    "control_r": ("lips", "mismatched_control", "r"),
    "sync_confidence": ("sync", "render", "confidence"),
    "sync_pairs_found": ("sync", "render", "pairs_found"),
    "psnr_face_db": ("picture", "face_box", "psnr_db"),
}


def ears(home: Path, everybody: Sequence[str], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Test the expert on unseen people: share of pairs in which a moment's own sound fits better
    than another's, and its error in frames on sound that was shifted by a known number, relative
    to the same piece unshifted."""
    rows: dict[str, Any] = {}
    for group in groups:
        judge = _expert(home, _others(everybody, group), "-".join(group))
        for name in group:
            rows[name] = _judged(judge, home, name)
    misses = [m for row in rows.values() for m in row["misses_frames"]]
    return {
        "pairs_found": _mean([row["pairs_found"] for row in rows.values()]),
        "within_one_frame": _mean([abs(m) <= 1 for m in misses]),
        "n_shifts": len(misses),
        "rows": rows,
    }


def _judged(judge: expert.Judge, home: Path, name: str) -> dict[str, Any]:
    data = presets.load(["expert", "tiny"]).data.model_copy(update={"holdout": 0.0})
    clip = footage.load(Workspace.open(home, name), data, SilentProgress())
    rows = clip.speaking
    last = len(clip.signals) - 1
    n = int(PIECE_S * 25)
    misses, offsets = [], []
    for first in range(0, max(1, len(rows) - n // 2), n):
        piece = rows[first : first + n]
        margin = max(SHIFTS)
        inner = piece[margin:-margin]
        if len(inner) < 50 or int(inner[-1] - inner[0]) != len(inner) - 1:
            continue  # too short, or not in one piece

        def shift(by: int, inner: torch.Tensor = inner) -> float:
            signals = clip.signals[inner]
            moved = signals.with_(audio=clip.signals.audio[(inner + by).clamp(0, last)])
            marks = signals.landmarks_2d.numpy()
            shown = clip.pictures[inner.numpy()]
            said = judge.judge(shown, marks, moved.audio, moved.moment)
            return said["sound_after_lips_s"] * 25

        here = shift(0)
        offsets.append(round(here, 2))
        # sound taken from later frames comes earlier
        misses += [round(shift(by) - here + by, 2) for by in SHIFTS]
    signals = clip.signals[rows]
    marks = signals.landmarks_2d.numpy()
    whole = judge.judge(clip.pictures[rows.numpy()], marks, signals.audio, signals.moment)
    return {"seconds": len(rows) / 25, **whole, "offsets_frames": offsets, "misses_frames": misses}


def _built_of(kind: str) -> Any:
    """Patch avatars to be built with this kind of deformation."""

    class Method(s3d.S3D):
        @classmethod
        def build(cls, size: Any, **named: Any) -> s3d.S3D:  # type: ignore[override]
            made = s3d.S3D.build(size, **named)
            made.deformation = kind
            return made

    return mock.patch.object(runs, "avatar_class", lambda _: Method)


def _others(everybody: Sequence[str], group: Sequence[str]) -> list[str]:
    return [name for name in everybody if name not in group]


def _expert(home: Path, others: Sequence[str], name: str) -> expert.Judge:
    made = pretrain(
        home,
        others,
        f"ear-{name}",
        SilentProgress(),
        preset_names=["expert", "tiny"],
        settings=[f"pretrain.scale={EXPERT_SCALE}"],
        device="cpu",
    )
    made.write_meta(finished_at=time.time())  # the newest expert is used
    return expert.load_expert(made)


def _pretrained(
    home: Path,
    others: Sequence[str],
    name: str,
    scale: float,
    *more: str,
    preset_names: Sequence[str] = PRESETS,
) -> Run:
    return pretrain(
        home,
        others,
        f"{name}-x{scale:g}",
        SilentProgress(),
        preset_names=preset_names,
        settings=[f"pretrain.scale={scale}", *more],
        device="cpu",
    )


def _scored(
    home: Path, name: str, prior: Run, preset_names: Sequence[str] = PRESETS
) -> dict[str, Any]:
    run = finetune(
        home,
        name,
        SilentProgress(),
        preset_names=preset_names,
        prior=prior.name,
        device="cpu",
        run_name=f"s3d-from-{prior.name}",
        fresh=True,
    )
    figures, _ = evaluate(home, name, SilentProgress(), run_name=run.name, device="cpu")
    return {"prior": {k: prior.meta()[k] for k in ("seconds", "steps")}, "figures": figures}


def _at(figures: dict[str, Any], path: Sequence[str]) -> Any:
    found: Any = figures
    for key in path:
        found = None if found is None else found.get(key)
    return found


def _mean(values: Sequence[Any]) -> float | None:
    some = [float(v) for v in values if v is not None]
    return round(float(np.mean(some)), 4) if some else None
