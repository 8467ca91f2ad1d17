"""Preprocess a video of one person talking into a workspace, which all other jobs read."""

from __future__ import annotations

import contextlib
import math
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from talkhead_cli import __version__, media
from talkhead_cli.contracts import (
    FPS,
    MisuseError,
    Progress,
    TalkheadError,
    UnfitError,
)
from talkhead_cli.jobs import backends
from talkhead_cli.jobs.stages import MIN_SECONDS, VERSIONS, Material, Stages
from talkhead_cli.media import Part
from talkhead_cli.store import Run, Workspace, check_id, finished_runs, list_runs
from talkhead_cli.store.files import digest, sha256_of
from talkhead_cli.track.scout import FACES
from talkhead_cli.track.spans import in_words

MAX_OFFSET_S = 10.0
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic")


def id_from(video: Path) -> str:
    """Derive a valid id from the name of a file or folder: accents are stripped, and if nothing
    is left, the id is a hash of the name."""
    stem = video.name if video.is_dir() else video.stem
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")
    return check_id(re.sub(r"\.{2,}", ".", name)[:64] or f"person-{digest(stem)[:6]}")


def preprocess(
    video: Path,
    home: Path,
    progress: Progress,
    *,
    name: str | None = None,
    which_face: str = "largest",
    with_audio: bool = True,
    wanted: Sequence[str] = (),
    offset: str = "auto",
    start_s: float = 0.0,
    end_s: float | None = None,
    consent: Path | None = None,
    fresh: bool = False,
) -> Workspace:
    """Track one person through a video and write the workspace `home`/`name`.

    Stages are keyed by the content of their inputs: a second call does only what is missing
    or changed.  `which_face` is largest, left or right, as seen in the picture; `wanted` names
    backends as kind=name (`backends.choose`).  `offset` is the delay of the sound after the lips
    that is corrected: seconds, none, or auto, which measures it.  `start_s` and `end_s` select a
    part of the video.
    """
    if which_face not in FACES:
        raise MisuseError(f"--face must be {', '.join(FACES)}, not '{which_face}'")
    if consent is not None and not consent.is_file():
        raise MisuseError(f"--consent {consent}: there is no such file")
    known_offset = _offset_from(offset)
    chosen = backends.choose(wanted)
    space = Workspace(home, id_from(video) if name is None else check_id(name))
    if name is None and space.id != video.stem:
        progress.note(f"id: {space.id} (--id chooses another)")
    began = time.monotonic()
    probe = _probed(video, with_audio, progress)
    part = _part(video, probe.duration_s, start_s, end_s)
    for warning in backends.warnings(chosen):
        progress.note(warning)
    source: dict[str, Any] = {
        "name": video.name,
        "sha256": sha256_of(video),
        "seconds": probe.duration_s,
        "synthetic": probe.is_synthetic,
        "first_frame": part.first,
        "part": [part.first, part.n_frames],
    }
    is_new = not space.root.exists()  # `locked` creates it
    with space.locked(), _nothing_left_of_refused(space, is_new):
        if fresh:
            _name_what_stays(space, source["sha256"], progress)
            space.set_aside()
        _refuse_other_footage(space, source["sha256"], source["part"], progress)
        material = Material(space, part, probe, progress, chosen, with_audio)
        work = Stages(material)
        work.run(source["sha256"], which_face, known_offset)
        missing = ~material.faces.found & material.kept
        if missing.any():
            progress.note(f"no face in frames {in_words(missing)}; training leaves them out")
        if consent is not None:
            space.keep_consent(consent)
        space.note(
            finished=True,
            version=__version__,
            source=source,
            dataset=None,
            consent=space.consents(),
            **work.facts(),
        )
        old = [r for r in finished_runs(space.runs) if r.meta().get("footage") != space.fingerprint]
        if old:
            progress.note(
                f"{_named(old)} of '{space.id}' learnt what was tracked before; train anew"
            )
        if work.n_done == len(VERSIONS):  # skipped stages would distort the speed
            seconds = time.monotonic() - began
            rate = material.n_frames / max(seconds, 1e-6)
            space.note(seconds_taken=round(seconds, 2), frames_per_second=round(rate, 2))
    return space


def _probed(video: Path, with_audio: bool, progress: Progress) -> media.Probe:
    """Probe the video; TalkheadError if it is none that a person could be tracked in."""
    probe = media.probe(video)
    if not probe.has_video:
        raise TalkheadError(f"{video.name} has no picture; give a video of somebody talking")
    if video.suffix.lower() in PICTURES:
        raise TalkheadError(
            f"{video.name} is a picture; talkhead render --image FILE speaks from one, without "
            "training"
        )
    if probe.duration_s < MIN_SECONDS:
        raise TalkheadError(
            f"{video.name} is only {probe.duration_s:.1f} s long; "
            f"at least {MIN_SECONDS:.0f} s of talking are needed (a minute looks good)"
        )
    if with_audio and not probe.has_audio:
        raise TalkheadError(
            f"{video.name} has no sound track; film with sound, or pass --no-audio to track "
            "the pictures alone (no avatar can be trained on them)"
        )
    if probe.is_synthetic:
        progress.note(
            f"{video.name} is synthetic, made by talkhead render: what is learnt from it is an "
            "avatar's likeness, not the person's"
        )
    return probe


@contextlib.contextmanager
def _nothing_left_of_refused(space: Workspace, is_new: bool) -> Iterator[None]:
    """Remove a new workspace if preprocessing fails before any stage is done, and bring back what
    was set aside for it.  A folder that existed before is kept, since its content is unknown."""
    space.bring_back()  # what a killed job set aside
    try:
        yield
    except BaseException as error:
        if space.bring_back() and isinstance(error, KeyboardInterrupt):
            error.add_note(f"'{space.id}' is as it was before; run the same command again")
        unfit = isinstance(error, UnfitError) or not space.manifest()["stages"]
        if is_new and isinstance(error, TalkheadError) and unfit:
            space.remove()
        raise


def _named(runs: Sequence[Run]) -> str:
    return ", ".join(f"run '{run.name}'" for run in runs)


def _refuse_other_footage(
    space: Workspace, source: str, place: list[int | None], progress: Progress
) -> None:
    """Two films may bear one name, and who is in them is not asked: neither takes the other's.  Nor
    does another part of the film take the one that runs have learnt from."""
    known = space.manifest().get("source")
    if known is None:
        return
    runs = finished_runs(space.runs)
    first, n_frames = place
    held = known.get("part", [known.get("first_frame", first), n_frames])  # older ones say less
    if known["sha256"] == source and not runs and held != [first, n_frames]:
        progress.note(f"'{space.id}' held another part of {known.get('name')}, which this replaces")
    if known["sha256"] == source and runs and held != [first, n_frames]:
        raise TalkheadError(
            f"{_named(runs)} of '{space.id}' learnt from another part of this video; name this "
            "part with --id, or track it instead of that one with --fresh"
        )
    if known["sha256"] != source:
        raise TalkheadError(
            f"there is another '{space.id}' already, of other footage ({known.get('name')}); name "
            "this one with --id, or replace that one (preprocess --fresh, or talkhead remove "
            f"{space.id} first)"
        )


def _name_what_stays(space: Workspace, source: str, progress: Progress) -> None:
    """Note which runs and consents stay when --fresh replaces the footage by other footage."""
    known = space.manifest().get("source")
    if known is None or known.get("sha256") == source:
        return
    kept = [f"run '{run.name}'" for run in list_runs(space.runs)]
    kept += [f"consent '{name}'" for name in space.consents()]
    if kept:
        progress.note(
            f"{', '.join(kept)} of '{space.id}' came with other footage ({known.get('name')}) and "
            "stay; if this is somebody else, use another --id"
        )


def _part(video: Path, seconds: float, start_s: float, end_s: float | None) -> Part:
    """Return the part from start to end; MisuseError if outside the video or too short."""
    end = seconds if end_s is None else end_s
    inside = 0 <= start_s < seconds and end <= seconds + 1 / FPS
    if not inside or not end - start_s >= MIN_SECONDS:
        raise MisuseError(
            f"--from and --to must lie in the {seconds:.1f} s of {video.name}, at least "
            f"{MIN_SECONDS:.0f} s apart, not {start_s:g} and {end:g}"
        )
    first = round(start_s * FPS)
    return Part(video, first, None if end_s is None else round(end_s * FPS) - first)


def _offset_from(text: str) -> float | None:
    """Parse --offset: auto -> None, none -> 0.0, else seconds; MisuseError for anything else."""
    if text in ("auto", "none"):
        return None if text == "auto" else 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not abs(seconds) <= MAX_OFFSET_S:
        raise MisuseError(
            f"--offset must be auto, none, or seconds up to {MAX_OFFSET_S:.0f} by which the sound "
            f"comes after the lips (negative: before), not '{text}'"
        )
    return seconds
