"""Statistics with a weight for each unit, in a graph that still has all units.

With weights of 1 and 0 a normalization takes its mean and variance over some of the units, at their old positions, and
gives zeros in the place of the others. The weights are a constant of their own: whoever tries a cut changes its
contents, and no shape. Unlike the gathered positions of ``masked_statistics`` they also follow units that were folded
into one axis with others, at sizes that only the run knows (all channels and positions of a picture).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from snpc.graph import (
    add_constant,
    attribute_values,
    copy_node,
    make_node,
    redirect_uses,
    unused_name,
)
from snpc.ops import (
    ADD,
    CAST,
    CAST_LIKE,
    DIV,
    EXPAND,
    MUL,
    REDUCE_MEAN,
    REDUCTION_AXES_INPUT_SINCE,
    RESHAPE,
    SHAPE,
    SQRT,
    SUB,
    Labels,
)
from snpc.passes.propagation import (
    NormalizationStatistic,
    RemovedUnits,
    Trace,
    affected_statistics,
    moves_from_own_axis,
)
from snpc.types import AnyArray

CAST_LIKE_SINCE = 15  # opset


def weights_name(statistic: NormalizationStatistic) -> str:
    """Name of the constant that weighs the units of a statistic."""
    return f"{statistic.context.node.name}__unit_weights"


def unit_weights(trace: Trace, removed: RemovedUnits) -> dict[str, AnyArray]:
    """Name of the weights -> 1 for units that stay and 0 for the others, of every statistic that a cut affects.

    Also 1 for those of parts (heads) of which nothing stays: the mean of no unit is no number."""
    weights = {}
    for statistic in affected_statistics(trace, removed):
        own = moves_from_own_axis(statistic.context.node.inputs[0], statistic.labels, trace)
        if own is not None:
            parts = labels_by_part(statistic)
            gone = parts[~removed.kept_mask(parts).any(1)]
            weights[weights_name(statistic)] = (removed.kept_mask(own[0]) | np.isin(own[0], gone)).astype(np.float32)
    return weights


def labels_by_part(statistic: NormalizationStatistic) -> Labels:
    """[parts, positions]: the labels of each part of which a statistic of its own is taken, as of each head."""
    labels, inner = statistic.labels, {axis + statistic.labels.ndim for axis in statistic.axes}
    order = sorted(range(labels.ndim), key=lambda axis: axis in inner)
    return labels.transpose(order).reshape(-1, math.prod(labels.shape[axis] for axis in inner))


def weigh_statistics(graph: ir.Graph, trace: Trace, statistics: Iterable[NormalizationStatistic]) -> None:
    """Give each of these statistics, of nodes that ``graph`` has under the same names, weights of 1; in place.

    What cannot be weighed is left as it is (further outputs of a node that are read, operators that add first).
    """
    nodes = {node.name: node for node in graph}
    for statistic in statistics:
        node = nodes.get(statistic.context.node.name)
        if node is not None and weights_name(statistic) not in graph.initializers:
            weigh_statistic(graph, node, statistic, trace)


def weigh_statistic(graph: ir.Graph, node: ir.Node, statistic: NormalizationStatistic, trace: Trace) -> bool:
    """Give one statistic weights of 1. Returns whether it can be weighed."""
    spec = statistic.context.spec
    if len(spec.data or (0,)) > 1 or any(output.uses() for output in node.outputs[1:]):
        return False
    if any(output.is_graph_output() for output in node.outputs):
        return False
    writer = WeightWriter(graph, node, statistic, trace)
    weights = writer.weights()
    if weights is None:
        return False
    if spec.kind == "reduce":
        writer.weigh_mean(weights)
    else:
        writer.spell_out(weights)
    return True


class WeightWriter:
    """Puts nodes around one node of a graph, or in its place."""

    def __init__(self, graph: ir.Graph, node: ir.Node, statistic: NormalizationStatistic, trace: Trace) -> None:
        self.graph, self.node, self.statistic, self.trace = graph, node, statistic, trace
        self.version, self.count = graph.opset_imports.get("", 1), 0
        rule = statistic.context.spec.axes
        assert rule is not None
        rank = statistic.labels.ndim
        self.axes = tuple(sorted(axis - rank for axis in rule(statistic.context.call)))

    def weights(self) -> ir.Value | None:
        """The weights at the positions that the statistic is taken over; None where these cannot be followed."""
        found = moves_from_own_axis(self.statistic.context.node.inputs[0], self.statistic.labels, self.trace)
        value = self.node.inputs[0]
        if found is None:
            return None
        labels, moves = found
        twins: list[ir.Node] = []
        for move in moves:
            twin = value.producer() if value is not None else None
            if twin is None or twin.op_type != move.op_type:  # it lies in front of this graph
                return None
            twins.append(twin)
            value = twin.inputs[0]
        weights = self.constant(np.ones(labels.shape, np.float32), value, weights_name(self.statistic))
        if twins:
            weights = self.op(EXPAND, [weights, self.op(SHAPE, [value])])
        for twin in reversed(twins):
            weights = self.place(copy_node(twin, [weights, *twin.inputs[1:]], name=self.name(), outputs=[""]))
        return weights

    def weigh_mean(self, weights: ir.Value) -> None:
        """The node's mean, over the units that count."""
        data = self.node.inputs[0]
        self.node.replace_input_with(0, self.op(MUL, [data, weights]))
        users = list(self.node.outputs[0].uses())
        share = self.op(REDUCE_MEAN, [weights, *self.node.inputs[1:]], self.node)
        scaled = make_node(DIV, [self.node.outputs[0], share], name=self.name())
        self.node.append(scaled)
        redirect_uses(users, scaled.outputs[0])

    def spell_out(self, weights: ir.Value) -> None:
        """The normalization in single steps, in the place of its node."""
        spec, data = self.statistic.context.spec, self.node.inputs[0]
        share = self.mean(weights)
        if spec.centered:
            data = self.op(SUB, [data, self.op(DIV, [self.mean(self.op(MUL, [data, weights])), share])])
        data = self.op(MUL, [data, weights])
        variance = self.op(DIV, [self.mean(self.op(MUL, [data, data])), share])
        epsilon = float(attribute_values(self.node).get("epsilon", spec.epsilon))
        root = self.op(SQRT, [self.op(ADD, [variance, self.constant(np.float32(epsilon), data)])])
        result = self.op(DIV, [data, root])
        for index, op in zip(spec.per_axis, (MUL, ADD), strict=False):
            parameter = self.node.inputs[abs(index)] if abs(index) < len(self.node.inputs) else None
            if parameter is not None:
                result = self.op(op, [result, self.per_channel(parameter) if index < 0 else parameter])
        # behind the bias once more, which a kept group of positions adds to those that go
        redirect_uses(list(self.node.outputs[0].uses()), self.op(MUL, [result, weights]))

    def per_channel(self, parameter: ir.Value) -> ir.Value:
        """A vector with an entry per channel (axis 1), as it broadcasts against the data."""
        shape = np.array([-1, *[1] * (self.statistic.labels.ndim - 2)], np.int64)
        return self.op(RESHAPE, [parameter, add_constant(self.graph, shape, self.name())])

    def mean(self, value: ir.Value | None) -> ir.Value:
        axes: Sequence[int] = self.axes
        if self.version >= REDUCTION_AXES_INPUT_SINCE[REDUCE_MEAN]:
            return self.op(REDUCE_MEAN, [value, add_constant(self.graph, np.array(axes, np.int64), self.name())])
        return self.place(make_node(REDUCE_MEAN, [value], {"axes": list(axes)}, name=self.name()))

    def constant(self, array: AnyArray | np.float32, like: ir.Value | None, name: str | None = None) -> ir.Value:
        """A constant that the graph converts to the type of ``like``."""
        value = add_constant(self.graph, np.asarray(array), name or self.name())
        if self.version >= CAST_LIKE_SINCE:
            return self.op(CAST_LIKE, [value, like])
        cast = make_node(CAST, [value], {"to": int(self.weight_type())}, name=self.name())
        return self.place(cast)

    def weight_type(self) -> ir.DataType:
        """The type of the weights that make the units."""
        label = int(self.statistic.labels.reshape(-1)[0])
        axis = next(a for a in self.trace.table.axes if a.first_label <= label < a.first_label + a.size)
        assert axis.constant.const_value is not None
        return axis.constant.const_value.dtype

    def op(self, op: str, inputs: Sequence[ir.Value | None], like: ir.Node | None = None) -> ir.Value:
        """The output of a new node in front of the statistic's own; ``like``: with the attributes of this node."""
        if like is not None:
            return self.place(copy_node(like, inputs, name=self.name(), outputs=[""]))
        return self.place(make_node(op, inputs, name=self.name()))

    def place(self, node: ir.Node) -> ir.Value:
        output = node.outputs[0]
        output.name = output.name or f"{node.name}_out"
        self.node.prepend(node)
        return output

    def name(self) -> str:
        self.count += 1
        return unused_name(f"{self.node.name}__weighted{self.count}", self.graph.initializers)
