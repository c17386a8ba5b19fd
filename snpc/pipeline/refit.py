"""Weights of the plan after its closed forms are fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from snpc.errors import UserError
from snpc.passes.grouping.traced import TracedGraph
from snpc.pipeline.token_decisions import with_token_decisions
from snpc.planning.plan import PruningMethod, SlicePlan
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.fit import ClosedForms, fit_parallel, in_rotated_order, solve_closed_forms
from snpc.runtime.closed_form.layerwise import fit_layerwise
from snpc.runtime.closed_form.refit_normalizations import approximate_groups, fit_normalizations, without_groups
from snpc.runtime.closed_form.stages import NotSegmentable
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.statistics.statistics import Statistics, measure_statistics


@dataclass(frozen=True)
class FitInputs:
    """What plans are carried out with. ``execution.memory_limit``: see ``fit_layerwise``."""

    closed_forms: ClosedForms | None = None
    calibration: Calibration | None = None
    execution: Execution = DEFAULT_EXECUTION

    def describe_data(self) -> str:
        """The data, in words."""
        if self.calibration is not None:
            return self.calibration.describe()
        return self.closed_forms.source if self.closed_forms is not None else ""


def with_refitted_weights(plan: SlicePlan, means: FitInputs) -> tuple[SlicePlan, TracedGraph]:
    """The plan with its rotated groups in order, and the model at its full size with every weight made for it."""
    if plan.method == "select":
        return plan, plan.analysis.traced_graph
    normed = approximate_groups(plan)
    compression, calibration = means.closed_forms, means.calibration
    if compression is None or (calibration is None and (plan.method == "auto" or normed)):
        raise UserError(
            f"this plan refits weights (method {plan.method}): it needs the calibration data that it was made with"
        )
    calibration = with_token_decisions(plan.analysis, calibration, means.execution)
    means = replace(means, calibration=calibration)
    plan = in_rotated_order(compression, plan)
    rest = without_groups(plan, normed)
    source = plan.analysis.traced_graph
    if rest.keep:
        source = refit_weights(compression, rest, means)
    if not normed:
        return plan, source
    assert calibration is not None
    return plan, fit_normalizations(source, plan, calibration, execution=means.execution)


def refit_weights(compression: ClosedForms, plan: SlicePlan, means: FitInputs) -> TracedGraph:
    if plan.method == "auto" and means.calibration is not None and not plan.analysis.traced_graph.kv_cache:
        try:
            return fit_layerwise(compression, plan, means.calibration, means.execution)
        except NotSegmentable:
            pass  # what the dense model gives serves as well
    return fit_parallel(compression, plan)


def check_refit_data(method: PruningMethod, calibration: Calibration | None, statistics: Statistics | None) -> None:
    if method == "auto" and calibration is None and statistics is not None:
        raise UserError(
            "--method auto fits layer after layer on the data itself, which --load-stats does not hold: give --calib "
            "as well, or --method parallel"
        )
    if method != "select" and calibration is None and statistics is None:
        raise UserError(f"--method {method} refits weights from calibration data: give --calib, or --method select")


def closed_forms_for(
    plan: SlicePlan,
    calibration: Calibration | None,
    *,
    statistics: Statistics | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> ClosedForms | None:
    """The closed forms that a plan read from a file is to be fitted with; None where it slices weights as they are.

    Raises UserError where they are needed and there is no data.
    """
    if plan.method == "select":
        return None
    if calibration is None and statistics is None:
        raise UserError(
            f"this plan refits weights (method {plan.method}): give --calib, the data that it was made with"
        )
    check_refit_data(plan.method, calibration, statistics)
    groups = [g for g in plan.analysis.groups if g.id in plan.keep]
    if statistics is None:
        calibration = with_token_decisions(plan.analysis, calibration, execution)
        assert calibration is not None
        statistics = measure_statistics(plan.analysis, calibration, groups, execution=execution)
    return solve_closed_forms(plan.analysis, statistics, groups)
