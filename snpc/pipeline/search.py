"""Decisions carried out. What is only predicted (drift, latency) is measured on the written model, and the plan moves
up or down the planner's steps until it holds."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from snpc.errors import CheckFailed, UserError
from snpc.pipeline.planner import PruningPlan
from snpc.pipeline.prune import (
    CandidateModel,
    PrunedModel,
    SearchResult,
    Stopwatch,
    apply_slice_plan,
    publish_candidate,
    temporary_path,
    write_candidate,
)
from snpc.pipeline.refit import FitInputs
from snpc.planning.allocate import allocation_path, predicted_drift
from snpc.planning.config import Budget, is_latency_budget, parse_target
from snpc.planning.descent import AllocationPath
from snpc.planning.plan import UnitScores, select_units
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.latency import Workload, time_pair
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.io.atomic import discard_model
from snpc.types import FloatArray

SEARCH_ROUNDS = 6
DRIFT_LOG_MARGIN = math.log(1.1)  # a drift is met when it is at most this below the limit, as a ratio
LATENCY_MARGIN = 0.03  # a latency when it is at most this share of the dense model's below


def apply(
    decision: PruningPlan,
    target: Path,
    *,
    calibration: Calibration | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    watch: Stopwatch | None = None,
) -> PrunedModel:
    """Apply a decision, write it to ``target``, verify it. Where it was made for ``max_drift`` or a latency, that is
    measured on the written file before it gets its name, and another plan is tried while it does not hold or could cut
    (or, for a latency, keep) clearly more: at most ``SEARCH_ROUNDS`` plans.

    Raises as ``apply_slice_plan``; CheckFailed also where the smallest cut moves the outputs by more than
    ``max_drift``,
    UserError where a latency cannot be reached.
    """
    watch = watch or Stopwatch()
    choice = decision.budget
    latency = choice is not None and is_latency_budget(choice)
    if choice is None or decision.scores is None or not (latency or choice.max_drift is not None):
        return apply_slice_plan(
            decision.slices,
            target,
            compression=decision.closed_forms,
            calibration=calibration,
            execution=execution,
            watch=watch,
        )
    means = FitInputs(decision.closed_forms, calibration, execution)
    trials = PlanSearch(decision, choice, decision.scores, target, means, watch)
    try:
        return meet_latency(trials) if latency else meet_drift(trials)
    finally:
        trials.discard_best()


@dataclass
class PlanSearch:
    """Plans along the way down that were built and measured. ``best`` is the best that holds."""

    plan: PruningPlan
    budget: Budget
    scores: UnitScores
    target: Path
    inputs: FitInputs
    watch: Stopwatch
    best: CandidateModel | None = None
    measured: float = math.nan
    tried: list[tuple[float, float]] = field(default_factory=list)

    def write(self, way: AllocationPath, steps: int) -> CandidateModel:
        """The plan after so many steps, as a verified file."""
        plan = select_units(self.scores, self.budget, way.widths_after(steps))
        path = temporary_path(self.target, len(self.tried) + 1)
        try:
            return write_candidate(plan, self.target, path, self.inputs, self.watch)
        except BaseException:
            discard_model(path)
            raise

    def record(self, made: CandidateModel, predicted: float, measured: float, limit: float) -> float:
        """Keep what holds (a later one is nearer to the limit), drop the rest."""
        self.tried.append((predicted, measured))
        if measured <= limit:
            self.discard_best()
            self.best, self.measured = made, measured
        else:
            discard_model(made.path)
        return measured

    def discard_best(self) -> None:
        if self.best is not None:
            discard_model(self.best.path)

    def publish(self, search: SearchResult) -> PrunedModel:
        assert self.best is not None
        return publish_candidate(self.best, self.target, self.inputs, self.watch, search)


def meet_drift(trials: PlanSearch) -> PrunedModel:
    """Cut as much as keeps the drift that verification states within the limit."""
    limit, way = trials.budget.max_drift, search_path(trials)
    assert limit is not None
    predicted = predicted_drift(way, trials.scores)[1:]

    def measure(index: int) -> float:
        made = trials.write(way, index + 1)
        if not made.verdict.drift:
            raise UserError("--max-drift: the original cannot be run here, so no drift can be measured")
        return math.log(max(trials.record(made, float(predicted[index]), made.drift, limit), 1e-300))

    bisect_on_prediction(np.log(np.maximum(predicted, 1e-300)), math.log(limit), measure, DRIFT_LOG_MARGIN)
    if trials.best is None:
        least = min(value for _, value in trials.tried)
        raise CheckFailed(
            f"{trials.target}: the smallest cut moves an output by {least:.3g}, more than --max-drift {limit:g}; "
            "nothing was written"
        )
    return trials.publish(SearchResult("drift", "relative", limit, trials.measured, tuple(trials.tried)))


def meet_latency(trials: PlanSearch) -> PrunedModel:
    """Cut as little as brings the latency down to the target."""
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        return meet_latency_in(Path(folder), trials)


def meet_latency_in(folder: Path, trials: PlanSearch) -> PrunedModel:
    times, way = trials.scores.latency, search_path(trials)
    assert times is not None and trials.budget.target is not None
    target, original = parse_target(trials.budget.target), trials.plan.slices.analysis
    scale = times.dense if target.ms is not None else 1.0
    limit = target.ms if target.ms is not None else target.share
    workload = trials.plan.workload or Workload()
    shares = ((times.base - way.cumulative(times.saved)) / times.dense)[::-1]  # rising, the whole way down first
    last = len(shares) - 1
    dense_file = workload.timed_file(original.model.path, folder / "dense")

    def measure(index: int) -> float:
        made = trials.write(way, last - index)
        with trials.watch.stage("latency"):
            file = workload.timed_file(made.path, folder / "cut")
            dense, share = time_pair(original, dense_file, file, workload, trials.inputs.execution)
        value = share * (dense if target.ms is not None else 1.0)
        return trials.record(made, float(shares[index]) * scale, value, limit) / scale

    bisect_on_prediction(shares, limit / scale, measure, LATENCY_MARGIN)
    unit = "ms" if target.ms is not None else ""
    if trials.best is None:
        least = min(value for _, value in trials.tried)
        raise UserError(
            f"target {trials.budget.target} cannot be reached: with these roles and widths the least measured is "
            f"latency={least:.3g}{unit}; allow more roles, or narrower groups"
        )
    built = f", built for {workload.artifact.name}" if workload.artifact else ""
    unit = (unit or "of the dense model") + built
    return trials.publish(SearchResult("latency", unit, limit, trials.measured, tuple(trials.tried)))


def search_path(trials: PlanSearch) -> AllocationPath:
    groups = trials.plan.groups
    return allocation_path(groups, trials.scores, trials.budget)[0]


def bisect_on_prediction(predicted: FloatArray, limit: float, measure: Callable[[int], float], near: float) -> int:
    """The largest index found at which ``measure`` stays within ``limit``, -1 if it does nowhere that was tried.

    ``predicted`` rises. What was measured shifts it, interpolated between the places where it was; from the fourth
    round on the rest is halved as well, and the last round, if nothing has held, tries index 0. A value less than
    ``near`` below the limit is good enough.
    """
    known: dict[int, float] = {}
    low, high = -1, len(predicted)
    for turn in range(SEARCH_ROUNDS):
        if high - low <= 1:
            break
        guess = next_guess(predicted, known, limit - near / 2 if known else limit)
        if turn >= 3:
            guess = min(guess, (low + high) // 2) if low < 0 else (low + high) // 2
        if turn == SEARCH_ROUNDS - 1 and low < 0:
            guess = 0
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = measure(guess)
        if known[guess] > limit:
            high = guess
        else:
            low = guess
            if known[guess] >= limit - near:
                break
    return low


def next_guess(predicted: FloatArray, known: dict[int, float], aim: float) -> int:
    """The largest index that should stay within ``aim``, after what is ``known``; 0 if none should."""
    at = sorted(known)
    shift = np.interp(np.arange(len(predicted)), at, [known[k] - predicted[k] for k in at]) if at else 0.0
    fits = np.flatnonzero(predicted + shift <= aim)
    return int(fits[-1]) if len(fits) else 0
