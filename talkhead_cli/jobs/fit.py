"""The one training loop.

for stage in preset: for step in stage: draw shots, march, compose, lose, step
once in a while: refresh the grid, average the weights, check for NaN, save, report
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from talkhead_cli import march
from talkhead_cli.avatars.base import Avatar, StepResult
from talkhead_cli.contracts import (
    Progress,
    Shot,
    Signals,
    TalkheadError,
    repacked,
    unpacked,
)
from talkhead_cli.jobs import critic, shots
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.preset import Preset, Stage
from talkhead_cli.store import Run

SAVE_EVERY_S = 20.0
GOOD_EVERY = 100  # steps between the states a NaN rolls back to
MAX_ROLLBACKS = 3
WARM_UP = 50  # steps
START_RAYS = 512
MAX_RAYS = {"cpu": 16_384, "cuda": 65_536}  # of random ones; of patches half as many


class Drawn:
    """The shots of a step, as they are.

    Fabric turns every tensor it finds in a module's input to half precision, where that is asked
    for: places would come out wrong by a hundredth of a head.  It does not look in here.
    """

    def __init__(self, shots: list[Shot]) -> None:
        self.shots = shots


class Lost(NamedTuple):
    """loss () the weighted sum · terms () by name, unweighted · how many points the field was
    asked for · for a critic to learn from, whole pictures (B, H, W, 3), their truth and the
    landmarks in them (B, 68, 2)."""

    loss: Tensor
    terms: dict[str, Tensor]
    n_points: int
    pictures: list[tuple[Tensor, Tensor, Tensor]]


class Step(nn.Module):
    """Condition, march, compose, lose and weigh, in one forward: what Fabric wraps."""

    def __init__(self, avatar: Avatar, marcher: march.Marcher) -> None:
        super().__init__()
        self.avatar, self.marcher = avatar, marcher

    def forward(self, drawn: Drawn, weights: Mapping[str, float]) -> Lost:
        """What a step loses; nothing but `loss` has a gradient."""
        results, n_points = [], 0
        for shot in drawn.shots:
            if shot.rays is None:
                results.append(StepResult(shot))
                continue
            assert shot.plate is not None
            speaker = self.avatar.enroll(shot.portrait)
            rays = speaker.aim(shot.signals, shot.rays)
            made = speaker.condition(shot.signals)
            rendered = self.marcher.march(made, rays)
            frame = speaker.compose(rendered, rays, shot.signals, shot.plate)
            results.append(StepResult(replace(shot, rays=rays), made, rendered, frame))
            n_points += int(rendered.n_points)
        terms = self.avatar.losses(results)
        weighed = [weights[name] * term for name, term in terms.items() if weights.get(name)]
        assert weighed, "the stage weighs none of its losses"
        loss = torch.stack(weighed).sum()
        pictures = [_with_its_truth(r) for r in results] if weights.get("critic") else []
        return Lost(loss, {name: term.detach() for name, term in terms.items()}, n_points, pictures)


def _with_its_truth(result: StepResult) -> tuple[Tensor, Tensor, Tensor]:
    assert result.frame is not None and result.shot.target is not None
    made = result.frame.rgb.detach()
    return made, result.shot.target.view(made.shape), result.shot.signals.landmarks_px


@dataclass
class Place:
    """Where training stands; saved with the weights."""

    stage: int = 0
    step: int = 0
    total: int = 0
    n_rays: float = START_RAYS
    rollbacks: int = 0
    seconds: float = 0.0  # of all its sessions
    figures: dict[str, float] = field(default_factory=dict)


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
    stop_after: Callable[[Place], bool] | None = None,
) -> Place:
    """Train through the preset's stages, continuing from the run's last save if there is one.

    At the end the avatar holds the averaged weights.  `stop_after` ends the loop early, as a
    kill would (tests).
    """
    people = [_near(person, fabric.device) for person in people]
    step_module = Step(avatar, marcher)
    average = _Average(avatar, preset.train.ema)
    place, held = Place(), run.resume_state()
    writer = _log_writer(run, progress) if fabric.is_global_zero else None
    rng = torch.Generator().manual_seed(seed)
    if held is not None:
        place = Place(**held["place"])
        step_module.load_state_dict(held["module"])
        average.load(held["average"])
        progress.note(f"continuing from step {place.total}")
    clock = _Clock(place)
    stages = list(preset.train.stages.items())
    while place.stage < len(stages):
        name, stage = stages[place.stage]
        trainer = _StageLoop(
            name, stage, preset, step_module, average, people, run, fabric, progress, writer, rng,
            seed, clock,
        )  # fmt: skip
        if not trainer.go(place, held, stop_after):
            return place
        held = None
        place.stage, place.step = place.stage + 1, 0
    clock.read(place)
    if writer is not None:
        writer.close()
    average.give(avatar)
    return place


class _Clock:
    """Seconds of training, those before an interruption too."""

    def __init__(self, place: Place) -> None:
        self._began = time.monotonic() - place.seconds

    def read(self, place: Place) -> None:
        place.seconds = time.monotonic() - self._began


class _StageLoop:
    """One stage of the preset."""

    def __init__(
        self,
        name: str,
        stage: Stage,
        preset: Preset,
        module: Step,
        average: _Average,
        people: list[Footage],
        run: Run,
        fabric: Fabric,
        progress: Progress,
        writer: Any,
        rng: torch.Generator,
        seed: int,
        clock: _Clock,
    ) -> None:
        self.name, self.stage, self.preset = name, stage, preset
        self.module, self.average, self.run = module, average, run
        self.fabric, self.progress, self.writer, self.rng = fabric, progress, writer, rng
        self.seed, self.clock = seed, clock
        self.avatar = module.avatar
        self.n_steps = max(1, round(stage.steps * preset.train.scale)) if stage.steps else 0
        self.avatar.noise = stage.noise
        module.marcher.exploring = stage.explore
        self.people = people
        self.kept: list[Signals] = []
        if stage.inner_split:
            self.people, self.kept = _inner_split(people, stage)
        if stage.listen:
            self.people = [self._with_what_is_said(person) for person in self.people]
        wanted = {id(p) for part in stage.learn for p in self.avatar.part(part)}
        for parameter in self.avatar.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        groups = [
            {"params": self.avatar.part(part), "lr": stage.rates[part], "rate": stage.rates[part]}
            for part in stage.learn
        ]
        self.replay = self._recording()
        optimizer = torch.optim.Adam(
            groups, betas=(0.9, 0.99), eps=1e-12 if stage.rays != "none" else 1e-8, fused=True,
            capturable=self.replay is not None,
        )  # fmt: skip
        self.wrapped, self.optimizer = fabric.setup(module, optimizer)
        self._place_rates()
        learner = critic.of(self.avatar)
        self.critic = None if learner is None else critic.Turns(learner, stage, fabric)

    def _recording(self) -> march.Replay[Lost] | None:
        """What records this stage's steps and plays them: on a GPU that one process trains one
        person on, where no step waits for it.  Rays are as many in every step then."""
        marcher, stage = self.module.marcher, self.stage
        alone = self.fabric.world_size == 1 and len(self.people) == 1 and not stage.portraits
        guided = isinstance(marcher, march.GuidedMarcher) and marcher.fused
        steady = stage.rays == "none" or (stage.rays != "picture" and guided)
        recorded = self.fabric.device.type == "cuda" and alone and steady and self.avatar.has_kernel
        if isinstance(marcher, march.GuidedMarcher):
            marcher.whole = recorded
        return march.Replay(self._learn, self.fabric.device) if recorded else None

    def _place_rates(self) -> None:
        """A recorded step reads its rates where it runs, any other from the CPU; a state that was
        saved may come from either."""
        recorded = self.replay is not None
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=self.fabric.device) if recorded else rate
            group["capturable"] = recorded

    def go(
        self, place: Place, held: dict[str, Any] | None, stop: Callable[[Place], bool] | None
    ) -> bool:
        """Run the stage to its end, from where it was saved if it was; False when stopped early."""
        if held is not None:
            self.optimizer.load_state_dict(held["optimizer"])
            self._place_rates()
            if self.critic is not None:
                self.critic.load(held["critic"])
        good, saved_at = None, time.monotonic()
        self.module.train()
        self.progress.stage(f"train: {self.name}", self.n_steps, "steps")
        if place.step:
            self.progress.advance(place.step)
        while place.step < self.n_steps:
            if good is None or place.step % GOOD_EVERY == 0:
                good = copy.deepcopy(self._state()), place.step
            losses, loss = self._one(place)
            if not math.isfinite(loss):
                self._roll_back(place, good)
                continue
            place.step += 1
            place.total += 1
            place.figures = losses
            self.average.update(self.avatar)
            if self.writer is not None and place.total % 20 == 0:
                for key, value in losses.items():
                    self.writer.add_scalar(f"{self.name}/{key}", value, place.total)
            self.progress.advance(1, **_shown(losses))
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                self._save(place)
                saved_at = time.monotonic()
            if stop is not None and stop(place):
                self._save(place)
                return False
        for kept in self.kept:
            self.avatar.eval()
            self.avatar.settle(kept.to(self.fabric.device))
        return True

    def _one(self, place: Place) -> tuple[dict[str, float], float]:
        """One optimiser step; the losses as numbers, and their weighted sum."""
        self._schedule(place.step)
        rank, seed = self.fabric.global_rank, self.seed
        self.rng.manual_seed(_mix(place.total, rank, place.rollbacks, seed=seed))
        _seed_noise(_mix(place.total, rank, 7919, seed=seed), self.fabric.device)
        if self.replay is not None and self.stage.rays != "none":
            marcher = self.module.marcher
            assert isinstance(marcher, march.GuidedMarcher)
            place.n_rays = min(self.stage.n_points // marcher.samples_per_ray, self._most_rays())
        drawn = [self._draw(person, int(place.n_rays)) for person in self._mixed()]
        learns_space = self.stage.rays != "none" and not self.stage.freeze_grid
        if learns_space and place.total % self.preset.march.every == 0:
            # everybody in turn: the grid is to hold them all
            shot = drawn[place.total // self.preset.march.every % len(drawn)]
            with torch.no_grad():
                made = self.avatar.enroll(shot.portrait).condition(shot.signals)
                self.module.marcher.refresh(made, place.total)
        lost = self._step(drawn) if self.replay is None else self._replayed(drawn)
        # all in one copy from the device
        terms = [lost.loss.detach().float(), *(term.float() for term in lost.terms.values())]
        value, *read = torch.stack(terms).tolist()
        if lost.n_points and self.stage.rays != "picture" and self.replay is None:
            want = place.n_rays * self.stage.n_points / lost.n_points
            place.n_rays = min(max(0.9 * place.n_rays + 0.1 * want, 128), self._most_rays())
        figures = dict(zip(lost.terms, read, strict=True)) | {"loss": value}
        if lost.n_points:
            figures |= {"rays": float(int(place.n_rays)), "points": float(lost.n_points)}
        return figures, value

    def _most_rays(self) -> int:
        return MAX_RAYS[self.fabric.device.type] // (1 if self.stage.rays == "random" else 2)

    def _draw(self, person: Footage, n_rays: int) -> Shot:
        aabb = self.avatar.aabb.to(person.device)
        shot = shots.draw(person, self.stage, n_rays, aabb, self.rng, self.avatar.magnification)
        tensors = (t.to(self.fabric.device) for t in unpacked(shot))
        return repacked(shot, tensors)

    def _step(self, drawn: list[Shot]) -> Lost:
        """One step of the optimiser, and of the critic, unless what is lost is not a number."""
        lost = self.wrapped(Drawn(drawn), self.stage.weights)
        self.optimizer.zero_grad(set_to_none=True)
        # of the whole team: all go on together, or all go back
        shared = self.fabric.all_reduce(lost.loss.detach(), reduce_op="mean")
        assert isinstance(shared, Tensor)
        if math.isfinite(float(shared)):
            self.fabric.backward(lost.loss)
            self.optimizer.step()
            if self.critic is not None and lost.pictures:
                with self.critic.learning():
                    told = self.critic.told_apart(lost.pictures)
                    self.fabric.backward(told)
                lost.terms["told_apart"] = told.detach()
        return lost._replace(loss=shared)

    def _replayed(self, drawn: list[Shot]) -> Lost:
        """The same by the recording."""
        assert self.replay is not None
        (self._like,) = drawn
        try:
            return self.replay(*unpacked(self._like))
        except march.CannotRecordError as error:
            self.progress.note(
                f"steps of stage '{self.name}' cannot be recorded ({error}); the GPU waits for the "
                "CPU to start their operations one by one, which takes several times as long"
            )
            self.replay = None
            return self._step(drawn)

    def _learn(self, *tensors: Tensor) -> Lost:
        """What is recorded: a step on the tensors of a shot like the one drawn last.  Gradients
        that are not numbers leave no trace: whoever scales the loss passes them over."""
        shot = repacked(self._like, iter(tensors))
        lost: Lost = self.wrapped(Drawn([shot]), self.stage.weights)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(lost.loss)
        self.optimizer.step()
        return lost._replace(loss=lost.loss.detach())

    @torch.no_grad()
    def _with_what_is_said(self, person: Footage) -> Footage:
        """The footage with the landmarks that speech says of every row, heard in order."""
        self.avatar.eval()
        said = self.avatar.listen(person.signals.to(self.fabric.device)).landmarks
        return replace(person, said=said.to(person.device))

    def _mixed(self) -> list[Footage]:
        """The people of this step."""
        n = self.stage.n_people
        if not 0 < n < len(self.people):
            return self.people
        return [self.people[i] for i in torch.randperm(len(self.people), generator=self.rng)[:n]]

    def _schedule(self, step: int) -> None:
        """Warm-up, then an exponential fall."""
        scale = min(1.0, (step + 1) / WARM_UP) * self.stage.fall ** (step / max(1, self.n_steps))
        for group in self.optimizer.param_groups:
            rate = group["rate"] * scale
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _roll_back(self, place: Place, good: Any) -> None:
        place.rollbacks += 1
        if good is None or place.rollbacks > MAX_ROLLBACKS:
            raise TalkheadError(
                f"training of stage '{self.name}' keeps producing NaN; lower the stage's rates, "
                f"for example -s train.stages.{self.name}.rates.{self.stage.learn[0]}=0.001"
            )
        state, step = good
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.replay is not None:  # it played on what was just replaced
            self.replay = march.Replay(self._learn, self.fabric.device)
        self._place_rates()
        if self.critic is not None:
            self.critic.load(state["critic"])
        self.average.restart(self.avatar)
        for group in self.optimizer.param_groups:
            group["rate"] *= 0.5
        self.progress.note(
            f"a loss was not a number at step {place.step} of '{self.name}'; back to step {step} "
            "at half the rates"
        )
        place.total -= place.step - step
        place.step = step

    def _save(self, place: Place) -> None:
        self.clock.read(place)
        if not self.fabric.is_global_zero:
            return
        self.run.save_resume({
            "place": {**vars(place)}, "average": self.average.state(), **self._state(),
        })  # fmt: skip

    def _state(self) -> dict[str, Any]:
        """Everything that learns in the stage."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic": None if self.critic is None else self.critic.state(),
        }


class _Average:
    """Exponential average of the avatar's weights, with a warm-up so that it never lags: each
    weight by the steps that it has learnt for, since parts begin in different stages."""

    def __init__(self, avatar: Avatar, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in avatar.named_parameters()}
        self.counts = dict.fromkeys(self.weights, 0)

    @torch.no_grad()
    def update(self, avatar: Avatar) -> None:
        means, news, shares = [], [], []
        for name, parameter in avatar.named_parameters():
            if parameter.requires_grad:
                self.counts[name] = count = self.counts[name] + 1
                means.append(self.weights[name])
                news.append(parameter.to(means[-1].device))
                shares.append(1 - min(self.decay, (1 + count) / (10 + count)))
        for share in set(shares):  # all parts of a stage have learnt for as long, or nearly
            at = [i for i, s in enumerate(shares) if s == share]
            torch._foreach_lerp_([means[i] for i in at], [news[i] for i in at], share)

    def restart(self, avatar: Avatar) -> None:
        """Forget what the parts that learn have been since; the others stand as they were left."""
        for name, parameter in avatar.named_parameters():
            if parameter.requires_grad:
                self.counts[name] = 0
                self.weights[name].copy_(parameter.detach())

    @torch.no_grad()
    def give(self, avatar: Avatar) -> None:
        for name, parameter in avatar.named_parameters():
            parameter.copy_(self.weights[name])

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts, "weights": self.weights}

    def load(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)


def _inner_split(people: list[Footage], stage: Stage) -> tuple[list[Footage], list[Signals]]:
    """Training rows without their last share, and the signals of that share, per person."""
    shorter, kept = [], []
    for person in people:
        rows = person.train[person.heard[person.train]]
        n = max(1, round(stage.inner_split * len(rows)))
        kept.append(person.signals[rows[-n:]])
        shorter.append(replace(person, train=rows[:-n]))
    return shorter, kept


def _near(person: Footage, device: torch.device) -> Footage:
    """The footage on a GPU, if half of what is free there holds it: a step that picks its pixels
    from the disk takes longer for that than for all the rest."""
    size = person.pictures.nbytes + person.labels.nbytes
    return person.on(device) if size < march.room_on(device) / 2 else person


def _shown(losses: dict[str, float]) -> dict[str, float]:
    return {k: losses[k] for k in ("loss", "rays") if k in losses}


def _seed_noise(number: int, device: torch.device) -> None:
    """What torch.manual_seed does for the devices that are used; it also writes down, at a
    millisecond's cost, who would have seeded GPUs that were never started."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _mix(*numbers: int, seed: int) -> int:
    """One seed out of several numbers and the job's own."""
    for number in numbers:
        seed = (seed * 1_000_003 + number + 12_345) % (2**31 - 1)
    return seed


def _log_writer(run: Run, progress: Progress) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        progress.note("tensorboard is not installed: no training curves are logged")
        return None
    return SummaryWriter(str(run.log_folder))
