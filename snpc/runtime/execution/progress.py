"""Progress: how far the stages of a run are. Whoever shows it gives ``Execution`` an object with ``Progress.stage``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

ItemT = TypeVar("ItemT")
Advance = Callable[[float], None]  # takes how much more of a stage's total is done

StageCost = tuple[str, float]

TIMING_STAGE = "timing"  # the stage in which models are timed: nothing else should run between its advances


class Progress(Protocol):
    """Hears of every stage that may take long.

    ``stage`` is entered when a stage begins and left when it ends, by an exception too; its advances add up to
    ``total``. A stage may begin within another one, as a pass over data within a search. Advances may come from several
    threads.
    """

    def stage(self, name: str, total: float) -> AbstractContextManager[Advance]: ...


@runtime_checkable
class ForesightedProgress(Progress, Protocol):
    """A progress that is told which stages are to come, so that it can say how long the run takes.

    ``stages``: (name, cost) in their order; the costs are in one unit, whatever it is. They replace what was announced
    before.
    """

    def expect(self, stages: Sequence[StageCost]) -> None: ...


def announce(progress: Progress, stages: Sequence[StageCost]) -> None:
    """Tell a progress what is to come, if it wants to know."""
    if isinstance(progress, ForesightedProgress):
        progress.expect(stages)


@dataclass(frozen=True)
class SilentProgress:
    """Shows nothing."""

    def stage(self, name: str, total: float) -> AbstractContextManager[Advance]:
        return nullcontext(ignore_advance)


def ignore_advance(amount: float = 1.0) -> None:
    """Advance nothing."""


def track(progress: Progress, name: str, items: Iterable[ItemT], total: float) -> Iterator[ItemT]:
    """The same items, ``total`` of them, as a stage that advances by one after each."""
    with progress.stage(name, total) as advance:
        for item in items:
            yield item
            advance(1)


SILENT: Progress = SilentProgress()
