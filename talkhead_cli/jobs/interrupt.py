"""Delay Ctrl-C and SIGTERM until a block of work has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def delayed() -> Iterator[Callable[[], bool]]:
    """Hold the first interrupt back until the block has ended; the yielded function returns whether
    there is one, so that the block may end early.  A second one takes effect at once.

    Does nothing outside the main thread, which alone receives signals.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            _passed_on(before[number], number, frame)
        asked.append(number)

    heard = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # as under nohup
    before = {int(number): signal.signal(number, note) for number in heard}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        _passed_on(before[asked[0]], asked[0], None)


def _passed_on(handler: object, number: int, frame: FrameType | None) -> None:
    """Do what the replaced handler would have done."""
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
