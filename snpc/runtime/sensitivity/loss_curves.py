"""Sensitivity of the model's outputs to the width of each group, measured at a few widths, one group at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from snpc.passes.slicing import Cuts
from snpc.passes.weights import WeightEdits
from snpc.planning import Budget, SlicePlan, UnitScores, allocate_widths, cuts_of, top_units
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import (
    ClosedForms,
    changed_constants,
    closed_form_edits,
    edited_constants,
    normalization_edits,
    trial_weights,
)
from snpc.runtime.evaluation import OutputMetrics, metrics_identity
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    Advance,
    Execution,
    SpillableStore,
    ignore_advance,
    memory_budget,
)
from snpc.runtime.io import NOT_STORED, StoredStage
from snpc.runtime.sensitivity.curve_fit import OutputChange, fit_curves
from snpc.runtime.sensitivity.predicted_curves import predicted_curves
from snpc.runtime.sensitivity.segmented_model import SegmentedModel, SegmentStates, open_segmented_model
from snpc.runtime.sensitivity.trial_workers import Trial, TrialSamples, TrialWorkers, can_be_sent
from snpc.runtime.statistics import PaddingMasks, TokenMask, TokenMasks, find_padding, token_mask_runner
from snpc.temporary import temporary_folder
from snpc.types import AnyArray, Feeds, FloatArray, Group

# shares of a group's units that are kept in trials
SHARE_GRID = (0.92, 0.83, 0.75, 0.58, 0.5, 0.42, 0.25)
CURVE_SHARES = (0.92, 0.75, 0.5, 0.25)  # those that give a curve over all widths
MIN_GROUPS_PER_ROLE = 8  # from which on one trial per group is enough, since groups of a role share their shape
REFINEMENT_ROUNDS = 1  # further trials at the widths that the curves so far lead to
SAMPLES_PER_WIDTH = 2  # of a trial near a plan
CURVE_SAMPLES = 4  # of a trial that gives a curve over all widths, which no later trial corrects
STREAM_SAMPLES = 32  # on which the readers of a rotated stream are refitted for a trial
SAMPLE_POOLS = 2  # sets of so many samples, which the trials of a group take in turn


def measure_loss_curves(
    closed_forms: ClosedForms,
    scores: UnitScores,
    calibration: Calibration,
    groups: Sequence[Group],
    budget: Budget | None = None,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> dict[str, FloatArray]:
    """Group id -> [size + 1]: change of the model's outputs by how many units per block are kept: that of
    ``OutputMetrics.change``, like a squared error, and each output by its metric.

    Every trial changes the weights of one group, in closed form where it has one, and runs the model from that group
    on. The closed-form loss gives the shape of the curve between the trials (``curve_fit``). With a ``budget`` the
    trials are near its plan: one per group at the width that closed-form losses lead to (four where groups are few, or
    where most units go), then a round at the widths that the curves so far lead to. The trials of a group see different
    samples in turn, so that a curve through them averages over more samples.

    ``scores`` order the units. Padded tokens of an output [batch, tokens, ..] do not count. Values of the dense model
    lie in memory up to ``execution.memory_limit`` bytes, the others in temporary files. A trial that makes an output
    infinite or NaN changes it infinitely. Raises UserError where the target of ``budget`` is out of reach, and where an
    output of the original has no finite entry.
    """
    analysis = closed_forms.analysis
    source = analysis.traced_graph
    near_plan = budget is not None and keeps_most_units(groups, scores, budget)
    if budget is not None and near_plan:
        trials = list(planned_widths(closed_forms, scores, groups, budget))
    else:
        trials = [(group, nearest_widths(group, CURVE_SHARES)) for group in groups]
    refits = StreamRefits(closed_forms, scores, calibration, execution)
    changed = {
        group.id: changed_constants(source, *refits.trial_edits(group, (widths or [group.size])[0]))
        for group, widths in trials
    }
    metrics, limited = OutputMetrics.of(analysis), budget is not None and budget.max_drift is not None
    padding = find_padding(source, [(spec.name, leading_axes) for spec in analysis.model.outputs])
    rounds = REFINEMENT_ROUNDS if budget is not None else 0
    with (
        execution.progress.stage("trials", len(trials) + rounds * len(groups)) as advance,
        token_mask_runner(source, padding, execution) as masks,
        temporary_folder() as folder,
        open_segmented_model(analysis, changed, execution, folder if execution.executor is not None else None) as model,
    ):
        store = SpillableStore(memory_budget(execution.memory_limit))
        pools: list[list[TrialBatch]] = []
        size = SAMPLES_PER_WIDTH if near_plan else CURVE_SAMPLES
        samples = sample_pools(calibration, size)
        for pool in samples:
            pools.append([])
            for feeds in pool:
                states = model.dense_states(feeds, store)
                metrics = metrics.for_values({name: states[-1][name] for name in model.outputs})
                metrics = metrics.for_limit() if limited else metrics
                pools[-1].append(TrialBatch(states, output_token_masks(masks(feeds), padding), metrics))
        stage = trial_stage(closed_forms, scores, calibration, (size, limited), execution)
        measurement = CurveMeasurement(refits, model, pools, groups, stage, advance)
        if execution.executor is not None:
            measurement.workers = trial_workers(model, folder, samples, pools, execution)
        measurement.measure(trials)
        for _ in range(rounds):
            assert budget is not None
            planned = allocate_widths(groups, replace(scores, curves=measurement.curves()), budget)
            measurement.measure((group, nearest_widths(group, [planned[group.id] / group.size])) for group in groups)
        return measurement.curves()


def keeps_most_units(groups: Sequence[Group], scores: UnitScores, budget: Budget) -> bool:
    """Would groups keep at least half of their units on average, were all pruned alike? Below that, trials near the
    plan only may lead to a plan that trials further off would have corrected."""
    if budget.limits_quality:
        return False
    widths = allocate_widths(groups, scores, replace(budget, uniform=True))
    return float(np.mean([widths[group.id] / group.size for group in groups])) >= 0.5


def planned_widths(
    closed_forms: ClosedForms, scores: UnitScores, groups: Sequence[Group], budget: Budget
) -> Iterator[tuple[Group, list[int]]]:
    """Of each group the width that the predicted curves lead to; ``CURVE_SHARES`` where the groups of a role are few,
    or where no closed form gives the shape."""
    counts = Counter(group.role for group in groups)
    predicted = replace(scores, curves=predicted_curves(closed_forms, scores, groups))
    planned = allocate_widths(groups, predicted, budget)
    for group in groups:
        one_is_enough = counts[group.role] >= MIN_GROUPS_PER_ROLE and closed_forms.loss_curve(group) is not None
        yield group, nearest_widths(group, [planned[group.id] / group.size] if one_is_enough else CURVE_SHARES)


@dataclass(frozen=True)
class WidthTrial:
    """A group cut to ``width``, on the samples of pool number ``pool``."""

    group: Group
    width: int
    pool: int

    @property
    def name(self) -> str:
        return f"{self.group.id} {self.width} of {self.group.size}, samples {self.pool}"


class CurveMeasurement:
    """The trials so far, and the curves through them."""

    def __init__(
        self,
        refits: StreamRefits,
        model: SegmentedModel,
        pools: Sequence[Sequence[TrialBatch]],
        groups: Sequence[Group],
        stage: StoredStage = NOT_STORED,
        advance: Advance = ignore_advance,
    ) -> None:
        self.refits, self.model, self.pools = refits, model, pools
        self.stage, self.advance = stage, advance
        self.workers: TrialWorkers | None = None  # None: trials run in this process
        self.priors = {group.id: prior_curve(refits.closed_forms, group) for group in groups}
        self.next_pool = {group.id: index for index, group in enumerate(groups)}
        self.changes: dict[tuple[str, int], OutputChange] = {}

    def measure(self, trials: Iterable[tuple[Group, Sequence[int]]]) -> None:
        """Try these widths, except those that were tried before."""
        planned: dict[tuple[str, int], WidthTrial] = {}
        ends: list[int] = []  # how many trials are planned when those of a group are; the stage counts groups
        for group, widths in trials:
            for width in widths:
                if (group.id, width) not in self.changes and (group.id, width) not in planned:
                    planned[group.id, width] = WidthTrial(group, width, self.next_pool[group.id] % len(self.pools))
                    self.next_pool[group.id] += 1
            ends.append(len(planned))
        stored = {key: self.stage.get(trial.name) for key, trial in planned.items()}
        changes = iter(self.changes_of([trial for key, trial in planned.items() if stored[key] is None]))
        for number, (key, trial) in enumerate(planned.items()):
            self.advance(ends.count(number))
            entry = stored[key]
            change = float(entry.record) if entry is not None else next(changes)
            if entry is None:
                self.stage.put(trial.name, change)
            self.changes[key] = OutputChange(trial.group, trial.width, trial.pool, change)
        self.advance(ends.count(len(planned)))

    def changes_of(self, trials: Sequence[WidthTrial]) -> Iterator[float]:
        """The change of the outputs in each trial, run here or by workers."""
        if self.workers is None:
            for trial in trials:
                arrays = self.arrays_of(trial)
                batches = self.pools[trial.pool]
                outputs = (self.model.outputs_with(batch.states, trial.group.id, arrays) for batch in batches)
                yield float(np.mean([batch.change(found) for batch, found in zip(batches, outputs, strict=True)]))
            return
        size = self.workers.at_once
        for start in range(0, len(trials), size):
            sent = [
                Trial(*self.model.spans[trial.group.id], trial.pool, self.arrays_of(trial))
                for trial in trials[start : start + size]
            ]
            yield from self.workers.changes(sent)

    def arrays_of(self, trial: WidthTrial) -> dict[str, AnyArray]:
        return self.refits.trial_constants(trial.group, trial.width)

    def curves(self) -> dict[str, FloatArray]:
        return fit_curves(self.priors, list(self.changes.values()))


def trial_stage(
    closed_forms: ClosedForms,
    scores: UnitScores,
    calibration: Calibration,
    kind: tuple[int, bool],
    execution: Execution,
) -> StoredStage:
    """Where trials are stored, for all budgets that are tried alike. ``kind``: on how many samples, and whether a drift
    is limited. Losses tell the closed forms, and what these were fitted to, from others."""
    if execution.work is None:
        return NOT_STORED
    analysis = closed_forms.analysis
    fitted = (closed_forms.identity, scores.values, scores.method)
    judged = (metrics_identity(analysis), *kind)
    return execution.stored_stage("trials", calibration.identity, fitted, judged)


def leading_axes(shape: Sequence[int]) -> tuple[int, int]:
    """(samples, rows of each) of an output [batch, tokens, ..]."""
    return (shape[0], shape[1]) if len(shape) > 2 else (0, 0)


def output_token_masks(masks: TokenMasks, padding: PaddingMasks) -> dict[str, TokenMask]:
    """Output -> bool [batch, tokens]: does the token count?"""
    return {name: masks[mask.name] for name, mask in padding.row_masks.items() if mask.order == "batch_first"}


@dataclass(frozen=True)
class TrialBatch:
    """One batch that trials run on: the dense model's values, which tokens of its outputs count, and how they are
    judged."""

    states: SegmentStates
    token_masks: Mapping[str, TokenMask]
    metrics: OutputMetrics

    def change(self, outputs: Mapping[str, AnyArray]) -> float:
        return self.metrics.change(self.states[-1], outputs, self.token_masks)


def trial_workers(
    model: SegmentedModel,
    folder: Path,
    samples: Sequence[Sequence[Feeds]],
    pools: Sequence[Sequence[TrialBatch]],
    execution: Execution,
) -> TrialWorkers | None:
    """What runs trials on the workers of ``execution.executor``; None where a metric of the user's cannot be sent."""
    assert execution.executor is not None
    sent = tuple(
        tuple(
            TrialSamples(feeds, batch.token_masks, batch.metrics)
            for feeds, batch in zip(feeds_of_pool, pool, strict=True)
        )
        for feeds_of_pool, pool in zip(samples, pools, strict=True)
    )
    if not can_be_sent(sent):
        return None
    return TrialWorkers(execution.executor, model, folder, sent, execution)


def sample_pools(calibration: Calibration, size: int) -> list[list[Feeds]]:
    """``SAMPLE_POOLS`` sets of ``size`` samples, from the first batches."""
    count = -(-size // calibration.batch)
    batches: list[Feeds] = list(itertools.islice(calibration.first_rows(size), count * SAMPLE_POOLS))
    return [batches[k : k + count] for k in range(0, len(batches), count)]


def measurable_widths(group: Group) -> list[int]:
    """Every width that may be tried, apart from none and all."""
    return nearest_widths(group, SHARE_GRID)


def nearest_widths(group: Group, shares: Sequence[float]) -> list[int]:
    """The nearest of ``measurable_widths`` to these shares of a group's units."""
    grid = sorted({min(max(round(group.size * share), 1), group.size - 1) for share in SHARE_GRID if group.size > 1})
    return sorted({min(grid, key=lambda width: abs(width - group.size * share)) for share in shares if grid})


def prior_curve(closed_forms: ClosedForms, group: Group) -> FloatArray:
    """[size + 1]: the closed-form loss. Where there is none, a parabola: equal changes per unit, which add up."""
    curve = closed_forms.loss_curve(group)
    curve = closed_forms.analysis.stream_loss(group) if curve is None else curve
    return curve if curve is not None else np.linspace(1.0, 0.0, group.size + 1) ** 2


def trial_edits(closed_forms: ClosedForms, scores: UnitScores, group: Group, width: int) -> tuple[WeightEdits, Cuts]:
    """The edits and cuts that prune this group to ``width``, in closed form if it has one."""
    plan = trial_plan(closed_forms, scores, group, width)
    edits = closed_form_edits(closed_forms, plan) if group.id in closed_forms.kinds else WeightEdits()
    return edits, cuts_of(plan)


def trial_plan(closed_forms: ClosedForms, scores: UnitScores, group: Group, width: int) -> SlicePlan:
    return SlicePlan(closed_forms.analysis, "", {}, {group.id: top_units(scores.values[group.id], width)}, "auto")


def trial_constants(closed_forms: ClosedForms, scores: UnitScores, group: Group, width: int) -> dict[str, AnyArray]:
    """New contents, by name, of the constants that pruning this group to ``width`` changes; removed units are zero."""
    source = closed_forms.analysis.traced_graph
    edits, cuts = trial_edits(closed_forms, scores, group, width)
    return trial_weights(source, edited_constants(source, edits), cuts)


@dataclass
class StreamRefits:
    """Trials of rotated streams too: what reads them is refitted for each width, on a few samples.

    Without that a trial says two to three times the change of what is written."""

    closed_forms: ClosedForms
    scores: UnitScores
    calibration: Calibration
    execution: Execution
    found: dict[tuple[str, int], WeightEdits] = field(default_factory=dict)

    def is_fitted(self, group: Group, width: int) -> bool:
        return width < group.size and self.closed_forms.analysis.stream_loss(group) is not None

    def trial_edits(self, group: Group, width: int) -> tuple[WeightEdits, Cuts]:
        """``trial_edits``, for rotated streams with what reads them."""
        if not self.is_fitted(group, width):
            return trial_edits(self.closed_forms, self.scores, group, width)
        plan = trial_plan(self.closed_forms, self.scores, group, width)
        if (group.id, width) not in self.found:
            batches = itertools.islice(self.calibration.batches(), -(-STREAM_SAMPLES // self.calibration.batch))
            source = self.closed_forms.analysis.traced_graph
            self.found[group.id, width] = normalization_edits(source, plan, batches, self.execution)
        return self.found[group.id, width], cuts_of(plan)

    def trial_constants(self, group: Group, width: int) -> dict[str, AnyArray]:
        """``trial_constants``, for rotated streams with what reads them."""
        if not self.is_fitted(group, width):
            return trial_constants(self.closed_forms, self.scores, group, width)
        source = self.closed_forms.analysis.traced_graph
        edits, cuts = self.trial_edits(group, width)
        return trial_weights(source, edited_constants(source, edits), cuts)
