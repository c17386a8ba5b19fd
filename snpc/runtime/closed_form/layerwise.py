"""Sequential fitting: each layer is fitted to what the cut layers before it give, and makes up for what they lost.

The graph is run in segments that end where a group's reader meets the residual stream. What crosses their borders is
kept for every calibration batch, for the dense model and for the cut one, so nothing is computed twice: per segment one
pass of the dense one, one of the measured one, one of the fitted one.

A reader of hidden units is fitted to more than its own output: the gap between the dense and the cut residual stream
behind it is regressed on its kept units, heavily damped, and added (asymmetric calibration as in GPTAQ, arXiv
2504.02692, with a whole layer as the unknown). Groups whose weights are used in several segments keep the parallel fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from snpc.graph.subgraph import Segment, extract_segment
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.weights.edits import WeightEdits
from snpc.planning.plan import SlicePlan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.algebra import solve_ridge
from snpc.runtime.closed_form.fit import ClosedForms, closed_form_edits, solve_bases
from snpc.runtime.closed_form.masked_weights import edited_constants, trial_weights
from snpc.runtime.closed_form.stages import FitStage, NotSegmentable, ResidualError, add_missing_biases, schedule_stages
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.memory import SpillableStore, memory_budget
from snpc.runtime.execution.session import SessionLoadError
from snpc.runtime.execution.temporary_session import temporary_session
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.keys import StatisticKey
from snpc.runtime.statistics.measure import accumulate
from snpc.runtime.statistics.moments import GroupMoments, MomentSet, group_moments
from snpc.runtime.statistics.padding import (
    PaddingMasks,
    TokenMasks,
    find_padding,
    probe_row_counters,
    token_mask_runner,
)
from snpc.types import AnyArray, FloatArray

RESIDUAL_DAMPING = 1.0  # of the mean diagonal, in the regression of the gap on the hidden units

TensorValues = dict[str, AnyArray]
ConstantArrays = dict[str, AnyArray]  # of constants, by name


@dataclass
class BoundaryValues:
    """What later segments need of the dense and of the cut model, per calibration batch; ``masks`` say which tokens
    count. What does not fit on the ``shelf`` lies in temporary files."""

    dense: list[TensorValues]
    pruned: list[TensorValues]
    masks: list[TokenMasks]
    store: SpillableStore

    def keep(self, values: TensorValues) -> TensorValues:
        return {name: self.store.keep(array) for name, array in values.items()}


def fit_layerwise(
    compression: ClosedForms,
    plan: SlicePlan,
    calibration: Calibration,
    execution: Execution = DEFAULT_EXECUTION,
) -> TracedGraph:
    """The model at its full size with every weight made for the plan, layer after layer.

    Values at the borders of segments lie in memory up to ``execution.memory_limit`` bytes, the others in temporary
    files.

    Raises stages.NotSequential where the graph cannot be run in segments.
    """
    base = add_missing_biases(compression, plan)
    stages = schedule_stages(compression.analysis, base, plan)
    staged = {g.id for stage in stages for g in stage.groups}
    before = replace(plan, keep={k: v for k, v in plan.keep.items() if k not in staged})
    contents = edited_constants(base, closed_form_edits(compression, before))
    probes = ((w.probe, w.group.blocks * w.group.size) for stage in stages for w in stage.requests)
    padding = find_padding(compression.analysis.traced_graph, probe_row_counters(probes))
    carry = BoundaryValues([], [], [], SpillableStore(memory_budget(execution.memory_limit)))
    with token_mask_runner(compression.analysis.traced_graph, padding, execution) as masks:
        for feeds in calibration.batches():
            carry.masks.append(masks(feeds))
            carry.dense.append(carry.keep(feeds))
            carry.pruned.append(dict(carry.dense[-1]))
    for stage in stages:
        contents |= fit_stage(LayerwiseFit(base, plan, before, execution, padding), stage, contents, carry)
    return trace_graph(with_constants(base.model.clone(), contents), base.dim_sizes, kv_cache=base.kv_cache)


def with_constants(model: ir.Model, contents: ConstantArrays) -> ir.Model:
    """``model``, with these contents of its constants."""
    for name, array in contents.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=name)
    return model


@dataclass(frozen=True)
class LayerwiseFit:
    """What stays the same from stage to stage. ``before``: the part of the plan that was fitted beforehand."""

    base: TracedGraph
    plan: SlicePlan
    earlier_plan: SlicePlan
    execution: Execution
    padding: PaddingMasks

    def model(
        self, segment: Segment, contents: ConstantArrays, keep: Mapping[str, tuple[tuple[int, ...], ...]]
    ) -> ir.Model:
        """The segment with new contents of its constants, and what ``keep`` cuts silent."""
        model = finalize(extract_segment(self.base.model, segment, self.base.facts))
        cuts = cuts_of(replace(self.plan, keep={**self.earlier_plan.keep, **keep}))
        return with_constants(model, trial_weights(self.base, contents, cuts, set(model.graph.initializers)))

    def run(self, model: ir.Model, feeds: list[TensorValues]) -> Iterator[TensorValues]:
        """Outputs per batch. Raises NotSequential where onnxruntime makes no session of the piece (its shape inference
        may need what lies before)."""
        try:
            with temporary_session(model, execution=self.execution, memory="shared") as run:
                for values in feeds:
                    yield run(values)
        except SessionLoadError as error:
            raise NotSegmentable(str(error)) from error


def fit_stage(
    fitting: LayerwiseFit, stage: FitStage, contents: ConstantArrays, carry: BoundaryValues
) -> ConstantArrays:
    """Fit the stage's groups; ``carry`` moves on to the end of its segment. Returns new contents of constants;
    ``contents``: of the stages before."""
    segment = stage.segment
    wide = replace(
        segment, outputs=tuple({**dict.fromkeys(segment.outputs), **{g.value: None for g in stage.residual_errors}})
    )
    whole = fitting.run(finalize(extract_segment(fitting.base.model, wide, fitting.base.facts)), carry.dense)
    dense = [carry.keep(values) for values in whole]
    found = edited_constants(fitting.base, solve_stage(fitting, stage, contents, carry, dense), contents)
    mine = {g.id: fitting.plan.keep[g.id] for g in stage.groups if g.id in fitting.plan.keep}
    cut = fitting.run(fitting.model(segment, {**contents, **found}, mine), carry.pruned)
    for held, dense_values, old, cut_values in zip(carry.dense, dense, carry.pruned, cut, strict=True):
        advance_boundary(held, dense_values, segment)
        advance_boundary(old, carry.keep(cut_values), segment)
    return found


def advance_boundary(held: TensorValues, made: TensorValues, segment: Segment) -> None:
    held.update(made)
    for name in set(held) - segment.live_values:
        del held[name]


def solve_stage(
    fitting: LayerwiseFit, stage: FitStage, contents: ConstantArrays, carry: BoundaryValues, dense: list[TensorValues]
) -> WeightEdits:
    """The edits of the stage's groups, from what the cut model gives."""
    if not stage.requests:
        return WeightEdits()
    instrument = Instrument(fitting.model(stage.segment, contents, {}), fitting.padding.row_masks)
    for item in stage.requests:
        item.add_to(instrument)
    types = {str(v.name): dtype for v, dtype in fitting.base.facts.dtype.items() if dtype is not None}
    for gap in stage.residual_errors:
        cross, total = instrument.residual_error_sums(
            gap.request.probe, gap.group.size, gap.value, dense_input_name(gap), types[gap.value]
        )
        instrument.add_output(cross, gap.cross)
        instrument.add_output(total, gap.total)
    feeds = [
        {**cut, **counts, **{dense_input_name(g): values[g.value] for g in stage.residual_errors}}
        for cut, counts, values in zip(carry.pruned, carry.masks, dense, strict=True)
    ]
    sums: dict[str, FloatArray] = {}
    for result in fitting.run(finalize(instrument.model), feeds):
        for name, array in result.items():
            if name not in sums:
                sums[name] = np.zeros(array.shape)
            accumulate(sums[name], array)
    measured = stage_moments(stage, sums)
    mine = {g.id: fitting.plan.keep[g.id] for g in stage.groups if g.id in fitting.plan.keep}
    edits = closed_form_edits(
        solve_bases(fitting.plan.analysis, measured, stage.groups), replace(fitting.plan, keep=mine)
    )
    for gap in stage.residual_errors:
        compensate_residual_error(edits, fitting, measured.moments[gap.group.id], gap, sums)
    return edits


def stage_moments(stage: FitStage, sums: Mapping[str, FloatArray]) -> MomentSet:
    """The moments of the stage's groups, from the sums by output of the instrumented model."""
    by_group: dict[str, dict[StatisticKey, FloatArray]] = {}
    for request in stage.requests:
        arrays = by_group.setdefault(request.group.id, {})
        arrays[request.key] = arrays.get(request.key, 0.0) + sums[request.output]
    moments = {group_id: group_moments(stage.kinds[group_id], arrays) for group_id, arrays in by_group.items()}
    return MomentSet(stage.kinds, moments, {})


def dense_input_name(gap: ResidualError) -> str:
    return f"{gap.value}__dense"


def compensate_residual_error(
    edits: WeightEdits, fitting: LayerwiseFit, moments: GroupMoments, gap: ResidualError, sums: Mapping[str, FloatArray]
) -> None:
    """Add to the reader what explains most of the gap behind it from the kept hidden units."""
    (reader,) = fitting.plan.analysis.weights[gap.group.id].consumers
    rows = fitting.plan.keep.get(gap.group.id)
    keep = np.array(rows[0] if rows else range(gap.group.size), np.int64)
    (seen,) = moments.consumers[0]
    (mean,), total = seen.means, sums[gap.total].reshape(-1)
    cross = sums[gap.cross].reshape(gap.group.size, -1) - np.outer(mean, total)
    more = solve_ridge(seen.moment[np.ix_(keep, keep)], cross[keep], RESIDUAL_DAMPING)
    edits.add(reader.weight_slice, 0, keep, more)
    edits.add_bias(str(reader.node.name), total / seen.count - mean[keep] @ more)
