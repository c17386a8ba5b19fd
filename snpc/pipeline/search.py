"""Search for a plan that meets a drift, a perplexity, a score or a latency: candidates are written and measured."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from snpc.errors import CheckFailed, UserError
from snpc.pipeline.candidate import (
    CandidateModel,
    PrunedModel,
    SearchResult,
    Stopwatch,
    publish_candidate,
    staging_folder_for,
    write_candidate,
)
from snpc.pipeline.planner import NO_PERPLEXITY, PruningPlan
from snpc.pipeline.verify import Reference, candidate_reference
from snpc.planning import (
    GUESSED_DRIFT,
    AllocationPath,
    Budget,
    PerplexityLimit,
    UnitScores,
    allocation_path,
    predicted_drift,
    predicted_surprise,
    select_units,
)
from snpc.runtime.evaluation import EvaluationData, OutputMetrics, Workload, task_change, task_score, time_pair
from snpc.runtime.execution import Advance, ignore_advance
from snpc.temporary import temporary_folder
from snpc.types import FloatArray, TaskChange

SEARCH_ROUNDS = 6
DRIFT_LOG_MARGIN = math.log(1.1)  # a drift is met when it is at most this below the limit, as a ratio
NO_GROWTH = 0.01  # of the growth that is allowed: what is below counts as nothing, since noise may be negative
LATENCY_MARGIN = 0.03  # a latency when it is at most this share of the dense model's below


def search_plans(
    plan: PruningPlan,
    budget: Budget,
    scores: UnitScores,
    target: Path,
    stopwatch: Stopwatch,
    reference: Reference | None = None,
    evaluation: EvaluationData | None = None,
) -> PrunedModel:
    """Write the narrowest model within ``budget.max_drift``, ``max_ppl`` or ``max_drop``, or the widest within the
    latency. See ``apply``."""
    with staging_folder_for(plan, target) as folder:
        search = PlanSearch(plan, budget, scores, target, stopwatch, folder, reference=reference)
        if budget.max_drop is not None:
            assert evaluation is not None  # check_labels
            return meet_drop(search, budget.max_drop, evaluation)
        if budget.max_ppl is not None:
            return meet_perplexity(search, budget.max_ppl)
        return meet_latency(search) if budget.is_latency else meet_drift(search)


@dataclass
class PlanSearch:
    """Candidates along the allocation path that were written and measured. ``folder``: where they lie. ``best``: the
    nearest within the limit."""

    plan: PruningPlan
    budget: Budget
    scores: UnitScores
    target: Path
    stopwatch: Stopwatch
    folder: Path
    best: CandidateModel | None = None
    measured: float = math.nan
    tried: list[tuple[float, float]] = field(default_factory=list)
    reference: Reference | None = None

    def write(self, path: AllocationPath, steps: int) -> CandidateModel:
        """The plan after so many steps, as a verified file."""
        plan = self.plan_after(path.widths_after(steps))
        turn = self.folder / str(len(self.tried) + 1)
        turn.mkdir()
        candidate = write_candidate(plan, turn / self.target.name, self.stopwatch, self.reference)
        self.reference = candidate.reference  # the original is run once
        return candidate

    def plan_after(self, widths: Mapping[str, int]) -> PruningPlan:
        """The plan with these widths, or where layers go too, that of the same MACs."""
        if self.plan.layer_planner is not None:
            return self.plan.layer_planner.plan_for(widths)
        return replace(self.plan, slices=select_units(self.scores, self.budget, widths))

    def record(self, candidate: CandidateModel, predicted: float, measured: float, limit: float) -> float:
        """Keep a candidate within the limit (a later one is nearer to it), delete any other."""
        self.tried.append((predicted, measured))
        if measured <= limit:
            self.discard_best()
            self.best, self.measured = candidate, measured
        else:
            shutil.rmtree(candidate.path.parent)
        return measured

    def discard_best(self) -> None:
        if self.best is not None:
            shutil.rmtree(self.best.path.parent)

    def publish(self, result: SearchResult) -> PrunedModel:
        assert self.best is not None
        return publish_candidate(self.best, self.plan, self.target, self.stopwatch, result)


def meet_drift(search: PlanSearch) -> PrunedModel:
    """The narrowest model whose measured drift is within the limit."""
    limit, path = search.budget.max_drift, search_path(search)
    assert limit is not None
    predicted = predicted_drift(path, search.scores)[1:]

    def measure(index: int) -> float:
        candidate = search.write(path, index + 1)
        if not candidate.verdict.quality.differences:
            raise UserError("--max-drift: the original cannot be run here, so no drift can be measured")
        return math.log(max(search.record(candidate, float(predicted[index]), candidate.drift, limit), 1e-300))

    logs = np.log(np.maximum(predicted, 1e-300))
    with search.plan.execution.progress.stage("search", SEARCH_ROUNDS) as advance:
        bisect_on_prediction(logs, math.log(limit), measure, DRIFT_LOG_MARGIN, advance)
    if search.best is None:
        least = min(value for _, value in search.tried)
        raise CheckFailed(
            f"{search.target}: the smallest cut changes an output by {least:.3g}, more than --max-drift {limit:g}; "
            "nothing was written"
        )
    unit = OutputMetrics.of(search.plan.analysis).drift_unit
    return search.publish(SearchResult("drift", unit, limit, search.measured, tuple(search.tried)))


def meet_perplexity(search: PlanSearch, limit: PerplexityLimit) -> PrunedModel:
    """The narrowest model whose measured perplexity is within the limit. The original's is measured first."""
    dense = dense_perplexity(search)
    factor = limit.factor(dense)
    if factor <= 1:
        subject = f"{search.target}: the original's perplexity is {dense:.4g}"
        raise CheckFailed(f"{subject}, not below --max-ppl {limit}; nothing was written")
    path, scale = search_path(search), 1.0 if limit.relative else dense
    allowed = math.log(factor)
    predicted = np.log(np.maximum(predicted_surprise(path, search.scores)[1:] / allowed, NO_GROWTH))

    def measure(index: int) -> float:
        candidate = search.write(path, index + 1)
        found = candidate.verdict.quality.perplexity
        assert found is not None  # the original has one
        guess = math.exp(allowed * math.exp(float(predicted[index])))
        search.record(candidate, scale * guess, scale * found.factor, scale * factor)
        return math.log(max(math.log(found.factor) / allowed, NO_GROWTH))

    with search.plan.execution.progress.stage("search", SEARCH_ROUNDS) as advance:
        bisect_on_prediction(predicted, 0.0, measure, DRIFT_LOG_MARGIN, advance)
    if search.best is None:
        least = min(value for _, value in search.tried)
        reached = f"{least:.4g}" + ("x the original's" if limit.relative else "")
        raise CheckFailed(
            f"{search.target}: with the smallest cut the perplexity is {reached}, more than --max-ppl {limit}; nothing "
            "was written"
        )
    unit = f"x the original's {dense:.4g}" if limit.relative else f"(the original's is {dense:.4g})"
    return search.publish(SearchResult("perplexity", unit, limit.value, search.measured, tuple(search.tried)))


def dense_perplexity(search: PlanSearch) -> float:
    """Of the original, which is run here. UserError where it is no language model, or cannot be run."""
    search.reference = search.reference or candidate_reference(search.plan)
    if search.reference.not_run:
        raise UserError("--max-ppl: the original cannot be run here, so no perplexity can be measured")
    language = search.reference.metrics.language
    if language is None:
        raise UserError(
            f"{NO_PERPLEXITY}: no output is logits [batch, tokens, vocabulary] that earlier tokens alone decide; use "
            "--max-drift"
        )
    return language.dense.perplexity


def check_labels(budget: Budget | None, evaluation: EvaluationData | None) -> None:
    """Raise UserError for a drop without the labels that it is measured on."""
    if budget is not None and budget.max_drop is not None and (evaluation is None or evaluation.labels is None):
        raise UserError("--max-drop is measured on labels: give --eval DATA --labels NAME")


def meet_drop(search: PlanSearch, limit: float, evaluation: EvaluationData) -> PrunedModel:
    """The narrowest model that loses at most ``limit`` points of the score on labels. The original's is measured first;
    how far a drift goes in points shows at the first candidate."""
    original, execution = search.plan.analysis.model.path, search.plan.execution
    dense, path = task_score(original, evaluation, execution), search_path(search)
    predicted = np.log(np.maximum(predicted_drift(path, search.scores)[1:] / GUESSED_DRIFT, NO_GROWTH))
    within: list[TaskChange] = []  # the last is that of ``search.best``

    def measure(index: int) -> float:
        candidate = search.write(path, index + 1)
        found = task_change(dense, task_score(candidate.path, evaluation, execution), evaluation)
        search.record(candidate, limit * math.exp(float(predicted[index])), found.drop, limit)
        within.extend([found] if found.drop <= limit else [])
        return math.log(max(found.drop / limit, NO_GROWTH))

    with execution.progress.stage("search", SEARCH_ROUNDS) as advance:
        bisect_on_prediction(predicted, 0.0, measure, DRIFT_LOG_MARGIN, advance)
    if search.best is None:
        least = min(value for _, value in search.tried)
        raise CheckFailed(
            f"{search.target}: the smallest cut loses {least:.3g} points of {evaluation.metric.name}, more than "
            f"--max-drop {limit:g}; nothing was written"
        )
    unit = f"points of {evaluation.metric.name} (the original's is {100 * dense.value:.4g} %)"
    published = search.publish(SearchResult("drop", unit, limit, search.measured, tuple(search.tried)))
    return replace(published, task=within[-1])


def meet_latency(search: PlanSearch) -> PrunedModel:
    """The widest model whose measured latency is within the target."""
    with temporary_folder() as folder:
        return meet_latency_in(folder, search)


def meet_latency_in(folder: Path, search: PlanSearch) -> PrunedModel:
    times, path = search.scores.latency, search_path(search)
    assert times is not None and search.budget.target is not None
    target, original = search.budget.target, search.plan.analysis
    scale = times.dense if target.ms is not None else 1.0
    limit = target.ms if target.ms is not None else target.share
    workload = search.plan.workload or Workload()
    shares = ((times.base - path.cumulative(times.saved)) / times.dense)[::-1]  # rising: the narrowest model first
    last = len(shares) - 1
    dense_file = workload.timed_file(original.model.path, folder / "dense")

    def measure(index: int) -> float:
        candidate = search.write(path, last - index)
        with search.stopwatch.stage("latency"):
            file = workload.timed_file(candidate.path, folder / "cut")
            dense, share = time_pair(original, dense_file, file, workload, search.plan.execution)
        value = share * (dense if target.ms is not None else 1.0)
        return search.record(candidate, float(shares[index]) * scale, value, limit) / scale

    with search.plan.execution.progress.stage("search", SEARCH_ROUNDS) as advance:
        bisect_on_prediction(shares, limit / scale, measure, LATENCY_MARGIN, advance)
    unit = "ms" if target.ms is not None else ""
    if search.best is None:
        least = min(value for _, value in search.tried)
        raise UserError(
            f"target {search.budget.target} cannot be reached: with these roles and widths the least measured is "
            f"latency={least:.3g}{unit}; allow more roles, or narrower groups"
        )
    built = f", built for {workload.artifact.name}" if workload.artifact else ""
    unit = (unit or "of the dense model") + built
    return search.publish(SearchResult("latency", unit, limit, search.measured, tuple(search.tried)))


def search_path(search: PlanSearch) -> AllocationPath:
    return allocation_path(search.plan.groups, search.scores, search.budget)[0]


def bisect_on_prediction(
    predicted: FloatArray,
    limit: float,
    measure: Callable[[int], float],
    margin: float,
    advance: Advance = ignore_advance,
) -> int:
    """The largest index at which a measurement was within ``limit``; -1 if none was.

    ``predicted`` rises. Measurements shift it, interpolated between their indices. From the fourth round on the
    remaining interval is halved as well, and the last round tries index 0 if nothing was within the limit. A value at
    most ``margin`` below the limit ends the search. ``advance`` hears of every round, and of those that are spared.
    """
    known: dict[int, float] = {}
    low, high = -1, len(predicted)
    for turn in range(SEARCH_ROUNDS):
        if high - low <= 1:
            break
        guess = next_guess(predicted, known, limit - margin / 2 if known else limit)
        if turn >= 3:
            guess = min(guess, (low + high) // 2) if low < 0 else (low + high) // 2
        if turn == SEARCH_ROUNDS - 1 and low < 0:
            guess = 0
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = measure(guess)
        advance(1)
        if known[guess] > limit:
            high = guess
        else:
            low = guess
            if known[guess] >= limit - margin:
                break
    advance(SEARCH_ROUNDS - len(known))
    return low


def next_guess(predicted: FloatArray, known: dict[int, float], aim: float) -> int:
    """The largest index whose prediction, corrected by the ``known`` measurements, is within ``aim``; 0 if none is."""
    indices = sorted(known)
    errors = [known[k] - predicted[k] for k in indices]
    shift = np.interp(np.arange(len(predicted)), indices, errors) if indices else 0.0
    fits = np.flatnonzero(predicted + shift <= aim)
    return int(fits[-1]) if len(fits) else 0
