"""Displays: how the state of a run is shown. A bar on a terminal; plain lines in a pipe."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from snpc.cli.tables import print_step

if TYPE_CHECKING:  # rich takes a tenth of a second to import
    from rich.progress import Progress, TaskID

FIRST_LINE = 2.0  # seconds that a stage takes before there is a line on it; shorter ones end without any
LINE_INTERVAL = 5.0  # seconds between two lines on a stage


@dataclass(frozen=True)
class RunState:
    """What is under way at ``now``. ``fraction``: of the stage; None where it has no parts. ``seconds``: since it
    began. ``seconds_left``: of the whole run; None where it is not known."""

    name: str
    fraction: float | None
    seconds: float
    seconds_left: float | None
    now: float

    @property
    def left_text(self) -> str:
        return "" if self.seconds_left is None else f"{duration_text(self.seconds_left)} left"


def duration_text(seconds: float) -> str:
    """``1:05``, ``2:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display(Protocol):
    """``show`` is called about twice a second while a stage is open, ``end_stage`` with the state at its end, and
    ``clear`` when no stage is open, after which other text may be printed."""

    def show(self, state: RunState) -> None: ...

    def end_stage(self, state: RunState) -> None: ...

    def clear(self) -> None: ...


class LineDisplay:
    """Lines on stderr: one every ``LINE_INTERVAL``; one when a stage has taken ``FIRST_LINE``, and one at its end."""

    def __init__(self) -> None:
        self.last: float | None = None

    def show(self, state: RunState) -> None:
        began = state.now - state.seconds
        if self.last is None:
            self.last = began
        first = self.last <= began and state.seconds >= FIRST_LINE
        if first or state.now - self.last >= LINE_INTERVAL:
            percent = "" if state.fraction is None else f"{100 * state.fraction:.0f} % in "
            self.print(state, f"{percent}{state.seconds:.0f} s")

    def end_stage(self, state: RunState) -> None:
        if state.seconds >= FIRST_LINE:
            self.print(state, f"took {state.seconds:.1f} s")

    def print(self, state: RunState, text: str) -> None:
        self.last = state.now
        with suppress(OSError):  # nobody reads it: the command goes on
            print_step(", ".join(filter(None, [f"{state.name}: {text}", state.left_text])))

    def clear(self) -> None:
        """Lines stay."""


class BarDisplay:
    """A bar in the last line of the terminal, which is gone when no stage is open."""

    def __init__(self) -> None:
        self.drawn: tuple[Progress, TaskID] | None = None

    def show(self, state: RunState) -> None:
        if self.drawn is None:
            self.drawn = open_bar(state)
            return
        bar, task = self.drawn
        bar.update(task, description=state.name, left=state.left_text, **bar_position(state), refresh=True)

    def end_stage(self, state: RunState) -> None:
        """The next state shows what is under way then."""

    def clear(self) -> None:
        if self.drawn is not None:
            self.drawn[0].stop()
            self.drawn = None


def bar_position(state: RunState) -> dict[str, Any]:
    """As rich takes it. Without a total the bar pulses."""
    return {"total": None if state.fraction is None else 1.0, "completed": state.fraction or 0.0}


def open_bar(state: RunState) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task(state.name, left=state.left_text, **bar_position(state))
    bar.start()
    return bar, task
