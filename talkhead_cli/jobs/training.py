"""What `finetune` and `pretrain` have in common: how a run begins, trains and is finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric

from talkhead_cli import __version__, march
from talkhead_cli.avatars.base import Avatar
from talkhead_cli.contracts import Progress
from talkhead_cli.jobs import fit
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.jobs.threads import Threads
from talkhead_cli.store import Run
from talkhead_cli.store.files import sweep


@dataclass(frozen=True)
class Training:
    """The training of one run, in one or several processes, of which the chief writes.

    fresh: replace a run of that name · stop_after: ends training early (tests) · began: when the
    job did, for the time that it took
    """

    run: Run
    fabric: Fabric
    progress: Progress
    seed: int
    fresh: bool
    stop_after: Callable[[fit.Position], bool] | None
    began: float = field(default_factory=time.monotonic)

    @property
    def is_chief(self) -> bool:
        return self.fabric.is_global_zero

    def begin(self, preset_text: str, **facts: Any) -> None:
        """Record what the run is trained from.  Nothing may be refused after this, since `fresh`
        deletes the run that was there."""
        self.fabric.barrier()
        if self.is_chief:
            if self.fresh:
                self.run.clear()
            sweep(self.run.root)
            self.run.write_meta(version=__version__, seed=self.seed, **facts)
            self.run.write_preset(preset_text)  # last: its presence marks the run as begun
        self.fabric.barrier()

    def train(
        self, preset: Preset, avatar: Avatar, marcher: march.Marcher, people: list[Footage]
    ) -> fit.Position | None:
        """Train through the stages of `preset.train`; return the end, or None if training was
        stopped before or if this process is not the chief."""
        set_up = time.monotonic() - self.began
        alone = self.fabric.device.type == "cpu" and self.fabric.world_size == 1
        with Threads(self.progress, wanted=alone) as threads:
            position = fit.fit(
                preset,
                avatar,
                marcher,
                people,
                self.run,
                self.fabric,
                self.progress,
                seed=self.seed,
                stop_after=self.stop_after,
                threads=threads,
            )
        if not self.is_chief:
            return None
        self.run.write_meta(seconds=round(set_up + position.seconds, 1))
        return position if position.stage == len(preset.train.stages) else None

    def finish(self, position: fit.Position, **facts: Any) -> None:
        """Mark the run as finished, once all its files are written."""
        self.run.write_meta(
            finished=True,
            finished_at=time.time(),
            steps=position.total,
            figures=position.figures,
            torch=torch.__version__,
            **facts,
        )
        self.run.drop_resume()
