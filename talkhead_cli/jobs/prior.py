"""Which prior a new person begins from, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkhead_cli.avatars.base import Avatar
from talkhead_cli.contracts import TalkheadError
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.store import Run, Workspace, list_runs, priors_folder


def speech_facts(space: Workspace, preset: Preset, n_features: int) -> dict[str, Any]:
    """What must agree before networks that hear are shared."""
    return {
        "backend": space.manifest()["backends"]["voice"], "n_features": n_features,
        "window": preset.data.window, "stored": "10 ms rows", "says": "mouths, in their own size",
    }  # fmt: skip


@dataclass(frozen=True)
class Start:
    """A prior that a new person begins from."""

    prior: Run
    knows: bool  # whether the person's very footage was among the prior's

    @property
    def n_people(self) -> int:
        return len(self.prior.meta()["people"])

    def facts(self) -> dict[str, Any]:
        """What a run keeps of it."""
        return {
            "name": self.prior.name, "key": self.prior.meta()["key"], "n_people": self.n_people,
            "knew_person": self.knows,
        }  # fmt: skip


def choose(
    home: Path, wanted: str | None, method: str, space: Workspace, speech: dict[str, Any]
) -> Start | None:
    """The named prior, which must fit; None with "none" or without a name."""
    if wanted in (None, "none"):
        return None
    known = {p.name: p for p in list_runs(priors_folder(home)) if p.is_finished}
    if wanted not in known:
        raise TalkheadError(
            f"there is no finished prior '{wanted}' in {home} (known: {', '.join(known) or 'none'})"
            f"; make one with: talkhead pretrain --out {wanted}"
        )
    meta = known[wanted].meta()
    for what, has, wants in (
        ("its method", meta["method"], method), ("what it hears", meta["speech"], speech),
    ):  # fmt: skip
        if has != wants:
            raise TalkheadError(f"prior '{wanted}' does not fit: {what} is {has}, not {wants}")
    return Start(known[wanted], space.manifest()["source"]["sha256"] in meta["people"].values())


def begin_from(avatar: Avatar, start: Start) -> None:
    """Load what a prior holds into a fresh avatar."""
    try:
        avatar.take_common(start.prior.weights())
    except ValueError as error:
        raise TalkheadError(
            f"prior '{start.prior.name}' is of another version of talkhead ({error}); pretrain it "
            "again with --fresh, or pass --prior none"
        ) from error
