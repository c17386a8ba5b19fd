"""Joint search over the widths of a plan: groups are made narrower and wider with all others cut too.

Loss curves are of one group at a time, and their sum says little of a plan that cuts half of a model: what one group
loses, the next has to live with. So the plan that they give is where a search starts. In each round every group is
made one step narrower and one step wider, on few samples; a step saves the same in every group. Where the outputs
change more than a group's curve says, beside other groups, its curve is raised, else lowered. The widths are allocated
anew for the curves changed by a part of that; the best of these moves, on more samples, is taken if it beats the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.planning import (
    Budget,
    UnitScores,
    allocate_widths,
    allowed_widths,
    savings_by_width,
)
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import ClosedForms
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, SpillableStore, memory_budget
from snpc.runtime.sensitivity.plan_trials import (
    BATCH_SAMPLES,
    TRIAL_SAMPLES,
    PlanTrials,
    TrialWeights,
    Widths,
    open_plan_trials,
)
from snpc.types import FloatArray, Group

MOVE_ROUNDS = 3
STEP_BATCHES = 4  # on which steps of one group are tried
MOVE_BATCHES = 16  # on which moves are compared with the plan
STEP_SHARE = 1 / 250  # of the model: what a step saves
MOVE_PARTS = (0.25, 0.5)  # powers of the factors of curves: steps on so few samples are noisy
STEP_SHARE_RUN = 0.55  # of the model that runs in a trial of one step, on average
MAX_FACTOR = 4.0  # of a curve, and its inverse


def search_widths(
    closed_forms: ClosedForms,
    scores: UnitScores,
    calibration: Calibration,
    groups: Sequence[Group],
    budget: Budget,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> dict[str, int]:
    """Group id -> units per block to keep, for a target in MACs, parameters or bytes: those of ``allocate_widths``, or
    others that save as much and change the outputs less.

    Trial weights are refitted to the dense model, as those of loss curves are. Nothing is drawn at random: the same
    data gives the same widths. Raises UserError where the target is out of reach.
    """
    start = allocate_widths(groups, scores, budget)
    store = SpillableStore(memory_budget(execution.memory_limit) // 2)
    weights = TrialWeights(closed_forms, scores, groups, store)
    steps = WidthSteps.of(groups, scores, budget)
    slopes = MeasuredSlopes(scores.curves)
    with (
        execution.progress.stage("joint search", MOVE_ROUNDS) as advance,
        open_plan_trials(weights, calibration, execution) as trials,
    ):
        trials.widths = start
        for _ in range(MOVE_ROUNDS):
            measure_slopes(trials, steps, slopes)
            moves = [
                allocate_widths(groups, replace(scores, curves=slopes.corrected_curves(part)), budget)
                for part in MOVE_PARTS
            ]
            trials.widths = best_plan(trials, moves)
            weights.forget(but=trials.widths)
            advance(1)
        return dict(trials.widths)


def search_samples(groups: int) -> float:
    """How many samples a search over so many groups runs, from the inputs to the outputs."""
    steps = (1 + 2 * groups * STEP_SHARE_RUN) * STEP_BATCHES
    return TRIAL_SAMPLES + MOVE_ROUNDS * BATCH_SAMPLES * (steps + (1 + len(MOVE_PARTS)) * MOVE_BATCHES)


def measure_slopes(trials: PlanTrials, steps: WidthSteps, slopes: MeasuredSlopes) -> None:
    """Try every group one step narrower and one step wider than in the plan so far."""
    batches, widths = trials.take(STEP_BATCHES), trials.widths
    now = trials.change(widths, batches)
    for group_id, width in widths.items():
        beside = steps.beside(group_id, width)
        changes = [now if w == width else trials.change({**widths, group_id: w}, batches) for w in beside]
        slopes.add(group_id, beside, changes[0] - changes[1])


def best_plan(trials: PlanTrials, moves: Sequence[Widths]) -> Widths:
    """The best of the plan so far and of ``moves``."""
    batches = trials.take(MOVE_BATCHES)
    return min([trials.widths, *moves], key=lambda widths: trials.change(widths, batches))


@dataclass
class MeasuredSlopes:
    """``curves``: group id -> [size + 1], of one group at a time. ``measured`` and ``predicted``: by how much more the
    outputs change at the narrower of two widths than at the wider one, summed over rounds, with all groups cut and by
    the curves."""

    curves: Mapping[str, FloatArray]
    measured: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)

    def add(self, group_id: str, widths: tuple[int, int], change: float) -> None:
        """``change``: at the first of ``widths``, less that at the second."""
        narrow, wide = widths
        predicted = float(self.curves[group_id][narrow] - self.curves[group_id][wide])
        self.measured[group_id] = self.measured.get(group_id, 0.0) + change
        self.predicted[group_id] = self.predicted.get(group_id, 0.0) + predicted

    def factors(self) -> dict[str, float]:
        """Group id -> what its curve is to be multiplied by, relative to the median over groups."""
        ratios = {
            group_id: change / self.predicted[group_id]
            for group_id, change in self.measured.items()
            if self.predicted[group_id] > 0 and np.isfinite(change)
        }
        positive = [ratio for ratio in ratios.values() if ratio > 0]
        if not positive:
            return {}
        middle = float(np.median(positive))
        return {g: float(np.clip(ratio / middle, 1 / MAX_FACTOR, MAX_FACTOR)) for g, ratio in ratios.items()}

    def corrected_curves(self, part: float) -> dict[str, FloatArray]:
        """The curves times their factors to the power of ``part``."""
        factors = self.factors()
        return {group_id: curve * factors.get(group_id, 1.0) ** part for group_id, curve in self.curves.items()}


@dataclass(frozen=True)
class WidthSteps:
    """``units``: group id -> units per block of a step, not rounded; ``options``: the widths that the budget allows,
    ascending."""

    units: Mapping[str, float]
    options: Mapping[str, list[int]]

    @classmethod
    def of(cls, groups: Sequence[Group], scores: UnitScores, budget: Budget) -> WidthSteps:
        assert budget.target is not None
        whole = float(getattr(scores.analysis.cost, budget.target.kind))
        saved = {group.id: float(savings_by_width(scores, group, budget.target)[0]) / group.size for group in groups}
        units = {group_id: STEP_SHARE * whole / max(saving, 1e-300) for group_id, saving in saved.items()}
        return cls(units, {group.id: sorted(allowed_widths(group, budget)) for group in groups})

    def beside(self, group_id: str, width: int) -> tuple[int, int]:
        """The nearest widths to one step narrower and one step wider; ``width`` itself at the end of the options."""
        narrower = [w for w in self.options[group_id] if w < width] or [width]
        wider = [w for w in self.options[group_id] if w > width] or [width]
        low, high = width - self.units[group_id], width + self.units[group_id]
        return min(narrower, key=lambda w: abs(w - low)), min(wider, key=lambda w: abs(w - high))
