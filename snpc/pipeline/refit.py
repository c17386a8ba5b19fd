"""Refitting: the weights of the full-size model, changed so that the cut of a plan loses least."""

from __future__ import annotations

from snpc.errors import UserError
from snpc.passes.grouping import TracedGraph
from snpc.pipeline.planner import PruningPlan
from snpc.planning import SlicePlan
from snpc.runtime.closed_form import (
    ClosedForms,
    NotSegmentable,
    approximate_groups,
    fit_layerwise,
    fit_normalizations,
    fit_on_cut_stream,
    fit_parallel,
    in_rotated_order,
    using_algebra,
    without_groups,
)


def with_refitted_weights(plan: PruningPlan) -> tuple[SlicePlan, TracedGraph]:
    """The units that stay, those of rotated groups in the order of the rotation, and the full-size model to slice.

    Raises UserError where the plan lacks the closed forms or the data that its method needs.
    """
    slices, calibration = plan.slices, plan.calibration
    if slices.method == "select":
        return slices, plan.analysis.traced_graph
    approximate = approximate_groups(slices)
    if plan.closed_forms is None or (calibration is None and (slices.method == "auto" or approximate)):
        raise UserError(
            f"this plan refits weights (method {slices.method}): it needs the calibration data that it was made with"
        )
    slices = in_rotated_order(plan.closed_forms, slices)
    exact = without_groups(slices, approximate)
    source = plan.analysis.traced_graph
    with using_algebra(plan.execution.algebra):
        if exact.keep or plan.analysis.removal is not None or plan.analysis.reduction is not None:
            source = refit_weights(plan, plan.closed_forms, exact)
        if not approximate:
            return slices, source
        assert calibration is not None
        fitted = fit_normalizations(source, slices, calibration, execution=plan.execution)
        if slices.method == "auto":
            fitted = fit_on_cut_stream(source, fitted, slices, calibration, plan.execution)
        return slices, fitted


def refit_weights(plan: PruningPlan, closed_forms: ClosedForms, slices: SlicePlan) -> TracedGraph:
    if slices.method == "auto" and plan.calibration is not None:
        try:
            return fit_layerwise(closed_forms, slices, plan.calibration, plan.execution, plan.dense_values)
        except NotSegmentable:
            pass  # the statistics of the dense model serve as well
    return fit_parallel(closed_forms, slices, plan.execution)
