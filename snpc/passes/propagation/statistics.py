"""Consumers of normalization statistics: where a mean over units is used, in one node or in several."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.ops import Labels, lookup
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import LabeledValue, NormalizationStatistic, Trace


@dataclass(frozen=True)
class StatisticPaths:
    """Where one statistic is used.

    ``statistic_nodes``: nodes that compute on the statistic only; ``rejoin_nodes``: element-wise nodes that combine it
    with the positions it was taken over; ``non_normalizing_consumer``: the first other consumer, if there is one.
    """

    statistic_nodes: tuple[ir.Node, ...]
    rejoin_nodes: tuple[ir.Node, ...]
    non_normalizing_consumer: str | None


def statistic_paths(statistic: NormalizationStatistic, trace: Trace) -> StatisticPaths:
    """Follow a statistic through element-wise operators and movement until it is combined with positions on its axes.

    A normalization in one node is its own path.
    """
    start = statistic.context.node
    if statistic.context.spec.kind == "normalize":
        return StatisticPaths((), (start,), None)
    on_path: dict[ir.Node, None] = {start: None}
    rejoining: dict[ir.Node, None] = {}
    other_consumer: str | None = None
    pending = list(start.outputs)
    while pending:
        value = pending.pop(0)
        if value.is_graph_output():
            other_consumer = other_consumer or f"the graph output {value.name}"
        for node in value.consumers():
            kind = lookup(node.domain, node.op_type).kind
            if kind == "shape" or node in on_path or node in rejoining:
                continue
            if kind == "pointwise" and varies_along(trace.values.get(node.outputs[0]), statistic.axes):
                rejoining[node] = None
            elif kind in ("pointwise", "movement") and node.graph is start.graph:
                on_path[node] = None
                pending += node.outputs
            else:
                other_consumer = other_consumer or f"{node.op_type} {node.name}"
    return StatisticPaths(tuple(on_path), tuple(rejoining), other_consumer)


def moves_from_own_axis(value: ir.Value | None, labels: Labels, trace: Trace) -> tuple[Labels, list[ir.Node]] | None:
    """Where each of the units of ``labels``, which ``value`` has, has one position, on one axis or on several.

    Returns their labels there, and the movement nodes from there to ``value``, the last first. None where other
    operators lie between.
    """
    moves: list[ir.Node] = []
    units = np.unique(labels)
    while value is not None and value in trace.values:
        for own in trace.values[value].factors:
            if own.size == len(units) and np.array_equal(np.unique(own), units):
                return own, moves
        node = value.producer()
        if node is None or lookup(node.domain, node.op_type).kind != "movement":
            return None
        moves.append(node)
        value = node.inputs[0]
    return None


def varies_along(labeled_value: LabeledValue | None, axes: tuple[int, ...]) -> bool:
    """Whether the value has labels along one of ``axes`` (counted from the right)."""
    return labeled_value is not None and any(
        labels.ndim + axis in varying_axes(labels) for labels in labeled_value.factors for axis in axes
    )


def non_normalizing_consumer(statistic: NormalizationStatistic, trace: Trace) -> str | None:
    """The first consumer that uses the statistic for anything but normalizing its positions; None if there is none."""
    return statistic_paths(statistic, trace).non_normalizing_consumer
