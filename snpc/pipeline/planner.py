"""Plans: what the closed forms and the criterion say of each unit, the width of each group, and the units that stay.

``plan`` measures statistics and solves the closed forms for every width. From these come the order of the units within
each group and the loss curves, which say how the outputs react to each group's width; ``snpc.planning`` makes the
widths of them. Groups of which the closed forms have none are scored by a criterion, and their weights stay as they
are; ``ClosedForms.skipped`` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, get_args

import numpy as np

from snpc.errors import UserError
from snpc.passes import Analysis, analyze
from snpc.pipeline.score import score_groups
from snpc.pipeline.token_decisions import with_token_decisions
from snpc.planning import (
    Budget,
    Effort,
    PlanOutlook,
    PruningMethod,
    ResourceTarget,
    SlicePlan,
    UnitScores,
    allocate_widths,
    check_ranked_streams,
    groups_to_prune,
    make_slice_plan,
    metrics_in,
    plan_from_json,
    plan_outlook,
    plan_to_json,
    prunes_kv_cache,
    saved_at,
    select_units,
    token_reduction_in,
    with_planned_entries,
    without_removed_layers,
)
from snpc.runtime.batches import DenseValues, check_runs_whole
from snpc.runtime.calibration import Calibration, find_ids
from snpc.runtime.closed_form import (
    ClosedForms,
    missing_statistics,
    residual_error_values,
    solve_closed_forms,
    using_algebra,
    with_stream_bases,
)
from snpc.runtime.evaluation import (
    MetricRequest,
    OutputMetrics,
    Workload,
    groups_to_time,
    latency_table,
    with_metrics,
    with_named_metrics,
)
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, SpillableStore, memory_budget
from snpc.runtime.io import atomic_write
from snpc.runtime.sensitivity import (
    check_layer_budget,
    measure_loss_curves,
    predicted_curves,
    remove_layers,
    remove_layers_beside_widths,
    search_widths,
)
from snpc.runtime.statistics import (
    Statistics,
    check_finite_weights,
    measure_statistics,
    unit_weight_energies,
)
from snpc.tokens import reduce_tokens
from snpc.types import LAYER_ROLE, FloatArray, Group, Model

if TYPE_CHECKING:
    from typing_extensions import Unpack

FACTOR_BYTES = 256 << 20  # of the factors for trials that stay in memory; others are read from files when a trial asks
DENSE_BYTES = 256 << 20  # of the dense model's values that stay in memory; they are read once

FILLED_CACHE_REASON = "stored in a KV cache, which the data fills with what the original computed"
NO_PERPLEXITY = "--max-ppl limits the perplexity of a causal language model"


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for.

    ``method``: how weights are adapted to the cut ("auto": refitted, one layer after the other; "parallel": refitted,
    all at once; "select": sliced as they are); None: "auto" where there is calibration data and no ``criterion`` is
    named. ``criterion`` scores the groups that have no closed form; None: "mixed" with data, "magnitude" without.
    ``workload``: what is run to measure a latency. ``full_curves``: loss curves are measured over all widths, so that
    ``PruningPlan.for_budget`` can serve other budgets, and not only near the widths of this one. ``effort``: what the
    plan may cost.
    """

    budget: Budget
    method: PruningMethod | None = None
    criterion: str | None = None
    workload: Workload | None = None
    full_curves: bool = False
    effort: Effort = "normal"


@dataclass(frozen=True)
class PruningPlan:
    """All that ``apply`` needs: which units stay, the closed forms that refit the weights, the data and how to run.

    ``closed_forms``: None where weights are sliced as they are. ``calibration``: with the token decisions of the dense
    model where tokens are reduced. ``budget``, ``groups``, ``scores``, ``workload``, ``statistics``: what the plan was
    made from; plans for other budgets are made from them.
    """

    slices: SlicePlan
    closed_forms: ClosedForms | None = None
    loss_curves: Mapping[str, FloatArray] = field(default_factory=dict, repr=False)
    """Group id -> [size + 1]: change of the outputs, like a squared error, by units per block that are kept."""
    budget: Budget | None = None
    groups: tuple[Group, ...] = field(default=(), repr=False)
    scores: UnitScores | None = field(default=None, repr=False)
    workload: Workload | None = None
    statistics: Statistics | None = field(default=None, repr=False)
    calibration: Calibration | None = field(default=None, repr=False)
    execution: Execution = DEFAULT_EXECUTION
    dense_values: DenseValues | None = field(default=None, repr=False)
    """What the layer-wise fit reads of the dense model, measured along with the statistics on ``calibration``."""
    layer_planner: LayerPlanner | None = field(default=None, repr=False, compare=False)
    """Makes plans for a limit of quality where layers go; ``scores`` and ``groups`` have all layers then."""

    @property
    def analysis(self) -> Analysis:
        return self.slices.analysis

    @property
    def effort(self) -> Effort:
        return self.scores.effort if self.scores is not None else "normal"

    @property
    def data_source(self) -> str:
        """The data that weights are fitted to, in words."""
        if self.calibration is not None:
            return self.calibration.describe()
        if self.closed_forms is not None:
            return self.closed_forms.source
        return str(self.slices.data["text"]) if self.slices.data is not None else ""

    @cached_property
    def outlook(self) -> PlanOutlook | None:
        """What goes, the drift that the curves predict, and up to where they are safe. None where no widths are cut."""
        if self.budget is None or self.scores is None:
            return None
        measured = self.calibration is not None and needs_loss_curves(self.budget, self.slices.method, self.effort)
        scores = self.scores if measured else replace(self.scores, curves={})
        return plan_outlook(self.groups, scores, self.budget, self.slices)

    @property
    def measured_on_calibration(self) -> bool:
        """Is ``calibration`` the data that the statistics were measured on, as far as they were?"""
        if self.calibration is None or self.statistics is None:
            return True
        return self.statistics.sources == (self.calibration.origin,)

    @property
    def other_data(self) -> str:
        """The data that a plan from a file was made with, in words, where it is not the data at hand; else ""."""
        record = self.slices.data
        if record is None or self.calibration is None or record["digest"] == self.calibration.digest:
            return ""
        return str(record.get("text", "other data"))

    def for_budget(self, budget: Budget) -> PruningPlan:
        """The plan for another target, from the same measurements (``PlanRequest.full_curves`` for one far off).

        ``budget`` differs in its target only, and that is a latency only if this one's is.
        """
        assert self.scores is not None
        closed_forms = self.closed_forms or ClosedForms.empty(self.analysis)
        slices = choose_units(closed_forms, self.scores, self.calibration, budget, self.execution)
        return replace(self, slices=slices, budget=budget)


class PlanOptions(TypedDict, total=False):
    """What a plan is seldom told."""

    workload: Workload | None
    metric: MetricRequest | None
    effort: Effort


def plan(
    analysis: Analysis,
    budget: Budget | None,
    calibration: Calibration | None = None,
    *,
    method: PruningMethod | None = None,
    criterion: str | None = None,
    statistics: Statistics | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    **options: Unpack[PlanOptions],
) -> PruningPlan:
    """Score the units, allocate the widths and choose the units that stay. Nothing is rewritten yet.

    ``budget`` None cuts no width, for a model whose tokens alone are reduced. ``method``, ``criterion`` and
    ``workload``: see ``PlanRequest``.

    ``metric``: how changed outputs are judged: "kl", "relative", "cosine", "mismatch", "none", "FILE.py:FUNCTION" or a
    function (original, pruned) -> distance; for one output as a mapping, or as text "OUTPUT=...". None: what suits each
    output (docs/how-it-works.md).

    ``effort``: "quick" goes through the data once, and widths come from the closed forms' own loss; "normal" tries
    widths on a few samples; "search" tries moves of units between groups besides.

    ``statistics`` that were measured before replace a measurement. Without ``calibration`` they allow "parallel" (then
    the default) and "select", and widths are allocated by the closed forms' own loss, relative to each group's output,
    because loss curves are measured on data. Raises UserError where data is needed and missing.
    """
    analysis = with_metrics(analysis, options.get("metric"))
    if budget is None:
        calibration = with_token_decisions(analysis, calibration, execution)
        method = method or ("auto" if calibration is not None else "select")
        check_refit_data(method, calibration, statistics)
        refits = analysis.reduction is not None and method == "auto"
        unchanged = SlicePlan(analysis, "none", {"roles": ()}, {}, "auto" if refits else "select")
        closed_forms = ClosedForms.empty(analysis) if refits else None
        return PruningPlan(unchanged, closed_forms, calibration=calibration, execution=execution)
    request = PlanRequest(budget, method, criterion, options.get("workload"), effort=options.get("effort", "normal"))
    return make_plan(analysis, request, calibration, statistics, execution)


def measure_request(
    analysis: Analysis, request: PlanRequest, calibration: Calibration, execution: Execution = DEFAULT_EXECUTION
) -> Statistics:
    """The statistics that ``make_plan`` measures for a request; of parts of the data they add up."""
    if LAYER_ROLE in request.budget.roles:
        raise UserError("the role layer tries layers on all the data: leave it out where parts of it are measured")
    analysis = with_selected_caches(analysis, calibration, None)
    groups = groups_to_prune(analysis, request.budget)
    check_ranked_streams(analysis, groups, request.budget)
    check_finite_weights(analysis, groups)
    calibration = with_token_decisions(analysis, calibration, execution) or calibration
    return measure_statistics(
        analysis,
        calibration,
        groups,
        method=request.method or default_method(calibration, request.criterion is None),
        criterion=request.criterion or "mixed",
        execution=execution,
    )


def make_plan(
    analysis: Analysis,
    request: PlanRequest,
    calibration: Calibration | None,
    statistics: Statistics | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> PruningPlan:
    """``plan``, by a request."""
    budget = request.budget
    check_memory(analysis, request, calibration, execution)
    if LAYER_ROLE not in budget.roles:
        return plan_widths(analysis, request, calibration, statistics, execution)
    check_layer_budget(analysis, budget, calibration)
    alone = set(budget.roles) == {LAYER_ROLE}
    if not alone and budget.ratio is None:
        return plan_layers_and_widths(analysis, request, calibration, statistics, execution)
    method = request.method or default_method(calibration, request.criterion is None)
    refits = method == "auto" and request.effort != "quick"
    decided = with_token_decisions(analysis, calibration, execution)
    analysis = remove_layers(analysis, budget, decided, execution, refits=refits)
    if alone:
        return plan_of_layers(analysis, request, calibration, execution)
    return plan_widths(analysis, request, calibration, statistics, execution)


def plan_layers_and_widths(
    analysis: Analysis,
    request: PlanRequest,
    calibration: Calibration | None,
    statistics: Statistics | None,
    execution: Execution,
) -> PruningPlan:
    """The plan for a target or a limit of quality that layers and widths serve together: widths are measured with all
    layers, to decide which layers go, and again without those."""
    measured = measure_widths(analysis, replace(request, full_curves=True), calibration, statistics, execution)
    assert calibration is not None
    if request.budget.limits_quality:
        planner = LayerPlanner(measured, request, calibration, execution)
        guess = planner.plan_for(allocate_widths(measured.groups, measured.scores, request.budget))
        return replace(guess, scores=measured.scores, groups=tuple(measured.groups), layer_planner=planner)
    return plan_beside_layers(measured, request, calibration, execution)


def plan_beside_layers(
    measured: WidthMeasurement, request: PlanRequest, calibration: Calibration, execution: Execution
) -> PruningPlan:
    """The plan for a target. ``measured``: of the model with all its layers."""
    target = target_in_macs(request.budget, measured.scores)
    budget = replace(request.budget, target=target)
    data = measured.calibration or calibration
    with using_algebra(execution.algebra):
        shorter = remove_layers_beside_widths(
            measured.closed_forms, measured.scores, data, measured.groups, budget, execution=execution
        )
    if shorter.removal is None:
        return measured.plan_for(request, execution)
    if not request.budget.is_latency and shorter.share_left(target.kind) <= target.share:
        return plan_of_layers(shorter, request, calibration, execution)
    return plan_widths(shorter, request, calibration, None, execution)


def target_in_macs(budget: Budget, scores: UnitScores) -> ResourceTarget:
    """The target, or for a latency the same share of the MACs."""
    assert budget.target is not None
    if scores.latency is None:
        return budget.target
    return ResourceTarget("macs", min(budget.target.milliseconds(scores.latency.dense) / scores.latency.dense, 1.0))


def plan_widths(
    analysis: Analysis,
    request: PlanRequest,
    calibration: Calibration | None,
    statistics: Statistics | None,
    execution: Execution,
) -> PruningPlan:
    """The plan that cuts widths alone."""
    return measure_widths(analysis, request, calibration, statistics, execution).plan_for(request, execution)


@dataclass(frozen=True)
class WidthMeasurement:
    """What plans of widths are made from, for any budget like the one that it was made for. ``dense``: what the
    layer-wise fit reads of the dense model."""

    closed_forms: ClosedForms
    scores: UnitScores
    groups: Sequence[Group]
    calibration: Calibration | None
    statistics: Statistics | None
    dense: DenseValues | None

    def plan_for(self, request: PlanRequest, execution: Execution) -> PruningPlan:
        closed_forms, scores = self.closed_forms, self.scores
        return PruningPlan(
            choose_units(closed_forms, scores, self.calibration, request.budget, execution),
            closed_forms.without_factors() if scores.method != "select" else None,
            scores.curves,
            request.budget,
            tuple(self.groups),
            scores,
            request.workload,
            self.statistics,
            self.calibration,
            execution,
            self.dense,
        )


@dataclass(frozen=True)
class LayerPlanner:
    """Plans of layers and widths for a limit of quality, from one measurement of the model with all its layers."""

    measured: WidthMeasurement
    request: PlanRequest
    calibration: Calibration
    execution: Execution
    plans: dict[float, PruningPlan] = field(default_factory=dict, repr=False, compare=False)

    def plan_for(self, widths: Mapping[str, int]) -> PruningPlan:
        """The plan that leaves as many MACs as these ``widths`` alone, by group id."""
        scores, budget = self.measured.scores, self.request.budget
        macs, whole = ResourceTarget("macs", 1.0), scores.analysis.cost.macs
        left = scores.analysis.share_left("macs") - saved_at(widths, scores, self.measured.groups, macs) / whole
        share = min(round(left, 9), 1.0)
        if share not in self.plans:
            aim = replace(budget, max_drift=None, max_ppl=None, max_drop=None, target=replace(macs, share=share))
            request = replace(self.request, budget=aim)
            plan = plan_beside_layers(self.measured, request, self.calibration, self.execution)
            slices = replace(plan.slices, options={**budget.to_options(), "effort": request.effort})
            self.plans[share] = replace(plan, slices=slices, budget=budget)
        return self.plans[share]


def measure_widths(
    analysis: Analysis,
    request: PlanRequest,
    calibration: Calibration | None,
    statistics: Statistics | None,
    execution: Execution,
) -> WidthMeasurement:
    """Statistics, closed forms, scores and loss curves of the groups that the budget names."""
    budget = request.budget
    analysis = with_selected_caches(analysis, calibration, statistics)
    groups = groups_to_prune(analysis, budget)
    check_finite_weights(analysis, groups)
    check_request(request, calibration)
    calibration = with_token_decisions(analysis, calibration, execution)
    if calibration is not None and statistics is None and rotates_streams(request):
        with using_algebra(execution.algebra):
            analysis = with_stream_bases(analysis, calibration, execution)
        groups = groups_to_prune(analysis, budget)
    check_ranked_streams(analysis, groups, budget)
    has_data = calibration is not None or statistics is not None
    method = request.method or default_method(calibration, has_data and request.criterion is None)
    check_refit_data(method, calibration, statistics)
    default_criterion = statistics.criterion if statistics else "mixed" if has_data else "magnitude"
    criterion = default_criterion if request.criterion is None else request.criterion
    dense = None
    if statistics is None and calibration is not None:
        dense = dense_values_for(analysis, groups, method, calibration, execution)
        statistics = measure_statistics(
            analysis, calibration, groups, method=method, criterion=criterion, dense=dense, execution=execution
        )
    measures_curves = calibration is not None and needs_loss_curves(budget, method, request.effort)
    closed_forms = ClosedForms.empty(analysis)
    if method != "select":
        assert statistics is not None
        limit = min(memory_budget(execution.memory_limit) // 2, FACTOR_BYTES)
        store = SpillableStore(limit) if measures_curves else None
        with using_algebra(execution.algebra):
            closed_forms = solve_closed_forms(analysis, statistics, groups, store, execution.progress)
    rest = [g for g in groups if g.id not in closed_forms.kinds]
    scores = with_closed_form_order(score_groups(analysis, criterion, rest, statistics), closed_forms, method)
    scores = replace(scores, effort=request.effort)
    check_numbers(scores, closed_forms, groups)
    if budget.allocator == "dimap":
        scores = replace(scores, energies=unit_weight_energies(analysis, groups))
    if budget.is_latency:
        roles = tuple(dict.fromkeys(g.role for g in groups))
        table = latency_table(analysis, roles, workload=request.workload, execution=execution)
        scores = replace(scores, latency=table.saved_times(groups_to_time(analysis, roles), groups))
    widths = [g for g in groups if g.role != "experts"]  # zero weights do not keep tokens from an expert
    if measures_curves and widths:
        assert calibration is not None
        near = None if request.full_curves else budget
        with using_algebra(execution.algebra):
            curves = measure_loss_curves(closed_forms, scores, calibration, widths, near, execution=execution)
        exponent = OutputMetrics.of(analysis).drift_exponent
        scores = replace(scores, curves=curves, drift_exponent=exponent)
    elif not measures_curves and method != "select" and not budget.uniform:
        scores = replace(scores, curves=predicted_curves(closed_forms, scores, groups))
    return WidthMeasurement(closed_forms, scores, groups, calibration, statistics, dense)


def rotates_streams(request: PlanRequest) -> bool:
    """May the width of residual streams be cut in another basis? Not where a criterion is named, which scores channels,
    nor where weights are sliced as they are, or layers go."""
    roles = request.budget.roles
    named = request.method == "select" or request.criterion is not None
    return "residual" in roles and LAYER_ROLE not in roles and not named


def plan_of_layers(
    analysis: Analysis, request: PlanRequest, calibration: Calibration | None, execution: Execution
) -> PruningPlan:
    """The plan that cuts no width of an analysis without some layers: what is left is refitted, unless by "select"."""
    calibration = with_token_decisions(analysis, calibration, execution)
    method = request.method or default_method(calibration, request.criterion is None)
    options = {**request.budget.to_options(), "effort": request.effort}
    slices = SlicePlan(analysis, "none", options, {}, method)
    closed_forms = ClosedForms.empty(analysis) if method != "select" else None
    return PruningPlan(slices, closed_forms, calibration=calibration, execution=execution)


def with_selected_caches(
    analysis: Analysis, calibration: Calibration | None, statistics: Statistics | None
) -> Analysis:
    """The analysis, in which channels that lie in KV caches keep their basis where the data fills the caches.

    A rotation changes what a cache holds, and the data's caches hold what the original computes. Caches that begin
    empty are filled by the rotated model itself. ``statistics`` that were measured before decide for each group.
    """
    filled = calibration is not None and fills_caches(analysis, calibration)
    selected = {
        g.id: replace(g, freedom="select", freedom_reason=FILLED_CACHE_REASON)
        for g in analysis.groups
        if g.cached and g.freedom == "basis"
        if filled or (statistics is not None and missing_statistics(analysis, statistics, g))
    }
    if not selected:
        return analysis
    return replace(analysis, groups=tuple(selected.get(g.id, g) for g in analysis.groups))


def fills_caches(analysis: Analysis, calibration: Calibration) -> bool:
    """Whether a KV cache that may get narrower is not empty in some sample."""
    return calibration.fills({str(value.name) for value in analysis.traced_graph.trace.caches})


def dense_values_for(
    analysis: Analysis,
    groups: Sequence[Group],
    method: PruningMethod,
    calibration: Calibration,
    execution: Execution,
) -> DenseValues | None:
    """Where the values that the layer-wise fit reads are collected; None where there is no such fit."""
    if method != "auto" or analysis.removal is not None or analysis.reduction is not None:
        return None
    limit = min(memory_budget(execution.memory_limit) // 2, DENSE_BYTES)
    return DenseValues(residual_error_values(analysis, groups), calibration, limit)


def choose_units(
    closed_forms: ClosedForms,
    scores: UnitScores,
    calibration: Calibration | None,
    budget: Budget,
    execution: Execution,
) -> SlicePlan:
    """The units that stay: as the curves say, or as a search from there on finds."""
    if scores.effort != "search" or calibration is None:
        return make_slice_plan(scores, budget)
    groups = groups_to_prune(scores.analysis, budget)
    with using_algebra(execution.algebra):
        widths = search_widths(closed_forms, scores, calibration, groups, budget, execution=execution)
    return select_units(scores, budget, widths)


def check_numbers(scores: UnitScores, closed_forms: ClosedForms, groups: Sequence[Group]) -> None:
    """Raise UserError where a score or a closed-form loss is NaN or infinite: no plan can be made of it."""
    for group in groups:
        loss = closed_forms.loss_curve(group)
        for what, array in ((f"scores ({scores.criterion})", scores.values.get(group.id)), ("closed-form loss", loss)):
            if array is not None and not np.isfinite(array).all():
                raise UserError(
                    f"{group.id}: its {what} hold NaN or infinity: the weights or the data have values that are too "
                    "large; leave the group out with --exclude, or look at its weights"
                )


def check_request(request: PlanRequest, calibration: Calibration | None) -> None:
    if request.budget.limits_quality and calibration is None:
        raise UserError(f"{request.budget.quality_flag} needs calibration data, on which it is measured: give --calib")
    if request.budget.max_ppl is not None and calibration is not None and find_ids(calibration.inputs) is None:
        raise UserError(f"{NO_PERPLEXITY}: no input of the model is known to take token ids; use --max-drift")
    if request.workload is not None and not request.budget.is_latency:
        raise UserError("batch, input shapes and threads are for --target latency=...: leave them out")
    check_effort(request, calibration)


def check_memory(
    analysis: Analysis, request: PlanRequest, calibration: Calibration | None, execution: Execution
) -> None:
    """Raise UserError where the request takes the whole model at once, and there is no memory for that."""
    budget = request.budget
    method = request.method or default_method(calibration, calibration is not None and request.criterion is None)
    requests: list[tuple[str, str]] = []
    if LAYER_ROLE in budget.roles:
        requests.append(("--roles layer tries layers on", "leave the role out, so that widths are cut"))
    if budget.is_latency:
        requests.append(("--target latency times", "give --target macs=R"))
    if execution.executor is not None and execution.memory_limit is not None:  # each worker has that much
        requests.append(("each worker of --cluster runs", "leave --cluster out, so that it runs segment by segment"))
    if "residual" in budget.roles and method != "select":
        instead = "give --method select, or leave the role residual out"
        requests.append(("refitting normalizations (--roles residual) runs", instead))
    for subject, instead in requests:
        check_runs_whole(analysis.traced_graph.model, execution, f"{analysis.name}: {subject}", instead)


def check_effort(request: PlanRequest, calibration: Calibration | None) -> None:
    """Raise UserError where the effort cannot serve the budget, or is none of the three."""
    budget, effort = request.budget, request.effort
    if effort not in get_args(Effort):
        raise UserError(f"effort {effort!r} is not one of {', '.join(get_args(Effort))}")
    if effort == "quick" and budget.limits_quality:
        raise UserError(
            f"--effort quick measures no loss curves, which say how far {budget.quality_flag} lets widths go: "
            "leave out one"
        )
    if effort == "search":
        movable = budget.target is not None and not budget.is_latency
        if not movable or budget.uniform or budget.allocator != "loss":
            raise UserError(
                "--effort search moves units between groups at equal cost: give --target macs=R, params=R or bytes=R, "
                "without --uniform and --allocator"
            )
        if calibration is None:
            raise UserError("--effort search tries plans on calibration data: give --calib")


def needs_loss_curves(budget: Budget, method: PruningMethod, effort: Effort) -> bool:
    """None for "quick". Uniform widths need none, except for a drift; a ratio of selected units needs scores alone."""
    if effort == "quick":
        return False
    if budget.uniform or budget.allocator == "dimap":
        return budget.limits_quality
    return method != "select" or budget.ratio is None


def default_method(calibration: Calibration | None, refits: bool) -> PruningMethod:
    if not refits:
        return "select"
    return "auto" if calibration is not None else "parallel"


def with_closed_form_order(scores: UnitScores, closed_forms: ClosedForms, method: PruningMethod) -> UnitScores:
    """Scores in which the closed forms give the order of the units within their groups."""
    values: dict[str, FloatArray] = dict(scores.values)
    for name, orders in closed_forms.elimination_orders.items():
        values[name] = np.stack([np.argsort(order.order) for order in orders]).astype(np.float64)
    for name, parts in closed_forms.bases.items():
        size = len(parts[0].loss) - 1
        values[name] = np.tile(np.arange(size, 0, -1, dtype=np.float64), (len(parts), 1))
    for stream in scores.analysis.stream_bases:
        if stream.rotated and stream.group in values:
            values[stream.group] = np.arange(stream.size, 0, -1, dtype=np.float64)[None]
    samples = max(scores.samples, closed_forms.samples)
    return replace(scores, values=values, method=method, samples=samples)


def check_refit_data(method: PruningMethod, calibration: Calibration | None, statistics: Statistics | None) -> None:
    if method == "auto" and calibration is None and statistics is not None:
        raise UserError(
            "--method auto refits layer after layer on the data, which --load-stats does not contain: give --calib "
            "as well, or --method parallel"
        )
    if method != "select" and calibration is None and statistics is None:
        raise UserError(f"--method {method} refits weights from calibration data: give --calib, or --method select")


# -- plans made before: from a file, or by hand ----------------------------------------------------------------------


def complete_plan(
    slices: SlicePlan,
    calibration: Calibration | None = None,
    *,
    statistics: Statistics | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> PruningPlan:
    """A plan that was read from a file or made by hand, with the closed forms that its method needs.

    Raises UserError where the plan refits weights and there is no data.
    """
    slices = replace(slices, analysis=with_selected_caches(slices.analysis, calibration, statistics))
    calibration = with_token_decisions(slices.analysis, calibration, execution)
    if slices.rotated:
        slices = with_planned_bases(slices, calibration, execution)
    if slices.method == "select":
        return PruningPlan(slices, calibration=calibration, execution=execution)
    if calibration is None and statistics is None:
        raise UserError(
            f"this plan refits weights (method {slices.method}): give --calib, the data that it was made with"
        )
    check_refit_data(slices.method, calibration, statistics)
    groups = [g for g in slices.analysis.groups if g.id in slices.keep]
    if not groups:
        empty = ClosedForms.empty(slices.analysis)
        return PruningPlan(slices, empty, statistics=statistics, calibration=calibration, execution=execution)
    if statistics is None:
        assert calibration is not None
        statistics = measure_statistics(slices.analysis, calibration, groups, execution=execution)
    with using_algebra(execution.algebra):
        closed_forms = solve_closed_forms(slices.analysis, statistics, groups, progress=execution.progress)
    return PruningPlan(slices, closed_forms, statistics=statistics, calibration=calibration, execution=execution)


def with_planned_bases(slices: SlicePlan, calibration: Calibration | None, execution: Execution) -> SlicePlan:
    """The plan, with the residual streams that it rotates in their bases. Raises UserError where there is no data."""
    if calibration is None:
        raise UserError(
            f"this plan rotates the residual stream {slices.rotated[0]}: give --calib, the data that it was made with"
        )
    with using_algebra(execution.algebra):
        return replace(slices, analysis=with_stream_bases(slices.analysis, calibration, execution, slices.rotated))


def load_plan(path: Path | str, model: Model, dim_sizes: Mapping[str, int] | None = None) -> SlicePlan:
    """Read a plan file for ``model``, which is analyzed as it was for the plan: with fewer tokens where it says so.

    ``dim_sizes``: see ``analyze``. Raises UserError where the file is no plan, or one of another model.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path}: cannot be read (not a file); give a plan that `snpc plan` wrote")
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    analysis, reduction = analyze(model, dim_sizes, prune_kv_cache=prunes_kv_cache(text)), token_reduction_in(text)
    if reduction is not None:
        analysis = reduce_tokens(analysis, *reduction)
    analysis = with_named_metrics(analysis, metrics_in(text))
    analysis = with_planned_entries(without_removed_layers(analysis, text), text)
    return plan_from_json(text, analysis, str(path))


def save_plan(plan: PruningPlan | SlicePlan, path: Path | str) -> None:
    """Write a plan as JSON that can be read, edited and applied."""
    slices = plan.slices if isinstance(plan, PruningPlan) else plan
    if isinstance(plan, PruningPlan) and plan.calibration is not None:
        slices = replace(slices, data=plan.calibration.record())
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(plan_to_json(slices))
