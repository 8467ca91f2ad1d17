"""Import an avatar that another machine exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from talkhead_cli import march
from talkhead_cli.contracts import TalkheadError
from talkhead_cli.jobs import drive as drives
from talkhead_cli.jobs.drive import MotionOptions
from talkhead_cli.jobs.player import Player
from talkhead_cli.store import Run, Workspace
from talkhead_cli.store.parcel import unpack


def import_avatar(file: Path, home: Path, name: str | None = None) -> tuple[Workspace, Run]:
    """Import a .talkhead file into `home`, as identity `name` or its own, if it can be rendered;
    all of it or nothing."""
    return unpack(file, home, name, check=_refuse_unplayable)


def _refuse_unplayable(run: Run) -> None:
    """Raise TalkheadError unless the run can be loaded and driven."""
    try:
        player = Player.load(run, march.device_of("auto"))
        drives.make(run.drive(), 1, MotionOptions()).eyes(np.arange(1))
        facts = run.meta()
        if player.stats.rate_hz != facts["speech"]["rate_hz"]:
            raise ValueError("its speech has another rate than its drive")
        float(facts["finished_at"])
    except TalkheadError:
        raise
    except Exception as error:  # whatever a file of the right name and wrong content leads to
        raise TalkheadError(
            f"run '{run.name}' of this avatar cannot be played ({type(error).__name__}: {error}); "
            "export it again"
        ) from error
