"""Which prior a new person begins from, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkhead_cli.avatars.base import Avatar
from talkhead_cli.contracts import TalkheadError
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.store import Run, Workspace, list_runs, priors_folder


def speech_facts(backend: str, preset: Preset, n_features: int) -> dict[str, Any]:
    """What must agree before networks that hear are shared."""
    return {
        "backend": backend, "n_features": n_features,
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
    home: Path, wanted: str | None, preset: Preset, space: Workspace, speech: dict[str, Any]
) -> Start | None:
    """The named prior, which must fit; without a name the newest that fits, if there is one; none
    with "none"."""
    if wanted == "none":
        return None
    if wanted is None:
        found = [p for p in finished(home, preset.method, preset) if p.meta()["speech"] == speech]
        if not found:
            return None
        prior = found[0]
    else:
        prior = fitting(home, wanted, preset.method, speech)
    return Start(prior, space.manifest()["source"]["sha256"] in prior.meta()["people"].values())


def finished(home: Path, method: str, preset: Preset | None = None) -> list[Run]:
    """Finished priors of a method, newest first; with a preset, those of its size."""
    known = [p for p in list_runs(priors_folder(home)) if p.is_finished]
    return [
        prior for prior in known
        if prior.meta()["method"] == method and (preset is None or _is_as_large(prior, preset))
    ]  # fmt: skip


def _is_as_large(prior: Run, preset: Preset) -> bool:
    try:
        return _size(presets.from_yaml(prior.preset_text() or "")) == _size(preset)
    except TalkheadError:  # of another version
        return False


def newest(home: Path, method: str, preset: Preset | None = None) -> str:
    """The name of the newest finished prior of a method; with a preset, one of its size."""
    for prior in finished(home, method, preset):
        return prior.name
    small = "" if preset is not None and preset.avatar.size == "full" else " -p tiny"
    raise TalkheadError(
        f"preset {method} draws people by what it learnt of others, and {home} has no such prior; "
        f"preprocess some people and make one with: talkhead pretrain -p {method}{small} -o NAME"
    )


def _size(preset: Preset) -> tuple[Any, ...]:
    """What must agree before networks are shared."""
    return preset.data.size_px, preset.data.window, preset.avatar


def fitting(home: Path, wanted: str, method: str, speech: dict[str, Any] | None = None) -> Run:
    """The finished prior of that name, refused if it is of another method or hears otherwise."""
    known = {p.name: p for p in list_runs(priors_folder(home)) if p.is_finished}
    if wanted not in known:
        raise TalkheadError(
            f"there is no finished prior '{wanted}' in {home} (known: {', '.join(known) or 'none'})"
            f"; make one with: talkhead pretrain -p {method} --out {wanted}"
        )
    meta = known[wanted].meta()
    for what, has, wants in (
        ("its method", meta["method"], method), ("what it hears", meta["speech"], speech),
    ):  # fmt: skip
        if wants is not None and has != wants:
            raise TalkheadError(f"prior '{wanted}' does not fit: {what} is {has}, not {wants}")
    return known[wanted]


def begin_from(avatar: Avatar, prior: Run) -> None:
    """Load what a prior holds into a fresh avatar."""
    try:
        avatar.take_common(prior.weights())
    except ValueError as error:
        raise TalkheadError(
            f"prior '{prior.name}' is of another size or another version of talkhead ({error}); "
            "pretrain it again with these presets and --fresh"
        ) from error
