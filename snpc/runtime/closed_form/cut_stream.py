"""Refits what reads a cut residual stream on what the cut model itself computes.

``refit_normalizations`` fits the readers on the inputs of the dense model. In the cut model they see something else:
what the layers in front have lost as well. Here the normalizations are taken in a few portions, in the order of the
graph. For each, the masked model with all fits so far runs beside the dense one, and the weights behind the portion are
refitted by least squares from what the first has behind the normalizations, to what the second makes of its own.

Least squares behind each normalization need not bring the outputs nearer: where the cut model is far from the dense one
they shrink what is read, and few of the rows may matter, such as those of a class token. So a portion keeps its new fit
only where the outputs change less by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from snpc.ops import names as op
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.slicing import find_removed_units, mask_model
from snpc.passes.weights import (
    Normalization,
    WeightEdits,
    affected_normalizations,
    apply_edits,
    existing_bias,
    normalization_consumers,
)
from snpc.planning import SlicePlan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.refit_normalizations import (
    ChannelAffine,
    NormalizationSums,
    approximate_groups,
    channel_rows,
    leading_rows,
    solve_consumer_refit,
)
from snpc.runtime.evaluation import OutputMetrics
from snpc.runtime.execution import Execution, temporary_session
from snpc.runtime.statistics import Instrument, find_padding, token_mask_runner
from snpc.types import FloatArray

PORTIONS = 6  # a pass of both models over the data for each
JUDGED_SAMPLES = 32  # on which outputs are compared


@dataclass(frozen=True)
class StreamReaders:
    """The cut normalizations of a residual stream. ``source``: the model whose outputs the readers are fitted to."""

    source: TracedGraph
    plan: SlicePlan
    norms: tuple[Normalization, ...]

    @property
    def dense(self) -> TracedGraph:
        return self.plan.analysis.traced_graph

    def masked(self, fitted: TracedGraph) -> ir.Model:
        """``fitted``, with all that the plan removes masked."""
        removed = find_removed_units(fitted.trace, fitted.units, cuts_of(self.plan))
        return mask_model(fitted.model, fitted.trace, removed)


def fit_on_cut_stream(
    source: TracedGraph, fitted: TracedGraph, plan: SlicePlan, calibration: Calibration, execution: Execution
) -> TracedGraph:
    """``fitted``, with the weights behind normalizations of rotated streams refitted on the cut model.

    ``fitted``: ``source`` after ``fit_normalizations``. Unchanged where no rotated stream is cut.
    """
    rotated = {stream.group for stream in plan.analysis.stream_bases if stream.rotated} & plan.keep.keys()
    if not rotated:
        return fitted
    dense = plan.analysis.traced_graph
    partial = replace(plan, keep={name: plan.keep[name] for name in rotated})
    removed = find_removed_units(dense.trace, dense.units, cuts_of(partial))
    readers = StreamReaders(source, plan, tuple(affected_normalizations(dense, removed)))
    portions = np.array_split(np.arange(len(readers.norms)), min(PORTIONS, len(readers.norms)))
    change = output_change(readers, fitted, calibration, execution)
    with execution.progress.stage("cut stream", len(portions)) as advance:
        for portion in portions:
            norms = [readers.norms[k] for k in portion]
            sums = measure_on_cut_stream(readers, fitted, norms, calibration, execution)
            refitted = refit_readers(readers, fitted, norms, sums)
            changed = output_change(readers, refitted, calibration, execution)
            if changed < change:
                fitted, change = refitted, changed
            advance(1)
    return fitted


def output_change(readers: StreamReaders, fitted: TracedGraph, calibration: Calibration, execution: Execution) -> float:
    """How far the outputs of the cut model are from the dense one's, on the first samples."""
    metrics, changes, left = OutputMetrics.of(readers.plan.analysis), list[float](), JUDGED_SAMPLES
    with (
        temporary_session(readers.dense.model.clone(), execution=execution) as run_dense,
        temporary_session(readers.masked(fitted), execution=execution) as run_masked,
    ):
        for feeds in calibration.batches():
            changes.append(metrics.change(run_dense(feeds), run_masked(feeds)))
            left -= calibration.batch
            if left <= 0:
                break
    return float(np.mean(changes))


def refit_readers(
    readers: StreamReaders, fitted: TracedGraph, norms: Sequence[Normalization], sums: Sequence[NormalizationSums]
) -> TracedGraph:
    """``fitted`` with the weights behind ``norms`` solved from ``sums``."""
    edits, groups = WeightEdits(), approximate_groups(readers.plan)
    for norm, measured in zip(norms, sums, strict=True):
        kept = int(norm.stays.sum())
        unchanged = ChannelAffine(np.ones(kept), np.zeros(kept))
        for consumer in normalization_consumers(readers.dense, norm, groups):
            name = str(consumer.node.name)
            before, now = (bias_of(traced, name, consumer.width) for traced in (readers.source, fitted))
            weight = consumer.rows(readers.source, 0)[0]
            rows, shift = solve_consumer_refit(measured, unchanged, weight, norm, now is not None)
            edits.put(consumer.weight_slice, 0, np.flatnonzero(norm.stays), rows)
            if now is not None:
                edits.add_bias(name, shift + (0.0 if before is None else before) - now)
    return trace_graph(apply_edits(fitted, edits), fitted.dim_sizes, kv_cache=fitted.kv_cache)


def bias_of(traced: TracedGraph, node_name: str, width: int) -> FloatArray | None:
    """[width]: the bias that only this node's output gets; None where there is none."""
    node = next(node for node in traced.model.graph if node.name == node_name)
    value = existing_bias(node, width)
    tensor = value.const_value if value is not None else None
    return None if tensor is None else tensor.numpy().astype(np.float64).reshape(-1)


def measure_on_cut_stream(
    readers: StreamReaders,
    fitted: TracedGraph,
    norms: Sequence[Normalization],
    calibration: Calibration,
    execution: Execution,
) -> list[NormalizationSums]:
    """The sums of each normalization: z of the masked model, y of the dense one. Padded tokens do not count."""
    dense = readers.dense
    padding = find_padding(dense, [(str(norm.output.name), leading_rows) for norm in norms if norm.axis == -1])
    whole = Instrument(dense.model, padding.row_masks)
    masked = Instrument(readers.masked(fitted))
    for index, norm in enumerate(norms):
        add_rows(whole, dense, norm, f"snpc_y_{index}")
        add_rows(masked, dense, norm, f"snpc_z_{index}")
    totals = [NormalizationTotals(norm) for norm in norms]
    with (
        token_mask_runner(dense, padding, execution) as masks,
        temporary_session(whole.model, execution=execution) as run_whole,
        temporary_session(masked.model, execution=execution) as run_masked,
    ):
        for feeds in calibration.batches():
            expected, found = run_whole({**feeds, **masks(feeds)}), run_masked(feeds)
            for index, total in enumerate(totals):
                total.add(found[f"snpc_z_{index}"], expected[f"snpc_y_{index}"])
    return [total.sums() for total in totals]


class NormalizationTotals:
    """``NormalizationSums`` of one normalization, batch by batch."""

    def __init__(self, norm: Normalization) -> None:
        self.kept = np.flatnonzero(norm.stays)
        self.squares: FloatArray = np.zeros((len(self.kept) + 1, len(self.kept) + 1))
        self.products: FloatArray = np.zeros((len(self.kept) + 1, len(norm.stays)))

    def add(self, found: FloatArray, expected: FloatArray) -> None:
        """``found`` [rows, D + 1] of the masked model, ``expected`` the same of the dense one, zero where a row does
        not count."""
        counts = expected[:, -1:].astype(np.float64)
        z = np.concatenate([found[:, self.kept], found[:, -1:]], axis=1) * counts
        self.squares += z.T @ z
        self.products += z.T @ expected[:, :-1].astype(np.float64)

    def sums(self) -> NormalizationSums:
        zz, zy = self.squares, self.products
        return NormalizationSums(zz[:-1, :-1], zy[:-1], zz[-1, :-1], zy[-1], float(zz[-1, -1]))


def add_rows(instrument: Instrument, dense: TracedGraph, norm: Normalization, name: str) -> None:
    """Add the output of a normalization as [rows, D + 1], with a column of ones; zero where a row does not count."""
    shape, tensor = dense.facts.shape[norm.output], str(norm.output.name)
    assert shape is not None
    rows = channel_rows(instrument, instrument.values[tensor], len(shape), norm.axis, len(norm.stays))
    first = instrument.node(op.GATHER, [rows, instrument.ints([0])], axis=1)
    ones = instrument.node(op.EXP, [instrument.node(op.SUB, [first, first])])
    mask = instrument.row_mask(tensor)
    rows = instrument.node(op.CONCAT, [rows, ones], axis=1)
    instrument.add_output(instrument.zero_masked(rows, None if mask is None else instrument.reshape(mask, -1, 1)), name)
