"""Apply the lip-sync expert: measure how well the lips of a film match its sound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkhead_cli.avatars import avatar_class
from talkhead_cli.avatars.base import Avatar
from talkhead_cli.avatars.expert import Expert
from talkhead_cli.blocks.sync import N_FRAMES, agreement, offset_of
from talkhead_cli.contracts import FPS, MisuseError, Progress, TalkheadError
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs import prior as priors
from talkhead_cli.jobs.preset import Train
from talkhead_cli.jobs.runs import speech_shape_of
from talkhead_cli.store import Run, Workspace

CHUNK = 100  # frames


@dataclass(frozen=True)
class Judge:
    """A trained expert, and the prior that records whose pictures it was trained on."""

    prior: Run
    net: Expert

    @property
    def name(self) -> str:
        return self.prior.name

    def attach_to(self, avatar: Avatar, device: torch.device) -> None:
        """Add the frozen network to the loss networks of an avatar in training."""
        avatar.loss_networks.append(self.net.sync.to(device).requires_grad_(False))

    def knows(self, space: Workspace) -> bool:
        """Return whether the expert was trained on the person's footage."""
        return space.manifest()["source"]["sha256"] in self.prior.meta()["people"].values()

    @torch.no_grad()
    def judge(
        self, pictures: NDArray[np.uint8], marks_2d: NDArray[Any], audio: Tensor, moment: Tensor
    ) -> dict[str, float]:
        """Score rows of a film: their landmarks (T, 68, 2) in [0, 1], speech windows (T, W, A) and
        frame numbers (T,).

        confidence: mean cosine at the best shift minus the median over shifts · sound_after_lips_s
        · pairs_found: share of pairs in which a frame's own sound fits better than another's
        """
        marks = torch.from_numpy(marks_2d).float()
        # cropped in chunks: whole films of float pictures would not fit in memory
        crops = torch.cat(
            [
                self.net.crops(
                    torch.from_numpy(pictures[a : a + CHUNK]).float() / 255, marks[a : a + CHUNK]
                )
                for a in range(0, len(marks), CHUNK)
            ]
        )
        seen, heard, middle = self.net.embedded(crops, audio, moment)
        if len(seen) < FPS:
            raise TalkheadError("less than a second in a row shows a face; sync needs that much")
        shift, confidence = offset_of(seen, heard, moment[middle])
        found = agreement(seen, heard, moment[middle])["found"]
        return {
            "confidence": round(confidence, 4),
            "sound_after_lips_s": round(shift / FPS, 4),
            "pairs_found": round(float(found), 4),
        }


def of_run(
    run: Run,
    home: Path,
    method: str,
    train: Train,
    speech: dict[str, Any],
    progress: Progress,
    fresh: bool,
) -> Judge | None:
    """Return the expert for the stages of a run, the same one as before if it is resumed; None if
    it does without."""
    begun = {} if fresh else run.meta()
    if "expert_key" in begun and begun["expert"] is None:
        return None
    judge = _expert_if_weighed(home, method, train, speech, progress, begun.get("expert"))
    key = facts(judge)["expert_key"]
    if begun.get("expert_key", key) != key:
        raise TalkheadError(
            f"'{run.name}' was begun with the lip-sync expert '{begun['expert']}', which is gone; "
            "pass --fresh to begin anew"
        )
    return judge


def facts(judge: Judge | None) -> dict[str, Any]:
    """Return what a run records of its expert."""
    if judge is None:
        return {"expert": None, "expert_key": None}
    return {"expert": judge.name, "expert_key": judge.prior.meta()["key"]}


def _expert_if_weighed(
    home: Path,
    method: str,
    train: Train,
    speech: dict[str, Any],
    progress: Progress,
    wanted: str | None,
) -> Judge | None:
    """Return the expert for stages with a weight for the loss `sync`: the wanted one, else the
    newest; None if no stage has one or, with a note, if the home has no expert."""
    stages = train.stages_weighing("sync")
    if not stages:
        return None
    if "sync" not in avatar_class(method).expert_losses:
        raise MisuseError(f"preset {method} has no loss 'sync'; stage '{stages[0]}' weighs it")
    for name in stages:
        stage = train.stages[name]
        if stage.rays != "picture" or min(stage.in_sequence, stage.n_frames) < N_FRAMES:
            raise MisuseError(
                f"stage '{name}' weighs 'sync', which needs whole pictures of {N_FRAMES} frames in "
                f"a row: rays picture, n_frames and in_sequence {N_FRAMES}"
            )
    judge = newest(home, speech)
    for prior in priors.finished(home, "expert"):
        if prior.name == wanted:
            judge = load_expert(prior)
    if judge is None:
        progress.note(
            f"stage '{stages[0]}' does without a lip-sync expert, since this home has none that "
            "hears by this speech backend; lips will follow speech a little less (train one first: "
            "talkhead pretrain --expert -p tiny)"
        )
    else:
        progress.note(f"lip-sync expert: {judge.name}")
    return judge


def newest(home: Path, speech: dict[str, Any]) -> Judge | None:
    """Return the newest expert of a home that fits the speech facts; None if there is none."""
    for prior in priors.finished(home, "expert"):
        if prior.meta()["speech"] == speech:
            return load_expert(prior)
    return None


def load_expert(prior: Run) -> Judge:
    """Load the expert of a finished prior."""
    text = prior.preset_text()
    assert text is not None
    preset = presets.from_yaml(text)
    n_steps, n_features = speech_shape_of(prior)
    net = Expert(preset.avatar.size, n_steps=n_steps, n_features=n_features)
    priors.load_prior(net, prior)
    net.eval()
    return Judge(prior, net)
