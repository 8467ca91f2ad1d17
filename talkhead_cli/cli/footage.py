"""Commands for footage and for the identities of a home folder."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talkhead_cli.cli.console import Reporter, answer, err, speaking
from talkhead_cli.cli.options import Home, Json, Verbose, say

if TYPE_CHECKING:
    from talkhead_cli.jobs.check.report import Finding
    from talkhead_cli.store import Run


def preprocess(
    videos: Annotated[
        list[Path], typer.Argument(help="Videos of one person talking each, or folders of them.")
    ],
    name: Annotated[
        str | None, typer.Option("--id", help="Name of the identity.  \\[default: the file's stem]")
    ] = None,
    face: Annotated[
        str, typer.Option(help="With several faces: largest, left or right.")
    ] = "largest",
    no_audio: Annotated[
        bool,
        typer.Option("--no-audio", help="Track without sound; such a video cannot be trained on."),
    ] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="What tracks, as kind=name (voice=mel, labels=bisenet ...); repeat it.  "
            "\\[default: the best whose weights are there]"
        ),
    ] = None,
    offset: Annotated[
        str,
        typer.Option(
            help="Delay of the sound after the lips, to correct: auto, none, or seconds "
            "(negative: it comes early)."
        ),
    ] = "auto",
    start: Annotated[
        float, typer.Option("--from", help="Start of the part to use, seconds (one video only).")
    ] = 0.0,
    end: Annotated[
        float | None,
        typer.Option(
            "--to", help="End of the part to use, at least 3 s later.  \\[default: the video's end]"
        ),
    ] = None,
    consent: Annotated[
        Path | None, typer.Option(help="The person's consent; kept with the identity.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Videos at a time.", show_default="by cores and memory")
    ] = 0,
    engine: Annotated[
        str, typer.Option(help="What runs many videos: processes, or ray on many machines.")
    ] = "processes",
    address: Annotated[
        str | None, typer.Option(help="Ray's cluster.  \\[default: this machine alone]")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Forget what was done and begin anew.")] = False,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Track the person in a video: landmarks, head pose, eyes, labels, plate, speech features."""
    with speaking(verbose) as report:
        from talkhead_cli.contracts import MisuseError
        from talkhead_cli.jobs.preprocess import preprocess as job
        from talkhead_cli.jobs.preprocess_many import preprocess_many, videos_of
        from talkhead_cli.store import Workspace, home_folder

        options: dict[str, Any] = {
            "which_face": face,
            "with_audio": not no_audio,
            "wanted": backend or [],
            "offset": offset,
            "consent": consent,
            "fresh": fresh,
        }
        where, found = home_folder(home), videos_of(videos)
        if len(found) == 1 and not videos[0].is_dir():
            if engine != "processes" or address is not None or jobs:
                raise MisuseError("--jobs, --engine and --address are for many videos, not for one")
            space = job(found[0], where, report, name=name, start_s=start, end_s=end, **options)
            say([space.root], {"manifest": space.manifest()}, json)
            return
        if name is not None or consent is not None or start or end is not None:
            raise MisuseError("--id, --consent, --from and --to are for one video, not for many")
        outcomes = preprocess_many(
            found, where, report, jobs=jobs, engine=engine, address=address, **options
        )
        made = [Workspace(where, o.id).root for o in outcomes if o.error is None]
        failed = len(outcomes) - len(made)
        say(made, {"videos": [o.facts() for o in outcomes]}, json)
    if failed:
        err.print(f"{failed} of {len(outcomes)} videos were left out; the notes above say why")
        raise SystemExit(1)


def check(
    videos: Annotated[
        list[Path], typer.Argument(help="A video of one person talking; or several, or a folder.")
    ],
    page: Annotated[
        Path | None, typer.Option("--page", help="Also write a page of HTML with plots.")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check whether a video is worth training on, point by point, and say how to improve it.

    For several videos, only the points that do not pass are listed, video by video.
    """
    with speaking(verbose) as report:
        from talkhead_cli.contracts import MisuseError
        from talkhead_cli.jobs.check import check as job
        from talkhead_cli.jobs.check import page as page_of
        from talkhead_cli.jobs.check import refuse_page
        from talkhead_cli.jobs.preprocess_many import videos_of
        from talkhead_cli.store.files import atomic

        if page is not None:
            refuse_page(page)
        films = videos_of(videos)
        if len(videos) > 1 or videos[0].is_dir():
            if page is not None:
                raise MisuseError("--page is of one video; name its file")
            verdicts = _check_each(films, report, json)
        else:
            found = job(films[0], report)
            verdicts = [found.verdict]
            if json:
                answer(jsonlib.dumps(found.facts()))
            else:
                _say_points(found.findings)
                answer(f"{found.verdict:8}all in all")
            if page is not None:
                with atomic(page) as part:
                    text = page_of(found, films[0].name)
                    part.write_text(text, encoding="utf-8", errors="replace")
    if "fail" in verdicts:
        raise SystemExit(1)


def _check_each(films: list[Path], report: Reporter, json: bool) -> list[str]:
    """Print what does not pass in each film; return the verdicts, "fail" for unreadable films."""
    from talkhead_cli.contracts import TalkheadError
    from talkhead_cli.jobs.check import check as job

    told: list[dict[str, Any]] = []
    for film in films:
        facts: dict[str, Any] = {"film": str(film)}
        try:
            found = job(film, report)
        except TalkheadError as error:
            facts |= {"verdict": "fail", "error": str(error)}
        else:
            facts |= found.facts()
        told.append(facts)
        if not json:
            answer(f"{facts['verdict']:8}{film.name}  {facts.get('error', '')}".rstrip())
            if "error" not in facts:
                _say_points([point for point in found.findings if point.verdict != "pass"], "    ")
    if json:
        answer(jsonlib.dumps({"films": told}))
    return [facts["verdict"] for facts in told]


def _say_points(points: Iterable[Finding], indent: str = "") -> None:
    for point in points:
        cure = f"  -> {point.cure}" if point.cure else ""
        answer(f"{indent}{point.verdict:8}{point.name:14}{point.found}{cure}")


def list_(home: Home = None, json: Json = False, verbose: Verbose = False) -> None:
    """List identities, their runs (the default one first) and priors."""
    with speaking(verbose) as report:
        from talkhead_cli.contracts import FPS
        from talkhead_cli.store import Workspace, home_folder, list_ids, list_runs, priors_folder

        folder = home_folder(home)
        names = list_ids(folder)
        if not names:
            report.note(f"there is no identity in {folder}; choose another folder with --home")
        if names and not json:
            err.print("[dim]identity\tlength\truns, newest first[/]")
        for name in names:
            space = Workspace(folder, name)
            manifest = space.manifest()
            finished = bool(manifest.get("finished"))
            seconds = manifest.get("n_frames", 0) / FPS
            runs = [(r.name, r.is_finished) for r in list_runs(space.runs)]
            if json:
                facts = [{"name": run, "finished": done} for run, done in runs]
                answer(
                    jsonlib.dumps(
                        {"id": name, "finished": finished, "seconds": seconds, "runs": facts}
                    )
                )
            else:
                told = [run + ("" if done else " (unfinished)") for run, done in runs]
                length = f"{seconds:.1f} s" if finished else "(unfinished)"
                length += "" if space.video.exists() or not finished else " (no footage here)"
                answer(f"{name}\t{length}\t{', '.join(told) or 'no runs'}")
        for prior in list_runs(priors_folder(folder)):
            meta = prior.meta() if prior.is_finished else {}
            people, method = list(meta.get("people", {})), meta.get("method", "")
            if json:
                answer(
                    jsonlib.dumps(
                        {
                            "prior": prior.name,
                            "finished": prior.is_finished,
                            "method": method,
                            "people": people,
                        }
                    )
                )
            else:
                what = f"prior of {len(people)} people" if meta else "prior (unfinished)"
                answer(f"{prior.name}\t{what}\t{method}".rstrip())


def info(
    name: Annotated[str, typer.Argument(help="Identity.")],
    home: Home = None,
    verbose: Verbose = False,
) -> None:
    """Print what is known about an identity, as JSON."""
    with speaking(verbose):
        from talkhead_cli.store import Workspace, home_folder, list_runs

        space = Workspace.open(home_folder(home), name)
        runs = {r.name: r.meta() for r in list_runs(space.runs)}
        answer(jsonlib.dumps({**space.manifest(), "runs": runs}, indent=2))


def remove(
    name: Annotated[str | None, typer.Argument(help="Identity.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="This run of it alone.")] = None,
    prior: Annotated[str | None, typer.Option("--prior", help="Or a prior.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = None,
    verbose: Verbose = False,
) -> None:
    """Delete an identity with all its runs, one run of it, or a prior."""
    with speaking(verbose):
        from talkhead_cli.contracts import MisuseError
        from talkhead_cli.store import Workspace, home_folder, list_ids, priors_folder

        folder = home_folder(home)
        if (name is None) == (prior is None) or (run and prior):
            raise MisuseError("say what goes: an identity, with or without --run, or --prior NAME")

        def sure(what: Path | str) -> None:
            if not yes and not sys.stdin.isatty():
                raise MisuseError(f"pass --yes to delete {what} without being asked")
            if not yes and not typer.confirm(f"Delete {what}?", err=True):
                raise typer.Exit(1)

        if prior is not None:
            gone = _run_of(priors_folder(folder), prior, "prior")
            sure(gone.root)
            with gone.locked():
                gone.clear()
            return
        space = Workspace(folder, str(name))
        if name not in list_ids(folder):
            Workspace.open(folder, str(name))
        if run is not None:
            gone = _run_of(space.runs, run, "run")
            sure(gone.root)
            with space.locked():
                gone.clear()
            return
        sure(f"{space.root} and all its runs")
        with space.locked():
            space.remove()


def _run_of(folder: Path, name: str, kind: str) -> Run:
    """Return the run or prior of that name, finished or not; TalkheadError if there is none."""
    from talkhead_cli.contracts import TalkheadError
    from talkhead_cli.store import Run, list_runs

    known = [run.name for run in list_runs(folder)]
    if name not in known:
        raise TalkheadError(f"there is no {kind} '{name}'; known: {', '.join(known) or 'none'}")
    return Run.named(folder, name)
