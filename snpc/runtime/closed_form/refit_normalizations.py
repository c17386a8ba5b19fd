"""Refits normalizations whose channels are partly removed, and the weights that consume them.

Over fewer channels a normalization has another mean and deviation, so that the kept channels come out scaled and
shifted. On the same dense inputs, y is the output over all channels and z the output over the kept ones. Per channel, y
is fitted by a z + b in least squares; a and b go into the gain and bias of the normalization. A matrix W that consumes
the output (as in a pre-norm layer) is then refitted to y W, which also compensates for the removed channels. All of it
needs only sums over rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from snpc.graph import copy_node
from snpc.ops import names as op
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.propagation import RemovedUnits
from snpc.passes.slicing import find_removed_units, mask_statistic
from snpc.passes.weights import (
    Normalization,
    WeightEdits,
    affected_normalizations,
    apply_edits,
    existing_bias,
    normalization_consumers,
    with_own_parameters,
)
from snpc.planning import SlicePlan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, temporary_session
from snpc.runtime.statistics import Instrument, PaddingMasks, find_padding, token_mask_runner
from snpc.types import Feeds, FloatArray, Group

CONSTANT_CHANNEL = 1e-6  # variance over mean square, below which a channel is constant and is only shifted


def approximate_groups(plan: SlicePlan) -> list[Group]:
    """The groups of the plan whose removal changes the statistics of a normalization, and that have no closed form:
    the residual stream, and hidden layers whose readers cannot be refitted."""
    weights = plan.analysis.weights
    return [g for g in plan.analysis.groups if g.id in plan.keep and g.approximate and weights[g.id].kind is None]


def without_groups(plan: SlicePlan, groups: Sequence[Group]) -> SlicePlan:
    """The plan without these groups, which then keep all units."""
    group_ids = {group.id for group in groups}
    return replace(plan, keep={group_id: rows for group_id, rows in plan.keep.items() if group_id not in group_ids})


def fit_normalizations(
    source: TracedGraph, plan: SlicePlan, calibration: Calibration, *, execution: Execution = DEFAULT_EXECUTION
) -> TracedGraph:
    """``source`` with the normalizations that ``plan`` affects, and their consumers, fitted to the kept channels.

    ``source``: the analyzed model, or the same with other weights fitted. Statistics are those of the analyzed model.
    """
    batches = execution.track("normalizations", calibration.batches(), len(calibration.batch_plan))
    edits = normalization_edits(source, plan, batches, execution)
    return trace_graph(apply_edits(source, edits), source.dim_sizes, kv_cache=source.kv_cache)


def normalization_edits(
    source: TracedGraph, plan: SlicePlan, batches: Iterable[Feeds], execution: Execution
) -> WeightEdits:
    """The edits that ``fit_normalizations`` makes, from these batches."""
    groups = approximate_groups(plan)
    dense = plan.analysis.traced_graph
    partial = replace(plan, keep={group.id: plan.keep[group.id] for group in groups})
    removed = find_removed_units(dense.trace, dense.units, cuts_of(partial))
    norms = [with_own_parameters(dense, norm) for norm in affected_normalizations(dense, removed)]
    edits = WeightEdits()
    measured = measure_normalizations(dense, norms, removed, batches, execution)
    for norm, sums in zip(norms, measured, strict=True):
        gain = fold_affine(edits, norm, sums)
        for consumer in normalization_consumers(dense, norm, groups):
            node = next(n for n in source.model.graph if n.name == consumer.node.name)
            weight = consumer.rows(source, 0)[0]
            with_bias = existing_bias(node, consumer.width) is not None
            rows, shift = solve_consumer_refit(sums, gain, weight, norm, with_bias)
            edits.put(consumer.weight_slice, 0, np.flatnonzero(norm.stays), rows)
            if with_bias:
                edits.add_bias(str(node.name), shift)
    return edits


# -- the algebra -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormalizationSums:
    """Over ``count`` rows of z [kept] and y [channels]: the sums of z'z, of z'y, of z and of y."""

    zz: FloatArray
    zy: FloatArray
    z: FloatArray
    y: FloatArray
    count: float


@dataclass(frozen=True)
class ChannelAffine:
    """Per kept channel: y = scale z + shift."""

    scale: FloatArray
    shift: FloatArray


def solve_affine(sums: NormalizationSums, norm: Normalization) -> ChannelAffine:
    """Least squares per kept channel: without shift where the normalization has no bias, the identity where it has no
    gain."""
    kept = len(sums.z)
    if norm.gain is None:
        return ChannelAffine(np.ones(kept), np.zeros(kept))
    channels = np.flatnonzero(norm.stays)
    square, cross = np.diag(sums.zz) / sums.count, sums.zy[np.arange(kept), channels] / sums.count
    z, y = sums.z / sums.count, sums.y[channels] / sums.count
    if norm.bias is None:
        return ChannelAffine(np.where(square > 0, cross / np.where(square > 0, square, 1.0), 1.0), np.zeros(kept))
    variance = square - z**2
    varies = variance > CONSTANT_CHANNEL * square
    scale = np.where(varies, (cross - z * y) / np.where(varies, variance, 1.0), 1.0)
    return ChannelAffine(scale, y - scale * z)


def fold_affine(edits: WeightEdits, norm: Normalization, sums: NormalizationSums) -> ChannelAffine:
    """Fold the affine fit of a normalization's output into its gain and bias."""
    fit = solve_affine(sums, norm)
    scale, shift = np.ones(len(norm.stays)), np.zeros(len(norm.stays))
    scale[norm.stays], shift[norm.stays] = fit.scale, fit.shift
    if norm.gain is not None:
        edits.changes.setdefault(norm.gain, []).append(lambda array: array * scale.reshape(array.shape))
    if norm.gain is not None and norm.bias is not None:
        edits.changes.setdefault(norm.bias, []).append(
            lambda array: (array.reshape(-1) * scale + shift).reshape(array.shape)
        )
    return fit


def solve_consumer_refit(
    sums: NormalizationSums, gain: ChannelAffine, weight: FloatArray, norm: Normalization, with_bias: bool
) -> tuple[FloatArray, FloatArray]:
    """(rows [kept, D], bias [D]) for the fitted kept channels that best replace ``weight`` [channels, D] for all.

    Ridge least squares, with a ridge on the difference from the rows as they were, larger where rows are few.
    ``with_bias``: the consumer has a bias to which the second result is added (else it is zero).
    """
    scale, shift, count = gain.scale, gain.shift, sums.count
    z, y = scale * sums.z / count + shift, sums.y / count
    between = np.outer(scale * sums.z / count, shift)
    square = scale[:, None] * sums.zz / count * scale + between + between.T + np.outer(shift, shift)
    cross = scale[:, None] * sums.zy / count + np.outer(shift, y)
    if with_bias:
        square, cross = square - np.outer(z, z), cross - np.outer(z, y)
    before = weight[norm.stays]
    ridge = np.eye(len(z)) * (np.trace(square) / count + 1e-12)
    rows: FloatArray = np.linalg.solve(square + ridge, cross @ weight + ridge @ before)
    return rows, y @ weight - z @ rows if with_bias else np.zeros(weight.shape[1])


# -- measuring -------------------------------------------------------------------------------------------------------


def measure_normalizations(
    dense: TracedGraph,
    norms: Sequence[Normalization],
    removed: RemovedUnits,
    batches: Iterable[Feeds],
    execution: Execution = DEFAULT_EXECUTION,
) -> list[NormalizationSums]:
    """The sums of every normalization over the calibration data, in one pass. Padded tokens do not count."""
    padding = find_padding(dense, [(str(norm.output.name), leading_rows) for norm in norms if norm.axis == -1])
    instrument = Instrument(dense.model, padding.row_masks)
    for index, norm in enumerate(norms):
        add_normalization_sums(instrument, dense, norm, removed, index)
    names = [f"snpc_{product}_{index}" for index in range(len(norms)) for product in ("zz", "zy")]
    totals = add_up_outputs(instrument, names, dense, padding, batches, execution)
    return [
        NormalizationSums(zz[:-1, :-1], zy[:-1], zz[-1, :-1], zy[-1], float(zz[-1, -1]))
        for zz, zy in zip(totals[::2], totals[1::2], strict=True)
    ]


def add_up_outputs(
    instrument: Instrument,
    names: Sequence[str],
    source: TracedGraph,
    padding: PaddingMasks,
    batches: Iterable[Feeds],
    execution: Execution,
) -> list[FloatArray]:
    """Each output of the instrumented ``source``, added up over the batches."""
    totals: list[FloatArray] = []
    with (
        token_mask_runner(source, padding, execution) as masks,
        temporary_session(instrument.model, execution=execution) as run,
    ):
        for feeds in batches:
            outputs = run({**feeds, **masks(feeds)})
            arrays = [np.asarray(outputs[name], np.float64) for name in names]
            totals = [a + b for a, b in zip(totals, arrays, strict=True)] if totals else arrays
    return totals


def add_normalization_sums(
    instrument: Instrument, dense: TracedGraph, norm: Normalization, removed: RemovedUnits, index: int
) -> None:
    """Add two outputs, z'z and z'y, with a column of ones behind z."""
    shape = dense.facts.shape[norm.output]
    assert shape is not None
    narrow = restricted_output(instrument, dense, norm, removed)
    kept = int(norm.stays.sum())
    z = channel_rows(instrument, narrow, len(shape), norm.axis, kept)
    y = channel_rows(instrument, instrument.values[str(norm.output.name)], len(shape), norm.axis, len(norm.stays))
    first = instrument.node(op.GATHER, [z, instrument.ints([0])], axis=1)
    z = instrument.node(op.CONCAT, [z, instrument.node(op.EXP, [instrument.node(op.SUB, [first, first])])], axis=1)
    mask = instrument.row_mask(str(norm.output.name))
    z = instrument.zero_masked(z, None if mask is None else instrument.reshape(mask, -1, 1))
    transposed = instrument.transpose(z, 1, 0)
    instrument.add_output(instrument.node(op.MATMUL, [transposed, z]), f"snpc_zz_{index}")
    instrument.add_output(instrument.node(op.MATMUL, [transposed, y]), f"snpc_zy_{index}")


def channel_rows(instrument: Instrument, value: ir.Value, rank: int, axis: int, width: int) -> ir.Value:
    """[rows, width] in float32."""
    last = [k for k in range(rank) if k != rank + axis]
    return instrument.reshape(instrument.transpose(instrument.cast_float32(value), *last, rank + axis), -1, width)


def leading_rows(shape: Sequence[int]) -> tuple[int, int]:
    """(samples, rows of each) of a normalization's output."""
    return shape[0], math.prod(shape[1:-1])


def restricted_output(
    instrument: Instrument, dense: TracedGraph, norm: Normalization, removed: RemovedUnits
) -> ir.Value:
    """The output of the normalization over the kept channels: its nodes once more, with statistics over those only."""
    graph = instrument.model.graph
    twins: dict[ir.Value, ir.Value] = {}
    nodes: dict[ir.Node, ir.Node] = {}
    for node in norm.nodes:
        inputs = [None if v is None else twins.get(v) or instrument.values[str(v.name)] for v in node.inputs]
        names = [f"{value.name}__twin" if value.name else "" for value in node.outputs]
        twin = copy_node(node, inputs, name=f"{node.name}__twin", outputs=names)
        twins.update(zip(node.outputs, twin.outputs, strict=True))
        graph.append(twin)
        nodes[node] = twin
    narrow = instrument.node(
        op.GATHER, [twins[norm.output], instrument.ints(np.flatnonzero(norm.stays))], axis=norm.axis
    )
    for statistic in norm.statistics:
        mask_statistic(graph, nodes[statistic.context.node], statistic, dense.trace, removed)
    return narrow
