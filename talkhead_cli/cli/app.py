"""Entry point of the command line.

The other modules of this package hold the commands: options, help, and one job call each.  Nothing
heavy is imported at module level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from talkhead_cli import __version__
from talkhead_cli.cli import exchange, films, footage, training
from talkhead_cli.cli.console import answer
from talkhead_cli.cli.memory import keep_freed_memory

app = typer.Typer(
    name="talkhead",
    help="From a person's video to a talking avatar, from any speech to a video of them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        answer(f"talkhead {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    del version
    keep_freed_memory()


COMMANDS: dict[str, Callable[..., None]] = {
    "preprocess": footage.preprocess,
    "check": footage.check,
    "finetune": training.finetune,
    "pretrain": training.pretrain,
    "render": films.render,
    "landmarks": films.landmarks,
    "evaluate": films.evaluate,
    "list": footage.list_,
    "info": footage.info,
    "remove": footage.remove,
    "presets": training.presets,
    "export": exchange.export,
    "import": exchange.import_,
    "doctor": exchange.doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(exchange.models, name="models")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
