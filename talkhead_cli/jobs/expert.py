"""The lip-sync expert at work: how well the lips of a film go with its sound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from talkhead_cli.avatars.expert import Expert
from talkhead_cli.blocks.sync import agreement, offset_of
from talkhead_cli.contracts import FPS, Signals, TalkheadError
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs import prior as priors
from talkhead_cli.store import Run, Workspace


@dataclass(frozen=True)
class Judge:
    """A trained expert, and whose pictures it was trained on."""

    prior: Run
    net: Expert

    @property
    def name(self) -> str:
        return self.prior.name

    def knows(self, space: Workspace) -> bool:
        """Whether the person's footage was among what it learnt from."""
        return space.manifest()["source"]["sha256"] in self.prior.meta()["people"].values()

    @torch.no_grad()
    def judge(
        self, pictures: NDArray[np.uint8], marks_px: NDArray[Any], signals: Signals
    ) -> dict[str, float]:
        """Rows of a film, with where landmarks are in them (T, 68, 2), in [0, 1].

        confidence: mean cosine at the best shift over the median of all · sound_after_lips_s ·
        pairs_found: share of pairs in which a moment's own sound fits better than another's
        """
        shown = torch.from_numpy(pictures).float() / 255
        marks = torch.from_numpy(marks_px).float()
        seen, heard, middle = self.net.embedded(shown, marks, signals)
        if len(seen) < FPS:
            raise TalkheadError("less than a second in a row shows a face; sync needs that much")
        shift, confidence = offset_of(seen, heard)
        found = agreement(seen, heard, signals.moment[middle])["found"]
        return {
            "confidence": round(confidence, 4), "sound_after_lips_s": round(shift / FPS, 4),
            "pairs_found": round(float(found), 4),
        }  # fmt: skip


def newest(home: Path, speech: dict[str, Any]) -> Judge | None:
    """The newest expert of a home that hears as `speech` says; None if there is none."""
    for prior in priors.finished(home, "expert"):
        if prior.meta()["speech"] == speech:
            return opened(prior)
    return None


def opened(prior: Run) -> Judge:
    """The expert of a finished prior."""
    text = prior.preset_text()
    assert text is not None
    preset, speech = presets.from_yaml(text), prior.meta()["speech"]
    net = Expert(preset.avatar.size, n_steps=speech["window"], n_features=speech["n_features"])
    priors.begin_from(net, prior)
    net.eval()
    return Judge(prior, net)
