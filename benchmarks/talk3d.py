"""Evaluation of Talk3D: novel views, and ablations of its prior, tokens and convolutions.

`views` moves the camera around an avatar and checks the face's place with the face mesh; `heads`
compares planes found in a generator of other people's heads with planes fitted freely; `tokens`
trains avatars without one of the tokens each, and with plain convolutions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from talkhead_cli.avatars import talk3d
from talkhead_cli.blocks.planes import RowPlanes
from talkhead_cli.contracts import Camera, Signals, SilentProgress
from talkhead_cli.jobs import drive as drives
from talkhead_cli.jobs import footage, runs
from talkhead_cli.jobs.evaluate import evaluate
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.player import Player
from talkhead_cli.jobs.pretrain import pretrain
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.jobs.scores import MEASURE_PX, psnr
from talkhead_cli.store import Workspace
from talkhead_cli.track import face
from talkhead_cli.track.pose import RIGID

VIEWS = ((0, 0), (-15, 0), (15, 0), (-30, 0), (30, 0), (0, -10), (0, 10))  # yaw, pitch, degrees
PRESETS = ("talk3d", "tiny")
NOSE, EARS = 4, (234, 454)  # of the face mesh
N_ROWS = 3  # footage rows rendered from each view
REPORT_PX = 128  # errors are in pixels of a picture of this side

Array = NDArray[np.floating[Any]]


# -- views ---------------------------------------------------------------------------------------


def views(home: Path, names: Sequence[str], runs: Sequence[str], sheets: Path) -> dict[str, Any]:
    """Return, by person, run and view of VIEWS: share of faces found, distance of rigid landmarks
    from where the head's geometry projects them, and depth of the nose before the ears relative
    to the mesh's.  Contact sheets (colour, depth) go to the folder `sheets`."""
    sheets.mkdir(parents=True, exist_ok=True)
    return {name: {run: _views(home, name, run, sheets) for run in runs} for name in names}


def _views(home: Path, name: str, run_name: str, sheets: Path) -> dict[str, Any]:
    space = Workspace.open(home, name)
    run = pick_run(space, run_name, SilentProgress())
    player = Player.load(run, torch.device("cpu"))
    clip = footage.load(space, player.preset.data, SilentProgress())
    shape = space.load("tracks")["shape"]
    poses = clip.signals.pose[clip.train]
    order = ((poses - poses.median(0).values) / poses.std(0)).norm(dim=1).argsort()
    rows = clip.train[order[:: max(1, len(order) // (4 * N_ROWS))][:N_ROWS]]
    found: dict[str, Any] = {}
    strips = []
    for yaw, pitch in VIEWS:
        made = drives.make(
            run.drive(), len(rows), drives.MotionOptions(yaw_deg=yaw, pitch_deg=pitch)
        )
        seen = clip.signals[rows]
        camera = made.camera(seen.pose.numpy(), clip.size_px, np.zeros(len(rows)))
        seen = seen.with_(camera=camera)
        player = Player.load(run, torch.device("cpu"))
        if yaw or pitch:
            player.open_views(seen)
        pictures, depths, errors, ratios = [], [], [], []
        for index, (frame, _) in enumerate(player.pictures(seen)):
            rgb = (frame.rgb[0].clamp(0, 1).numpy() * 255).round().astype(np.uint8)
            depth = frame.depth[0, ..., 0].numpy()
            pictures.append(rgb)
            depths.append(depth)
            size = (MEASURE_PX, MEASURE_PX)
            with face.FaceMesh() as mesh:  # a new one, as it tracks faces from picture to picture
                marks = mesh(cv2.resize(rgb, size, interpolation=cv2.INTER_CUBIC))
            want = _seen(shape, camera[index : index + 1])
            if marks is not None:
                off = marks[RIGID, :2] / MEASURE_PX - want[RIGID, :2]
                errors.append(np.linalg.norm(off, axis=1).mean() * REPORT_PX)
            ratios.append(None if yaw else _depth_ratio(depth, want))  # else one ear is hidden
        found[f"yaw {yaw}, pitch {pitch}"] = {
            "face_found": round(len(errors) / len(rows), 3),
            "rigid_error_px": round(float(np.mean(errors)), 3) if errors else None,
            "nose_before_ears": _mean(ratios),
        }
        strips.append(np.concatenate([pictures[0], _as_grey(depths[0])], 0))
    sheet = np.concatenate(strips, 1)
    cv2.imwrite(str(sheets / f"{name}-{run_name}.png"), sheet[..., ::-1])
    return found


def _seen(points: Array, camera: Camera) -> Array:
    """Project points (n, 3) of head space to x, y in fractions of the side, and distance (n, 3)."""
    c2w, k = camera.c2w[0].numpy().astype(float), camera.k[0].numpy().astype(float)
    here = (points - c2w[:3, 3]) @ c2w[:3, :3]
    flat = here @ k.T
    away = np.linalg.norm(here, axis=1, keepdims=True)
    seen: Array = np.concatenate([flat[:, :2] / flat[:, 2:] / camera.size_px, away], 1)
    return seen


def _depth_ratio(depth: Array, want: Array) -> float | None:
    """Return the rendered depth of the nose before the ears, relative to the mesh's."""

    def read(index: int) -> float:
        size = len(depth)
        x, y = (want[index, :2] * size).astype(int).clip(2, size - 3)
        window = depth[y - 2 : y + 3, x - 2 : x + 3]
        window = window[np.isfinite(window)]
        return float(np.median(window)) if len(window) else np.nan

    drawn = np.mean([read(ear) for ear in EARS]) - read(NOSE)
    true = want[list(EARS), 2].mean() - want[NOSE, 2]
    return float(drawn / true) if np.isfinite(drawn) else None


def _mean(values: Sequence[float | None]) -> float | None:
    some = [v for v in values if v is not None]
    return round(float(np.mean(some)), 3) if some else None


def _as_grey(depth: Array) -> NDArray[np.uint8]:
    """Return depth as a grey picture: near is bright, empty is black."""
    solid = np.isfinite(depth)
    low, high = (np.quantile(depth[solid], q) for q in (0.01, 0.99)) if solid.any() else (0, 1)
    grey = np.where(solid, 1 - 0.85 * ((depth - low) / max(high - low, 1e-6)).clip(0, 1), 0)
    return np.repeat((grey * 255).astype(np.uint8)[..., None], 3, 2)


# -- heads ---------------------------------------------------------------------------------------


def heads(
    home: Path, names: Sequence[str], others: Sequence[str], scale: float, sheets: Path
) -> dict[str, Any]:
    """Train each person at `scale` of the steps, from a prior of `others`, none of them in `names`,
    and from scratch; return held-out figures, and views as in `views`."""
    assert not set(names) & set(others)
    quiet = SilentProgress()
    prior = pretrain(home, others, "heads", quiet, preset_names=PRESETS, device="cpu").meta()
    assert set(prior["people"]) == set(others), "this prior is of others; use another --work"
    found: dict[str, Any] = {"scale": scale, "pretrain_s": prior["seconds"]}
    for name in names:
        rows: dict[str, Any] = {}
        for start, begun in (("none", "none"), ("others", "heads")):
            run = finetune(
                home,
                name,
                quiet,
                preset_names=PRESETS,
                settings=[f"train.scale={scale}"],
                run_name=f"head-{start}",
                prior=begun,
                device="cpu",
            )
            figures, _ = evaluate(home, name, quiet, run_name=run.name, device="cpu")
            rows[start] = {
                "psnr_face_db": figures["picture"]["face_box"]["psnr_db"],
                "psnr_full_db": figures["picture"]["full"]["psnr_db"],
                "lips_r": figures["lips"]["correlation"]["r"],
                "eyes_r": figures["eyes"]["correlation"]["r"],
                "lmd_px_at_512": figures["lmd_px_at_512"],
                "views": views(home, [name], [run.name], sheets)[name][run.name],
            }
        found[name] = rows
    return found


# -- tokens --------------------------------------------------------------------------------------


def tokens(home: Path, names: Sequence[str], scale: float) -> dict[str, Any]:
    """Return PSNR of held-out frames, dB, in the boxes of mouth and eyes and in full, driven by
    tracked mouths: the complete method, the identity alone, without one token at a time, with
    plain convolutions, and with the editor predicting planes instead of a change of them."""
    rows: dict[str, Any] = {}
    for name in names:
        for label, kind in {
            "whole": talk3d.Talk3D,
            "still": _Still,
            **{f"without {token}": partial(_Without, token) for token in talk3d.TOKENS},
            "plain convolutions": partial(talk3d.Talk3D, split=False),
            "planes, not their change": _Full,
        }.items():
            with _built_by(kind):
                run = finetune(
                    home,
                    name,
                    SilentProgress(),
                    preset_names=["talk3d", "tiny"],
                    settings=[f"train.scale={scale}"],
                    run_name="ablation",
                    device="cpu",
                    fresh=True,
                    prior="none",
                )
                player = Player.load(run, torch.device("cpu"))
            rows.setdefault(label, {})[name] = _boxes(player, home, name)
    mean = {
        label: {
            box: round(float(np.mean([person[box] for person in people.values()])), 3)
            for box in next(iter(people.values()))
        }
        for label, people in rows.items()
    }
    return {"people": list(names), "scale": scale, "mean": mean, "rows": rows}


class _Still(talk3d.Talk3D):
    """The identity alone, without the editor's change."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.still = True


class _Without(talk3d.Talk3D):
    """The method trained without one of its tokens."""

    def __init__(self, token: str, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.unheard = frozenset({token})


class _Full(talk3d.Talk3D):
    """The editor predicts the planes themselves."""

    def condition(self, signals: Signals) -> talk3d.Talk3DField:
        field = super().condition(signals)
        if field._change is not None:
            field._identity = RowPlanes(torch.zeros_like(self.planes())[None])
        return field


@contextlib.contextmanager
def _built_by(kind: Any) -> Iterator[None]:
    class Method(talk3d.Talk3D):
        @staticmethod
        def build(size: str, *, px: int, **named: Any) -> Any:
            del px
            return kind(size, **named)

    with mock.patch.object(runs, "avatar_class", lambda _: Method):
        yield


def _boxes(player: Player, home: Path, name: str) -> dict[str, float]:
    clip = footage.load(Workspace.open(home, name), player.preset.data, SilentProgress())
    scores: dict[str, list[float]] = {"mouth": [], "eyes": [], "full": []}
    signals = clip.signals[clip.held]
    for row, (frame, _) in zip(clip.held.tolist(), player.pictures(signals), strict=True):
        made = frame.rgb[0].clamp(0, 1).numpy()
        true = clip.pictures[row] / np.float32(255)
        marks = clip.signals.landmarks_2d[row].numpy() * clip.size_px
        for label, part in (("mouth", slice(48, 68)), ("eyes", slice(36, 48))):
            low, high = marks[part].min(0), marks[part].max(0)
            half = 0.65 * (high - low).max()
            x0, y0 = np.floor((low + high) / 2 - half).astype(int).clip(0)
            x1, y1 = np.ceil((low + high) / 2 + half).astype(int)
            scores[label].append(psnr(made[y0:y1, x0:x1], true[y0:y1, x0:x1]))
        scores["full"].append(psnr(made, true))
    return {label: round(float(np.mean(values)), 3) for label, values in scores.items()}
