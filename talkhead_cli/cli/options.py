"""Options that commands share, and how results are printed."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from talkhead_cli.cli.console import answer

Home = Annotated[
    Path | None,
    typer.Option("--home", help="Folder of the avatars.  \\[default: $TALKHEAD_HOME or ./avatars]"),
]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", help="Show the traceback of an error, and native chatter."),
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Devices = Annotated[
    int, typer.Option("--devices", help="Processes that train together here, one GPU each.")
]
Nodes = Annotated[
    int,
    typer.Option(
        "--nodes", help="Machines that train together; run this command on each (MASTER_ADDR ...)."
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random.")
]
Id = Annotated[str, typer.Option("--id", help="Which identity.")]
Presets = Annotated[
    list[str] | None,
    typer.Option(
        "-p",
        "--preset",
        help="Preset by name or file; repeat it, the later wins.  \\[default: lokitalk, on a "
        "CPU with small on top]",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("-s", "--set", help="One preset key: key=value.")
]
RunName = Annotated[str | None, typer.Option("--run", help="Which run.  \\[default: the newest]")]


def say(paths: list[Path], facts: dict[str, Any], json: bool) -> None:
    """Print the paths of what was made, one per line, or all facts as JSON."""
    if json:
        answer(jsonlib.dumps({"paths": [str(p) for p in paths], **facts}))
        return
    for path in paths:
        answer(path)
