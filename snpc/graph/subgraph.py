"""Segments of a graph: contiguous nodes in topological order, with their inputs and outputs.

Run one after the other, each on the outputs of earlier ones, they compute what the whole graph does. So a later segment
can be run many times without those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts
from snpc.graph.traversal import used_values


@dataclass(frozen=True)
class Segment:
    """Nodes ``first`` to ``last`` (not included). ``inputs`` and ``outputs`` are names of values that enter from before
    and that are used after; ``needed``: every value that nodes from ``last`` on use, for who carries them over."""

    first: int
    last: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    live_values: frozenset[str]


def split_into_segments(model: ir.Model, ends: Sequence[int]) -> list[Segment]:
    """The graph split at ``ends`` (indices of nodes that start a new segment); the last segment ends with the graph."""
    nodes = list(model.graph)
    producer_index = {value: k for k, node in enumerate(nodes) for value in node.outputs}
    producer_index |= {value: -1 for value in model.graph.inputs if not value.is_initializer()}
    last_use = dict.fromkeys(producer_index, -1)
    for k, node in enumerate(nodes):
        for value in used_values(node):
            if value in producer_index:
                last_use[value] = k
    for value in model.graph.outputs:
        if value in producer_index:  # an initializer can be an output too
            last_use[value] = len(nodes)
    segments = []
    first = 0
    for last in sorted({*ends, len(nodes)} - {0}):
        used = {
            value: None
            for node in nodes[first:last]
            for value in used_values(node)
            if producer_index.get(value, first) < first
        }
        out = [v for node in nodes[first:last] for v in node.outputs if v.name and last_use.get(v, -1) >= last]
        needed = frozenset(str(v.name) for v, k in last_use.items() if k >= last and producer_index[v] < last)
        segments.append(Segment(first, last, tuple(str(v.name) for v in used), tuple(str(v.name) for v in out), needed))
        first = last
    return segments


def extract_segment(model: ir.Model, segment: Segment, facts: ShapeFacts) -> ir.Model:
    """A model of copies of these nodes alone. ``facts`` of ``model`` must know the types of the segment's inputs and
    outputs."""
    types = facts.types_by_name
    inside = list(model.graph)[segment.first : segment.last]
    used = {value: None for node in inside for value in used_values(node)}
    known = {str(v.name): v for v in (*used, *(out for node in inside for out in node.outputs))}
    graph = ir.GraphView(
        [known[name] for name in segment.inputs],
        [known[name] for name in segment.outputs],
        nodes=inside,
        initializers=[v for v in used if v.is_initializer() and v.graph is model.graph],
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    ).clone()
    for value in graph.inputs:
        if not known[str(value.name)].is_graph_input():
            value.shape = None
        value.type = ir.TensorType(types[str(value.name)])
    for value in graph.outputs:
        value.dtype = types[str(value.name)]
    return ir.Model(graph, ir_version=model.ir_version)
