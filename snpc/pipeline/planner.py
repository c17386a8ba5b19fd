"""Closed-form compression: from statistics, measured once, loss curves; from these a plan.

Groups whose freedom is ``basis`` are rotated before they are cut; of groups that are selected, what reads them is
refitted. Where a group's weights do not have the form that this needs, its units are selected by a criterion and left
as they are; ``Compression.skipped`` says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.pipeline.refit import check_refit_data
from snpc.pipeline.score import score_groups
from snpc.pipeline.token_decisions import with_token_decisions
from snpc.planning.allocate import groups_to_prune, make_slice_plan
from snpc.planning.config import Budget, is_latency_budget
from snpc.planning.plan import PruningMethod, SlicePlan, UnitScores
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.fit import ClosedForms, solve_closed_forms
from snpc.runtime.evaluation.latency import Workload, groups_to_time, latency_table
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.memory import SpillableStore, memory_budget
from snpc.runtime.sensitivity.loss_curves import measurable_widths, measure_loss_curves
from snpc.runtime.statistics.statistics import Statistics, measure_statistics
from snpc.runtime.statistics.unit_weights import unit_weight_energies
from snpc.types import FloatArray, Group


def with_closed_form_order(scores: UnitScores, compression: ClosedForms, method: PruningMethod) -> UnitScores:
    """Scores in which the closed forms set the order of units within their groups."""
    values: dict[str, FloatArray] = dict(scores.values)
    for name, found in compression.elimination_orders.items():
        values[name] = np.stack([np.argsort(one.order) for one in found]).astype(np.float64)
    for name, parts in compression.bases.items():
        size = len(parts[0].loss) - 1
        values[name] = np.tile(np.arange(size, 0, -1, dtype=np.float64), (len(parts), 1))
    samples = max(scores.samples, compression.samples)
    return replace(scores, values=values, method=method, samples=samples)


@dataclass(frozen=True)
class PruningPlan:
    """A plan, and the closed forms that it is to be fitted with (None: slice the weights as they are).

    ``choice``, ``groups``, ``scores`` and ``workload`` are what other plans for the same wish are made from.
    """

    slices: SlicePlan
    closed_forms: ClosedForms | None = None
    curves: Mapping[str, FloatArray] = field(default_factory=dict, repr=False)
    """Group id -> [size + 1]: relative squared change of the outputs when so many units per block are kept."""
    budget: Budget | None = None
    groups: tuple[Group, ...] = field(default=(), repr=False)
    scores: UnitScores | None = field(default=None, repr=False)
    workload: Workload | None = None
    statistics: Statistics | None = field(default=None, repr=False)

    def for_budget(self, choice: Budget) -> PruningPlan:
        """The same for another target: what was measured serves again (for one far off, ``plan`` with ``whole``).
        ``choice`` differs in its target only, and that is a latency only if this one's is."""
        assert self.scores is not None
        return replace(self, slices=make_slice_plan(self.scores, choice), budget=choice)


def plan_without_cuts(analysis: Analysis) -> PruningPlan:
    """The decision to cut no width, as where only tokens go."""
    return PruningPlan(SlicePlan(analysis, "none", {"roles": ()}, {}, "select"))


def plan(
    analysis: Analysis,
    choice: Budget,
    *,
    calibration: Calibration | None = None,
    statistics: Statistics | None = None,
    method: PruningMethod | None = None,
    criterion: str | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    workload: Workload | None = None,
    whole: bool = False,
) -> PruningPlan:
    """Score and plan in one step.

    ``method`` "auto" needs calibration data and uses closed forms, with ``criterion`` (default "mixed") for the groups
    that have none, one layer after the other ("parallel": all at once); "select" scores by ``criterion`` only (default
    "mixed" with data, "magnitude" without). Left out, it is "auto" where there is data and no criterion was named.

    ``statistics`` that were measured before serve in place of a measurement. On their own they allow "parallel" (the
    default then) and "select", and widths are chosen by the closed forms' own loss, relative to what each group does:
    how much the outputs mind takes ``calibration``. ``execution.memory_limit``: see ``measure_statistics``.

    ``workload`` says at what sizes a latency is measured. ``whole``: curves are measured all along, for other choices
    than this one as well, not near its plan. Raises UserError where data is needed and missing.
    """
    groups = groups_to_prune(analysis, choice)
    calibration = with_token_decisions(analysis, calibration, execution)
    informed = calibration is not None or statistics is not None
    method = method or default_method(calibration, informed and criterion is None)
    check_refit_data(method, calibration, statistics)
    check_plan_inputs(choice, calibration, workload)
    usual = statistics.criterion if statistics else "mixed" if informed else "magnitude"
    judge = usual if criterion is None else criterion
    if statistics is None and calibration is not None:
        statistics = measure_statistics(
            analysis,
            calibration,
            groups,
            method=method,
            criterion=judge,
            execution=execution,
        )
    found = ClosedForms.empty(analysis)
    curves = calibration is not None and needs_loss_curves(choice, method)
    if method != "select":
        assert statistics is not None
        probed = {g.id: measurable_widths(g) for g in groups} if curves else {}
        found = solve_closed_forms(
            analysis, statistics, groups, probed, SpillableStore(memory_budget(execution.memory_limit) // 2)
        )
    rest = score_groups(analysis, judge, [g for g in groups if g.id not in found.kinds], statistics)
    scores = with_closed_form_order(rest, found, method)
    if choice.allocator == "dimap":
        scores = replace(scores, energies=unit_weight_energies(analysis, groups))
    if is_latency_budget(choice):
        roles = tuple(dict.fromkeys(g.role for g in groups))
        table = latency_table(analysis, roles, workload=workload, execution=execution)
        scores = replace(scores, latency=table.saved_times(groups_to_time(analysis, roles), groups))
    if curves:
        assert calibration is not None
        near = None if whole else choice
        measured = measure_loss_curves(found, scores, calibration, groups, near, execution=execution)
        scores, found = replace(scores, curves=measured), found.without_refits()
    elif method != "select" and not choice.uniform:
        scores = replace(scores, curves={g.id: relative_loss(found, scores, g) for g in groups})
    plan = make_slice_plan(scores, choice)
    closed = found if method != "select" else None
    return PruningPlan(plan, closed, scores.curves, choice, tuple(groups), scores, workload, statistics)


def check_plan_inputs(choice: Budget, calibration: Calibration | None, workload: Workload | None) -> None:
    if choice.max_drift is not None and calibration is None:
        raise UserError("--max-drift needs calibration data, on which it is measured: give --calib")
    if workload is not None and not is_latency_budget(choice):
        raise UserError("batch, input shapes and threads are for --target latency=...: leave them out")


def needs_loss_curves(choice: Budget, method: PruningMethod) -> bool:
    """Uniform widths ask for none, unless for the drift; scores alone serve a ratio of selected units."""
    if choice.uniform or choice.allocator == "dimap":
        return choice.max_drift is not None
    return method != "select" or choice.ratio is None


def default_method(calibration: Calibration | None, closed: bool) -> PruningMethod:
    if not closed:
        return "select"
    return "auto" if calibration is not None else "parallel"


def relative_loss(compression: ClosedForms, scores: UnitScores, group: Group) -> FloatArray:
    """[size + 1]: the closed form's loss as a share of all that the group does; without one, the scores' share."""
    curve = compression.loss_curve(group)
    if curve is None:
        ordered = np.sort(scores.values[group.id], axis=1).mean(0)
        curve = np.concatenate([[0.0], np.cumsum(ordered - min(float(ordered[0]), 0.0))])[::-1]
    return curve / max(float(curve[0]), 1e-300)
