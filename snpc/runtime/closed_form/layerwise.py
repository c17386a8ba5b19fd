"""Layerwise fitting: each layer is fitted to the activations of the pruned layers before it, and compensates for their
error.

The graph runs in segments that end where a group's output joins the residual stream. The values at their borders are
kept for every calibration batch, of the dense and of the pruned model, so that nothing is computed twice: each segment
runs once with the dense weights, once with statistics, and once with the fitted weights.

A consumer of hidden units is fitted to more than its own output: the error of the pruned residual stream behind it is
regressed on its kept units, with a large ridge, and added (asymmetric calibration as in GPTAQ, arXiv 2504.02692, with
a whole layer as the unknown). Groups whose weights are used in several segments keep the parallel fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from snpc.graph import Segment, extract_segment
from snpc.passes.canonicalization import finalize
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.propagation import affected_statistics
from snpc.passes.slicing import find_removed_units, weigh_statistics
from snpc.passes.weights import WeightEdits
from snpc.planning import SlicePlan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.algebra import solve_ridge
from snpc.runtime.closed_form.fit import ClosedForms, closed_form_edits, solve_bases
from snpc.runtime.closed_form.masked_weights import edited_constants, trial_weights
from snpc.runtime.closed_form.stages import FitStage, NotSegmentable, ResidualError, add_missing_biases, schedule_stages
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    Execution,
    SessionLoadError,
    SpillableStore,
    memory_budget,
    temporary_session,
)
from snpc.runtime.statistics import (
    GroupMoments,
    Instrument,
    MomentSet,
    PaddingMasks,
    StatisticKey,
    TokenMasks,
    accumulate,
    find_padding,
    group_moments,
    probe_row_counters,
    token_mask_runner,
)
from snpc.types import AnyArray, FloatArray

RESIDUAL_DAMPING = 1.0  # ridge of the regression of the residual error on the hidden units

TensorValues = dict[str, AnyArray]  # by name of the value
ConstantArrays = dict[str, AnyArray]  # by name of the constant


@dataclass
class BoundaryValues:
    """What later segments read of the dense and of the pruned model, per calibration batch. ``masks``: which tokens
    count. ``store`` moves what does not fit into temporary files."""

    dense: list[TensorValues]
    pruned: list[TensorValues]
    masks: list[TokenMasks]
    store: SpillableStore

    def keep(self, values: TensorValues) -> TensorValues:
        return {name: self.store.keep(array) for name, array in values.items()}


def fit_layerwise(
    closed_forms: ClosedForms,
    plan: SlicePlan,
    calibration: Calibration,
    execution: Execution = DEFAULT_EXECUTION,
) -> TracedGraph:
    """The model at full size, every weight fitted for the plan, layer after layer.

    Values at the borders of segments take up to ``execution.memory_limit`` bytes of memory; the others lie in temporary
    files. Raises NotSegmentable where the graph cannot be run in segments.
    """
    analysis, source = closed_forms.analysis, closed_forms.analysis.traced_graph
    base = add_missing_biases(closed_forms, plan)
    stages = schedule_stages(analysis, base, plan)
    staged = {group.id for stage in stages for group in stage.groups}
    earlier_plan = replace(
        plan, keep={group_id: rows for group_id, rows in plan.keep.items() if group_id not in staged}
    )
    contents = edited_constants(base, closed_form_edits(closed_forms, earlier_plan))
    requests = [request for stage in stages for request in stage.requests]
    padding = find_padding(source, probe_row_counters((r.probe, r.group.blocks * r.group.size) for r in requests))
    boundary = BoundaryValues([], [], [], SpillableStore(memory_budget(execution.memory_limit)))
    with token_mask_runner(source, padding, execution) as masks:
        for feeds in calibration.batches():
            boundary.masks.append(masks(feeds))
            boundary.dense.append(boundary.keep(feeds))
            boundary.pruned.append(dict(boundary.dense[-1]))
    fit = LayerwiseFit(base, plan, earlier_plan, execution, padding)
    for stage in execution.track("layers", stages, len(stages)):
        contents |= fit_stage(fit, stage, contents, boundary)
    return trace_graph(with_constants(base.model.clone(), contents), base.dim_sizes, kv_cache=base.kv_cache)


def with_constants(model: ir.Model, contents: ConstantArrays) -> ir.Model:
    """``model`` with these contents of its constants; changed in place."""
    for name, array in contents.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=name)
    return model


@dataclass(frozen=True)
class LayerwiseFit:
    """What all stages share. ``earlier_plan``: the part of the plan that was fitted before the first stage."""

    base: TracedGraph
    plan: SlicePlan
    earlier_plan: SlicePlan
    execution: Execution
    padding: PaddingMasks

    def rows_of(self, stage: FitStage) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The part of the plan that the stage fits."""
        return {group.id: self.plan.keep[group.id] for group in stage.groups if group.id in self.plan.keep}

    def dense_model(self, segment: Segment) -> ir.Model:
        """The segment with the dense weights."""
        return finalize(extract_segment(self.base.model, segment, self.base.facts))

    def pruned_model(
        self, segment: Segment, contents: ConstantArrays, keep: Mapping[str, tuple[tuple[int, ...], ...]]
    ) -> ir.Model:
        """The segment with new contents of its constants, and with zeros where the earlier plan and ``keep`` remove
        units."""
        model = self.dense_model(segment)
        cuts = cuts_of(replace(self.plan, keep={**self.earlier_plan.keep, **keep}))
        removed = find_removed_units(self.base.trace, self.base.units, cuts)
        weigh_statistics(model.graph, self.base.trace, affected_statistics(self.base.trace, removed))
        return with_constants(model, trial_weights(self.base, contents, cuts, set(model.graph.initializers)))

    def run(self, model: ir.Model, feeds: list[TensorValues]) -> Iterator[TensorValues]:
        """Outputs per batch. Raises NotSegmentable where onnxruntime does not load the segment (its shape inference may
        need what lies before)."""
        try:
            with temporary_session(model, execution=self.execution, memory="shared") as run:
                for values in feeds:
                    yield run(values)
        except SessionLoadError as error:
            raise NotSegmentable(str(error)) from error


def fit_stage(fit: LayerwiseFit, stage: FitStage, contents: ConstantArrays, boundary: BoundaryValues) -> ConstantArrays:
    """Fit the groups of one stage, and move ``boundary`` to the end of its segment. Returns the new contents of
    constants; ``contents``: those of the stages before."""
    segment = stage.segment
    residuals = {error.value: None for error in stage.residual_errors}
    with_residuals = replace(segment, outputs=tuple({**dict.fromkeys(segment.outputs), **residuals}))
    dense = [boundary.keep(values) for values in fit.run(fit.dense_model(with_residuals), boundary.dense)]
    fitted = edited_constants(fit.base, solve_stage(fit, stage, contents, boundary, dense), contents)
    pruned = fit.run(fit.pruned_model(segment, {**contents, **fitted}, fit.rows_of(stage)), boundary.pruned)
    for dense_state, dense_values, pruned_state, pruned_values in zip(
        boundary.dense, dense, boundary.pruned, pruned, strict=True
    ):
        advance_boundary(dense_state, dense_values, segment)
        advance_boundary(pruned_state, boundary.keep(pruned_values), segment)
    return fitted


def advance_boundary(state: TensorValues, outputs: TensorValues, segment: Segment) -> None:
    """Add the outputs of a segment, and drop the values that no later segment reads."""
    state.update(outputs)
    for name in set(state) - segment.live_values:
        del state[name]


def solve_stage(
    fit: LayerwiseFit, stage: FitStage, contents: ConstantArrays, boundary: BoundaryValues, dense: list[TensorValues]
) -> WeightEdits:
    """The edits of the stage's groups, solved on the activations of the pruned model."""
    if not stage.requests:
        return WeightEdits()
    sums = measure_stage(fit, stage, contents, boundary, dense)
    moment_set = stage_moments(stage, sums)
    closed_forms = solve_bases(fit.plan.analysis, moment_set, stage.groups)
    consumers = {c.weight_slice.tensor for g in stage.groups for c in fit.plan.analysis.weights[g.id].consumers}
    earlier = {name: array for name, array in contents.items() if name in consumers}
    edits = closed_form_edits(closed_forms, replace(fit.plan, keep=fit.rows_of(stage)), earlier)
    for error in stage.residual_errors:
        compensate_residual_error(edits, fit.plan, moment_set.moments[error.group.id], error, sums)
    return edits


def measure_stage(
    fit: LayerwiseFit, stage: FitStage, contents: ConstantArrays, boundary: BoundaryValues, dense: list[TensorValues]
) -> dict[str, FloatArray]:
    """Output of the instrumented segment -> its sum over the calibration data, in float64."""
    instrument = Instrument(fit.pruned_model(stage.segment, contents, {}), fit.padding.row_masks)
    for request in stage.requests:
        request.add_to(instrument)
    types = {str(value.name): dtype for value, dtype in fit.base.facts.dtype.items() if dtype is not None}
    for error in stage.residual_errors:
        cross, total = instrument.residual_error_sums(
            error.request.probe, error.group.size, error.value, dense_input_name(error), types[error.value]
        )
        instrument.add_output(cross, error.cross)
        instrument.add_output(total, error.total)
    feeds = [
        {**pruned, **masks, **{dense_input_name(error): values[error.value] for error in stage.residual_errors}}
        for pruned, masks, values in zip(boundary.pruned, boundary.masks, dense, strict=True)
    ]
    sums: dict[str, FloatArray] = {}
    for outputs in fit.run(finalize(instrument.model), feeds):
        for name, array in outputs.items():
            if name not in sums:
                sums[name] = np.zeros(array.shape)
            accumulate(sums[name], array)
    return sums


def stage_moments(stage: FitStage, sums: Mapping[str, FloatArray]) -> MomentSet:
    """The moments of the stage's groups, from the sums by output of the instrumented segment."""
    by_group: dict[str, dict[StatisticKey, FloatArray]] = {}
    for request in stage.requests:
        arrays = by_group.setdefault(request.group.id, {})
        arrays[request.key] = arrays.get(request.key, 0.0) + sums[request.output]
    moments = {group_id: group_moments(stage.kinds[group_id], arrays) for group_id, arrays in by_group.items()}
    return MomentSet(stage.kinds, moments, {})


def dense_input_name(error: ResidualError) -> str:
    """The input of the instrumented segment that takes the dense residual sum."""
    return f"{error.value}__dense"


def compensate_residual_error(
    edits: WeightEdits, plan: SlicePlan, moments: GroupMoments, error: ResidualError, sums: Mapping[str, FloatArray]
) -> None:
    """Add to the consumer weight and its bias what explains most of the residual error from the kept hidden units."""
    (consumer,) = plan.analysis.weights[error.group.id].consumers
    rows = plan.keep.get(error.group.id)
    keep = np.array(rows[0] if rows else range(error.group.size), np.int64)
    (inputs,) = moments.consumers[0]
    (mean,), total = inputs.means, sums[error.total].reshape(-1)
    cross = sums[error.cross].reshape(error.group.size, -1) - np.outer(mean, total)
    correction = solve_ridge(inputs.moment[np.ix_(keep, keep)], cross[keep], RESIDUAL_DAMPING)
    edits.add(consumer.weight_slice, 0, keep, correction)
    edits.add_bias(str(consumer.node.name), total / inputs.count - mean[keep] @ correction)
