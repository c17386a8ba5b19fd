"""The progress of one command: what its stages say goes to one display, drawn by a thread of its own."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import click

from snpc.cli.progress.displays import BarDisplay, Display, LineDisplay, RunState
from snpc.cli.progress.time_left import RunEstimate, RunningStage
from snpc.cli.tables import CLEAR_KEY, is_quiet
from snpc.runtime.execution import SILENT, TIMING_STAGE, Advance, Progress, StageCost

REDRAW_INTERVAL = 0.5  # seconds: a tenth of a percent of one core
REDRAW_INTERVAL_WHILE_TIMING = 0.1  # between rounds only


class RunProgress:
    """Shows the stages of a run: the name of the innermost, how far it is, and the time left of the whole run.

    A thread redraws while a stage is open, except while models are timed: then the calls that advance do, so that
    nothing else runs in between. ``close`` ends the thread and clears the display.
    """

    def __init__(self, display: Display, clock: Callable[[], float] = time.monotonic) -> None:
        self.display, self.clock = display, clock
        self.estimate = RunEstimate()
        self.lock = threading.RLock()
        self.closed = threading.Event()
        self.thread: threading.Thread | None = None
        self.shown = -REDRAW_INTERVAL

    def expect(self, stages: Sequence[StageCost]) -> None:
        with self.lock:
            self.estimate.expect(stages)

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Advance]:
        with self.lock:
            stage = self.estimate.begin(name, total, self.clock())
            self.start_thread()
        try:
            yield partial(self.advance, stage)
        finally:
            with self.lock:
                self.end(stage)

    def advance(self, stage: RunningStage, amount: float = 1.0) -> None:
        with self.lock:
            now = self.clock()
            self.estimate.advance(stage, amount, now)
            if stage.name == TIMING_STAGE and now - self.shown >= REDRAW_INTERVAL_WHILE_TIMING:
                self.show()

    def end(self, stage: RunningStage) -> None:
        now = self.clock()
        self.estimate.end(stage, now)
        left = self.estimate.seconds_left(now)
        self.display.end_stage(RunState(stage.name, stage.shown_fraction, now - stage.began, left, now))
        if not self.estimate.open:
            self.display.clear()

    def show(self) -> None:
        """Draw the innermost stage."""
        if not self.estimate.open or self.closed.is_set():
            return
        stage, now = self.estimate.open[-1], self.clock()
        self.shown = now
        left = self.estimate.seconds_left(now)
        self.display.show(RunState(stage.name, stage.shown_fraction, now - stage.began, left, now))

    def start_thread(self) -> None:
        if self.thread is None and not self.closed.is_set():
            self.thread = threading.Thread(target=self.redraw, name="snpc-progress", daemon=True)
            self.thread.start()

    def redraw(self) -> None:
        while not self.closed.wait(REDRAW_INTERVAL):
            with self.lock:
                if self.estimate.open and self.estimate.open[-1].name != TIMING_STAGE:
                    self.show()

    def clear(self) -> None:
        """Take away what is drawn, until it is drawn again."""
        with self.lock:
            self.display.clear()

    def close(self) -> None:
        with self.lock:
            self.closed.set()
            self.estimate.open.clear()
            self.display.clear()


def command_progress() -> Progress:
    """The progress of the command that runs, one for each: a bar on a terminal, lines in a pipe, nothing with
    ``--quiet``. It ends with the command."""
    context = click.get_current_context()
    if is_quiet() or sys.stderr is None:
        return SILENT
    progress = context.meta.get(PROGRESS_KEY)
    if progress is None:
        progress = context.meta[PROGRESS_KEY] = RunProgress(BarDisplay() if sys.stderr.isatty() else LineDisplay())
        context.meta[CLEAR_KEY] = progress.clear
        context.call_on_close(progress.close)
    assert isinstance(progress, RunProgress)
    return progress


PROGRESS_KEY = "snpc.progress"  # in click's ``Context.meta``
