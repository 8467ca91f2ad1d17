"""Gain from a prior of other people for people outside its training set, at equal steps.

`compare` trains each of some people on seconds of footage, with a prior and from scratch, at
shares of the steps, and scores the held-out ends.  Every row is stored in the work folder as soon
as it is made: the same command resumes where it stopped.  `heard` tests the speech stages alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from talkhead_cli.avatars.lokitalk import LokiTalk
from talkhead_cli.contracts import Portrait, SilentProgress
from talkhead_cli.jobs import evaluate, footage, scores
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.player import Player
from talkhead_cli.jobs.pretrain import pretrain
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.store import Run, Workspace
from talkhead_cli.track import face

PRESETS = ["lokitalk", "tiny"]
FIELD_STAGES = ("shape", "detail", "lips", "eyes")
STARTS = ("nothing", "prior", "prior, not met")  # the last: without the ID encoder
FIGURES = ("psnr_face_db", "psnr_full_db", "lmd_px_at_512", "lips_r", "eyes_r", "lips_spread")


def compare(
    home: Path,
    names: Sequence[str],
    others: Sequence[str],
    work: Path,
    *,
    seconds: Sequence[float],
    scales: Sequence[float],
    starts: Sequence[str] = STARTS[:2],
    seeds: int = 1,
) -> dict[str, Any]:
    """Compare starts, with one prior of `others`, none of them in `names`; one thread a row."""
    assert not set(names) & set(others)
    prior = "strangers"
    made = pretrain(
        home, others, prior, SilentProgress(), preset_names=PRESETS, device="cpu"
    ).meta()
    assert set(made["people"]) == set(others), "this prior is of other people; use another --work"
    folder = work / "transfer"
    folder.mkdir(exist_ok=True)
    wanted = [
        (start, float(length), scale, seed)
        for scale in sorted(scales)
        for seed in range(seeds)
        for length in sorted(seconds)
        for start in starts
    ]
    rows: list[dict[str, Any]] = []
    # One process per person: a training locks the person's workspace.
    with ProcessPoolExecutor(len(names), get_context("spawn")) as pool:
        for done in as_completed(
            [pool.submit(_rows, wanted, home, name, prior, folder) for name in names]
        ):
            rows += done.result()
    return {
        "people": list(names),
        "prior_of": list(others),
        "seeds": seeds,
        "pretrain": {k: made[k] for k in ("seconds", "steps")},
        "protocol": "held-out ends, driven by their own sound; poses and eyes of the footage",
        "mean": _means(rows),
        "rows": sorted(rows, key=lambda r: str(list(r.values()))),
    }


def heard(
    home: Path,
    groups: Sequence[Sequence[str]],
    everybody: Sequence[str],
    *,
    seconds: Sequence[float],
) -> dict[str, Any]:
    """Return how well mouth opening is predicted on held-out ends, from scratch and from a prior of
    people outside the group that it is used on.  No field is trained."""
    rows = []
    for group in groups:
        prior = f"voices-without-{'-'.join(group)}"
        others = [name for name in everybody if name not in group]
        quick = [f"pretrain.stages.{stage}.steps=0" for stage in ("shape", "detail")]
        made = pretrain(
            home,
            others,
            prior,
            SilentProgress(),
            preset_names=PRESETS,
            settings=quick,
            device="cpu",
        )
        assert set(made.meta()["people"]) == set(others), "of other people; use another --work"
        for name in group:
            for length in seconds:
                row: dict[str, Any] = {"name": name, "train_s": length}
                for start, begun in zip(STARTS, ("none", prior), strict=False):
                    settings = [f"train.stages.{stage}.steps=0" for stage in FIELD_STAGES]
                    settings += steps_of(1.0, length, from_prior=begun == prior)
                    run = finetune(
                        home,
                        name,
                        SilentProgress(),
                        preset_names=PRESETS,
                        settings=settings,
                        run_name=f"heard-{start}",
                        prior=begun,
                        device="cpu",
                        fresh=True,
                    )
                    row[start] = _opening(home, name, run)
                rows.append(row)
    means = [
        {"train_s": length}
        | {
            start: round(float(np.mean([r[start]["r"] for r in rows if r["train_s"] == length])), 3)
            for start in STARTS[:2]
        }
        for length in seconds
    ]
    return {"groups": [list(g) for g in groups], "seed": 0, "mean_r": means, "rows": rows}


def steps_of(scale: float, seconds: float, *, from_prior: bool) -> list[str]:
    """Return settings for `scale` of all steps on seconds of footage, of which a run from a prior
    would take a smaller share by itself."""
    share = presets.share_of_steps(presets.load(PRESETS), seconds) if from_prior else 1.0
    return [f"train.scale={scale / share:.6g}", f"data.train_s={seconds:g}"]


@torch.no_grad()
def _opening(home: Path, name: str, run: Run) -> dict[str, Any]:
    """Return the correlation of predicted and tracked mouth opening on held-out frames."""
    player = Player.load(run, torch.device("cpu"))
    clip = footage.load(
        Workspace.open(home, name), player.preset.data, SilentProgress(), pictures=False
    )
    held = clip.signals[clip.held]
    true, said = (
        (marks[:, 66, 1] - marks[:, 62, 1]).numpy()
        for marks in (held.landmarks, player.listen(held).landmarks)
    )
    return scores.correlation(true, said)


def _rows(
    wanted: Sequence[tuple[str, float, float, int]], home: Path, name: str, prior: str, folder: Path
) -> list[dict[str, Any]]:
    return [_row(home, name, *row, prior, folder) for row in wanted]


def _row(
    home: Path,
    name: str,
    start: str,
    length: float,
    scale: float,
    seed: int,
    prior: str,
    folder: Path,
) -> dict[str, Any]:
    """Return the figures of one training, stored or new."""
    torch.set_num_threads(1)
    label = f"{name}-{start.replace(', ', '-').replace(' ', '-')}-{length:g}s-{scale:g}-{seed}"
    kept = folder / f"{label}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    settings = steps_of(scale, length, from_prior=start != STARTS[0])
    with _unmet() if start == STARTS[2] else contextlib.nullcontext():
        run = finetune(
            home,
            name,
            SilentProgress(),
            preset_names=PRESETS,
            settings=settings,
            run_name=label,
            prior="none" if start == STARTS[0] else prior,
            device="cpu",
            seed=seed,
            fresh=True,
        )
    row = {
        "name": name,
        "start": start,
        "train_s": length,
        "scale": scale,
        "seed": seed,
        "seconds": run.meta()["seconds"],
        "steps": run.meta()["steps"],
        **score(home, name, label),
    }
    kept.write_text(json.dumps(row))
    return row


def score(home: Path, name: str, run_name: str) -> dict[str, float]:
    """Return a run's figures on its held-out frames, as in `evaluate`, without its controls."""
    space = Workspace.open(home, name)
    run = pick_run(space, run_name, SilentProgress())
    player = Player.load(run, torch.device("cpu"))
    clip = footage.load(space, player.preset.data, SilentProgress())
    held, quiet = clip.held.numpy(), SilentProgress()
    truth = np.ascontiguousarray(clip.pictures[held])
    film = evaluate._render(player, player.listen_to_rows(clip.signals, clip.held), quiet).pictures
    seen_truth, seen = evaluate.measured(truth, quiet), evaluate.measured(film, quiet)
    boxes = scores.face_boxes(space.load("tracks")["mesh_fractions"][held], clip.size_px)
    picture = scores.picture_scores(truth, film, boxes)
    lips = scores.correlation(face.lip_aperture(seen_truth.mesh), face.lip_aperture(seen.mesh))
    eyes = scores.correlation(*(face.lid_gap(m.mesh).mean(1) for m in (seen_truth, seen)))
    return {
        "psnr_face_db": picture["face_box"]["psnr_db"],
        "psnr_full_db": picture["full"]["psnr_db"],
        "lmd_px_at_512": scores.mouth_distance(seen_truth, seen),
        "lips_r": lips["r"],
        "eyes_r": eyes["r"],
        "lips_spread": lips["spread"],
        "lips_interval_90": lips["interval_90"],
        "eyes_interval_90": eyes["interval_90"],
    }


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over people and seeds, by start, footage and share of the steps."""
    keys = sorted({(r["train_s"], r["scale"], r["start"]) for r in rows})
    means = []
    for length, scale, start in keys:
        same = [r for r in rows if (r["train_s"], r["scale"], r["start"]) == (length, scale, start)]
        means.append(
            {"train_s": length, "scale": scale, "start": start, "n": len(same)}
            | {f: round(float(np.mean([r[f] for r in same])), 4) for f in FIGURES}
        )
    return means


@contextlib.contextmanager
def _unmet() -> Iterator[None]:
    """Start new people from the common weights alone, without the ID encoder's changes."""

    def let_go(self: LokiTalk, portrait: Portrait) -> None:
        self.transfer = None

    with mock.patch.object(LokiTalk, "meet", let_go):
        yield
