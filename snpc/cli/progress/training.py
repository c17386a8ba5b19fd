"""The progress of training: a bar with the loss on a terminal, lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from snpc.cli.progress.displays import duration_text
from snpc.cli.tables import is_quiet, print_text

if TYPE_CHECKING:  # these need torch
    from snpc.torch.pruning import PruningRound
    from snpc.torch.training import TrainingCallback, TrainingProgress

TRAINING_LINE_INTERVAL = 10.0  # seconds between lines in a pipe


@contextmanager
def training_progress() -> Iterator[TrainingCallback]:
    """A callback that shows each training step: a bar on a terminal, lines in a pipe, nothing with ``--quiet``."""
    if is_quiet():
        yield lambda now: None
        return
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
    """A line every ``TRAINING_LINE_INTERVAL`` seconds, and one for the last step."""
    last_time = -TRAINING_LINE_INTERVAL

    def report(now: TrainingProgress) -> None:
        nonlocal last_time
        if now.step == now.steps or time.monotonic() - last_time >= TRAINING_LINE_INTERVAL:
            last_time = time.monotonic()
            print_text(training_status(now), err=True)

    return report


def training_status(now: TrainingProgress) -> str:
    """A training step in one line."""
    drift = "" if now.drift is None else f", held-out drift {now.drift:.4f}"
    left = duration_text(now.seconds_left)
    return f"step {now.step} of {now.steps}: loss {now.loss:.4g}, lr {now.lr:.1e}{drift}, {left} left"


def print_round(result: PruningRound) -> None:
    """One round of pruning and training, in a line on stderr; nothing with ``--quiet``."""
    if is_quiet():
        return
    undone = "" if result.kept else ": undone"
    lost = "" if result.lost is None else f", {100 * result.lost:.1f} points of accuracy lost"
    drift = f"drift {result.drift:.4f} after training"
    print_text(f"{100 * result.macs:.1f} % of the MACs: {drift}{lost}{undone}", err=True)
