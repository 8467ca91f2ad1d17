"""Commands for export, import, third-party weights, and checks of the machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from talkhead_cli.cli.console import answer, speaking
from talkhead_cli.cli.options import Home, Id, Json, RunName, Verbose, say


def export(
    name: Id,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="ID.talkhead, or a folder; must not exist yet.")
    ],
    run: RunName = None,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write an avatar as one file (.talkhead; import reads it), or the footage as a dataset.

    The dataset folder has the layout of RAD-NeRF, ER-NeRF and SyncTalk.
    """
    with speaking(verbose) as report:
        from talkhead_cli.contracts import MisuseError
        from talkhead_cli.jobs.export import export_avatar, export_dataset
        from talkhead_cli.store import home_folder
        from talkhead_cli.store.parcel import SUFFIX

        if out.suffix == SUFFIX:
            say([export_avatar(home_folder(home), name, out, report, run_name=run)], {}, json)
        else:
            if run is not None:
                raise MisuseError(
                    f"a dataset is of footage, not of a run; --run goes with -o NAME{SUFFIX}"
                )
            if re.search("[A-Za-z]", out.suffix):
                raise MisuseError(
                    f"-o {out} is neither NAME{SUFFIX}, for an avatar in one file, nor a folder "
                    "(a name without a suffix), for its footage as a dataset"
                )
            say([export_dataset(home_folder(home), name, out, report)], {}, json)


def import_(
    file: Annotated[
        Path, typer.Argument(help="An avatar (.talkhead), or a dataset in RAD-NeRF's layout.")
    ],
    name: Annotated[
        str | None, typer.Option("--id", help="Name it is to have here.  \\[default: its own]")
    ] = None,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Import an avatar file, or preprocess the pictures and sound of a dataset."""
    with speaking(verbose) as report:
        from talkhead_cli.store import home_folder

        if file.is_dir():
            from talkhead_cli.jobs.import_dataset import import_dataset

            space = import_dataset(file, home_folder(home), report, name=name)
            say([space.root], {"manifest": space.manifest()}, json)
            return
        from talkhead_cli.jobs.import_avatar import import_avatar

        _, run = import_avatar(file, home_folder(home), name)
        say([run.root], {"meta": run.meta()}, json)


models = typer.Typer(help="Weights of other people's networks.", no_args_is_help=True)


@models.command("list")
def models_list(verbose: Verbose = False) -> None:
    """List the known weights, whether they are installed, and their licences."""
    with speaking(verbose):
        from talkhead_cli.store import weights

        for known in weights.KNOWN.values():
            place = weights.find(known.name) or "not here"
            size = f"{known.bytes / 1e6:.0f} MB" if known.bytes else "size not published"
            digest = f"sha256 {known.sha256[:12]}" if known.sha256 else "no sha256 published"
            answer(
                f"{known.name}\t{known.file}\t{size}\t{digest}\t{known.licence}\t"
                f"{known.what_for}\t{place}"
            )


@models.command("pull")
def models_pull(
    name: Annotated[str, typer.Argument(help="Which weights.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="A mirror (https://...) or folder that holds the file.  "
            "\\[default: where it is published]",
        ),
    ] = None,
    sha256: Annotated[str, typer.Option(help="The sha256 that the file must have.")] = "",
    verbose: Verbose = False,
) -> None:
    """Download weights from their publisher or a mirror; their sha256 is checked."""
    with speaking(verbose) as report:
        from talkhead_cli.store import weights

        report.note(f"licence: {weights.licence(name)}")
        answer(weights.pull(name, report, source=source, sha256=sha256))


@models.command("verify")
def models_verify(verbose: Verbose = False) -> None:
    """Check the installed weights against their sha256."""
    with speaking(verbose):
        from talkhead_cli.store import weights

        states = {name: weights.verify(name) for name in weights.KNOWN}
        for name, state in states.items():
            answer(f"{name}\t{state}")
        if "WRONG" in states.values():
            raise SystemExit(1)


@models.command("import")
def models_import(
    name: Annotated[str, typer.Argument(help="Which weights.")],
    file: Annotated[Path, typer.Argument(help="The file, as published.")],
    verbose: Verbose = False,
) -> None:
    """Install weights that you downloaded; their sha256 or layout is checked."""
    with speaking(verbose):
        from talkhead_cli.store import weights

        if weights.is_converted(name):
            from talkhead_cli.jobs import generators

            answer(generators.import_generator(name, file))
            return
        answer(weights.import_file(name, file))


def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Compile the CUDA kernels now (minutes, once).")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Report what this machine has and lacks, one line each with its fix."""
    with speaking(verbose):
        from talkhead_cli.jobs import doctor as job

        if build:
            answer(job.build())
            return
        bad = False
        for need in job.needs():
            mark = "ok  " if need.ok else ("FAIL" if need.required else "none")
            bad |= need.required and not need.ok
            fix = f"  -> {need.fix}" if need.fix and not need.ok else ""
            answer(f"{mark}  {need.name}: {need.found}{fix}")
        if bad:
            raise SystemExit(1)
