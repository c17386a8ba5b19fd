"""What is under way: bars on a terminal, on stderr; in a pipe nothing, or a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import click

from snpc.runtime.calibration import Calibration
from snpc.types import Feeds

if TYPE_CHECKING:  # these need torch
    from snpc.torch.pruning.round_log import PruningRound
    from snpc.torch.training.options import TrainingCallback, TrainingProgress


def batch_progress(what: str, calibration: Calibration | None) -> Callable[[Iterable[Feeds]], Iterable[Feeds]] | None:
    """A bar over calibration batches where there is a terminal to show it on."""
    if calibration is None or not sys.stderr.isatty():
        return None

    def wrap(feeds: Iterable[Feeds]) -> Iterator[Feeds]:
        from rich.console import Console
        from rich.progress import track

        total = -(-calibration.samples // calibration.batch)
        yield from track(feeds, what, total=total, console=Console(stderr=True), transient=True)

    return wrap


@contextmanager
def step_progress(total: int) -> Iterator[Callable[[str], None]]:
    """Called with what begins, ``total`` times: a bar with the time left where there is a terminal to show it on."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with remaining_time_bar("", total) as update:
        begun = iter(range(total))
        yield lambda text: update(description=text, completed=next(begun))


@contextmanager
def timing_progress() -> Iterator[Callable[[float], None] | None]:
    """Called with the share that is done. The bar is drawn in these calls only: nothing runs while models are timed."""
    if not sys.stderr.isatty():
        yield None
        return
    with remaining_time_bar("timing", 1.0, auto_refresh=False) as update:
        yield lambda share: update(completed=share, refresh=True)


@contextmanager
def remaining_time_bar(text: str, total: float, auto_refresh: bool = True) -> Iterator[Callable[..., None]]:
    """A bar with the time left; called with what changes of it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=auto_refresh) as shown:
        yield partial(shown.update, shown.add_task(text, total=total))


# -- finetuning ------------------------------------------------------------------------------------------------------

LINE_INTERVAL = 10.0  # seconds between lines in a pipe


@contextmanager
def training_progress() -> Iterator[TrainingCallback]:
    """Shows a run as it goes, on stderr: a bar on a terminal, lines in a pipe."""
    with training_bar() if sys.stderr.isatty() else nullcontext(training_lines()) as report:
        yield report


@contextmanager
def training_bar() -> Iterator[TrainingCallback]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda now: shown.update(task, completed=now.step, total=now.steps, description=training_status(now))


def training_lines() -> TrainingCallback:
    last = -LINE_INTERVAL

    def report(now: TrainingProgress) -> None:
        nonlocal last
        if now.step == now.steps or time.monotonic() - last >= LINE_INTERVAL:
            last = time.monotonic()
            click.echo(training_status(now), err=True)

    return report


def training_status(now: TrainingProgress) -> str:
    drift = "" if now.drift is None else f", held-out drift {now.drift:.4f}"
    minutes, seconds = divmod(round(now.seconds_left), 60)
    return f"step {now.step} of {now.steps}: loss {now.loss:.4g}, lr {now.lr:.1e}{drift}, {minutes}:{seconds:02d} left"


def print_round(found: PruningRound) -> None:
    said = "" if found.kept else ": taken back"
    lost = "" if found.lost is None else f", {100 * found.lost:.1f} points of accuracy lost"
    click.echo(f"{100 * found.macs:.1f} % of the MACs: drift {found.drift:.4f} after training{lost}{said}", err=True)
