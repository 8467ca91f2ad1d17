"""Processes that train together: the same as one process that learns from all their draws."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, Progress, SilentProgress, TalkheadError
from talkhead_cli.jobs import fit, footage, shots, stage_loop, team
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.average import Average
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.jobs.runs import box_for, build_avatar, pick_run
from talkhead_cli.jobs.step import Step, UncastShots
from talkhead_cli.march import OccupancyGrid
from talkhead_cli.store import Run, Workspace

CPU = torch.device("cpu")
SMALL = [
    "data.size_px=64",
    "march.resolution=32",
    "march.n_steps=16",
    "train.stages.speech.steps=4",
    "train.stages.speech_all.steps=0",
    "train.stages.shape.steps=20",
    "train.stages.detail.steps=4",
    "train.stages.lips.steps=2",
    "train.stages.eyes.steps=0",
    *(f"train.stages.{name}.n_points=3000" for name in ("shape", "detail", "lips")),
]
ONLY_SPEECH = [*SMALL, *(f"train.stages.{name}.steps=0" for name in ("shape", "detail", "lips"))]


def ready(home: Path, settings: list[str]) -> tuple[Preset, Any, Any, footage.Footage]:
    """A fresh avatar of the speaker, its marcher, and her footage."""
    preset = presets.load(["lokitalk", "tiny"], settings)
    clip = footage.load(Workspace.open(home, "speaker"), preset.data, SilentProgress())
    torch.manual_seed(0)
    aabb = box_for(preset, clip.signals.camera[clip.train])
    avatar, marcher, _ = build_avatar(preset, clip.signals.audio.shape[1:], aabb, CPU)
    avatar.calibrate(clip.signals[clip.train], clip.mesh, aabb)
    return preset, avatar, marcher, clip


def learn(home: Path, progress: Progress, *, settings: list[str], devices: int, nodes: int) -> None:
    """Train, and write what this process ends with."""
    fabric = team.fabric(CPU, "32-true", devices, nodes)
    with fabric.rank_zero_first():
        preset, avatar, marcher, clip = ready(home, settings)
    place = fit.fit(preset, avatar, marcher, [clip], Run.named(home, "run"), fabric, progress)
    state = {**avatar.state_dict(), **{f"grid.{k}": v for k, v in marcher.state_dict().items()}}
    torch.save({"state": state, "loss": place.figures["loss"]}, home / f"{fabric.global_rank}.pt")


def by_one(home: Path, settings: list[str], n_steps: int) -> tuple[dict[str, torch.Tensor], float]:
    """The first stage by one process, on what each of two would have drawn."""
    preset, avatar, marcher, clip = ready(home, settings)
    stage = preset.train.stages["speech"]
    step, average = Step(avatar, marcher).train(), Average(avatar, preset.train.ema)
    avatar.noise = stage.noise
    (shorter,), kept = stage_loop.inner_split([clip], stage)
    avatar.requires_grad_(False)
    parameters = avatar.part("speech")
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
    rng, value = torch.Generator(), 0.0
    for index in range(n_steps):
        scale = min(1.0, (index + 1) / stage_loop.WARM_UP) * stage.fall ** (index / n_steps)
        optimizer.param_groups[0]["lr"] = stage.rates["speech"] * scale
        optimizer.zero_grad()
        value = 0.0
        for rank in range(2):
            rng.manual_seed(stage_loop.mix(index, rank, 0, seed=0))
            torch.manual_seed(stage_loop.mix(index, rank, 7919, seed=0))
            drawn = UncastShots([shots.draw(shorter, stage, 0, avatar.aabb, rng)])
            loss = step(drawn, stage.weights).loss / 2
            loss.backward()
            value += float(loss.detach())
        optimizer.step()
        average.update(avatar)
    avatar.eval()
    avatar.settle(kept[0])
    average.give(avatar)
    return avatar.state_dict(), value


def test_two_processes_learn_as_one_with_both_their_draws(home: Path) -> None:
    team.run(learn, home, progress=SilentProgress(), devices=2, nodes=1, settings=ONLY_SPEECH)
    found = [torch.load(home / f"{rank}.pt", weights_only=True) for rank in range(2)]
    state, loss = by_one(home, ONLY_SPEECH, 4)
    assert found[0]["loss"] == found[1]["loss"] == pytest.approx(loss, rel=1e-5)
    for name, value in state.items():
        assert torch.allclose(found[0]["state"][name], value, atol=1e-6), name
    assert not torch.distributed.is_initialized() and "LOCAL_RANK" not in os.environ


def test_a_team_stays_of_one_mind(home: Path) -> None:
    """Fields, averages and the occupancy grid too, which every process looks into elsewhere."""
    team.run(learn, home, progress=SilentProgress(), devices=2, nodes=1, settings=SMALL)
    one, two = (torch.load(home / f"{rank}.pt", weights_only=True)["state"] for rank in range(2))
    apart = [name for name in one if not torch.equal(one[name], two[name])]
    # what marching saw since the grid was last shared is each one's own
    assert set(apart) <= {name for name in one if name.endswith("seen")}, apart


def look_elsewhere(home: Path, progress: Progress, *, devices: int, nodes: int) -> None:
    """Two steps, each of which sees a cell that the other process does not; write what is known."""
    fabric = team.fabric(CPU, "32-true", devices, nodes)

    class Sees(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.grid = OccupancyGrid(torch.tensor([-1.0, -1, -1, 1, 1, 1]), 0.1, 8)

        def forward(self, place: torch.Tensor) -> torch.Tensor:
            self.grid.observe(place, torch.full((1,), 0.9))
            return self.weight.sum() * place.sum()

    seer = Sees()
    module, optimizer = fabric.setup(seer, torch.optim.Adam(seer.parameters()))
    side = 0.9 if fabric.global_rank else -0.9
    for height in (side, 0.1):
        fabric.backward(module(torch.tensor([[side, height, side]])))
        optimizer.step()
    torch.save(seer.grid.seen, home / f"{fabric.global_rank}.pt")


def test_what_each_process_saw_is_its_own_until_grids_are_shared(home: Path) -> None:
    team.run(look_elsewhere, home, progress=SilentProgress(), devices=2, nodes=1)
    one, two = (torch.load(home / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one[0, 0, 0] == two[7, 7, 7] == pytest.approx(0.9)
    assert one[7, 7, 7] == two[0, 0, 0] == pytest.approx(0.05)


def learn_of_people(home: Path, progress: Progress, *, devices: int, nodes: int) -> None:
    """Pretrain on the speaker and on herself as another; write what this process ends with."""
    settings = [*SMALL, "pretrain.stages.speech.steps=2"]
    settings += [
        f"pretrain.stages.{stage}.{setting}"
        for stage in ("shape", "detail")
        for setting in ("steps=3", "n_points=2000", "n_people=2")
    ]
    preset = presets.load(["lokitalk", "tiny"], settings)
    assert preset.pretrain is not None
    fabric = team.fabric(CPU, "32-true", devices, nodes)
    space = Workspace.open(home, "speaker")
    with fabric.rank_zero_first():
        clips = [footage.load(space, preset.data, SilentProgress(), person=i) for i in range(2)]
    torch.manual_seed(0)
    rows = [clip.signals[clip.train] for clip in clips]
    aabb = box_for(preset, rows[0].camera)
    avatar, marcher, _ = build_avatar(preset, rows[0].audio.shape[1:], aabb, CPU, 2)
    avatar.survey(rows)
    for clip, signals in zip(clips, rows, strict=True):
        avatar.calibrate(signals, clip.mesh, aabb)
    before = {name: value.clone() for name, value in avatar.common_state().items()}
    stages = preset.model_copy(update={"train": preset.pretrain})
    fit.fit(stages, avatar, marcher, clips, Run.named(home, "prior"), fabric, progress)
    torch.save(
        {"before": before, "after": avatar.common_state()}, home / f"{fabric.global_rank}.pt"
    )


def test_a_team_that_learns_of_people_stays_of_one_mind(home: Path) -> None:
    team.run(learn_of_people, home, progress=SilentProgress(), devices=2, nodes=1)
    one, two = (torch.load(home / f"{rank}.pt", weights_only=True) for rank in range(2))
    moved = [n for n, value in one["after"].items() if not torch.equal(value, one["before"][n])]
    assert {n.partition(".")[0] for n in moved} >= {"transfer", "volume", "speech", "density_net"}
    assert all(torch.equal(value, two["after"][name]) for name, value in one["after"].items())


def test_a_team_is_asked_for_in_the_command(home: Path) -> None:
    words = ["finetune", "--id", "speaker", "-p", "lokitalk", "-p", "tiny", "--home", str(home)]
    words += [word for setting in SMALL for word in ("-s", setting)]
    result = CliRunner().invoke(app, [*words, "--devices", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    run = pick_run(Workspace.open(home, "speaker"), None, SilentProgress())
    assert run.is_finished and run.meta()["steps"] == 30
    again = CliRunner().invoke(app, [*words, "--devices", "2", "--device", "cpu"])
    assert again.exit_code == 0 and "finished already" in again.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_team_saves_first(home: Path, number: int) -> None:
    """All of a team hear Ctrl-C in a terminal; the chief alone does anything about it."""

    class Impatient(SilentProgress):
        n_steps = 0

        def advance(self, n: int = 1, **figures: float) -> None:
            self.n_steps += n * ("loss" in figures)
            if self.n_steps == 7:  # in the second stage
                (other,) = multiprocessing.active_children()
                for process in (other.pid, os.getpid()):
                    assert process is not None
                    os.kill(process, number)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            team.run(learn, home, progress=Impatient(), devices=2, nodes=1, settings=SMALL)
    finally:
        signal.signal(number, before)
    assert not multiprocessing.active_children()
    state = Run.named(home, "run").resume_state()
    assert state is not None and state["position"]["total"] == 7
    again = Notes()
    team.run(learn, home, progress=again, devices=2, nodes=1, settings=SMALL)
    assert "continuing from step 7" in again.said
    one, two = (torch.load(home / f"{rank}.pt", weights_only=True)["state"] for rank in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one if not n.endswith("seen"))


def on_the_second_machine(home: Path, place: dict[str, str], ends: Any) -> None:
    os.environ.update(place | {"NODE_RANK": "1"})
    try:
        team.run(learn, home, progress=SilentProgress(), devices=1, nodes=2, settings=SMALL)
    except BaseException as error:
        ends.put(f"{type(error).__name__}: {error}")


def test_a_team_of_two_machines_saves_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler tells every machine to end; the first one saves, and the others follow it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    for name, value in (place | {"NODE_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("spawn")
    ends = context.Queue()
    other = context.Process(target=on_the_second_machine, args=(home, place, ends))

    class Impatient(SilentProgress):
        n_steps = 0

        def advance(self, n: int = 1, **figures: float) -> None:
            self.n_steps += n * ("loss" in figures)
            if self.n_steps == 7:
                for process in (other.pid, os.getpid()):
                    assert process is not None
                    os.kill(process, signal.SIGTERM)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        other.start()
        with pytest.raises(KeyboardInterrupt):
            team.run(learn, home, progress=Impatient(), devices=1, nodes=2, settings=SMALL)
        said = ends.get(timeout=60)
        other.join(60)
    finally:
        signal.signal(signal.SIGTERM, before)
        other.kill()
    state = Run.named(home, "run").resume_state()
    assert state is not None and state["position"]["total"] == 7
    assert said.startswith("TalkheadError: another machine of the team has ended")


class Notes(SilentProgress):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def gone(home: Path, progress: Progress, *, devices: int, nodes: int) -> None:
    """A job whose second process is killed."""
    fabric = team.fabric(CPU, "32-true", devices, nodes)
    if not team.is_chief(devices, nodes):
        os._exit(9)
    fabric.barrier()


def test_a_process_that_dies_takes_nobody_hostage(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TalkheadError, match="a process of the team failed.*fewer --devices"):
        team.run(gone, tmp_path, progress=SilentProgress(), devices=2, nodes=1)
    assert time.monotonic() - began < 60
    assert not torch.distributed.is_initialized()


def test_who_works_alone_writes_whatever_a_cluster_s_shell_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NODE_RANK", "3")
    assert team.is_chief(1, 1) and not team.is_chief(1, 4)


def test_teams_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for devices, nodes in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(MisuseError, match="1 or more"):
            team.run(gone, tmp_path, progress=SilentProgress(), devices=devices, nodes=nodes)
    monkeypatch.delenv("NODE_RANK", raising=False)
    with pytest.raises(MisuseError, match="NODE_RANK"):
        team.run(gone, tmp_path, progress=SilentProgress(), devices=1, nodes=2)
