"""What normalisations over fewer channels give is fitted back to what they gave over all.

Without some of its channels a normalisation has another mean and deviation, so that the kept ones come out scaled and
shifted. Both are watched on the same, dense inputs: y, the output over all channels, and z, the output over the kept
ones. Per channel, y is fitted by a z + b in least squares, and a and b go into the normalisation's gain and bias. What
reads it as a matrix W (that is all, where a normalisation stands ahead of a layer) is then refitted to y W, which also
makes up for the channels that are gone. Plain sums over rows are enough for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from snpc.graph.builder import copy_node
from snpc.ops import names as op
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.propagation.removal import RemovedUnits
from snpc.passes.slicing.masked_statistics import mask_statistic
from snpc.passes.slicing.slice import find_removed_units
from snpc.passes.weights.edits import WeightEdits, apply_edits, existing_bias
from snpc.passes.weights.normalizations import Normalization, affected_normalizations, normalization_consumers
from snpc.planning.plan import SlicePlan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.temporary_session import temporary_session
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.padding import find_padding, token_mask_runner
from snpc.types import Feeds, FloatArray, Group

CONSTANT_CHANNEL = 1e-6  # of its mean square: a channel that varies less is constant, and is shifted only


def approximate_groups(plan: SlicePlan) -> list[Group]:
    """The groups of the plan over which statistics change."""
    return [g for g in plan.analysis.groups if g.id in plan.keep and g.approximate]


def without_groups(plan: SlicePlan, groups: Sequence[Group]) -> SlicePlan:
    """The plan with these groups left whole."""
    names = {g.id for g in groups}
    return replace(plan, keep={name: rows for name, rows in plan.keep.items() if name not in names})


def fit_normalizations(
    source: TracedGraph, plan: SlicePlan, calibration: Calibration, *, execution: Execution = DEFAULT_EXECUTION
) -> TracedGraph:
    """``source`` with the normalisations over what ``plan`` cuts, and what reads them, fitted to the kept channels.

    ``source`` is the analysed model, or that with other weights fitted; the statistics are always the analysed one's.
    """
    groups = approximate_groups(plan)
    dense = plan.analysis.traced_graph
    only = replace(plan, keep={g.id: plan.keep[g.id] for g in groups})
    dead = find_removed_units(dense.trace, dense.units, cuts_of(only))
    norms = affected_normalizations(dense, dead)
    edits = WeightEdits()
    for norm, sums in zip(
        norms, measure_normalizations(dense, norms, dead, calibration.batches(), execution), strict=True
    ):
        gain = fold_affine(edits, norm, sums)
        for reader in normalization_consumers(dense, norm, groups):
            node = next(n for n in source.model.graph if n.name == reader.node.name)
            weight = reader.rows(source, 0)[0]
            centred = existing_bias(node, reader.width) is not None
            rows, shift = solve_consumer_refit(sums, gain, weight, norm, centred)
            edits.put(reader.place, 0, np.flatnonzero(norm.stays), rows)
            if centred:
                edits.add_bias(str(node.name), shift)
    return trace_graph(apply_edits(source, edits), source.dim_sizes, kv_cache=source.kv_cache)


# -- the algebra -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormalizationSums:
    """Over ``count`` rows, with z [kept] and y [positions]: z'z, z'y, and the sums of z and of y."""

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
    """Least squares per kept channel; through the origin where the norm has no bias, the identity where no gain."""
    kept = len(sums.z)
    if norm.gain is None:
        return ChannelAffine(np.ones(kept), np.zeros(kept))
    mine = np.flatnonzero(norm.stays)
    square, cross = np.diag(sums.zz) / sums.count, sums.zy[np.arange(kept), mine] / sums.count
    z, y = sums.z / sums.count, sums.y[mine] / sums.count
    if norm.bias is None:
        return ChannelAffine(np.where(square > 0, cross / np.where(square > 0, square, 1.0), 1.0), np.zeros(kept))
    variance = square - z**2
    varies = variance > CONSTANT_CHANNEL * square
    scale = np.where(varies, (cross - z * y) / np.where(varies, variance, 1.0), 1.0)
    return ChannelAffine(scale, y - scale * z)


def fold_affine(edits: WeightEdits, norm: Normalization, sums: NormalizationSums) -> ChannelAffine:
    """Fold the fit of a norm's output into its gain and bias."""
    found = solve_affine(sums, norm)
    scale, shift = np.ones(len(norm.stays)), np.zeros(len(norm.stays))
    scale[norm.stays], shift[norm.stays] = found.scale, found.shift
    if norm.gain is not None:
        edits.changes.setdefault(norm.gain, []).append(lambda array: array * scale.reshape(array.shape))
    if norm.gain is not None and norm.bias is not None:
        edits.changes.setdefault(norm.bias, []).append(
            lambda array: (array.reshape(-1) * scale + shift).reshape(array.shape)
        )
    return found


def solve_consumer_refit(
    sums: NormalizationSums, gain: ChannelAffine, weight: FloatArray, norm: Normalization, centred: bool
) -> tuple[FloatArray, FloatArray]:
    """(rows [kept, D], bias [D]) that make of the fitted kept channels what ``weight`` [positions, D] makes of all.

    Ridge least squares that shrinks towards the rows as they are, the more the fewer calibration rows there are.
    ``centred``: with a bias to be added to the reader's (else that is zero).
    """
    scale, shift, count = gain.scale, gain.shift, sums.count
    z, y = scale * sums.z / count + shift, sums.y / count
    between = np.outer(scale * sums.z / count, shift)
    square = scale[:, None] * sums.zz / count * scale + between + between.T + np.outer(shift, shift)
    cross = scale[:, None] * sums.zy / count + np.outer(shift, y)
    if centred:
        square, cross = square - np.outer(z, z), cross - np.outer(z, y)
    mine = weight[norm.stays]
    ridge = np.eye(len(z)) * (np.trace(square) / count + 1e-12)
    rows: FloatArray = np.linalg.solve(square + ridge, cross @ weight + ridge @ mine)
    return rows, y @ weight - z @ rows if centred else np.zeros(weight.shape[1])


# -- measuring -------------------------------------------------------------------------------------------------------


def measure_normalizations(
    dense: TracedGraph,
    norms: Sequence[Normalization],
    dead: RemovedUnits,
    batches: Iterable[Feeds],
    execution: Execution = DEFAULT_EXECUTION,
) -> list[NormalizationSums]:
    """The sums of every norm over the calibration data, in one pass. Padded tokens do not count."""
    padding = find_padding(dense, [(str(norm.output.name), leading_rows) for norm in norms if norm.axis == -1])
    instrument = Instrument(dense.model, padding.row_masks)
    for index, norm in enumerate(norms):
        add_normalization_sums(instrument, dense, norm, dead, index)
    names = [f"snpc_{what}_{index}" for index in range(len(norms)) for what in ("zz", "zy")]
    total: list[FloatArray] = []
    with (
        token_mask_runner(dense, padding, execution) as masks,
        temporary_session(instrument.model, execution=execution) as run,
    ):
        for feeds in batches:
            found = run({**feeds, **masks(feeds)})
            arrays = [np.asarray(found[name], np.float64) for name in names]
            total = [a + b for a, b in zip(total, arrays, strict=True)] if total else arrays
    return [
        NormalizationSums(zz[:-1, :-1], zy[:-1], zz[-1, :-1], zy[-1], float(zz[-1, -1]))
        for zz, zy in zip(total[::2], total[1::2], strict=True)
    ]


def add_normalization_sums(
    instrument: Instrument, dense: TracedGraph, norm: Normalization, dead: RemovedUnits, index: int
) -> None:
    """Two outputs, with a column of ones behind z: z'z and z'y."""
    shape = dense.facts.shape[norm.output]
    assert shape is not None
    narrow = restricted_output(instrument, dense, norm, dead)
    kept = int(norm.stays.sum())
    z = channel_rows(instrument, narrow, len(shape), norm.axis, kept)
    y = channel_rows(instrument, instrument.values[str(norm.output.name)], len(shape), norm.axis, len(norm.stays))
    one = instrument.node(op.GATHER, [z, instrument.ints([0])], axis=1)
    z = instrument.node(op.CONCAT, [z, instrument.node(op.EXP, [instrument.node(op.SUB, [one, one])])], axis=1)
    counts = instrument.row_mask(str(norm.output.name))
    z = instrument.zero_masked(z, None if counts is None else instrument.reshape(counts, -1, 1))
    turned = instrument.transpose(z, 1, 0)
    instrument.add_output(instrument.node(op.MATMUL, [turned, z]), f"snpc_zz_{index}")
    instrument.add_output(instrument.node(op.MATMUL, [turned, y]), f"snpc_zy_{index}")


def channel_rows(instrument: Instrument, value: ir.Value, rank: int, axis: int, width: int) -> ir.Value:
    """[rows, width] in float32."""
    last = [k for k in range(rank) if k != rank + axis]
    return instrument.reshape(instrument.transpose(instrument.cast_float32(value), *last, rank + axis), -1, width)


def leading_rows(shape: Sequence[int]) -> tuple[int, int]:
    """(samples, rows of each) of a norm's output."""
    return shape[0], math.prod(shape[1:-1])


def restricted_output(instrument: Instrument, dense: TracedGraph, norm: Normalization, dead: RemovedUnits) -> ir.Value:
    """What the norm would give for the kept channels: its nodes once more, with statistics over those only."""
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
        mask_statistic(graph, nodes[statistic.context.node], statistic, dense.trace, dead)
    return narrow
