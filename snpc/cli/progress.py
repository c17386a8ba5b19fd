"""Progress on stderr: bars on a terminal; in a pipe nothing, or a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import click

from snpc.runtime.execution import Advance, ignore_advance

if TYPE_CHECKING:  # these need torch
    from snpc.torch.pruning import PruningRound
    from snpc.torch.training import TrainingCallback, TrainingProgress


class StageBars:
    """A bar for each stage, on a terminal."""

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Advance]:
        if not sys.stderr.isatty():
            yield ignore_advance
            return
        done = 0.0
        with remaining_time_bar(name, total) as update:

            def advance(amount: float = 1.0) -> None:
                nonlocal done
                done += amount
                update(completed=done)

            yield advance


@contextmanager
def step_progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each of ``total`` steps when it begins; on a terminal it moves a bar."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with remaining_time_bar("", total) as update:
        completed = iter(range(total))
        yield lambda text: update(description=text, completed=next(completed))


@contextmanager
def timing_progress() -> Iterator[Callable[[float], None] | None]:
    """A function to call with the fraction that is done; None without a terminal.

    The bar is drawn in these calls only, so that nothing else runs while models are timed.
    """
    if not sys.stderr.isatty():
        yield None
        return
    with remaining_time_bar("timing", 1.0, auto_refresh=False) as update:
        yield lambda fraction: update(completed=fraction, refresh=True)


@contextmanager
def remaining_time_bar(text: str, total: float, auto_refresh: bool = True) -> Iterator[Callable[..., None]]:
    """A bar with the remaining time; yields the function that updates it (rich's ``Progress.update``)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=auto_refresh) as progress:
        yield partial(progress.update, progress.add_task(text, total=total))


# -- finetuning ------------------------------------------------------------------------------------------------------

LINE_INTERVAL = 10.0  # seconds between lines in a pipe


@contextmanager
def training_progress() -> Iterator[TrainingCallback]:
    """A callback that shows each training step: a bar on a terminal, lines in a pipe."""
    with training_bar() if sys.stderr.isatty() else nullcontext(training_lines()) as report:
        yield report


@contextmanager
def training_bar() -> Iterator[TrainingCallback]:
    """A bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda now: progress.update(task, completed=now.step, total=now.steps, description=training_status(now))


def training_lines() -> TrainingCallback:
    """A line every ``LINE_INTERVAL`` seconds, and one for the last step."""
    last_time = -LINE_INTERVAL

    def report(now: TrainingProgress) -> None:
        nonlocal last_time
        if now.step == now.steps or time.monotonic() - last_time >= LINE_INTERVAL:
            last_time = time.monotonic()
            click.echo(training_status(now), err=True)

    return report


def training_status(now: TrainingProgress) -> str:
    """A training step in one line."""
    drift = "" if now.drift is None else f", held-out drift {now.drift:.4f}"
    minutes, seconds = divmod(round(now.seconds_left), 60)
    return f"step {now.step} of {now.steps}: loss {now.loss:.4g}, lr {now.lr:.1e}{drift}, {minutes}:{seconds:02d} left"


def print_round(result: PruningRound) -> None:
    """One round of pruning and training, in a line on stderr."""
    undone = "" if result.kept else ": undone"
    lost = "" if result.lost is None else f", {100 * result.lost:.1f} points of accuracy lost"
    drift = f"drift {result.drift:.4f} after training"
    click.echo(f"{100 * result.macs:.1f} % of the MACs: {drift}{lost}{undone}", err=True)
