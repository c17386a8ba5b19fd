"""Interruptions: SIGTERM and SIGHUP end a command as Ctrl-C does, so that its temporary files are removed.

Schedulers, ``timeout`` and ``docker stop`` send SIGTERM, a closed terminal sends SIGHUP. By default both end a process
at once, with everything left where it is.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
EXIT_CODE_BASE = 128  # of a process that a signal ended, in shells


class Interrupted(BaseException):
    """A signal that asks the process to end. ``exit_code``: 128 and the signal's number, as shells report it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = EXIT_CODE_BASE + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C and ``SIGNALS`` into ``Interrupted`` while the block runs, except for ignored signals (nohup)."""
    try:
        with signals_raise_interrupted():
            yield
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None


@contextmanager
def signals_raise_interrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, raise_interrupted)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def raise_interrupted(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the cleaning up
    raise Interrupted(number)
