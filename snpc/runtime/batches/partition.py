"""Where a model is cut so that no segment's weights take more memory than there is for them.

Between two layers of a transformer little more than the residual stream crosses, so of the positions at which a segment
could end, the one where the fewest bytes cross is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import onnx_ir as ir

from snpc.graph import Segment, ShapeFacts, split_into_segments, used_values
from snpc.runtime.execution import session_bytes

Span = tuple[int, int]  # the first and the last of several nodes that stay in one segment

UNKNOWN_ELEMENTS = 1 << 24  # of a value without a known shape: other positions are preferred


def partition(model: ir.Model, facts: ShapeFacts, limit: int, together: Iterable[Span] = ()) -> list[Segment]:
    """The graph in segments of about ``limit`` bytes of weights in a session each, or of one node that takes more.

    ``facts``: of this graph, or by name of one that it was made from. ``together``: spans of nodes, by index, that are
    not separated. One segment where an output is no result of a node.
    """
    nodes = list(model.graph)
    if any(value.producer() is None for value in model.graph.outputs):
        return split_into_segments(model, [])
    crossing = crossing_bytes(model, facts)
    for first, last in together:
        crossing[first + 1 : last + 1] = [math.inf] * (last - first)
    ends: list[int] = []
    while (end := segment_end(nodes, crossing, ends[-1] if ends else 0, limit)) < len(nodes):
        ends.append(end)
    return split_into_segments(model, ends)


def segment_end(nodes: Sequence[ir.Node], crossing: Sequence[float], first: int, limit: int) -> int:
    """Behind which node the segment ends that begins at ``first``: in the second half of ``limit``, where least
    crosses; where that is nowhere possible, at the next position at which it is."""
    sizes = list(accumulate_weights(nodes[first:]))
    if sizes[-1] <= limit:
        return len(nodes)
    within = [first + k + 1 for k, size in enumerate(sizes) if size <= limit]
    late = [end for end in within if 2 * sizes[end - first - 1] > limit]
    for candidates in (late, within):
        possible = [end for end in candidates if crossing[end] < math.inf]
        if possible:
            return min(possible, key=lambda end: (crossing[end], -end))
    return next((end for end in range(first + 1, len(nodes)) if crossing[end] < math.inf), len(nodes))


def accumulate_weights(nodes: Sequence[ir.Node]) -> Iterable[int]:
    """Bytes of the weights that a session of the first 1, 2, ... of these nodes holds."""
    seen: set[ir.TensorProtocol] = set()

    def added(node: ir.Node) -> int:
        tensors = weights_of([node]) - seen
        seen.update(tensors)
        return session_bytes(tensors)

    return accumulate(map(added, nodes))


def weights_of(nodes: Iterable[ir.Node]) -> set[ir.TensorProtocol]:
    """The weights that these nodes use."""
    used = {value for node in nodes for value in used_values(node) if value.is_initializer()}
    return {value.const_value for value in used if value.const_value is not None}


def crossing_bytes(model: ir.Model, facts: ShapeFacts) -> list[float]:
    """[nodes + 1]: bytes of the values that nodes before a position make and nodes from there on use; infinite where
    the type of one is not known. Outputs of the graph count everywhere, inputs nowhere."""
    nodes = list(model.graph)
    types, shapes = facts.types_by_name, facts.shapes_by_name
    made = {value: k for k, node in enumerate(nodes) for value in node.outputs}
    last_use = {value: k for k, node in enumerate(nodes) for value in used_values(node) if value in made}
    changes = [0.0] * (len(nodes) + 2)
    unknown = [0] * (len(nodes) + 2)
    for value, last in last_use.items():
        name = str(value.name)
        shape, dtype = shapes.get(name), types.get(name)
        size = (UNKNOWN_ELEMENTS if shape is None else math.prod(shape)) * (dtype.itemsize if dtype is not None else 0)
        changes[made[value] + 1] += size
        changes[last + 1] -= size
        if dtype is None:
            unknown[made[value] + 1] += 1
            unknown[last + 1] -= 1
    return [
        math.inf if blocked else size for size, blocked in zip(accumulate(changes), accumulate(unknown), strict=True)
    ][: len(nodes) + 1]
