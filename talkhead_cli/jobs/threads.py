"""Thread count of CPU training, kept at the number of cores that other programs leave free.

A step is a thousand small operations, and torch's threads meet at the end of each.  Where another
program holds one of their cores, all wait for the thread that was preempted: beside one busy
program on two cores, a command that took 24 to 29 s alone took 76 s in two threads, 36 to 38 s in
one.  Results then depend on the load in their last bits, since threads order sums;
OMP_NUM_THREADS=1 avoids that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from talkhead_cli.contracts import Progress, n_bound_cores, n_cores

EVERY_S = 3.0  # between looks at what other programs use

Times = tuple[float, float, float]


def cpu_times() -> Times | None:
    """Return seconds of wall time, seconds that this process's cores were busy, and those of them
    that this process used; None where Linux's /proc does not tell."""
    try:
        ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        with open("/proc/stat", encoding="ascii") as file:
            rows = [line.split() for line in file if line.startswith("cpu")]
        # user nice system idle iowait irq softirq steal; guests are within user
        ticks = [[int(word) for word in row[1:9]] for row in rows if row[0] in ours]
        busy = sum(sum(core) - core[3] - core[4] for core in ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    own = os.times()
    return time.monotonic(), busy, sum(own[:4])  # with children that have ended, such as ffmpeg


class Threads:
    """Adapts torch's number of threads, from 1 to what it was; as a context, sets it back."""

    def __init__(
        self,
        progress: Progress,
        *,
        wanted: bool = True,
        times: Callable[[], Times | None] = cpu_times,
    ) -> None:
        """wanted: False leaves the number alone · times: see `cpu_times`"""
        self._before = torch.get_num_threads()
        self.most = min(self._before, n_cores())  # torch does not know of a container's quota
        if wanted and self.most < self._before:
            torch.set_num_threads(self.most)
        self._progress, self._times, self._told = progress, times, False
        self._seen = times() if wanted and self.most > 1 else None

    def adapt(self) -> None:
        """Count free cores since the last look, if that is long enough ago."""
        if self._seen is None or time.monotonic() - self._seen[0] < EVERY_S:
            return
        now = self._times()
        if now is None:
            return
        seconds, busy, own = (a - b for a, b in zip(now, self._seen, strict=True))
        self._seen = now
        others = max(0.0, busy - own) / max(seconds, 1e-9)
        n = min(self.most, max(1, round(n_bound_cores() - others)))
        if n < self.most and not self._told:
            self._told = True
            self._progress.note(
                f"other programs use {others:.1f} cores: training goes on in {n} of {self.most} "
                "threads while they do"
            )
        if n != torch.get_num_threads():
            torch.set_num_threads(n)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)
