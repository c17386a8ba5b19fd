"""A progress that writes down what it hears."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snpc.runtime.execution import Advance


class RecordedProgress:
    """``begun``: names of stages. ``finished``: (name, total, sum of the advances) of stages, as they end. ``open``:
    names of those that have not ended, the innermost last."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.finished: list[tuple[str, float, float]] = []
        self.open: list[str] = []

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
