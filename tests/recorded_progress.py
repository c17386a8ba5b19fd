"""A progress that writes down what it hears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from snpc.runtime.execution import Advance, StageCost


class RecordedProgress:
    """``begun``: names of stages. ``finished``: (name, total, sum of the advances) of stages, as they end. ``open``:
    names of those that have not ended, the innermost last. ``expected``: what was announced."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.finished: list[tuple[str, float, float]] = []
        self.open: list[str] = []
        self.expected: list[StageCost] = []

    def expect(self, stages: Sequence[StageCost]) -> None:
        self.expected = list(stages)

    def complete(self, name: str) -> bool:
        """Did every stage of this name reach its total?"""
        found = [abs(done - total) < 1e-9 for other, total, done in self.finished if other == name]
        return bool(found) and all(found)

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Advance]:
        done = 0.0

        def advance(amount: float = 1.0) -> None:
            nonlocal done
            assert amount >= 0 and name in self.open
            done += amount

        self.begun.append(name)
        self.open.append(name)
        try:
            yield advance
        finally:
            assert self.open.pop() == name
            self.finished.append((name, total, done))
