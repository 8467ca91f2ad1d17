"""What people are shown while a job runs, and how jobs are interrupted."""

from __future__ import annotations

import errno
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from talkhead_cli.cli import console
from talkhead_cli.jobs import interrupt
from talkhead_cli.store import Workspace


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A console that remembers what it shows."""
    made = Console(record=True, width=100, force_terminal=False, stderr=True, emoji=False)
    assert not console.err._emoji
    monkeypatch.setattr(console, "err", made)
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0.0)
    return made


def test_lines_say_how_far_a_stage_is_and_how_long_it_took(
    shown: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"now": 100.0}
    monkeypatch.setattr(console.time, "monotonic", lambda: clock["now"])
    with console.Reporter() as report:
        report.stage("face mesh", 200)
        for _ in range(2):
            clock["now"] += 1.0
            report.advance(50, loss=0.12345)
        report.note("two faces [left] are seen in C:\\[a] :fire: [/b]")
        report.stage("sound")
        clock["now"] += 0.1
    said = shown.export_text().splitlines()
    assert said[0].startswith("face mesh: 50/200 frames, 50.0/s, 3 s left  loss 0.123")
    assert said[1].startswith("face mesh: 100/200 frames, 50.0/s, 2 s left")
    assert said[2] == "note: two faces [left] are seen in C:\\[a] :fire: [/b]"
    assert said[3] == "face mesh: 100/200 frames, 2.0 s" and len(said) == 4, (
        "a short stage says nothing"
    )


def test_on_a_terminal_a_bar_stands_still_once_its_stage_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Console(record=True, width=120, force_terminal=True, stderr=True)
    monkeypatch.setattr(console, "err", made)
    with console.Reporter() as report:
        report.stage("looking for faces")
        report.stage("face mesh", 10)
        report.advance(4)
        bars = report._bars
        assert bars is not None
        first, second = bars.tasks
        assert first.finished_time is None and first.stop_time is not None
        assert second.stop_time is None and second.completed == 4
    assert second.stop_time is not None


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Signals that reach whoever listened before."""
    found: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: found.append(number))
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_first_interruption_waits_and_a_second_does_not(heard: list[int]) -> None:
    with interrupt.delayed() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() and not heard
        os.kill(os.getpid(), signal.SIGINT)
        assert heard == [signal.SIGINT], "at once"
    assert len(heard) == 2, "the first, once the block has ended"


def test_without_an_interruption_nothing_is_passed_on(heard: list[int]) -> None:
    with interrupt.delayed() as asked:
        assert not asked()
    assert not heard
    os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGINT], "as it was before"


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.delayed() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert not asked()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_names_that_a_terminal_cannot_show_are_told_as_far_as_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for code, name, told in (
        ("utf-8", os.fsdecode(b"caf\xe9.mp4"), b"caf\\udce9.mp4\n"),
        ("latin-1", "\u65e5\u672c.mp4", b"\\u65e5\\u672c.mp4\n"),
    ):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, code, errors="strict"))
        console.answer(name)
        sys.stdout.flush()
        assert written.getvalue() == told


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_a_file_that_may_not_be_touched_is_a_sentence(shown: Console, number: int) -> None:
    with pytest.raises(SystemExit) as ended, console.speaking(False):
        raise OSError(number, os.strerror(number), "/tmp/x")
    assert ended.value.code == 1
    assert "cannot open" in shown.export_text()


def test_answers_go_to_stdout_while_bars_are_on_a_terminal(tmp_path: Path) -> None:
    """path=$(talkhead render ...) is typed where stderr is a terminal."""
    for name in ("a", "b"):
        Workspace(tmp_path, name).note(finished=False)
    reader, terminal = pty.openpty()
    command = [sys.executable, "-m", "talkhead_cli.cli.app", "list", "--home", str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, check=True, timeout=60)
    os.close(terminal)
    os.close(reader)
    assert done.stdout == b"a\t(unfinished)\tno runs\nb\t(unfinished)\tno runs\n"


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_a_stage_is_over_before_the_answer(
    monkeypatch: pytest.MonkeyPatch, on_a_terminal: bool
) -> None:
    order: list[str] = []

    class Pen(io.StringIO):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name_ = name

        def write(self, text: str) -> int:
            if text.strip():
                order.append(self.name_)
            return super().write(text)

    aside = Pen("stderr")
    monkeypatch.setattr(
        console, "err", Console(file=aside, width=100, force_terminal=on_a_terminal)
    )
    monkeypatch.setattr(sys, "stdout", Pen("stdout"))
    with console.Reporter() as report:
        report.stage("render", 2)
        report._began -= 5
        report.advance(2)
        console.answer("film.mp4")
        console.answer("film.mp4.json")
    assert order[-2:] == ["stdout", "stdout"] and "stderr" in order, order
    assert "render" in aside.getvalue()


@pytest.mark.parametrize(("note", "told"), [(None, "without --fresh"), ("as before", "as before")])
def test_who_interrupts_is_told_what_to_do_next(
    shown: Console, note: str | None, told: str
) -> None:
    stop = KeyboardInterrupt()
    if note is not None:
        stop.add_note(note)
    with pytest.raises(SystemExit) as end, console.speaking(False):
        raise stop
    assert end.value.code == 130
    said = " ".join(shown.export_text().split())
    assert told in said and ("without --fresh" in said) == (note is None)
