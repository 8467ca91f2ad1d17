"""The training loop: the steps of one stage.

draw shots, march, compose, compute losses, step, check for NaN, average the weights, report; at
intervals, also refresh the grid and save
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from talkhead_cli import march
from talkhead_cli.contracts import (
    Progress,
    RayShot,
    Shot,
    Signals,
    TalkheadError,
    repacked,
    unpacked,
)
from talkhead_cli.jobs import critic, shots
from talkhead_cli.jobs.average import Average
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.preset import Preset, Stage
from talkhead_cli.jobs.step import PendingLosses, Step, StepLosses, UncastShots
from talkhead_cli.jobs.threads import Threads
from talkhead_cli.store import Run

SAVE_EVERY_S = 20.0
GOOD_EVERY = 100  # steps between the states that a NaN rolls back to
MAX_ROLLBACKS = 3
WARM_UP = 50  # steps
START_RAYS, MIN_RAYS = 512, 128
MAX_RAYS = {"cpu": 16_384, "cuda": 65_536}  # random pixels; half as many for patches


@dataclass
class Position:
    """Position in the training schedule; saved with the weights.

    stage: number of the stage · step: of the stage · total: steps of all stages so far
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    n_rays: float = START_RAYS
    rollbacks: int = 0
    seconds: float = 0.0  # of training, including that before a resume
    figures: dict[str, float] = field(default_factory=dict)


class Clock:
    """Training time, including that before a resume, and when to save."""

    def __init__(self) -> None:
        self._saved = self._began = time.monotonic()

    def resume(self, position: Position) -> None:
        """Count the seconds of training before a resume."""
        self._began -= position.seconds

    def save_is_due(self) -> bool:
        """Return True once every SAVE_EVERY_S, counted across stages."""
        due = time.monotonic() - self._saved > SAVE_EVERY_S
        if due:
            self._saved = time.monotonic()
        return due

    def read(self, position: Position) -> None:
        position.seconds = time.monotonic() - self._began


@dataclass(frozen=True)
class Job:
    """What all stages share."""

    preset: Preset
    module: Step
    average: Average
    people: list[Footage]
    run: Run
    fabric: Fabric
    progress: Progress
    writer: Any  # tensorboard writer of the chief, else None
    rng: torch.Generator
    seed: int
    clock: Clock
    threads: Threads | None


class StageLoop:
    """Runs one stage of the preset."""

    def __init__(self, name: str, stage: Stage, job: Job) -> None:
        self.name, self.stage, self.job = name, stage, job
        self.avatar = job.module.avatar
        self.n_steps = max(1, round(stage.steps * job.preset.train.scale)) if stage.steps else 0
        self.avatar.noise = stage.noise
        job.module.marcher.exploring = stage.explore
        self.people = job.people
        self.kept: list[Signals] = []
        if stage.inner_split:
            self.people, self.kept = inner_split(job.people, stage)
        if stage.listen:
            self.people = [self._with_predicted_landmarks(person) for person in self.people]
        self.boxes = {p.device: self.avatar.aabb.to(p.device) for p in self.people}
        wanted = {id(p) for part in stage.learn for p in self.avatar.part(part)}
        for parameter in self.avatar.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        groups = [
            {"params": self.avatar.part(part), "lr": stage.rates[part], "rate": stage.rates[part]}
            for part in stage.learn
        ]
        self.learns_space = (
            stage.rays != "none" and not stage.freeze_grid and self.avatar.field_learns()
        )
        self.samples_per_ray = job.module.marcher.fix_shapes(self._is_steady())
        self.replay = self._recording()
        self._next: tuple[int, int, list[Shot]] | None = None
        self._pending_losses: PendingLosses | None = None
        # Most texels' gradients are about as small as Adam's usual epsilon, which would damp their
        # steps; Instant-NGP takes 1e-15.
        optimizer = torch.optim.Adam(
            groups,
            betas=(0.9, 0.99),
            eps=1e-12 if stage.rays != "none" else 1e-8,
            fused=True,
            capturable=self.replay is not None,
        )
        self.wrapped, self.optimizer = job.fabric.setup(job.module, optimizer)
        self._place_rates()
        learner = critic.critic_of(self.avatar)
        self.critic = None if learner is None else critic.CriticTrainer(learner, stage, job.fabric)

    def _recording(self) -> march.Replay[StepLosses] | None:
        """Return the CUDA-graph replay of this stage's steps, or None; with it the number of rays
        is constant."""
        free = self.stage.rays == "none" or self.samples_per_ray > 0  # of host syncs
        recorded = free and self._is_steady()
        return march.Replay(self._learn, self.job.fabric.device) if recorded else None

    def _is_steady(self) -> bool:
        """Whether, on a GPU, all steps are the same operations if the marcher's shapes are fixed:
        one process, one person, no portraits, no whole pictures."""
        fabric, stage = self.job.fabric, self.stage
        alone = fabric.world_size == 1 and len(self.people) == 1 and not stage.portraits
        steady = alone and stage.rays != "picture" and self.avatar.has_kernel
        return steady and fabric.device.type == "cuda"

    def _place_rates(self) -> None:
        """Keep learning rates as tensors on the device if steps are recorded, else as floats; a
        loaded state may hold either."""
        recorded = self.replay is not None
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=self.job.fabric.device) if recorded else rate
            group["capturable"] = recorded

    def go(
        self, position: Position, held: dict[str, Any] | None, stop: Callable[[Position], bool]
    ) -> bool:
        """Run the stage to its end, resuming from `held` if given; return False if stopped."""
        if held is not None:
            self.optimizer.load_state_dict(held["optimizer"])
            self._place_rates()
            self._scale_as(held)
            if self.critic is not None:
                self.critic.load(held["critic"])
        good = None
        self.job.module.train()
        self.job.progress.stage(f"train: {self.name}", self.n_steps, "steps")
        if position.step:
            self.job.progress.advance(position.step)
        while True:
            ends = position.step >= self.n_steps
            if ends or good is None or position.step % GOOD_EVERY == 0:
                if not self._all_is_finite():
                    self._roll_back(position, good)
                    continue
                if ends:
                    break
                good = copy.deepcopy(self._state()), position.step
            losses, loss = self._one(position)
            if not math.isfinite(loss):
                self._roll_back(position, good)
                continue
            position.step += 1
            position.total += 1
            position.figures = losses
            self.job.average.update(self.avatar)
            if self.job.writer is not None and position.total % 20 == 0:
                for key, value in losses.items():
                    self.job.writer.add_scalar(f"{self.name}/{key}", value, position.total)
            self.job.progress.advance(1, **_shown(losses))
            if self.job.threads is not None:
                self.job.threads.adapt()
            stopped = stop(position)
            if stopped or self.job.clock.save_is_due():
                if self._all_is_finite():
                    self._save(position)
                elif self.job.fabric.world_size == 1:
                    self._roll_back(position, good)
                    continue  # of several processes the next step's loss, which they share, is none
            if stopped:
                return False
        for kept in self.kept:
            self.avatar.eval()
            self.avatar.settle(kept.to(self.job.fabric.device))
        return True

    def _one(self, position: Position) -> tuple[dict[str, float], float]:
        """Take one optimiser step; return the losses as numbers, and their weighted sum.

        A recorded step is not waited for: while it runs the next one is drawn, and the losses
        returned are those of the step before it.
        """
        self._schedule(position.step)
        _seed_noise(self._seed(position.total, 7919), self.job.fabric.device)
        if self.replay is not None and self.samples_per_ray:
            position.n_rays = min(self.stage.n_points // self.samples_per_ray, self._most_rays())
        drawn = self._drawn(position.total, position)
        if self.learns_space and position.total % self.job.preset.march.every == 0:
            # people in turn, since the grid must hold all of them
            shot = drawn[position.total // self.job.preset.march.every % len(drawn)]
            assert isinstance(shot, RayShot)
            with torch.no_grad():
                made = self.avatar.enroll(shot.portrait).condition(shot.signals)
                self.job.module.marcher.refresh(made, position.total)
        lost = self._step(drawn) if self.replay is None else self._replayed(drawn)
        news = PendingLosses(lost, int(position.n_rays))
        if self.replay is not None:
            self._next = (
                position.total + 1,
                position.rollbacks,
                self._drawn(position.total + 1, position),
            )
            news, self._pending_losses = self._pending_losses or news, news
        elif lost.n_points and self.stage.rays != "picture":
            # slowly towards the number of rays whose samples are `n_points`
            want = position.n_rays * self.stage.n_points / lost.n_points
            n_rays = 0.9 * position.n_rays + 0.1 * want
            position.n_rays = min(max(n_rays, MIN_RAYS), self._most_rays())
        return news.read()

    def _drawn(self, total: int, position: Position) -> list[Shot]:
        """Return the shots of step number `total` of the job, prefetched if possible."""
        if self._next is not None and self._next[:2] == (total, position.rollbacks):
            return self._next[2]
        self.job.rng.manual_seed(self._seed(total, position.rollbacks))
        return [self._draw(person, int(position.n_rays)) for person in self._mixed()]

    def _seed(self, total: int, number: int) -> int:
        return mix(total, self.job.fabric.global_rank, number, seed=self.job.seed)

    def _most_rays(self) -> int:
        return MAX_RAYS[self.job.fabric.device.type] // (1 if self.stage.rays == "random" else 2)

    def _draw(self, person: Footage, n_rays: int) -> Shot:
        shot = shots.draw(
            person,
            self.stage,
            n_rays,
            self.boxes[person.device],
            self.job.rng,
            self.avatar.magnification,
        )
        tensors = (t.to(self.job.fabric.device) for t in unpacked(shot))
        return repacked(shot, tensors)

    def _step(self, drawn: list[Shot]) -> StepLosses:
        """Take one step of the optimiser and of the critic, unless the loss is not finite."""
        lost = self.wrapped(UncastShots(drawn), self.stage.weights)
        self.optimizer.zero_grad(set_to_none=True)
        # mean over all processes, so that either all of them step or all roll back
        shared = self.job.fabric.all_reduce(lost.loss.detach(), reduce_op="mean")
        assert isinstance(shared, Tensor)
        if math.isfinite(float(shared)):
            self.job.fabric.backward(lost.loss)
            self.optimizer.step()
            if self.critic is not None and lost.pictures:
                with self.critic.learning():
                    told = self.critic.critic_loss(lost.pictures)
                    self.job.fabric.backward(told)
                lost.terms["told_apart"] = told.detach()
        return lost._replace(loss=shared)

    def _replayed(self, drawn: list[Shot]) -> StepLosses:
        """Take the step by replaying the recording, or fall back to `_step` if it fails."""
        assert self.replay is not None
        (self._like,) = drawn
        try:
            return self.replay(*unpacked(self._like))
        except march.CannotRecordError as error:
            self.job.progress.note(
                f"steps of stage '{self.name}' cannot be recorded ({error}); the GPU waits for the "
                "CPU to start their operations one by one, which takes several times as long"
            )
            self.replay = self._next = None
            self.job.module.marcher.fix_shapes(False)
            return self._step(drawn)

    def _learn(self, *tensors: Tensor) -> StepLosses:
        """The work that is recorded: a step on the tensors of a shot shaped like `self._like`.
        Gradients that are not finite change nothing, since the gradient scaler skips the step."""
        shot = repacked(self._like, iter(tensors))
        lost: StepLosses = self.wrapped(UncastShots([shot]), self.stage.weights)
        self.optimizer.zero_grad(set_to_none=True)
        self.job.fabric.backward(lost.loss)
        self.optimizer.step()
        return lost._replace(loss=lost.loss.detach())

    @torch.no_grad()
    def _with_predicted_landmarks(self, person: Footage) -> Footage:
        """Return the footage with landmarks predicted from speech for every row, in order."""
        self.avatar.eval()
        said = self.avatar.listen(person.signals.to(self.job.fabric.device)).landmarks
        return replace(person, said=said.to(person.device))

    def _mixed(self) -> list[Footage]:
        """Return the people of this step."""
        n = self.stage.n_people
        if not 0 < n < len(self.people):
            return self.people
        return [
            self.people[i] for i in torch.randperm(len(self.people), generator=self.job.rng)[:n]
        ]

    def _schedule(self, step: int) -> None:
        """Set the learning rates: a linear warm-up times an exponential decay."""
        scale = min(1.0, (step + 1) / WARM_UP) * self.stage.fall ** (step / max(1, self.n_steps))
        for group in self.optimizer.param_groups:
            rate = group["rate"] * scale
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _all_is_finite(self) -> bool:
        """Return whether the last step's loss, if it was not read yet, and all that the stage
        learns are numbers: a finite loss may have a gradient that is not."""
        news, self._pending_losses = self._pending_losses, None
        if news is not None and not math.isfinite(news.read()[1]):
            return False
        learnt = [p for group in self.optimizer.param_groups for p in group["params"]]
        return bool(torch.stack([p.detach().isfinite().all() for p in learnt]).all())

    def _roll_back(self, position: Position, good: Any) -> None:
        position.rollbacks += 1
        if good is None or position.rollbacks > MAX_ROLLBACKS:
            raise TalkheadError(
                f"training of stage '{self.name}' keeps producing NaN; lower the stage's rates, "
                f"for example -s train.stages.{self.name}.rates.{self.stage.learn[0]}=0.001"
            )
        good_state, step = good
        for group in good_state["optimizer"]["param_groups"]:
            group["rate"] *= 0.5  # a further NaN finds them halved
        state = copy.deepcopy(good_state)  # the optimiser goes on to write into what it loads
        self.job.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._pending_losses = None
        if self.replay is not None:  # it uses the tensors just replaced
            self.replay = march.Replay(self._learn, self.job.fabric.device)
        self._place_rates()
        self._scale_as(state)
        if self.critic is not None:
            self.critic.load(state["critic"])
        self.job.average.restart(self.avatar)
        self.job.progress.note(
            f"a loss or a weight was not a number at step {position.step} of '{self.name}'; back "
            f"to step {step} at half the rates"
        )
        position.total -= position.step - step
        position.step = step

    def _scale_as(self, state: dict[str, Any]) -> None:
        """Restore the loss scale of half-precision training; states in full precision and of
        older versions hold none."""
        if kept := state.get("precision"):
            self.job.fabric.strategy.precision.load_state_dict(kept)

    def _save(self, position: Position) -> None:
        self.job.clock.read(position)
        if not self.job.fabric.is_global_zero:
            return
        self.job.run.save_resume(
            {"position": {**vars(position)}, "average": self.job.average.state(), **self._state()}
        )

    def _state(self) -> dict[str, Any]:
        """Return the state of everything that the stage trains."""
        return {
            "module": self.job.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.job.fabric.strategy.precision.state_dict(),
            "critic": None if self.critic is None else self.critic.state(),
        }


def inner_split(people: list[Footage], stage: Stage) -> tuple[list[Footage], list[Signals]]:
    """Split training rows with sound per person: footage of the first, signals of the last."""
    shorter, kept = [], []
    for person in people:
        rows = person.speaking
        n = max(1, round(stage.inner_split * len(rows)))
        kept.append(person.signals[rows[-n:]])
        shorter.append(replace(person, train=rows[:-n]))
    return shorter, kept


def _shown(losses: dict[str, float]) -> dict[str, float]:
    return {k: losses[k] for k in ("loss", "rays") if k in losses}


def _seed_noise(number: int, device: torch.device) -> None:
    """Seed the generators of the devices in use.  torch.manual_seed also queues a seeding of GPUs
    that were never initialised, with a traceback, which takes a millisecond."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def mix(*numbers: int, seed: int) -> int:
    """Combine several numbers and the job's seed into one seed."""
    for number in numbers:
        seed = (seed * 1_000_003 + number + 12_345) % (2**31 - 1)
    return seed
