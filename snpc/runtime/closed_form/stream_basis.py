"""Bases of residual streams: principal directions in place of channels, where fewer of them say more.

What is behind a normalization of a residual stream, n [D], is read by weights W. Of k directions U of the stream, the
best that weights can read is n U B for the B of a least-squares fit. The share of the energy of n W that is lost then,

    tr W' (C - C U (U'C U)^-1 U'C) W / tr W'C W    with C = E n'n,

is known for every k at once from one factorization of C in the order of the directions. The mean of these shares over
the normalizations is the loss of a basis. Channels are a basis too: in the order in which the others can best make up
for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.ops import names as op
from snpc.passes import Analysis, enter_streams, turn_streams
from snpc.passes.grouping import TracedGraph
from snpc.passes.rotation import (
    ResidualStream,
    StreamKeepsChannels,
    entry_weight,
    find_stream,
    first_basis,
    norm_vector,
    reader_weight,
)
from snpc.passes.weights import existing_bias
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.dense_algebra import current_algebra
from snpc.runtime.closed_form.refit_normalizations import add_up_outputs, channel_rows, leading_rows
from snpc.runtime.evaluation import rounding_tolerance
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, temporary_session
from snpc.runtime.statistics import Instrument, find_padding
from snpc.types import FloatArray, Group, IntArray, StreamBasis

RIDGE = 1e-6  # of the trace: sums over rows in float32 are no better
CHANNEL_STEPS = 24  # in which the order of channels is found
SHARE_BEHIND_ENTRY = 0.8  # of a stream's MACs: what is in front of its entry keeps its width
COMPARED_FROM = 0.5  # of the width: bases are compared over all widths from here on


def with_stream_bases(
    analysis: Analysis,
    calibration: Calibration,
    execution: Execution = DEFAULT_EXECUTION,
    rotated: Collection[str] | None = None,
) -> Analysis:
    """The analysis with residual streams in the basis that loses least, and what was found of each of them.

    Streams may begin behind a weight that is put in (``enter_streams``) where they can be rotated only so.
    ``rotated``: the groups to be rotated, as a plan says. Raises UserError where one of these cannot be.
    """
    if rotated is None and not analysis.entries:
        entered = with_entries(analysis)
        if entered.entries:
            found = with_bases(entered, calibration, execution, None)
            rotated_groups = {stream.group for stream in found.stream_bases if stream.rotated}
            if all(group.id in rotated_groups for group in groups_behind(entered, entered.entries)):
                return found
    return with_bases(analysis, calibration, execution, rotated)


def with_entries(analysis: Analysis) -> Analysis:
    """The analysis in which streams that cannot be rotated begin behind a weight, where one makes them so."""
    entries = []
    for group in groups_of_streams(analysis):
        try:
            check_rotatable(analysis)
            find_stream(analysis.traced_graph, group)
        except StreamKeepsChannels as error:
            if error.entry is not None and analysis.reduction is None and begins_at(analysis, error.entry, group.macs):
                entries.append(error.entry)
    return enter_streams(analysis, entries) if entries else analysis


def begins_at(analysis: Analysis, value: str, macs: int) -> bool:
    """Can the stream be rotated that begins behind ``value``, and has it most of the ``macs`` of the whole?"""
    entered = enter_streams(analysis, [value])
    behind = groups_behind(entered, [value])
    try:
        streams = [find_stream(entered.traced_graph, group) for group in behind]
    except StreamKeepsChannels:
        return False
    return bool(streams) and sum(group.macs for group in behind) >= SHARE_BEHIND_ENTRY * macs


def groups_behind(analysis: Analysis, entries: Sequence[str]) -> list[Group]:
    """The groups of the streams that begin behind these values."""
    weights = {entry_weight(value) for value in entries}
    return [g for g in groups_of_streams(analysis) if any(s.tensor in weights and s.axis == 1 for s in g.sites)]


def groups_of_streams(analysis: Analysis) -> list[Group]:
    return [g for g in analysis.groups if g.role == "residual" and g.prunable and g.size > 1]


def with_bases(
    analysis: Analysis, calibration: Calibration, execution: Execution, rotated: Collection[str] | None
) -> Analysis:
    """``with_stream_bases`` of streams as they are."""
    groups = groups_of_streams(analysis)
    found: dict[str, StreamBasis] = {}
    streams: list[ResidualStream] = []
    for group in groups:
        try:
            check_rotatable(analysis)
            streams.append(find_stream(analysis.traced_graph, group))
        except StreamKeepsChannels as error:
            found[group.id] = StreamBasis(group.id, group.size, False, str(error))
    turns: list[tuple[ResidualStream, FloatArray]] = []
    if streams and (rotated is None or rotated):
        base = turn_streams(analysis, [(stream, first_basis(stream)) for stream in streams])
        difference = turned_difference(analysis.traced_graph, base.traced_graph, calibration, execution)
        if not difference <= rounding_tolerance(analysis.model, coarsest=True):  # also where it is NaN
            reason = f"outputs change by {difference:.1e} where it is rotated"
            found |= {s.group.id: StreamBasis(s.group.id, s.group.size, False, reason) for s in streams}
            streams = []
        moments = measure_streams(base.traced_graph, streams, calibration, execution) if streams else []
        for stream, measured in zip(streams, moments, strict=True):
            start = first_basis(stream)
            entry, basis = choose_basis(analysis.traced_graph, stream, start, measured)
            if rotated is not None:
                entry = replace(entry, rotated=stream.group.id in rotated)
            found[stream.group.id] = entry
            if entry.rotated:
                turns.append((stream, start @ basis))
    missing = set(rotated or ()) - {name for name, entry in found.items() if entry.rotated}
    if missing:
        name = min(missing)
        reason = found[name].reason if name in found else "it has no such residual stream"
        raise UserError(f"{analysis.model.path.name}: the plan rotates {name}, which cannot be: {reason}")
    turned = turn_streams(analysis, turns) if turns else analysis
    return replace(turned, stream_bases=tuple(found[group.id] for group in groups if group.id in found))


def check_rotatable(analysis: Analysis) -> None:
    """Raise StreamKeepsChannels where the model's form allows no rotation."""
    for holds, reason in (
        (analysis.model.quantized is not None, "the weights of a quantized file keep their basis"),
        (bool(analysis.companions), "a model that is cut alike reads the same weights"),
        (analysis.removal is not None, "whole layers are removed, and the rest is fitted to what they added"),
    ):
        if holds:
            raise StreamKeepsChannels(reason)


def turned_difference(before: TracedGraph, after: TracedGraph, calibration: Calibration, execution: Execution) -> float:
    """The largest difference of an output on the first batch, relative to the largest entry."""
    feeds = next(iter(calibration.batches()))
    outputs = []
    for traced in (before, after):
        with temporary_session(traced.model.clone(), execution=execution) as run:
            outputs.append(run(feeds))
    differences = [0.0]
    for name, array in outputs[0].items():
        if array.size and np.issubdtype(array.dtype, np.floating):
            x, y = (np.nan_to_num(o[name].astype(np.float64)) for o in outputs)
            differences.append(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)))
    return float(np.max(differences))


# -- measuring -------------------------------------------------------------------------------------------------------


def measure_streams(
    traced: TracedGraph, streams: Sequence[ResidualStream], calibration: Calibration, execution: Execution
) -> list[list[FloatArray]]:
    """Per stream and normalization: [D + 1, D + 1], the second moments of its output with a column of ones behind it.
    Padded tokens do not count."""
    norms = [norm for stream in streams for norm in stream.normalizations]
    names = [str(norm.output.name) for norm in norms]
    values = {str(value.name): value for node in traced.model.graph for value in node.outputs}
    padding = find_padding(
        traced, [(name, leading_rows) for name, norm in zip(names, norms, strict=True) if norm.axis == -1]
    )
    instrument = Instrument(traced.model, padding.row_masks)
    for index, (name, norm) in enumerate(zip(names, norms, strict=True)):
        shape = traced.facts.shape[values[name]]
        assert shape is not None
        rows = channel_rows(instrument, instrument.values[name], len(shape), norm.axis, len(norm.stays))
        add_row_moments(instrument, rows, name, f"snpc_moments_{index}")
    batches = execution.track("stream basis", calibration.batches(), len(calibration.batch_plan))
    outputs = [f"snpc_moments_{index}" for index in range(len(norms))]
    totals = add_up_outputs(instrument, outputs, traced, padding, batches, execution)
    parts = iter([total / total[-1, -1] for total in totals])
    return [[next(parts) for _ in stream.normalizations] for stream in streams]


def add_row_moments(instrument: Instrument, rows: ir.Value, tensor: str, name: str) -> None:
    """Add the output ``name``: the second moments of ``rows`` [rows, D] of ``tensor`` with a column of ones."""
    first = instrument.node(op.GATHER, [rows, instrument.ints([0])], axis=1)
    ones = instrument.node(op.EXP, [instrument.node(op.SUB, [first, first])])
    rows = instrument.node(op.CONCAT, [rows, ones], axis=1)
    mask = instrument.row_mask(tensor)
    rows = instrument.zero_masked(rows, None if mask is None else instrument.reshape(mask, -1, 1))
    instrument.add_output(instrument.node(op.MATMUL, [instrument.transpose(rows, 1, 0), rows]), name)


# -- the algebra -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadMoments:
    """What is read behind one normalization: [D, D] second moments of the rows, about the mean where readers have a
    bias, and W W' of the weights that read them."""

    moments: FloatArray
    weights: FloatArray

    @property
    def energy(self) -> float:
        return max(float(np.sum(self.moments * self.weights)), 1e-30)

    def turned(self, basis: FloatArray) -> ReadMoments:
        """In the basis [D, k], whose columns are directions."""
        return ReadMoments(basis.T @ self.moments @ basis, basis.T @ self.weights @ basis)

    def losses(self) -> FloatArray:
        """[D + 1]: the share of the energy that is lost when the first directions are kept, by their number."""
        factor = current_algebra().cholesky(with_ridge(self.moments))
        parts = np.sum((factor.T @ self.weights) * factor.T, axis=1)
        tail = np.append(np.cumsum(parts[::-1])[::-1], 0.0)
        return tail / max(float(tail[0]), 1e-30)


def with_ridge(moments: FloatArray) -> FloatArray:
    return moments + np.eye(len(moments)) * (RIDGE * float(np.trace(moments)) + 1e-12)


def choose_basis(
    source: TracedGraph, stream: ResidualStream, start: FloatArray, measured: Sequence[FloatArray]
) -> tuple[StreamBasis, FloatArray]:
    """What channels and principal directions lose, and the directions [D, D], in terms of the basis ``start``.

    ``measured``: of each normalization, ``measure_streams`` in the basis ``start``.
    """
    reads = [
        read_moments(source, stream, number, start, moments)
        for number, moments in enumerate(measured)
        if any(reader.norm == number for reader in stream.readers)
    ]
    free = stream.group.size - (1 if stream.centered else 0)  # the mean is the last direction, and empty
    basis = np.eye(stream.group.size)
    basis[:free, :free] = principal_directions([read.turned(np.eye(stream.group.size)[:, :free]) for read in reads])
    rotation = np.mean([read.turned(basis).losses() for read in reads], axis=0)
    of_channels = [read.turned(start.T) for read in reads]
    order = channel_order(of_channels)
    channels = np.mean([read.turned(start.T[:, order]).losses() for read in reads], axis=0)
    compared = slice(round(COMPARED_FROM * stream.group.size), None)
    return StreamBasis(
        stream.group.id,
        stream.group.size,
        bool(rotation[compared].sum() < channels[compared].sum()),
        "",
        tuple(channels.tolist()),
        tuple(rotation.tolist()),
        hashlib.sha256(np.ascontiguousarray(start @ basis).tobytes()).hexdigest(),
        len(reads),
    ), basis


def read_moments(
    source: TracedGraph, stream: ResidualStream, number: int, start: FloatArray, moments: FloatArray
) -> ReadMoments:
    """What is read behind normalization ``number``, whose outputs have ``moments`` in the basis ``start``."""
    norm, size = stream.normalizations[number], stream.group.size
    gain = norm_vector(source, norm.gain, size, 1.0)
    weights, with_bias = np.zeros((size, size)), norm.bias is not None
    for reader in (reader for reader in stream.readers if reader.norm == number):
        weight = gain[:, None] * reader_weight(source, reader)
        weights += weight @ weight.T
        node = next(node for node in source.model.graph if node.name == reader.node)
        with_bias = with_bias or existing_bias(node, weight.shape[1] // reader.copies) is not None
    mean = moments[-1:, :-1] if with_bias else np.zeros((1, size))
    return ReadMoments(moments[:-1, :-1] - mean.T @ mean, start.T @ weights @ start)


def principal_directions(reads: Sequence[ReadMoments]) -> FloatArray:
    """[D, D]: directions of the stream in falling order of what is read along them, over all normalizations.

    Along a direction u, the rows n of second moments C give n W the share u'C W W'u, of which the symmetric part is
    summed. On ViT-Tiny that loses 8 % less than the principal directions of C alone.
    """
    total = np.zeros_like(reads[0].moments)
    for read in reads:
        product = read.moments @ read.weights
        total += (product + product.T) / read.energy
    _, vectors = current_algebra().eigh(total)
    return np.asarray(vectors[:, ::-1])


def channel_order(reads: Sequence[ReadMoments]) -> IntArray:
    """[D]: channels, the last of which goes first: in steps, those go that the others can best make up for."""
    size = len(reads[0].moments)
    kept, gone = np.arange(size), list[int]()
    shares = [1.0 / read.energy for read in reads]
    while len(kept) > 1:
        costs = sum(s * removal_costs_of(read, kept) for s, read in zip(shares, reads, strict=True))
        going = np.argsort(costs)[: max(1, min(len(kept) - 1, size // CHANNEL_STEPS))]
        gone += kept[going].tolist()
        kept = np.delete(kept, going)
    return np.array([*kept.tolist(), *reversed(gone)])


def removal_costs_of(read: ReadMoments, kept: IntArray) -> FloatArray:
    """[kept]: the energy that is lost with each channel, after the others are refitted."""
    algebra = current_algebra()
    inverse = algebra.invert_positive_definite(with_ridge(read.moments[np.ix_(kept, kept)]))
    fitted = inverse @ read.moments[kept]
    energies = np.sum((fitted @ read.weights) * fitted, axis=1)
    return np.asarray(np.maximum(energies, 0.0) / np.diag(inverse))
