"""Layer-wise fitting: each feed-forward layer compensates for the error of the pruned layers before it; where whole
layers are gone, each attention does too.

All weights are first fitted to the activations of the dense model (``fit_parallel``). Then the cut graph runs in
segments, each of which ends where a layer's output has joined the residual stream. There the error of the pruned
stream, dense less pruned, is regressed on the kept hidden units with a large ridge, and added to the weight that reads
them (asymmetric calibration as in GPTQv2, arXiv 2504.02692, with a whole layer as the unknown).

Every segment runs once, in its cut widths: the fitted layer differs by the product of its kept hidden units with the
change of its weight, which is added to the values at the border.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from snpc.graph import ShapeFacts, extract_segment
from snpc.ops import names as op
from snpc.passes import Analysis
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.propagation import SlicedShape
from snpc.passes.slicing import rewrite_model
from snpc.passes.sublayers import Continuation
from snpc.passes.token_analysis import TOKEN_AXIS
from snpc.passes.weights import WeightEdits, apply_edits
from snpc.planning import SlicePlan, cuts_of
from snpc.runtime.batches import (
    BatchProgram,
    BatchSums,
    BatchValues,
    DenseValues,
    DistributedBatchValues,
    LocalBatchValues,
    dense_name,
    unpack_symmetric,
)
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.algebra import solve_ridge
from snpc.runtime.closed_form.fit import ClosedForms, closed_form_edits, weight_store
from snpc.runtime.closed_form.masked_weights import edited_constants
from snpc.runtime.closed_form.ridge import RIDGES, Regression, choose_ridge
from snpc.runtime.closed_form.stages import (
    FitStage,
    NotSegmentable,
    ResidualError,
    fitted_sums,
    kept_columns,
    residual_errors,
    schedule_stages,
)
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, SessionLoadError, SpillableStore, memory_budget
from snpc.runtime.io import NOT_STORED, StageEntry, StoredStage
from snpc.runtime.statistics import (
    Instrument,
    PaddingMasks,
    consumer_moments,
    find_padding,
    is_streamed,
    keep_token_masks,
    measure_dense_values,
    moment_about,
    probe_row_counters,
    token_mask_runner,
)
from snpc.tokens import TokenReductionPlan, full_length_values
from snpc.types import AnyArray, FloatArray, IntArray, Probe

RESIDUAL_DAMPING = 1.0  # ridge of the regression of the residual error on the hidden units, where there are no halves
RESIDUAL_RIDGES = RIDGES[:-1]  # that are tried; where the last of them is best, the limit below is taken
MAX_RESIDUAL_DAMPING = 3.0  # a small correction helps even where halves find none: docs/rows-and-ridge.md
CLASS_TOKEN_SHARE = 0.3  # in the regression, of the weight of all other tokens together (docs/design-notes.md)
GRAM, CROSS, TOTAL, HIDDEN = "snpc_gram", "snpc_cross", "snpc_total", "snpc_hidden"  # values of an instrumented segment


def fit_layerwise(
    closed_forms: ClosedForms,
    plan: SlicePlan,
    calibration: Calibration,
    execution: Execution = DEFAULT_EXECUTION,
    dense: DenseValues | None = None,
) -> TracedGraph:
    """The model at full size, every weight fitted for the plan, layer after layer.

    ``dense``: values of the dense model on the same batches, where they were measured. Values at the borders of
    segments take up to ``execution.memory_limit`` bytes of memory; the others lie in temporary files. Raises
    NotSegmentable where the graph cannot be run in segments.
    """
    analysis = closed_forms.analysis
    groups = [g for g in analysis.groups if g.id in plan.keep]
    errors = residual_errors(analysis, groups)
    store = weight_store(execution)
    base = fit_for_dense_stream(closed_forms, plan, errors, store)
    if not errors or not (groups or analysis.removal or analysis.reduction):
        return base
    cut = rewrite_model(base, cuts_of(plan))
    stages = schedule_stages(cut.model, cut.source.facts, errors, fitted_sums(analysis, base, errors))
    shown = ((e.probe, e.group.blocks * e.group.size) for e in errors)
    padding = find_padding(analysis.traced_graph, probe_row_counters(shown))
    dense_names = frozenset(dense_name(stage.error.value) for stage in stages)
    inputs = {str(value.name) for value in cut.model.graph.inputs}
    narrowed = {name: shape for name, shape in cut.sliced_interface().items() if name in inputs}
    fit = LayerwiseFit(analysis, plan, base, cut.model, cut.source.facts, padding, dense_names, narrowed, store)
    stored = stored_corrections(closed_forms, plan, calibration, execution)
    known = [stored.get(stage.error.group.id) for stage in stages]
    if all(known):  # nothing has to run
        for stage, entry in zip(stages, known, strict=True):
            assert entry is not None
            compensate(fit, stage.error, fit.kept_columns(stage.error), entry.arrays["weight"], entry.arrays["bias"])
        return base
    try:
        with execution.progress.stage("layers", 1 + len(stages)) as advance:
            values = first_values(fit, stages, calibration, execution, dense)
            if fit.narrowed:
                values.run(narrowing_program(fit))
            advance(1)
            for number, (stage, entry) in enumerate(zip(stages, known, strict=True)):
                correction, bias = fit_stage(fit, stage, values, entry, last=number == len(stages) - 1)
                if entry is None:
                    stored.put(stage.error.group.id, arrays={"weight": correction, "bias": bias})
                advance(1)
    except SessionLoadError as error:  # onnxruntime's own shape inference may need what lies before a segment
        raise NotSegmentable(str(error)) from error
    return base


def stored_corrections(
    closed_forms: ClosedForms, plan: SlicePlan, calibration: Calibration, execution: Execution
) -> StoredStage:
    """Where the corrections of this plan's layers are stored."""
    if execution.work is None:
        return NOT_STORED
    return execution.stored_stage("layers", closed_forms.identity, calibration.identity, plan.keep)


def fit_for_dense_stream(
    closed_forms: ClosedForms, plan: SlicePlan, errors: list[ResidualError], store: SpillableStore
) -> TracedGraph:
    """The model with all closed forms of the plan, and a bias behind every weight that compensates for an error."""
    source = closed_forms.analysis.traced_graph
    edits = closed_form_edits(closed_forms, plan, store=store)
    for error in errors:
        (consumer,) = closed_forms.analysis.weights[error.group.id].consumers
        edits.add_bias(str(consumer.node.name), np.zeros(error.width))
    return trace_graph(apply_edits(source, edits), source.dim_sizes, kv_cache=source.kv_cache)


@dataclass(frozen=True)
class LayerwiseFit:
    """What all stages share. ``base``: the full-size model, whose constants the stages change. ``cut``: the same sliced
    before the first stage, with the ``facts`` of its values. ``narrowed``: its inputs that are narrower, caches.
    ``store``: where weights lie."""

    analysis: Analysis
    plan: SlicePlan
    base: TracedGraph
    cut: ir.Model
    facts: ShapeFacts
    padding: PaddingMasks
    dense_names: frozenset[str]
    narrowed: Mapping[str, SlicedShape]
    store: SpillableStore

    def kept_columns(self, error: ResidualError) -> IntArray:
        """The columns of the hidden value that the cut one has, ascending."""
        return kept_columns(error, self.plan.keep.get(error.group.id))


def first_values(
    fit: LayerwiseFit,
    stages: list[FitStage],
    calibration: Calibration,
    execution: Execution,
    dense: DenseValues | None,
) -> BatchValues:
    """The feeds of every batch, which tokens count, and the dense model's residual sums."""
    names = tuple(stage.error.value for stage in stages)
    if dense is not None and not (dense.calibration is calibration and set(names) <= set(dense.names)):
        dense = None

    if dense is None and fit.analysis.reduction is None and is_streamed(fit.analysis, execution):
        dense = DenseValues(names, calibration, memory_budget(execution.memory_limit) // 2)
        measure_dense_values(fit.analysis, dense, execution)

    def batches() -> Iterator[dict[str, AnyArray]]:
        with token_mask_runner(fit.analysis.traced_graph, fit.padding, execution) as masks:
            for number, feeds in enumerate(calibration.batches()):
                yield {
                    **feeds,
                    **masks(feeds),
                    **(dense.batches[number] if dense is not None and dense.batches else {}),
                }

    if execution.executor is not None:
        return values_on_workers(fit, names, calibration, execution, dense)
    values = LocalBatchValues(batches(), execution)
    if dense is None or not dense.batches:
        values.run(dense_program(fit.analysis, names))
    return values


def values_on_workers(
    fit: LayerwiseFit,
    names: tuple[str, ...],
    calibration: Calibration,
    execution: Execution,
    dense: DenseValues | None,
) -> BatchValues:
    """``first_values`` on the workers of ``execution.executor``."""
    assert execution.executor is not None
    if dense is not None and dense.on_workers is not None:
        values, known = dense.on_workers.branch(), True
    else:
        values, known = DistributedBatchValues(calibration, execution.executor, execution), False
    keep_token_masks(values, fit.analysis.traced_graph, fit.padding)
    if not known:
        values.run(dense_program(fit.analysis, names))
    return values


def dense_program(analysis: Analysis, names: tuple[str, ...]) -> BatchProgram:
    """The dense model, with all its tokens and layers, which keeps what its values of these names are: at the tokens
    that are left, and in front of a layer that is gone, the sum behind it."""
    removal, reduction = analysis.removal, analysis.reduction
    if removal is None and reduction is None:
        instrument = Instrument(analysis.traced_graph.model)
        instrument.add_values(names, analysis.traced_graph.facts.types_by_name)
        return BatchProgram(instrument.model, kept={name: dense_name(name) for name in names})
    found = {name: Continuation(name) if removal is None else removal.stands_for(name) for name in names}
    source = removal.source if removal is not None else analysis.traced_graph
    model, shown = source.model, dict[str, str]((place.summed, place.summed) for place in found.values())
    if reduction is not None:
        assert isinstance(reduction, TokenReductionPlan) and reduction.source is not None
        source = reduction.source
        model, shown = full_length_values(source.model, source.facts, reduction.steps, tuple(shown))
    instrument, types = Instrument(model), source.facts.types_by_name
    for name, place in found.items():
        value, dtype = instrument.values[shown[place.summed]], types[place.summed]
        if place.added is not None:
            value = instrument.node(op.SUB, [value, instrument.constant(place.added.astype(dtype.numpy()))])
        instrument.add_output(instrument.node(op.IDENTITY, [value]), dense_name(name), dtype)
    return BatchProgram(instrument.model, kept={dense_name(name): dense_name(name) for name in names})


@dataclass(frozen=True)
class CacheNarrowing:
    """Caches in the cut model's shapes, from outputs that hold them in full."""

    shapes: Mapping[str, SlicedShape]

    def __call__(self, outputs: Mapping[str, AnyArray]) -> Mapping[str, AnyArray]:
        return {name: shape.slice_array(outputs[full_name(name)]) for name, shape in self.shapes.items()}


def full_name(cache: str) -> str:
    return f"{cache}__full"


def narrowing_program(fit: LayerwiseFit) -> BatchProgram:
    """Brings the caches that a batch begins with to the widths of the cut model."""
    types = fit.analysis.traced_graph.facts.types_by_name
    inputs = [ir.Value(name=name, type=ir.TensorType(types[name])) for name in fit.narrowed]
    opsets = dict(fit.cut.graph.opset_imports)
    graph = ir.Graph(inputs, [], nodes=[], opset_imports=opsets, name="narrowing")
    instrument = Instrument(ir.Model(graph, ir_version=fit.cut.ir_version))
    for value, name in zip(inputs, fit.narrowed, strict=True):
        instrument.add_output(value, full_name(name), types[name])
    return BatchProgram(instrument.model, derive=CacheNarrowing(fit.narrowed))


def fit_stage(
    fit: LayerwiseFit, stage: FitStage, values: BatchValues, known: StageEntry | None, last: bool
) -> tuple[FloatArray, FloatArray]:
    """Measure the error at the end of one segment, change the weight in front of it, and move ``values`` there.
    ``known``: what an earlier run made of it; the segment runs all the same, in the same way, for the values behind it.

    Returns what was added to weight and bias.
    """
    keep = fit.kept_columns(stage.error)
    measured = [values.run(measuring_program(fit, stage, len(keep)))]
    if known is not None:
        correction, bias = known.arrays["weight"], known.arrays["bias"]
    else:
        correction, bias = solve_residual_error(measured.pop(), len(keep))
    compensate(fit, stage.error, keep, correction, bias)
    if not last:
        values.run(correcting_program(fit, stage, correction, bias))
    return correction, bias


def measuring_program(fit: LayerwiseFit, stage: FitStage, width: int) -> BatchProgram:
    """The cut segment: moments of its ``width`` kept hidden units, their products with the error at its end, and the
    values that later segments read."""
    segment, error = stage.segment, stage.error
    types = fit.facts.types_by_name
    hidden = error.probe.tensor
    scale = row_scale(fit, hidden)
    instrument = Instrument(extract_segment(fit.cut, segment, fit.facts), fit.padding.row_masks, scale)
    if hidden not in instrument.values:
        raise NotSegmentable(f"{hidden} is not computed in the segment of its weight")
    units = np.arange(width).reshape([1] * (error.probe.units.ndim - 1) + [width])
    probe = Probe(error.probe.kind, hidden, units)
    instrument.add_output(instrument.gram_joint(probe, width, None), GRAM)
    sums = instrument.residual_error_sums(probe, width, stage.summed, dense_name(error.value), types[stage.summed])
    for value, name in zip(sums, (CROSS, TOTAL), strict=True):
        instrument.add_output(value, name)
    instrument.add_values(segment.outputs, types)
    instrument.add_output(instrument.node(op.IDENTITY, [instrument.values[hidden]]), HIDDEN, types[hidden])
    kept = {name: name for name in segment.outputs} | {HIDDEN: HIDDEN}
    live = live_names(fit, stage) | {HIDDEN}
    return BatchProgram(instrument.model, (GRAM, CROSS, TOTAL), kept, live)


def row_scale(fit: LayerwiseFit, hidden: str) -> FloatArray | None:
    """[1, rows, 1]: the square root of the weight of each token; None where all weigh the same.

    Where the outputs read class tokens only, these count as ``CLASS_TOKEN_SHARE`` of all others together: the others
    matter as far as the class tokens read them. The number of tokens must be that of every input.
    """
    reduction, shape = fit.analysis.reduction, fit.facts.shapes_by_name.get(hidden)
    if reduction is None or shape is None:
        return None
    assert isinstance(reduction, TokenReductionPlan)
    point, varies = reduction.steps[0].point, any(step.method.input_adaptive for step in reduction.steps)
    if varies or point.pooled or not (point.leading_reads and point.fixed_length):
        return None
    others = shape[TOKEN_AXIS] - point.leading_reads
    scale = np.ones((1, shape[TOKEN_AXIS], 1))
    scale[:, : point.leading_reads] = np.sqrt(max(CLASS_TOKEN_SHARE * others / point.leading_reads, 1.0))
    return scale


def live_names(fit: LayerwiseFit, stage: FitStage) -> frozenset[str]:
    """The values that a batch keeps behind a stage: what later segments read, the masks, the dense residual sums."""
    return stage.segment.live_values | set(fit.padding.sources) | fit.dense_names


def correcting_program(fit: LayerwiseFit, stage: FitStage, correction: FloatArray, bias: FloatArray) -> BatchProgram:
    """Adds to the residual sum what the change of the weight in front of it adds: its hidden units times
    ``correction``, and ``bias``."""
    name = stage.summed
    types = fit.facts.types_by_name
    hidden, summed = (
        ir.Value(name=of, type=ir.TensorType(types[kind]))
        for of, kind in ((HIDDEN, stage.error.probe.tensor), (name, name))
    )
    graph = ir.Graph([hidden, summed], [], nodes=[], opset_imports=dict(fit.cut.graph.opset_imports), name="correction")
    instrument = Instrument(ir.Model(graph, ir_version=fit.cut.ir_version))
    operands = [instrument.cast_float32(instrument.values[of]) for of in (HIDDEN, name)]
    change = instrument.node(op.MATMUL, [operands[0], instrument.constant(correction.astype(np.float32))])
    change = instrument.node(op.ADD, [change, instrument.constant(bias.astype(np.float32))])
    total = instrument.node(op.ADD, [operands[1], change])
    dtype = types[name]
    instrument.add_output(instrument.node(op.CAST, [total], to=int(dtype)), "corrected", dtype)
    return BatchProgram(instrument.model, kept={"corrected": name}, live=live_names(fit, stage))


def solve_residual_error(sums: BatchSums, width: int) -> tuple[FloatArray, FloatArray]:
    """(correction [width, D], bias [D]): the ridge regression of the error on the kept hidden units, with the ridge
    that carries over from one half of the batches to the other, up to ``MAX_RESIDUAL_DAMPING``; of one batch, with
    ``RESIDUAL_DAMPING``. ``sums`` are empty afterwards: those of a wide layer are gigabytes."""
    moments = consumer_moments([unpack_symmetric(sums.total(GRAM))])
    (mean,), total = moments.means, sums.total(TOTAL).reshape(-1) / moments.count
    cross = sums.total(CROSS).reshape(width, -1) - moments.count * np.outer(mean, total)
    sums.even.clear()
    ridge = RESIDUAL_DAMPING
    if sums.odd:
        odd = odd_regression(sums, mean, total)
        sums.odd.clear()
        even = Regression(moments.moment, cross) - odd
        halves = even.for_search(), odd.for_search()
        del even, odd
        ridge = min(choose_ridge(halves, RESIDUAL_RIDGES, RESIDUAL_DAMPING).ridge, MAX_RESIDUAL_DAMPING)
    correction = solve_ridge(moments.moment, cross, ridge)
    return correction, total - mean @ correction


def odd_regression(sums: BatchSums, mean: FloatArray, error: FloatArray) -> Regression:
    """The part of the odd batches in the regression of the error about the means of hidden units and error."""
    gram, total = unpack_symmetric(sums.odd[GRAM]), sums.odd[TOTAL].reshape(-1)
    shift = gram[-1, :-1] - gram[-1, -1] * mean
    cross = sums.odd[CROSS].reshape(len(mean), -1) - np.outer(mean, total) - np.outer(shift, error)
    return Regression(moment_about(gram, mean), cross)


def compensate(
    fit: LayerwiseFit, error: ResidualError, keep: IntArray, correction: FloatArray, bias: FloatArray
) -> None:
    """Add the correction to the weight and the bias of the full-size model."""
    (consumer,) = fit.analysis.weights[error.group.id].consumers
    edits = WeightEdits()
    columns = np.arange(error.probe.units.size)[None]  # of the hidden value: the weight reads them in this order
    edits.add(replace(consumer.weight_slice, index=(columns,)), 0, keep, correction)
    edits.add_bias(str(consumer.node.name), bias)
    for name, array in edited_constants(fit.base, edits).items():
        value = fit.base.model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(fit.store.keep(array), dtype=value.const_value.dtype, name=name)
