"""How long a run still takes: an estimate over the stages that are under way and those that have not begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snpc.runtime.execution import StageCost


@dataclass
class RunningStage:
    """A stage that has begun. ``weight``: its expected cost, None if it was not announced. ``advanced``: when it last
    advanced, ``done`` of ``total``."""

    name: str
    total: float
    weight: float | None
    began: float
    advanced: float
    done: float = 0.0

    @property
    def fraction(self) -> float:
        return min(self.done / self.total, 1.0) if self.total > 0 else 1.0

    @property
    def shown_fraction(self) -> float | None:
        """None of a stage in one piece: nothing is known before it ends."""
        return None if self.total <= 1 and self.done == 0 else self.fraction


class RunEstimate:
    """The stages of a run and the seconds that are left of it. Times are given by the caller, in seconds.

    Announced stages have costs in one unit, whatever it is: what a unit takes is learned from the stages that ended,
    and before that from the one that is under way. A stage that was announced and is passed over is given up.
    """

    def __init__(self) -> None:
        self.expected: list[StageCost] = []
        self.open: list[RunningStage] = []
        self.spent_seconds = 0.0  # on announced stages that ended
        self.spent_cost = 0.0

    def expect(self, stages: Sequence[StageCost]) -> None:
        """Announce what comes, in place of what was announced before."""
        self.expected = list(stages)

    def begin(self, name: str, total: float, now: float) -> RunningStage:
        weight = self.take_expected(name)
        stage = RunningStage(name, total, weight, now, now)
        self.open.append(stage)
        return stage

    def take_expected(self, name: str) -> float | None:
        """The cost of the next announced stage of this name."""
        for position, (expected, cost) in enumerate(self.expected):
            if expected == name:
                del self.expected[: position + 1]
                return cost
        return None

    def advance(self, stage: RunningStage, amount: float, now: float) -> None:
        stage.done, stage.advanced = stage.done + amount, now

    def end(self, stage: RunningStage, now: float) -> None:
        """End a stage, and any within it that was left behind by an exception."""
        if stage not in self.open:
            return
        del self.open[self.open.index(stage) :]
        if stage.weight is not None and stage.weight > 0:
            self.spent_seconds += now - stage.began
            self.spent_cost += stage.weight

    def seconds_left(self, now: float) -> float | None:
        """Of the whole run: of the stages that are open, the outermost of which lasts longest, and of those that were
        announced. None where nothing is known yet."""
        stages = [self.stage_seconds_left(stage, now) for stage in self.open]
        known = [seconds for seconds in stages if seconds is not None]
        unit = self.seconds_per_cost()
        if (self.open and not known) or (not self.open and unit is None):
            return None
        return max(known, default=0.0) + (unit or 0.0) * sum(cost for _, cost in self.expected)

    def seconds_per_cost(self) -> float | None:
        """Of the announced stages that ended; before one has, of the one that is under way."""
        if self.spent_cost > 0:
            return self.spent_seconds / self.spent_cost
        for stage in self.open:
            if stage.weight and stage.done > 0:
                return (stage.advanced - stage.began) / stage.fraction / stage.weight
        return None

    def stage_seconds_left(self, stage: RunningStage, now: float) -> float | None:
        """From its own speed and, the less of it is done, from what it was expected to take; None where neither is
        known. Between advances it counts down."""
        fraction, elapsed = stage.fraction, stage.advanced - stage.began
        unit = self.seconds_per_cost()
        expected = None if stage.weight is None or unit is None else unit * stage.weight
        if stage.done > 0:
            whole = elapsed / fraction if fraction > 0 else elapsed
            if expected is not None:
                whole = fraction * whole + (1 - fraction) * expected
        elif expected is not None:
            whole = expected
        else:
            return None
        return max(whole * (1 - fraction) - (now - stage.advanced), 0.0)
