"""The training loop: schedules, averaging, NaN guard, exact resume; on the synthetic speaker."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Container
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainings import PRESETS, SHORT, train

from talkhead_cli import march
from talkhead_cli.avatars.lokitalk.method import LokiTalk
from talkhead_cli.contracts import (
    MisuseError,
    RayBundle,
    Signals,
    SilentProgress,
    TalkheadError,
    repacked,
    unpacked,
)
from talkhead_cli.jobs import fit, footage, shots, stage_loop, team
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.average import Average
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.pretrain import pretrain
from talkhead_cli.jobs.runs import build_avatar, pick_run
from talkhead_cli.jobs.step import Step, StepLosses, UncastShots
from talkhead_cli.store import Run, Workspace


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been_killed(home: Path) -> None:
    whole = train(home, run_name="whole")
    for kill_at in (20, 27, 47, 70):  # in both speech stages, shape, detail
        assert not train(home, run_name="cut", stop_after=lambda p, k=kill_at: p.total >= k)
    resumed = train(home, run_name="cut")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.allclose(value.float(), resumed[name].float(), atol=1e-5), name


def test_a_state_of_another_version_is_refused_in_a_sentence(home: Path) -> None:
    assert not train(home, run_name="old", stop_after=lambda p: p.total >= 3)
    run = Run.named(Workspace.open(home, "speaker").runs, "old")
    for key in ("position", "module"):
        held = run.resume_state()
        assert held is not None
        run.save_resume(held | {key: {"other": torch.zeros(1)}})
        with pytest.raises(TalkheadError, match="another version.*--fresh"):
            train(home, run_name="old")


def test_what_a_recorded_step_left_goes_on_without_a_recording(home: Path) -> None:
    """A GPU's state, whose rates are tensors there, on a CPU."""
    assert not train(home, run_name="moved", stop_after=lambda p: p.total >= 33)
    run = Run.named(Workspace.open(home, "speaker").runs, "moved")
    held = run.resume_state()
    assert held is not None
    for group in held["optimizer"]["param_groups"]:
        group |= {"lr": torch.tensor(group["lr"]), "capturable": True}
    run.save_resume(held)
    assert not train(home, run_name="moved", stop_after=lambda p: p.total >= 35)
    left = run.resume_state()
    assert left is not None and left["position"]["total"] == 35
    for group in left["optimizer"]["param_groups"]:
        assert isinstance(group["lr"], float) and not group["capturable"]


class Losses(SilentProgress):
    """What is told of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[float] = []

    def advance(self, n: int = 1, **figures: float) -> None:
        self.told += [figures["loss"]] if "loss" in figures else []


@pytest.mark.parametrize(
    ("broken", "good_every", "heard_after"),
    [
        (0, 100, 0),
        (9, 100, 10),  # when the next one is told of
        (9, 9, 9),  # before a state that holds it is called good
        (24, 100, 24),  # before the stage ends
    ],
)
def test_nobody_waits_for_a_recorded_step(
    home: Path, monkeypatch: pytest.MonkeyPatch, broken: int, good_every: int, heard_after: int
) -> None:
    """It learns what any other does, from what was drawn while the one before it ran, and is told
    of one step later; where one breaks, training goes back all the same."""
    monkeypatch.setattr(stage_loop, "GOOD_EVERY", good_every)
    settings = [
        *SHORT,
        *(
            f"train.stages.{name}.steps=0"
            for name in ("speech_all", "shape", "detail", "lips", "eyes")
        ),
    ]
    seen: list[int] = []

    def trained(name: str) -> tuple[dict[str, Tensor], list[float]]:
        progress = Losses()
        run = finetune(
            home,
            "speaker",
            progress,
            preset_names=PRESETS,
            settings=settings,
            device="cpu",
            run_name=name,
        )
        return run.weights(), progress.told

    plain, told = trained("plain")

    class Played:
        def __init__(self, work: Any) -> None:
            self.work = work

        def __call__(self, *given: Tensor) -> StepLosses:
            lost: StepLosses = self.work(*given)
            seen.append(1)
            return lost._replace(loss=torch.tensor(torch.nan)) if len(seen) == broken else lost

    monkeypatch.setattr(stage_loop.StageLoop, "_recording", lambda loop: Played(loop._learn))
    monkeypatch.setattr(march, "Replay", lambda work, device: Played(work))
    played, later = trained("played")
    if broken:
        assert len(seen) == heard_after + len(told), "and from the beginning"
        return
    assert later == pytest.approx([told[0], *told[:-1]], rel=1e-4)
    for name, value in plain.items():
        assert torch.allclose(value.float(), played[name].float(), atol=1e-6), name


@pytest.mark.parametrize("method", ["lokitalk", "landmark", "talk3d"])
def test_training_bears_half_precision(
    home: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU trains with, in the CPU's halves: every stage runs, weights stay whole, and the
    losses are those of full precision."""
    stages = presets.load([method, "tiny"]).train.stages
    settings = ["data.size_px=64", "march.resolution=32", "march.n_steps=16"]
    for name, stage in stages.items():
        settings += [
            f"train.stages.{name}.steps={3 if stage.steps else 0}",
            f"train.stages.{name}.n_points=2000",
        ]
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        monkeypatch.setitem(team.PRECISION, "cpu", precision)
        run = finetune(
            home,
            "speaker",
            SilentProgress(),
            preset_names=[method, "tiny"],
            settings=settings,
            device="cpu",
            run_name=precision,
        )
        losses[precision] = run.meta()["figures"]["loss"]
        assert all(w.dtype != torch.bfloat16 for w in run.weights().values())
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.2)
    assert losses["bf16-mixed"] != losses["32-true"], "halves are what is asked for"


def test_half_precision_leaves_places_alone() -> None:
    """Fabric would halve every tensor in a module's input, cameras among them."""
    seen: list[torch.dtype] = []

    class Sees(torch.nn.Module):
        def forward(self, drawn: UncastShots) -> torch.Tensor:
            (shot,) = drawn.shots
            seen.append(shot.dtype)  # type: ignore[attr-defined]
            return torch.zeros(())

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    module = fabric.setup(Sees())
    module(UncastShots([torch.rand(3)]))  # type: ignore[list-item]
    assert seen == [torch.float32]


def test_a_run_keeps_the_presets_that_it_was_begun_with(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words may mean another preset after an upgrade."""
    words = {"preset_names": PRESETS, "settings": SHORT, "device": "cpu", "run_name": "old"}
    finetune(home, "speaker", SilentProgress(), **words, stop_after=lambda p: p.total >= 5)
    as_they_were = presets.load

    def changed(names: list[str], settings: list[str] | tuple[str, ...] = ()) -> Any:
        return as_they_were(names, [*settings, "train.ema=0.5"])

    monkeypatch.setattr(presets, "load", changed)
    progress = SilentProgress()
    run = finetune(home, "speaker", progress, **words)
    assert run.is_finished and any("presets changed" in note for note in progress.notes)
    assert presets.from_yaml(run.preset_text() or "").train.ema == 0.998
    with pytest.raises(TalkheadError, match="other settings"):
        finetune(home, "speaker", progress, **{**words, "settings": [*SHORT, "train.scale=2"]})


def test_a_run_without_presets_is_small_on_a_cpu_and_named_so(home: Path) -> None:
    progress, settings = SilentProgress(), [*SHORT, "train.scale=0.2"]
    run = finetune(home, "speaker", progress, settings=settings, device="cpu")
    assert run.name == "lokitalk+small" and run.is_finished
    assert run.meta()["asked"]["presets"] == ["lokitalk", "small"]
    assert any("no GPU is used: training 256 px" in note for note in progress.notes)


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(home: Path) -> None:
    train(home)
    progress = SilentProgress()
    run = pick_run(Workspace.open(home, "speaker"), None, progress)
    assert progress.notes == [f"run: {run.name}"]
    stamp = (run.root / "avatar.safetensors").stat().st_mtime_ns
    train(home)
    assert (run.root / "avatar.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(TalkheadError, match="--fresh"):
        finetune(
            home, "speaker", SilentProgress(), preset_names=PRESETS, settings=["train.scale=0.5"]
        )
    with pytest.raises(TalkheadError, match="begun with --seed 0"):
        finetune(home, "speaker", SilentProgress(), preset_names=PRESETS, settings=SHORT, seed=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_heard_between_steps_and_saves(home: Path, number: int) -> None:
    class Impatient(SilentProgress):
        n_steps = 0

        def advance(self, n: int = 1, **figures: float) -> None:
            self.n_steps += n * ("loss" in figures)
            if self.n_steps == 27:  # in the second stage
                os.kill(os.getpid(), number)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            finetune(
                home, "speaker", Impatient(), preset_names=PRESETS, settings=SHORT, device="cpu"
            )
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    run = Run.named(Workspace.open(home, "speaker").runs, "lokitalk+tiny")
    state = run.resume_state()
    assert state is not None and state["position"]["total"] == 27 and not run.is_finished


def test_nothing_is_lost_by_a_command_that_is_refused(home: Path) -> None:
    train(home)
    root = Workspace.open(home, "speaker").runs / "lokitalk+tiny"
    before = {file.name: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}
    assert "avatar.safetensors" in before and "optim.pt" not in before
    misspelt = [
        "train.stages.lips.learn=[volume, deform, static, pose, voluem]",
        "train.stages.lips.rates.voluem=0.1",
    ]
    for settings, why in (
        (["train.stages.lips.weights.colr=1"], "'lips'.*no 'colr' among its weights"),
        (["train.stages.lips.weights.sync=1"], "no 'sync' among its weights; known: attention"),
        (misspelt, "no 'voluem' among its learn; known: deform"),
    ):
        with pytest.raises(MisuseError, match=why):
            finetune(
                home,
                "speaker",
                SilentProgress(),
                preset_names=PRESETS,
                settings=[*SHORT, *settings],
                fresh=True,
            )
    assert before == {f.name: f.stat().st_mtime_ns for f in root.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", ["../../../x", "/tmp/x", "a/b", ".hidden", ""])
def test_a_runs_name_never_leads_out_of_its_folder(home: Path, name: str) -> None:
    if not name:
        with pytest.raises(MisuseError, match="cannot be the name"):
            Run.named(home, name)
        return
    with pytest.raises(MisuseError, match="cannot be the name"):
        finetune(
            home, "speaker", SilentProgress(), preset_names=PRESETS, settings=SHORT, run_name=name
        )
    assert not (home.parent / "x").exists()


HONEST = Step.forward


def poison(monkeypatch: pytest.MonkeyPatch, steps: Container[int]) -> None:
    """From now on the losses of these steps, counted from one, are not numbers."""
    count = itertools.count(1)

    def sick(self: Step, *args: Any) -> StepLosses:
        lost = HONEST(self, *args)
        return lost._replace(loss=lost.loss * float("nan")) if next(count) in steps else lost

    monkeypatch.setattr(Step, "forward", sick)


def test_a_loss_that_is_not_a_number_rolls_back_and_then_gives_up(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = SilentProgress()
    poison(monkeypatch, {45})
    run = finetune(home, "speaker", progress, preset_names=PRESETS, settings=SHORT, run_name="once")
    assert run.is_finished and any("not a number" in note for note in progress.notes)
    assert all(bool(torch.isfinite(w).all()) for w in run.weights().values())

    poison(monkeypatch, range(45, 10_000))
    with pytest.raises(TalkheadError, match="rates"):
        finetune(home, "speaker", progress, preset_names=PRESETS, settings=SHORT, run_name="always")


@pytest.mark.parametrize("at", [39, 45, 86])  # before a copy to go back to, amid, the last step
def test_a_weight_that_is_not_a_number_rolls_back_though_the_loss_is_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The gradient of sqrt(0) is none, whatever it is multiplied by."""
    honest, seen = Step.forward, []

    def sick(self: Step, *args: object) -> StepLosses:
        lost = honest(self, *args)
        seen.append(1)
        weight = next(p for p in self.avatar.parameters() if p.requires_grad)
        return (
            lost._replace(loss=lost.loss + (0 * weight).abs().sqrt().sum())
            if len(seen) == at
            else lost
        )

    monkeypatch.setattr(Step, "forward", sick)
    monkeypatch.setattr(stage_loop, "GOOD_EVERY", 10)
    progress = SilentProgress()
    run = finetune(home, "speaker", progress, preset_names=PRESETS, settings=SHORT, run_name="w")
    assert any("a weight was not a number" in note for note in progress.notes)
    assert run.is_finished
    assert all(bool(torch.isfinite(w).all()) for w in run.weights().values())


def test_a_loss_that_is_not_a_number_right_after_a_resume_is_borne(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"preset_names": PRESETS, "settings": SHORT, "run_name": "resumed"}
    finetune(home, "speaker", SilentProgress(), **names, stop_after=lambda p: p.total >= 47)
    poison(monkeypatch, {1})
    progress = SilentProgress()
    assert finetune(home, "speaker", progress, **names).is_finished
    assert any("not a number" in note for note in progress.notes)


def test_a_roll_back_leaves_the_averages_of_what_does_not_learn() -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.old, self.new = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))

    pair = Pair()
    average = Average(pair, 0.9)  # type: ignore[arg-type]
    with torch.no_grad():
        for value in (1.0, 3.0):
            pair.old.fill_(value)
            average.update(pair)  # type: ignore[arg-type]
    settled = average.weights["old"].clone()
    assert 1 < settled < 3
    pair.old.requires_grad_(False)
    with torch.no_grad():
        pair.new.fill_(5.0)
    average.restart(pair)  # type: ignore[arg-type]
    assert torch.equal(average.weights["old"], settled) and average.weights["new"] == 5
    with torch.no_grad():
        pair.new.fill_(9.0)
    average.update(pair)  # type: ignore[arg-type]
    assert float(average.weights["new"]) == pytest.approx(5 + 4 * (1 - 2 / 11)), "as if just begun"


def test_draws_follow_the_seed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds see other rays and frames, not other first weights alone."""
    monkeypatch.setattr(Fabric, "seed_everything", lambda self, seed, **_: torch.manual_seed(7))
    first = []
    for index, seed in enumerate((3, 3, 4)):
        losses: list[float] = []

        def watch(position: fit.Position, seen: list[float] = losses) -> bool:
            seen.append(position.figures["loss"])
            return position.total >= 2

        finetune(
            home,
            "speaker",
            SilentProgress(),
            preset_names=PRESETS,
            settings=SHORT,
            run_name=f"run{index}",
            seed=seed,
            stop_after=watch,
        )
        first.append(losses)
    assert first[0] == first[1] != first[2]


def test_every_person_s_space_reaches_the_grid(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a step mixes everybody, always in the same order."""
    seen: list[int] = []
    grown = march.PackedMarcher.refresh

    def watch(self: march.PackedMarcher, field: Any, step: int) -> None:
        seen.append(int(field.whose))
        grown(self, field, step)

    asked = LokiTalk.condition

    def known(self: LokiTalk, signals: Signals) -> Any:
        field = asked(self, signals)
        field.whose = signals.person[0]
        return field

    monkeypatch.setattr(march.PackedMarcher, "refresh", watch)
    monkeypatch.setattr(LokiTalk, "condition", known)
    shutil.copytree(home / "speaker", home / "twin")
    pretrain(
        home, ["speaker", "twin"], "both", SilentProgress(), preset_names=PRESETS, device="cpu",
        settings=["data.size_px=64", "march.resolution=16", "march.every=1",
                  "pretrain.stages.speech.steps=1", "pretrain.stages.detail.steps=0",
                  "pretrain.stages.shape.steps=3", "pretrain.stages.shape.n_points=2000",
                  "pretrain.stages.shape.n_people=0"],
    )  # fmt: skip
    assert set(seen) == {0, 1}


def test_training_lowers_the_colour_loss(home: Path) -> None:
    seen: list[float] = []

    def watch(position: fit.Position) -> bool:
        if "colour" in position.figures:
            seen.append(position.figures["colour"])
        return False

    only = [f"train.stages.{name}.steps=0" for name in ("speech_all", "detail", "lips", "eyes")]
    finetune(
        home,
        "speaker",
        SilentProgress(),
        preset_names=PRESETS,
        settings=[*SHORT, *only, "train.stages.shape.steps=90"],
        stop_after=watch,
    )
    assert len(seen) == 90 and sum(seen[-8:]) < 0.4 * sum(seen[:8])


@pytest.mark.parametrize("name", ["speech", "detail", "lips"])
def test_a_step_that_is_recorded_waits_for_nobody(
    speaker_home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a device without numbers nobody can wait for one, forwards or backwards; and nothing is
    fetched from the CPU, but for single numbers."""
    preset = presets.load(["lokitalk", "tiny"], ["data.size_px=64"])
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    box = footage.box_of(clip.signals.camera[clip.train])
    cpu = torch.device("cpu")
    avatar, _, _ = build_avatar(preset, clip.signals.audio.shape[1:], box, cpu)
    avatar.calibrate(clip.signals[clip.train], clip.mesh, box)
    marcher, _ = march.build(box, cpu, n_steps=24, n_samples=5, kernels=True)
    assert isinstance(marcher, march.FusedMarcher) and avatar.has_kernel
    stage = preset.train.stages[name]
    shot = shots.draw(clip, stage, 4000, box, torch.Generator().manual_seed(0))
    assert marcher.fix_shapes(True) == 5

    def laid(marcher: march.FusedMarcher, rays: RayBundle) -> tuple[Tensor, Tensor, Tensor]:
        room = rays.near.expand(-1, marcher.n_samples).contiguous()
        return room, torch.empty_like(room), rays.row >= 0

    step = Step(avatar, marcher).to("meta").train()
    drawn = UncastShots([repacked(shot, (t.to("meta") for t in unpacked(shot)))])
    monkeypatch.setattr(march.FusedMarcher, "_laid", laid)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda t: t.device.type == "meta"))
    monkeypatch.setattr("talkhead_cli.blocks.planes.why_no_triton", lambda: "there is none")
    halves = torch.autocast  # which knows no such device
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *a, **k: nullcontext() if kind == "meta" else halves(kind, *a, **k),
    )
    step(drawn, stage.weights)  # constants cross once

    class Fetched(TorchDispatchMode):
        found: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            if any(t.device.type == "cpu" and t.ndim for t in tensors):
                self.found.append(str(func))
            return out

    with Fetched() as fetched:
        lost = step(drawn, stage.weights)
        slopes = torch.autograd.grad(lost.loss, avatar.part(stage.learn[0]))
    assert fetched.found == [] and all(slope.is_meta for slope in slopes)
    with Fetched() as fetched, pytest.raises(NotImplementedError):
        torch.ones(3).to("meta").nonzero()  # it would have been seen
    assert fetched.found


def test_a_part_that_begins_late_is_averaged_from_its_own_beginning() -> None:
    """A torso that learns last must not come out half-learnt."""
    avatar = torch.nn.ModuleDict({"early": torch.nn.Linear(1, 1), "late": torch.nn.Linear(1, 1)})
    average = Average(avatar, 0.998)  # type: ignore[arg-type]
    for name, n_steps in (("early", 3000), ("late", 300)):
        for part in avatar:
            avatar[part].requires_grad_(part == name)
        for step in range(n_steps):
            with torch.no_grad():
                avatar[name].weight.fill_(min(1.0, step / 50))
            average.update(avatar)  # type: ignore[arg-type]
    assert float(average.weights["late.weight"]) > 0.9
    assert float(average.weights["early.weight"]) > 0.99
