"""Ablations of LokiTalk: `fields` for a single person, `transfer` for a prior.

Every variant is trained anew.  `fields` tests the cascade of two displacements and the attention
loss; `transfer` removes parts of the prior, one at a time.  Rows are stored in the work folder as
soon as they are made: the same command resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transfer as others_worth
from torch import Tensor

from talkhead_cli.avatars.lokitalk import LokiField
from talkhead_cli.avatars.lokitalk import transfer as encoder
from talkhead_cli.avatars.lokitalk.field import MAX_SHIFT
from talkhead_cli.blocks.mlp import by_row, density_of
from talkhead_cli.blocks.planes import frequencies, warped
from talkhead_cli.blocks.rigid import moved
from talkhead_cli.contracts import LABELS, SilentProgress
from talkhead_cli.jobs import footage, views
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.player import Player
from talkhead_cli.jobs.pretrain import pretrain
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.store import Workspace

PRESETS = ["lokitalk", "tiny"]
N_MOUTHS = 5  # from shut to wide open
BODY = [LABELS.index("neck"), LABELS.index("torso")]
FACE = [LABELS.index("face"), LABELS.index("mouth")]


class _SideBySide(LokiField):
    """Both displacements are taken at the observed point and added: no cascade."""

    def _static(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attention, encoded, driven = self._attended(x, row)
        after_face, face = self._moved_by_face(x, encoded, driven, attention[:, :2].sum(1))
        after_torso, torso = self._moved_by_torso(x, attention[:, 2:], row)
        return self._shown(after_face + after_torso - x, row, attention, driven, (face, torso))

    def _attended(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = x.detach()
        encoded = frequencies(moved(here, self._framed, row), self.avatar.octaves)
        attention = (self.avatar.attention(encoded).float() + self._prior(here)).sigmoid()
        return attention, encoded, by_row(attention[:, :2], row, self.n_rows)

    def _shown(
        self, x: Tensor, row: Tensor, attention: Tensor, driven: Tensor, shifts: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = self.avatar.volume(warped(moved(x, self._shared, row), self._reach))
        hidden = self.avatar.density_net(features, (driven, self._density))
        return density_of(hidden[:, 0]), hidden[:, 1:], attention, torch.cat(list(shifts), 1)


class _OneField(_SideBySide):
    """One network conditioned on lips, eyes and pose moves every point; no rigid motion."""

    def _static(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attention, encoded, driven = self._attended(x, row)
        pose = by_row(torch.ones_like(attention[:, :1]), row, self.n_rows)
        told = torch.cat([driven, pose], 1), torch.cat([self._face, self._torso])
        raw = self.avatar.face_field(encoded, told).float()
        shift = MAX_SHIFT * (raw / MAX_SHIFT).tanh()
        far = shift.abs().sum(1, keepdim=True)
        return self._shown(x + shift, row, attention, driven, (far, torch.zeros_like(far)))


def _without_attention_loss(part: str, stages: Sequence[str]) -> list[str]:
    return [f"{part}.stages.{stage}.weights.attention=0" for stage in stages]


FIELDS: dict[str, tuple[type[LokiField], list[str]]] = {
    "two fields, one after the other": (LokiField, []),
    "two fields, side by side": (_SideBySide, []),
    "one field": (_OneField, []),
    "without the attention loss": (
        LokiField,
        _without_attention_loss("train", ("shape", "detail", "lips", "eyes")),
    ),
}


def fields(home: Path, names: Sequence[str], work: Path, scale: float) -> dict[str, Any]:
    """Train each person from scratch at `scale` of the steps, one thread each; return PSNR of
    held-out frames by region, driven by tracked signals, and what an opening mouth changes."""
    folder = work / "fields"
    folder.mkdir(exist_ok=True)
    with ProcessPoolExecutor(len(names), get_context("spawn")) as pool:
        people = list(
            pool.map(
                _fields_of, [home] * len(names), names, [folder] * len(names), [scale] * len(names)
            )
        )
    rows = dict(zip(names, people, strict=True))
    mean = {
        label: {
            figure: round(float(np.mean([rows[n][label][figure] for n in names])), 3)
            for figure in rows[names[0]][label]
        }
        for label in FIELDS
    }
    return {"people": list(names), "scale": scale, "mean": mean, "rows": rows}


def _fields_of(home: Path, name: str, folder: Path, scale: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = {}
    for label, (kind, settings) in FIELDS.items():

        def made(kind: type[LokiField] = kind, settings: list[str] = settings) -> dict[str, Any]:
            with mock.patch("talkhead_cli.avatars.lokitalk.method.LokiField", kind):
                run = finetune(
                    home,
                    name,
                    SilentProgress(),
                    preset_names=PRESETS,
                    settings=[f"train.scale={scale}", *settings],
                    run_name="ablation",
                    device="cpu",
                    fresh=True,
                    prior="none",
                )
                return _regions(home, name, run.name)

        rows[label] = _kept(folder / f"{name}-{label}.json", made)
    return rows


@torch.no_grad()
def _regions(home: Path, name: str, run_name: str) -> dict[str, float]:
    """Return PSNR, dB, of face, of neck and shoulders, and in full; also the mean colour change,
    of 255, of the face and of the rest when only the mouth opens."""
    space = Workspace.open(home, name)
    run = pick_run(space, run_name, SilentProgress())
    player = Player.load(run, torch.device("cpu"))
    clip = footage.load(space, player.preset.data, SilentProgress())
    errors: dict[str, list[float]] = {"face": [], "neck and shoulders": [], "full": []}
    signals = clip.signals[clip.held]
    for row, (frame, _) in zip(clip.held.tolist(), player.pictures(signals), strict=True):
        true = clip.pictures[row] / np.float32(255)
        wrong = (frame.rgb[0].clamp(0, 1).numpy() - true) ** 2
        labels = clip.labels[row] / np.float32(255)
        for region, where in (
            ("face", labels[FACE].sum(0) > 0.5),
            ("neck and shoulders", labels[BODY].sum(0) > 0.5),
            ("full", np.ones_like(labels[0], bool)),
        ):
            errors[region].append(-10 * float(np.log10(max(wrong[where].mean(), 1e-10))))
    row = clip.held[len(clip.held) // 2 : len(clip.held) // 2 + 1]
    mouths = views.opening_mouths(player.avatar, clip.signals[row], N_MOUTHS)
    films = np.stack([f.rgb[0].clamp(0, 1).numpy() for f, _ in player.pictures(mouths)])
    moved = 255 * np.abs(films[1:] - films[:1]).mean((0, 3))
    face = clip.labels[int(row)][FACE].sum(0) > 127
    return {
        **{f"psnr {region}": float(np.mean(values)) for region, values in errors.items()},
        "face moves": float(moved[face].mean()),
        "the rest moves": float(moved[~face].mean()),
    }


# -- transfer ------------------------------------------------------------------------------------

WITHOUT = ("nothing", "cascade", "attention loss", "hyper-network", "encoder's start")


def transfer(
    home: Path,
    names: Sequence[str],
    others: Sequence[str],
    work: Path,
    *,
    scale: float,
    seconds: float,
    share: float,
) -> dict[str, Any]:
    """Train priors of `others`, each without one part, in `scale` of the steps; return the figures
    of `names`, none of them in `others`, after `share` of the steps on `seconds` of footage."""
    assert not set(names) & set(others)
    folder = work / "ablation"
    folder.mkdir(exist_ok=True)
    parts, spawn = WITHOUT[:-1], get_context("spawn")
    with ProcessPoolExecutor(2, spawn) as pool:
        list(pool.map(partial(_prior_without, home, list(others), scale), parts))
    # One process per person: a training locks the person's workspace.
    with ProcessPoolExecutor(len(names), spawn) as pool:
        people = list(pool.map(partial(_begun_without, home, folder, seconds, share), names))
    rows = {
        part: {name: person[part] for name, person in zip(names, people, strict=True)}
        for part in WITHOUT
    }
    mean = {
        part: {
            f: round(float(np.mean([row[f] for row in found.values()])), 3)
            for f in others_worth.FIGURES
        }
        for part, found in rows.items()
    }
    return {
        "people": list(names),
        "prior_of": list(others),
        "scale": scale,
        "seconds": seconds,
        "share": share,
        "mean": mean,
        "rows": rows,
    }


def _prior_without(home: Path, others: Sequence[str], scale: float, part: str) -> None:
    torch.set_num_threads(1)
    more = _without_attention_loss("pretrain", ("shape", "detail"))
    with _left_out(part):
        pretrain(
            home,
            others,
            _named(part),
            SilentProgress(),
            preset_names=PRESETS,
            device="cpu",
            settings=[f"pretrain.scale={scale}", *(more if part == "attention loss" else [])],
        )


def _begun_without(
    home: Path, folder: Path, seconds: float, share: float, name: str
) -> dict[str, dict[str, Any]]:
    """Return a person's figures by the part left out."""
    torch.set_num_threads(1)
    found = {}
    for part in WITHOUT:
        settings = others_worth.steps_of(share, seconds, from_prior=True)
        if part == "attention loss":
            settings += _without_attention_loss("train", ("shape", "detail", "lips", "eyes"))
        label = f"{name}-{_named(part)}"
        met = part != WITHOUT[-1]

        def made(
            part: str = part, settings: list[str] = settings, label: str = label, met: bool = met
        ) -> dict[str, Any]:
            with _left_out(part), contextlib.nullcontext() if met else others_worth._unmet():
                finetune(
                    home,
                    name,
                    SilentProgress(),
                    preset_names=PRESETS,
                    settings=settings,
                    run_name=label,
                    prior=_named(part if met else WITHOUT[0]),
                    device="cpu",
                    fresh=True,
                )
                return others_worth.score(home, name, label)

        found[part] = _kept(folder / f"{label}.json", made)
    return found


def _named(part: str) -> str:
    return f"without-{part.replace(' ', '-').replace(chr(39), '')}"


@contextlib.contextmanager
def _left_out(part: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if part == "cascade":
            where = "talkhead_cli.avatars.lokitalk.method.LokiField"
            stack.enter_context(mock.patch(where, _SideBySide))
        if part == "hyper-network":
            stack.enter_context(mock.patch.dict(encoder.VECTORS, hyper=()))
        yield


def _kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the contents of the file, or make them and store them there."""
    if file.exists():
        held: dict[str, Any] = json.loads(file.read_text())
        return held
    made = make()
    file.write_text(json.dumps(made))
    return made
