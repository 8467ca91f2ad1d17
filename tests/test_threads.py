"""Training takes as many threads as other programs leave cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from talkhead_cli import contracts
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


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_the_quota_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(contracts, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert contracts.n_cores() == cores


def test_the_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = contracts.free_gb()
    monkeypatch.setattr(contracts, "CGROUP", tmp_path)
    assert contracts.free_gb() == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text(f"{3 * 2**28}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {2**27}\n")
    assert contracts.free_gb() == 0.375
    (tmp_path / "memory.max").write_text("max\n")
    assert contracts.free_gb() == pytest.approx(machine, rel=0.2)


def test_training_keeps_to_the_quota(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "n_cores", lambda: 1)
    with Threads(SilentProgress()):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_cores_that_others_use_are_not_taken_from_the_quota(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of 64 cores may be used, 40 are: there is room enough."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(threads, "n_cores", lambda: 2)
    looks = iter(after([40.0, 63.5]))
    with Threads(SilentProgress(), times=lambda: next(looks)) as kept:
        for wanted in (2, 1):
            kept.adapt()
            assert torch.get_num_threads() == wanted


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
