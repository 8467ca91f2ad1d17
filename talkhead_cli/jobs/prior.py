"""Choose the prior that a new person starts from, and load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkhead_cli.avatars import avatar_class
from talkhead_cli.avatars.base import Avatar
from talkhead_cli.contracts import Progress, TalkheadError
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.footage import speech_of
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.store import Run, Workspace, finished_runs, priors_folder
from talkhead_cli.track import voice


def speech_facts(space: Workspace, preset: Preset) -> dict[str, Any]:
    """Return what must agree before speech networks can be shared."""
    stream, rate_hz = speech_of(space)
    return {
        "backend": space.manifest()["backends"]["voice"],
        "rate_hz": rate_hz,
        "n_features": stream.shape[1],
        "n_steps": voice.n_steps(preset.data.window, rate_hz),
        "says": "mouths, in their own size",
    }


@dataclass(frozen=True)
class Start:
    """A prior that a new person starts from."""

    prior: Run
    knows: bool  # whether it was trained on the same footage of this person

    @property
    def n_people(self) -> int:
        return len(self.prior.meta()["people"])

    def facts(self) -> dict[str, Any]:
        """Return what a run records of it."""
        return {
            "name": self.prior.name,
            "key": self.prior.meta()["key"],
            "n_people": self.n_people,
            "knew_person": self.knows,
        }


def choose_start(
    home: Path,
    wanted: str | None,
    preset: Preset,
    space: Workspace,
    speech: dict[str, Any],
    progress: Progress,
) -> Start | None:
    """Return the named prior, which must fit; without a name the newest that fits, preferably one
    not trained on this person.  None if there is none, or if `wanted` is "none"."""
    if wanted == "none":
        return None
    who = space.manifest()["source"]["sha256"]

    def start_from(prior: Run) -> Start:
        return Start(prior, who in prior.meta()["people"].values())

    if wanted is not None:
        named = named_prior(home, wanted, preset.method, speech)
        refuse_unfit(named, preset)
        return start_from(named)
    known = finished(home, preset.method)
    found = [start_from(prior) for prior in known if _fits(prior, preset, speech)]
    if known and not found:
        progress.note(
            f"training starts without a prior: {known[0].name}, the newest of {preset.method}, has "
            "another size, version or speech backend (pretrain makes one with these presets)"
        )
    return min(found, key=lambda start: start.knows, default=None)


def prior_of_begun_run(runs: Sequence[Run], name: str, *, exactly: bool) -> str | None:
    """Return the prior, or "none", of a run begun under the name, so that the same command
    continues it; None if there is no such run.

    `exactly`: the user named the run; else any unfinished run of the presets `name` will do.
    """
    for run in runs:
        own = run.name == name or (not exactly and run.name.startswith(f"{name}+from-"))
        if own and (exactly or not run.is_finished):
            return str((run.meta().get("prior") or {"name": "none"})["name"])
    return None


def finished(home: Path, method: str) -> list[Run]:
    """Return the finished priors of a method, newest first."""
    return [p for p in finished_runs(priors_folder(home)) if p.meta()["method"] == method]


def refuse_unfit(prior: Run, preset: Preset) -> None:
    """Raise TalkheadError unless a named prior agrees with the preset's size."""
    if not _fits(prior, preset):
        raise TalkheadError(
            f"prior '{prior.name}' does not fit these presets: it is of another size, window or "
            "version; use the presets that it was trained with, or another --prior"
        )


def _fits(prior: Run, preset: Preset, speech: dict[str, Any] | None = None) -> bool:
    """Return whether a prior agrees with the preset's size and, if given, with `speech`."""
    try:
        size = _size(presets.from_yaml(prior.preset_text() or ""))
    except TalkheadError:  # of another version
        return False
    return size == _size(preset) and speech in (None, prior.meta()["speech"])


def newest(
    home: Path, method: str, preset: Preset | None = None, speech: dict[str, Any] | None = None
) -> str:
    """Return the name of the newest finished prior of a method; given a preset, of the newest that
    agrees with its size and with `speech`.  TalkheadError if there is none."""
    for prior in finished(home, method):
        if preset is None or _fits(prior, preset, speech):
            return prior.name
    size = "tiny" if preset is None else preset.avatar.size
    overlay = "" if size == "full" else f" -p {size}"
    raise TalkheadError(
        f"preset {method} draws people by what it learnt of others, and {home} has no such prior; "
        f"preprocess some people and make one with: talkhead pretrain -p {method}{overlay} -o NAME"
    )


def _size(preset: Preset) -> tuple[Any, ...]:
    """Return what must agree before networks can be shared; picture size only if it matters."""
    px = preset.data.size_px if avatar_class(preset.method).needs_portrait else None
    return px, preset.data.window, preset.avatar


def named_prior(home: Path, wanted: str, method: str, speech: dict[str, Any] | None = None) -> Run:
    """Return the finished prior of that name; TalkheadError if its method or speech differs."""
    known = {p.name: p for p in finished_runs(priors_folder(home))}
    if wanted not in known:
        raise TalkheadError(
            f"there is no finished prior '{wanted}' in {home} (known: {', '.join(known) or 'none'})"
            f"; make one with: talkhead pretrain -p {method} --out {wanted}"
        )
    meta = known[wanted].meta()
    for what, has, wants in (
        ("its method", meta["method"], method),
        ("what it hears", meta["speech"], speech),
    ):
        if wants is not None and has != wants:
            raise TalkheadError(f"prior '{wanted}' does not fit: {what} is {has}, not {wants}")
    return known[wanted]


def load_prior(avatar: Avatar, prior: Run) -> None:
    """Load a prior's weights into a fresh avatar."""
    try:
        avatar.take_common(prior.weights())
    except ValueError as error:
        raise TalkheadError(
            f"prior '{prior.name}' is of another size or another version of talkhead ({error}); "
            "pretrain it again with these presets and --fresh"
        ) from error
