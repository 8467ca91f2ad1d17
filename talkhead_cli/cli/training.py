"""Commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from talkhead_cli.cli.console import answer, speaking
from talkhead_cli.cli.options import (
    Device,
    Devices,
    Home,
    Id,
    Json,
    Nodes,
    Presets,
    Seed,
    Settings,
    Verbose,
    say,
)


def finetune(
    name: Id,
    preset: Presets = None,
    setting: Settings = None,
    run: Annotated[
        str | None,
        typer.Option("--run", help="Name of the run.  \\[default: its presets, and its prior]"),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            help="Prior to begin from (pretrain), or none.  \\[default: the newest that fits]"
        ),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(help="For s3d: fine-tune on the person's picture for so many steps."),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Replace the run of that name.")] = False,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    seed: Seed = 0,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train one person's avatar.  An interrupted run resumes where it was last saved."""
    with speaking(verbose) as report:
        from talkhead_cli.jobs import team
        from talkhead_cli.jobs.finetune import finetune as job
        from talkhead_cli.jobs.finetune import refined
        from talkhead_cli.store import home_folder

        made = team.run(
            job, home_folder(home), name, progress=report, devices=devices, nodes=nodes,
            preset_names=preset,
            settings=[*(setting or []), *refined(preset or [], refine)], run_name=run,
            prior=prior, device=device, seed=seed, fresh=fresh,
        )  # fmt: skip
        say([made.root], {"meta": made.meta()}, json)


def pretrain(
    ids: Annotated[
        str | None, typer.Option(help="Identities, comma-separated.  \\[default: all of the home]")
    ] = None,
    ids_from: Annotated[
        Path | None, typer.Option("--ids-from", help="File with one identity per line.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="Name of the prior.  \\[default: prior, s3d or expert]"),
    ] = None,
    preset: Presets = None,
    expert: Annotated[
        bool,
        typer.Option(
            "--expert", help="Train the lip-sync network that evaluate and s3d use (-p tiny)."
        ),
    ] = False,
    setting: Settings = None,
    fresh: Annotated[bool, typer.Option(help="Replace the prior of that name.")] = False,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    seed: Seed = 0,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a prior on many people, from which finetune --prior starts."""
    with speaking(verbose) as report:
        from talkhead_cli.jobs import team
        from talkhead_cli.jobs.pretrain import pretrain as job
        from talkhead_cli.store import home_folder

        names = ["expert", *(preset or [])] if expert else preset
        made = team.run(
            job, home_folder(home), _named(ids, ids_from, home_folder(home)), out,
            progress=report, devices=devices, nodes=nodes, preset_names=names,
            settings=setting or [], device=device, seed=seed, fresh=fresh,
        )  # fmt: skip
        say([made.root], {"meta": made.meta()}, json)


def _named(ids: str | None, file: Path | None, home: Path) -> list[str]:
    """Return the identities of --ids, else of --ids-from, else all of the home folder."""
    from talkhead_cli.contracts import MisuseError
    from talkhead_cli.store import list_ids

    if ids is not None and file is not None:
        raise MisuseError("give --ids or --ids-from, not both")
    if ids is not None:
        return [name.strip() for name in ids.split(",") if name.strip()]
    if file is None:
        return list_ids(home)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"--ids-from {file} cannot be read: {error}") from error


def presets(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    verbose: Verbose = False,
) -> None:
    """List the presets, or print one."""
    with speaking(verbose):
        from talkhead_cli.jobs.preset import preset_names, preset_text

        if name is None:
            for known in preset_names():
                answer(known)
        else:
            answer(preset_text(name).rstrip())
