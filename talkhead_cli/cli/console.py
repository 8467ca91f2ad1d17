"""Console output: progress, notes, results, and errors with their exit codes.

stdout carries the paths of what was made, stderr everything else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from talkhead_cli.contracts import MisuseError, TalkheadError

PLAIN_EVERY_S = 10.0
CANNOT_WRITE = (
    errno.ENOSPC,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)

err = Console(stderr=True, highlight=False, emoji=False)


class Reporter:
    """Reports progress: bars with rate and time left on a terminal, plain lines elsewhere."""

    shown: Reporter | None = None  # the active one

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._unit = "", "frames"
        self._total: int | None = None
        self._done, self._began, self._said = 0, 0.0, 0.0
        if err.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:24}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[figures]}"),
                console=err,
                redirect_stdout=False,
            )

    def __enter__(self) -> Reporter:
        Reporter.shown = self
        return self

    def __exit__(self, *_: object) -> None:
        Reporter.shown = None
        self.make_way()

    def make_way(self) -> None:
        """End the stage and remove the bars, so that other output can follow."""
        self._close_stage()
        if self._bars is not None:
            self._bars.stop()
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._task = None

    def stage(self, name: str, total: int | None = None, unit: str = "frames") -> None:
        self._close_stage()
        self._name, self._total, self._unit = name, total, unit
        self._done, self._began = 0, time.monotonic()
        self._said = self._began
        if self._bars is not None:
            self._bars.start()
            self._task = self._bars.add_task(name, total=total, rate="", figures="")

    def advance(self, n: int = 1, **figures: float) -> None:
        self._done += n
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        if self._bars is not None and self._task is not None:
            self._bars.update(
                self._task, advance=n, rate=f"{rate:.1f} {self._unit}/s", figures=shown
            )
        elif now - self._said > PLAIN_EVERY_S:
            self._said = now
            self._line(rate, shown)

    def note(self, text: str) -> None:
        err.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)

    def _line(self, rate: float, shown: str) -> None:
        of = f"/{self._total}" if self._total else ""
        left = ""
        if self._total and rate > 0:
            left = f", {max(0, self._total - self._done) / rate:.0f} s left"
        err.print(
            f"{self._name}: {self._done}{of} {self._unit}, {rate:.1f}/s{left}  {shown}".rstrip()
        )

    def _close_stage(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.stop_task(self._task)
        elif self._name:
            seconds = time.monotonic() - self._began
            if seconds > 0.5:
                short = self._total is not None and self._done < self._total
                of = f"/{self._total}" if short else ""
                count = f" {self._done}{of} {self._unit}," if self._done else ""
                err.print(f"{self._name}:{count} {seconds:.1f} s")
        self._name = ""


@contextlib.contextmanager
def speaking(verbose: bool) -> Iterator[Reporter]:
    """Run a job: report progress, turn errors into one sentence and an exit code.

    0 done, 1 failed, 2 misused, 130 interrupted, 143 terminated.  `verbose` adds tracebacks and
    what native libraries print.
    """
    code, words = 0, ""
    quiet = contextlib.nullcontext() if verbose else native_stderr_silenced()
    try:
        with _termination_heeded(), quiet, Reporter() as reporter:
            yield reporter
    except MisuseError as error:
        code, words = 2, str(error)
        _trace(verbose)
    except TalkheadError as error:
        code, words = 1, str(error)
        _trace(verbose)
    except KeyboardInterrupt as stop:
        code, words = 130, "interrupted"
        if isinstance(stop, Terminated):
            code, words = 143, "terminated"
        go_on = (
            "run the same command again, without --fresh (preprocess, pretrain and finetune go on "
            "from there)"
        )
        words += "; " + "; ".join(getattr(stop, "__notes__", [go_on]))
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        verbs = {errno.ENOENT: "find", errno.EACCES: "open", errno.EPERM: "open"}
        verb = verbs.get(error.errno, "write")
        code, words = 1, f"cannot {verb}: {error.strerror} ({error.filename or 'disk'})"
        _trace(verbose)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        code = 1
        words = (
            "the GPU's memory is full; free it, ask for less at once (in training -s "
            "train.stages.STAGE.n_points=100000), or pass --device cpu"
        )
        _trace(verbose)
    if code:
        err.print(f"[bold red]error:[/] {escape(words)}", soft_wrap=True)
        raise SystemExit(code)


class Terminated(KeyboardInterrupt):
    """SIGTERM was received, as clusters and containers send it."""


@contextlib.contextmanager
def _termination_heeded() -> Iterator[None]:
    """Make SIGTERM end a job as Ctrl-C does, with nothing left half-written."""

    def end(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # which gets no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def native_stderr_silenced() -> Iterator[None]:
    """Silence messages that C++ libraries print from their own threads and no flag turns off.

    Meanwhile file descriptor 2 is the null device; Python's own stderr goes where it went.
    """
    python = sys.stderr
    try:
        heard = os.dup(2)
    except OSError:  # closed, as in a daemon: nothing to silence
        yield
        return
    try:
        ours = python is not None and python.fileno() == 2
    except (OSError, ValueError):  # a buffer without a descriptor, as in tests
        ours = False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if ours:
        python.flush()
        sys.stderr = os.fdopen(
            os.dup(heard), "w", buffering=1, encoding=python.encoding, errors=python.errors
        )
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(heard, 2)
        os.close(heard)
        if ours:
            sys.stderr.flush()  # not closed: loggers may hold a reference to it
            sys.stderr = python


def _trace(verbose: bool) -> None:
    if verbose:
        err.print_exception()


def answer(text: object) -> None:
    """Print one line of the result to stdout, if stdout exists."""
    if Reporter.shown is not None:
        Reporter.shown.make_way()
    if sys.stdout is None:
        return
    line = f"{text}\n"
    try:
        sys.stdout.write(line)
    except UnicodeEncodeError:  # file names may not fit the terminal's encoding
        code = sys.stdout.encoding or "utf-8"
        sys.stdout.write(line.encode(code, "backslashreplace").decode(code))


def compared(rows: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Return a table of figures: one row per label, one column per run."""
    runs = list(next(iter(rows.values())))
    table = Table("", *runs, box=None, pad_edge=False)
    for label, values in rows.items():
        table.add_row(label, *("" if v is None else f"{v:.4g}" for v in values.values()))
    return table
