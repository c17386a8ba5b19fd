"""Normalisations: where means over a group's units go, one node or spelled out in several."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from snpc.ops import lookup
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import LabeledValue, NormalizationStatistic, Trace


@dataclass(frozen=True)
class StatisticPaths:
    """Where one mean goes: the nodes that compute on it alone, those at which it meets the positions that it is of
    again, and the first that does something else with it."""

    statistic_nodes: tuple[ir.Node, ...]
    rejoin_nodes: tuple[ir.Node, ...]
    non_normalizing_consumer: str | None


def statistic_paths(statistic: NormalizationStatistic, trace: Trace) -> StatisticPaths:
    """Follow a mean through pointwise operators and movement until it meets positions on the axes that it is taken
    over. A normalisation in one node is its own path."""
    start = statistic.context.node
    if statistic.context.spec.kind == "normalise":
        return StatisticPaths((), (start,), None)
    alone: dict[ir.Node, None] = {start: None}
    meets: dict[ir.Node, None] = {}
    stray: str | None = None
    todo = list(start.outputs)
    while todo:
        value = todo.pop(0)
        if value.is_graph_output():
            stray = stray or f"the output {value.name}"
        for node in value.consumers():
            kind = lookup(node.domain, node.op_type).kind
            if kind == "shape" or node in alone or node in meets:
                continue
            if kind == "pointwise" and varies_along(trace.values.get(node.outputs[0]), statistic.axes):
                meets[node] = None
            elif kind in ("pointwise", "movement") and node.graph is start.graph:
                alone[node] = None
                todo += node.outputs
            else:
                stray = stray or f"{node.op_type} {node.name}"
    return StatisticPaths(tuple(alone), tuple(meets), stray)


def varies_along(carried: LabeledValue | None, axes: tuple[int, ...]) -> bool:
    return carried is not None and any(
        labels.ndim + axis in varying_axes(labels) for labels in carried.factors for axis in axes
    )


def non_normalizing_consumer(statistic: NormalizationStatistic, trace: Trace) -> str | None:
    """What reads a mean for anything else than to normalise the positions that it is of; None where nothing does."""
    return statistic_paths(statistic, trace).non_normalizing_consumer
