"""Statistics over the units that stay, in a graph that still has all of them.

A mean over channels of which some are zero is not the mean over the others. So where the removed units are silenced
instead of sliced off, what takes statistics over them is given the kept ones only, and a node that also hands out their
positions gets zeros in the place of the removed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph import add_constant, make_node, redirect_uses, unused_name
from snpc.ops import CONCAT, GATHER, SUB
from snpc.passes.propagation import NormalizationStatistic, RemovedUnits, Trace, removed_along
from snpc.passes.slicing.weighted_statistics import labels_by_part, unit_weights, weigh_statistic, weights_name
from snpc.types import BoolArray, IntArray


def mask_statistic(
    graph: ir.Graph, node: ir.Node, statistic: NormalizationStatistic, trace: Trace, dead: RemovedUnits
) -> None:
    """Let ``node``, which stands in ``graph`` for the statistic's own, see the kept positions only."""
    old, spec = statistic.context.node, statistic.context.spec
    folded = any(index < 0 for index in spec.per_axis)  # per channel: units may share one axis with positions
    if folded or differs_between_parts(statistic, dead):
        mask_by_weights(graph, node, statistic, trace, dead)
        return
    writer = KeptPositionsWriter(graph, node)
    for index in {*(spec.data or (0,)), *spec.per_axis}:
        value = old.inputs[index] if index < len(old.inputs) else None
        for axis, stays in removed_along(trace.values.get(value), statistic.axes, dead):  # type: ignore[arg-type]
            node.replace_input_with(index, writer.take(node.inputs[index], np.flatnonzero(stays), axis))
    if spec.kind == "normalize":
        for index in (0, *spec.sum_outputs):
            if index < len(old.outputs):
                for axis, stays in removed_along(trace.values.get(old.outputs[index]), statistic.axes, dead):
                    writer.scatter_output(node.outputs[index], stays, axis)


def differs_between_parts(statistic: NormalizationStatistic, dead: RemovedUnits) -> bool:
    """Do parts (heads) of which a statistic of their own is taken keep other positions? Those that go do not count."""
    rows = dead.kept_mask(labels_by_part(statistic))
    rows = rows[rows.any(1)]
    return not bool((rows == rows[:1]).all())


def mask_by_weights(
    graph: ir.Graph, node: ir.Node, statistic: NormalizationStatistic, trace: Trace, dead: RemovedUnits
) -> None:
    """As ``mask_statistic``, with all positions where they are and weights of 0 for the removed ones."""
    if not weigh_statistic(graph, node, statistic, trace):
        raise CheckFailed(f"{node.op_type} {node.name}: its statistics over the units that stay cannot be written")
    weights = graph.initializers[weights_name(statistic)]
    weights.const_value = ir.Tensor(unit_weights(trace, dead)[str(weights.name)], name=weights.name)


class KeptPositionsWriter:
    """Puts nodes around one node of a graph."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.count = graph, node, 0

    def take(self, value: ir.Value | None, positions: npt.NDArray[np.int64], axis: int) -> ir.Value:
        """``value`` with these positions of an axis, ahead of the node."""
        assert value is not None
        gather = self.op(GATHER, [value, self.constant(positions)], axis)
        self.node.prepend(gather)
        return gather.outputs[0]

    def scatter_output(self, output: ir.Value, stays: BoolArray, axis: int) -> None:
        """What reads ``output`` of the node reads it at its old size, with zeros where positions do not stay."""
        users = list(output.uses())
        first = self.op(GATHER, [output, self.constant(np.zeros(1, np.int64))], axis)
        zero = self.op(SUB, [first.outputs[0], first.outputs[0]])
        padded = self.op(CONCAT, [output, zero.outputs[0]], axis)
        where = np.where(stays, np.cumsum(stays) - 1, stays.sum())
        whole = self.op(GATHER, [padded.outputs[0], self.constant(where)], axis)
        self.node.append([first, zero, padded, whole])
        redirect_uses(users, whole.outputs[0])

    def op(self, op: str, inputs: list[ir.Value], axis: int | None = None) -> ir.Node:
        return make_node(op, inputs, {} if axis is None else {"axis": axis}, name=self.name())

    def constant(self, array: IntArray) -> ir.Value:
        return add_constant(self.graph, np.asarray(array, np.int64), self.name())

    def name(self) -> str:
        self.count += 1
        return unused_name(f"{self.node.name}__kept{self.count}", self.graph.initializers)
