"""Training takes as many threads as other programs leave cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from talkhead_cli.contracts import SilentProgress
from talkhead_cli.jobs import threads
from talkhead_cli.jobs.threads import Threads, Times, cpu_times


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(threads, "EVERY_S", 0.0)
    yield
    torch.set_num_threads(before)


def after(others: list[float], own: float = 1.2) -> list[Times]:
    """Looks a second apart, between which so many cores were used by others."""
    times, busy = [(0.0, 0.0, 0.0)], 0.0
    for second, used in enumerate(others, 1):
        busy += used + own
        times.append((float(second), busy, own * second))
    return times


@pytest.mark.parametrize(
    ("others", "wanted"),
    [([0.0, 0.1], [2, 2]), ([0.67, 1.0, 1.0, 0.05], [1, 1, 1, 2]), ([1.9], [1]), ([5.0], [1])],
)
def test_threads_are_as_many_as_cores_are_free(
    two_threads: None, others: list[float], wanted: list[int]
) -> None:
    looks, progress = iter(after(others)), SilentProgress()
    found = []
    with Threads(progress, times=lambda: next(looks)) as kept:
        for _ in others:
            kept.adapt()
            found.append(torch.get_num_threads())
    assert found == wanted
    assert len(progress.notes) == (1 if min(wanted) == 1 else 0), "said once"
    assert torch.get_num_threads() == 2


def test_it_looks_now_and_then_and_only_where_asked(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "EVERY_S", 3600.0)
    now = time.monotonic()
    looks = iter([(now, 0.0, 0.0), (now + 1, 9.0, 0.0)])
    kept = Threads(SilentProgress(), times=lambda: next(looks))
    kept.adapt()
    assert torch.get_num_threads() == 2 and next(looks) == (now + 1, 9.0, 0.0)
    Threads(SilentProgress(), wanted=False, times=lambda: pytest.fail("not asked")).adapt()
    Threads(SilentProgress(), times=lambda: None).adapt()
    torch.set_num_threads(1)
    Threads(SilentProgress(), times=lambda: pytest.fail("there is but one")).adapt()


def test_what_others_use_is_told_from_what_we_use() -> None:
    """A busy program of ours counts as our own, another one does not."""
    first = cpu_times()
    if first is None:
        pytest.skip("there is no /proc/stat here")
    core = min(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.3)
        first = cpu_times()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            pass
        second = cpu_times()
    finally:
        other.kill()
        other.wait()
    assert first is not None and second is not None
    seconds, busy, own = (b - a for a, b in zip(first, second, strict=True))
    assert 0.2 * seconds < own <= 1.1 * seconds
    assert busy - own > 0.2 * seconds
