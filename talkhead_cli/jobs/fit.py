"""Training through the stages of a preset, for all methods; stage_loop.py takes the steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning_fabric import Fabric

from talkhead_cli import march
from talkhead_cli.avatars.base import Avatar
from talkhead_cli.contracts import Progress, TalkheadError
from talkhead_cli.jobs import interrupt
from talkhead_cli.jobs.average import Average
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.jobs.stage_loop import Clock, Job, Position, StageLoop
from talkhead_cli.jobs.step import Step
from talkhead_cli.jobs.threads import Threads
from talkhead_cli.store import Run

__all__ = ["Position", "fit"]


def fit(
    preset: Preset,
    avatar: Avatar,
    marcher: march.Marcher,
    people: list[Footage],
    run: Run,
    fabric: Fabric,
    progress: Progress,
    *,
    seed: int = 0,
    stop_after: Callable[[Position], bool] | None = None,
    threads: Threads | None = None,
) -> Position:
    """Train through the preset's stages, resuming from the run's last save if there is one.

    At the end the avatar holds the averaged weights.  An interrupt takes effect between two steps,
    after a save; of several processes only the chief (rank 0) handles it, and without the chief
    the others end.  Resumed, one process goes on exactly as if it had not been interrupted; of
    several, all go on with the chief's number of rays and view of the occupancy grid.
    `stop_after` ends the loop early, as an interrupt would (tests).  `threads` adapts to the CPU's
    load between steps.
    """
    people = _brought_near(people, fabric.device)
    position, held = Position(), run.resume_state()
    job = Job(
        preset,
        Step(avatar, marcher),
        Average(avatar, preset.train.ema),
        people,
        run,
        fabric,
        progress,
        writer=_log_writer(run, progress) if fabric.is_global_zero else None,
        rng=torch.Generator().manual_seed(seed),
        seed=seed,
        clock=Clock(),
        threads=threads,
    )
    if held is not None:
        try:
            position = Position(**held["position"])
            job.module.load_state_dict(held["module"])
            job.average.load(held["average"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise TalkheadError(
                f"what run '{run.name}' has learnt so far was saved by another version of "
                "talkhead; begin again with --fresh"
            ) from error
        progress.note(f"continuing from step {position.total}")
    job.clock.resume(position)
    interrupted = interrupt.delayed() if fabric.is_global_zero else nullcontext(lambda: False)
    with interrupted as asked:

        def stop(position: Position) -> bool:
            return asked() or (stop_after is not None and stop_after(position))

        try:
            finished = _go_through(job, position, held, stop)
        finally:
            if job.writer is not None:
                job.writer.close()
        if not finished:
            return position
    job.clock.read(position)
    job.average.give(avatar)
    return position


def _go_through(
    job: Job, position: Position, held: dict[str, Any] | None, stop: Callable[[Position], bool]
) -> bool:
    """Run the stages that are left; return False when stopped early."""
    stages = list(job.preset.train.stages.items())
    while position.stage < len(stages):
        loop = StageLoop(*stages[position.stage], job)
        try:
            if not loop.go(position, held, stop):
                return False
        finally:
            loop.replay = None  # it refers to the loop: a cycle that would keep its GPU memory
        held = None
        position.stage, position.step, position.rollbacks = position.stage + 1, 0, 0
    return True


def _brought_near(people: list[Footage], device: torch.device) -> list[Footage]:
    """Return the people with their footage on the GPU, as far as half of its free memory goes:
    picking a step's pixels from the disk takes longer than all the rest of the step."""
    room, near = march.room_on(device) / 2, []
    for person in people:
        fits = person.n_bytes <= room
        room -= person.n_bytes if fits else 0
        near.append(person.on(device) if fits else person)
    return near


def _log_writer(run: Run, progress: Progress) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        progress.note("tensorboard is not installed: no training curves are logged")
        return None
    return SummaryWriter(str(run.log_folder))
