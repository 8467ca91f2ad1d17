"""What a stage of training does with its rates, its grid and its saves, and what going back
restores; watched from outside while the speaker is trained."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from talkhead_cli import march
from talkhead_cli.avatars.lokitalk import LokiTalk
from talkhead_cli.contracts import SilentProgress
from talkhead_cli.jobs import fit, stage_loop
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.step import Step, StepLosses
from talkhead_cli.store import Run

N = {"speech": 90, "speech_all": 3, "shape": 40, "detail": 6, "lips": 3, "eyes": 0}
SETTINGS = [
    "data.size_px=64",
    "march.resolution=32",
    "march.every=2",
    "train.stages.speech.batch=8",
    *(f"train.stages.{name}.steps={n}" for name, n in N.items()),
    *(f"train.stages.{name}.n_points=3000" for name in ("shape", "detail", "lips")),
]


@pytest.fixture
def train(speaker_home: Path, tmp_path: Path) -> Callable[..., Run]:
    home = Path(shutil.copytree(speaker_home, tmp_path / "home"))

    def trained(*, fresh: bool = True, **options: Any) -> Run:
        return finetune(
            home,
            "speaker",
            SilentProgress(),
            preset_names=["lokitalk", "tiny"],
            settings=SETTINGS,
            device="cpu",
            fresh=fresh,
            **options,
        )

    return trained


def watched(monkeypatch: pytest.MonkeyPatch, kind: Any, name: str, told: Callable[..., Any]) -> Any:
    """Call `told` with what `kind.name` is called with, before it does what it does."""
    honest = getattr(kind, name)

    def spied(self: Any, *args: Any, **named: Any) -> Any:
        told(self, *args)
        return honest(self, *args, **named)

    monkeypatch.setattr(kind, name, spied)
    return honest


def test_rates_rise_fall_and_a_frozen_grid_is_left_alone(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"stage": ""}
    rates: dict[str, list[float]] = defaultdict(list)
    refreshed: dict[str, int] = defaultdict(int)
    settled: list[str] = []

    def stepped(loop: Any, drawn: Any) -> None:
        now["stage"] = loop.name
        rates[loop.name].append(float(loop.optimizer.param_groups[0]["lr"]))

    def refresh(*_: Any) -> None:
        refreshed[now["stage"]] += 1

    watched(monkeypatch, stage_loop.StageLoop, "_step", stepped)
    watched(monkeypatch, march.GuidedMarcher, "refresh", refresh)
    watched(monkeypatch, LokiTalk, "settle", lambda *_: settled.append(now["stage"]))
    run = train()
    assert {name: len(seen) for name, seen in rates.items()} == {k: n for k, n in N.items() if n}
    assert settled == ["speech"], "its last rows settle how far mouths open"
    # of the preset: 2e-3, which falls to 0.3 of it; warm-up takes 50 steps
    speech = rates["speech"]
    assert speech[0] == pytest.approx(2e-3 / stage_loop.WARM_UP) and speech[:45] == sorted(
        speech[:45]
    )
    assert speech[-1] == pytest.approx(2e-3 * 0.3 ** (89 / 90))
    assert refreshed.keys() == {"shape", "detail"} and refreshed["shape"] >= 18
    assert run.is_finished


def test_training_saves_as_often_as_the_clock_says(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    watched(
        monkeypatch, Run, "save_resume", lambda _, state: saved.append(state["position"]["total"])
    )
    train()
    n_seldom = len(saved)
    monkeypatch.setattr(stage_loop, "SAVE_EVERY_S", 0.0)
    saved.clear()
    train()
    assert saved == list(range(1, sum(N.values()) + 1)) and n_seldom < 20


def test_going_back_restores_all_that_learns(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is no number in step 31 of `shape`: weights and moments are those of step 20 of
    it again, averages begin anew, rates are half."""
    monkeypatch.setattr(stage_loop, "GOOD_EVERY", 20)
    broken_at, honest = N["speech"] + N["speech_all"] + 31, Step.forward
    calls = {"n": 0}

    def sick(self: Step, *args: Any) -> StepLosses:
        calls["n"] += 1
        lost = honest(self, *args)
        return lost._replace(loss=lost.loss * float("nan")) if calls["n"] == broken_at else lost

    monkeypatch.setattr(Step, "forward", sick)
    seen: list[dict[str, Any]] = []
    roll_back = stage_loop.StageLoop._roll_back

    def spied(loop: Any, position: fit.Position, good: Any) -> None:
        def apart() -> dict[str, bool]:
            (state, _), now = good, loop._state()
            moments = [
                {n: s["exp_avg"] for n, s in of["optimizer"]["state"].items()}
                for of in (state, now)
            ]
            assert moments[0].keys() == moments[1].keys() and moments[0]
            return {
                "weights": any(
                    not torch.equal(v, now["module"][n]) for n, v in state["module"].items()
                ),
                "moments": any(not torch.equal(v, moments[1][n]) for n, v in moments[0].items()),
                "average": any(
                    p.requires_grad and not torch.equal(loop.job.average.weights[n], p)
                    for n, p in loop.avatar.named_parameters()
                ),
            }

        rates = [group["rate"] for group in loop.optimizer.param_groups]
        before = apart()
        roll_back(loop, position, good)
        halved = [group["rate"] for group in loop.optimizer.param_groups]
        seen.append(
            {
                "before": before,
                "after": apart(),
                "step": position.step,
                "total": position.total,
                "halved": halved == [0.5 * rate for rate in rates],
            }
        )

    monkeypatch.setattr(stage_loop.StageLoop, "_roll_back", spied)
    train()
    (told,) = seen
    assert told["before"] == dict.fromkeys(("weights", "moments", "average"), True)
    assert told["after"] == dict.fromkeys(("weights", "moments", "average"), False)
    assert told["step"] == 20 and told["halved"]
    assert told["total"] == N["speech"] + N["speech_all"] + 20


def test_going_back_twice_goes_back_to_the_same_state_more_slowly(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a resume there is no newer state for a while: it must survive what is learnt from it,
    and a second NaN finds the rates halved already."""
    train(stop_after=lambda position: position.stage == 2 and position.step == 3)
    calls, honest = {"n": 0}, Step.forward

    def sick(self: Step, *args: Any) -> StepLosses:
        calls["n"] += 1
        lost = honest(self, *args)
        return lost._replace(loss=lost.loss * float("nan")) if calls["n"] in (4, 8) else lost

    monkeypatch.setattr(Step, "forward", sick)
    seen: list[dict[str, Any]] = []
    roll_back = stage_loop.StageLoop._roll_back

    def spied(loop: Any, position: fit.Position, good: Any) -> None:
        roll_back(loop, position, good)
        state = copy.deepcopy(loop._state())
        seen.append(
            {
                "step": position.step,
                "module": state["module"],
                "moments": {n: s["exp_avg"] for n, s in state["optimizer"]["state"].items()},
                "rates": [group["rate"] for group in loop.optimizer.param_groups],
            }
        )

    monkeypatch.setattr(stage_loop.StageLoop, "_roll_back", spied)
    train(fresh=False)
    one, other = seen
    assert one["step"] == other["step"] == 3 and one["moments"]
    for kind in ("module", "moments"):
        assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items()), kind
    assert other["rates"] == [0.5 * rate for rate in one["rates"]]
