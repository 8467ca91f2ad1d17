"""Ablations of the landmark method: its speech stage, its landmark coding, and the gap between.

`hearing` trains stage one (speech) alone, on people held out in turn, with and without formants and
other people; `ears` compares audio features; `coding` trains the head with Gaussian codes and with
plain landmarks, at equal steps and parameters, and renders tracked and predicted landmarks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from talkhead_cli import media
from talkhead_cli.avatars import landmark
from talkhead_cli.avatars.personal import PersonalAvatar
from talkhead_cli.blocks.mlp import Mlp
from talkhead_cli.blocks.mouth import MOUTH, N_CODES
from talkhead_cli.blocks.speech import SpeechEncoder
from talkhead_cli.contracts import N_LANDMARKS, Signals, SilentProgress
from talkhead_cli.jobs import backends, footage, runs, shots, stage_loop
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.average import Average
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.footage import Footage, SpeechStats
from talkhead_cli.jobs.player import Player
from talkhead_cli.jobs.preset import Preset, Train
from talkhead_cli.jobs.scores import correlation, psnr
from talkhead_cli.store import Workspace
from talkhead_cli.track.voice import FEATURE_NAMES, N_MEL

FORMANTS = [i for i, name in enumerate(FEATURE_NAMES) if name in ("f1", "f2", "f3")]
NOT_MEL = list(range(N_MEL, len(FEATURE_NAMES)))


# -- stage one ---------------------------------------------------------------------------------


def hearing(home: Path, names: Sequence[str], others: Sequence[str], seeds: int) -> dict[str, Any]:
    """Return held-out landmark error and mouth opening of each of `names`; priors are trained on
    `others` and the rest of `names`, never on the person itself."""
    preset = presets.load(["landmark", "tiny"])
    crowd = {n: _heard(home, n, preset, "embedding") for n in dict.fromkeys([*names, *others])}
    rows: dict[str, Any] = {}
    for name in names:
        own, plain = crowd[name], _heard(home, name, preset, "mel")
        strangers = [clip for other, clip in crowd.items() if other != name]
        for seed in range(seeds):
            torch.manual_seed(seed)
            prior = _fit_speech(preset, preset.pretrain, strangers, None, False)
            found = {
                "transformer": _score(preset, own, None, seed),
                "transformer, from others": _score(preset, own, prior, seed),
                "windows": _score(preset, own, None, seed, windows=True),
                "mel and formants: transformer": _score(preset, plain, None, seed),
                "mel and formants: windows": _score(preset, plain, None, seed, windows=True),
                "mel, no formants": _score(preset, plain, None, seed, deaf=FORMANTS),
                "mel alone": _score(preset, plain, None, seed, deaf=NOT_MEL),
            }
            for label, figures in found.items():
                rows.setdefault(label, {}).setdefault(name, []).append(figures)
    means = {
        label: {
            key: round(float(np.mean([f[key] for each in people.values() for f in each])), 5)
            for key in ("landmark_error_face_heights", "opening_r")
        }
        for label, people in rows.items()
    }
    return {
        "people": list(names),
        "others": list(others),
        "seeds": seeds,
        "mean": means,
        "rows": rows,
    }


def ears(home: Path, names: Sequence[str], seconds: Sequence[float]) -> dict[str, Any]:
    """Compare audio features by the mouths predicted for `names`, trained on the first seconds of
    their own footage alone, with LokiTalk's encoder (a linear map beside small nets); one seed."""
    rows = []
    for length in seconds:
        preset = presets.load(["landmark", "tiny"], [f"data.train_s={length:g}"])
        for voice in ("embedding", "mel"):
            for name in names:
                clip = _heard(home, name, preset, voice)
                rows.append(
                    {"voice": voice, "train_s": length, "name": name}
                    | _score(preset, clip, None, 0, windows=True)
                )
    figures = ("landmark_error_face_heights", "opening_r")
    means = [
        {"voice": voice, "train_s": length}
        | {
            figure: round(float(np.mean([
                row[figure] for row in rows if (row["voice"], row["train_s"]) == (voice, length)
            ])), 5)
            for figure in figures
        }
        for length in seconds for voice in ("embedding", "mel")
    ]  # fmt: skip
    return {"people": list(names), "mean": means, "rows": rows}


def _heard(home: Path, name: str, preset: Preset, voice: str) -> Footage:
    """Load a person's footage without pictures, with the audio features of `voice`."""
    space, ear = Workspace.open(home, name), backends.voice_of(voice)
    clip = footage.load(space, preset.data, SilentProgress(), pictures=False)
    stream = ear.features(media.sound(space.audio))
    stats = SpeechStats.of(stream, ear.rate_hz, clip.audible[: int(clip.train[-1]) + 1].numpy())
    signals = footage.make_signals(space.load("tracks"), stream, stats, preset.data)
    return replace(clip, signals=signals.with_(person=clip.signals.person), stats=stats)


def _fit_speech(
    preset: Preset,
    train: Train | None,
    clips: list[Footage],
    prior: PersonalAvatar | None,
    windows: bool,
) -> PersonalAvatar:
    """Train an avatar's speech stages on the clips; the field is never evaluated."""
    assert train is not None
    n_steps, n_features = clips[0].signals.audio.shape[1:]
    avatar = landmark.Landmark.build(
        "tiny", n_steps=n_steps, n_features=n_features, px=64, n_people=len(clips)
    )
    if windows:
        avatar.speech = SpeechEncoder.of_windows(n_steps, n_features, N_CODES)
        avatar.past = 0
    if prior is not None:
        avatar.take_common(prior.common_state())
    clips = [
        replace(c, signals=c.signals.with_(person=torch.full_like(c.signals.person, i)))
        for i, c in enumerate(clips)
    ]
    rows = [c.signals[c.speaking] for c in clips]
    if len(rows) > 1:
        avatar.survey(rows)
    for clip, signals in zip(clips, rows, strict=True):
        avatar.calibrate(signals, clip.mesh, torch.tensor([-1.5, -1.5, -1, 1.5, 1.5, 1]))
    average = Average(avatar, train.ema)
    rng = torch.Generator().manual_seed(torch.initial_seed())
    for stage in (s for s in train.stages.values() if s.rays == "none"):
        learning = clips
        kept: list[Signals] = []
        if stage.inner_split:
            learning, kept = stage_loop.inner_split(clips, stage)
        rate = stage.rates["speech"] * (train.common_rates["speech"] if prior is not None else 1)
        moving = avatar.part("speech")
        for parameter in avatar.parameters():
            parameter.requires_grad_(any(parameter is p for p in moving))
        optimizer = torch.optim.Adam(moving, betas=(0.9, 0.99))
        avatar.train()
        for step in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = (
                    rate
                    * min(1, (step + 1) / stage_loop.WARM_UP)
                    * stage.fall ** (step / stage.steps)
                )
            some = torch.randperm(len(learning), generator=rng)[: stage.n_people or len(learning)]
            losses = []
            for index in some.tolist():
                shot = shots.draw(learning[index], stage, 0, avatar.aabb, rng)
                told = avatar.person(shot.signals).mouth.speech_target(shot.signals)
                net_predictions = avatar.speech.net_predictions(shot.signals)
                losses.append(
                    nn.functional.smooth_l1_loss(net_predictions, told.expand_as(net_predictions))
                )
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(losses).mean())
            optimizer.step()
            average.update(avatar)
        avatar.eval()
        for signals in kept:
            avatar.settle(signals)
    average.give(avatar)
    return avatar


def _score(
    preset: Preset,
    clip: Footage,
    prior: PersonalAvatar | None,
    seed: int,
    *,
    windows: bool = False,
    deaf: Sequence[int] = (),
) -> dict[str, Any]:
    torch.manual_seed(seed)
    if deaf:
        audio = clip.signals.audio.clone()
        audio[:, :, list(deaf)] = 0
        clip = replace(clip, signals=clip.signals.with_(audio=audio))
    avatar = _fit_speech(preset, preset.train, [clip], prior, windows)
    held = clip.signals[clip.held]
    first = max(0, int(clip.held[0]) - avatar.past)
    with torch.no_grad():
        said = avatar.listen(clip.signals[first : int(clip.held[-1]) + 1]).landmarks
    said = said[clip.held - first]
    mouth = avatar.person(held).mouth
    error = (said - held.landmarks)[:, MOUTH].norm(dim=2).mean()
    true, heard = (
        mouth.opening(mouth.code(held.with_(landmarks=m))).numpy() for m in (held.landmarks, said)
    )
    found = correlation(true, heard)
    return {
        "landmark_error_face_heights": round(float(error), 5),
        "opening_r": found["r"],
        "interval_90": found["interval_90"],
        "spread": found["spread"],
    }


# -- stage two ---------------------------------------------------------------------------------


class PlainCode(nn.Module):
    """Baseline coding: all landmarks through a small net, the same code for every point."""

    neutral: Tensor

    def __init__(self, n_hidden: int = 57, n_out: int = 48) -> None:
        super().__init__()
        self.register_buffer("neutral", torch.zeros(N_LANDMARKS, 3))
        self.net = Mlp(3 * N_LANDMARKS, n_hidden, n_out)
        self.n_out = n_out

    def tables(self, landmarks: Tensor, axis: Tensor) -> Tensor:
        """landmarks (T, 68, 3) -> (T, n_out)."""
        del axis
        told: Tensor = self.net(20 * (landmarks - self.neutral).flatten(1))
        return told

    def forward(self, x: Tensor, tables: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return tables.index_select(0, row), torch.arange(len(x), device=x.device)


class PlainLandmark(landmark.Landmark):
    """The landmark method with PlainCode as its coding."""

    def coding(self) -> Any:
        return PlainCode()

    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        super().calibrate(signals, mesh, aabb)
        assert isinstance(self.code, PlainCode)
        self.code.neutral.copy_(self.neutral)


def coding(home: Path, names: Sequence[str], seeds: int, scale: float) -> dict[str, Any]:
    """Return mouth-box PSNR of held-out frames, from tracked and from predicted landmarks."""
    rows: dict[str, Any] = {}
    n_parameters: dict[str, int] = {}
    for label, kind in {"gaussian": landmark.Landmark, "plain": PlainLandmark}.items():
        for name in names:
            for seed in range(seeds):
                with _drawn_by(kind):
                    run = finetune(
                        home, name, SilentProgress(), preset_names=["landmark", "tiny"],
                        settings=[f"train.scale={scale}", "train.stages.torso.steps=0",
                                  "train.stages.eyes.steps=0"],
                        run_name=f"coding-{label}-{seed}", device="cpu", seed=seed, fresh=True,
                        prior="none",
                    )  # fmt: skip
                    player = Player.load(run, torch.device("cpu"))
                assert isinstance(player.avatar, landmark.Landmark)
                n_parameters[label] = sum(
                    p.numel() for part in ("coding", "static") for p in player.avatar.part(part)
                )
                rows.setdefault(label, {}).setdefault(name, []).append(_mouths(player, home, name))
    gain = {
        by: [
            round(g[by]["mouth_db"] - p[by]["mouth_db"], 3)
            for name in names
            for g, p in zip(rows["gaussian"][name], rows["plain"][name], strict=True)
        ]
        for by in ("tracked", "heard")
    }
    return {
        "people": list(names),
        "seeds": seeds,
        "scale": scale,
        "parameters": n_parameters,
        "gaussian_minus_plain_db": gain,
        "rows": rows,
    }


@contextlib.contextmanager
def _drawn_by(kind: type) -> Iterator[None]:
    with mock.patch.object(runs, "avatar_class", lambda _: kind):
        yield


def _mouths(player: Player, home: Path, name: str) -> dict[str, Any]:
    clip = footage.load(Workspace.open(home, name), player.preset.data, SilentProgress())
    signals = clip.signals[clip.held]
    found = {}
    for by, driven in {
        "tracked": signals,
        "heard": player.listen_to_rows(clip.signals, clip.held),
    }.items():
        scores = []
        for row, (frame, _) in zip(clip.held.tolist(), player.pictures(driven), strict=True):
            marks = clip.signals.landmarks_2d[row, 48:68] * clip.size_px
            low, high = marks.amin(0), marks.amax(0)
            half = 1.3 * (high - low).amax() / 2
            x0, y0 = ((low + high) / 2 - half).floor().long().clamp_min(0).tolist()
            x1, y1 = ((low + high) / 2 + half).ceil().long().tolist()
            made = frame.rgb[0].clamp(0, 1).numpy()[y0:y1, x0:x1]
            scores.append(psnr(made, clip.pictures[row, y0:y1, x0:x1] / np.float32(255)))
        found[by] = {"mouth_db": round(float(np.mean(scores)), 3), "n_frames": len(scores)}
    return found
