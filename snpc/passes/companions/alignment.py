"""Which constants and nodes of two graphs are the same, by the contents of their weights.

Exporters name weights and nodes as they like, so names say little. A large weight is found again by its contents. From
these anchors the alignment goes along the graphs: two nodes that read aligned values in the same place are the same
node, and so are their constants of equal contents (biases that are zero everywhere, gains that are one).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph import is_float, static_shape

MIN_ANCHOR = 16  # elements of a constant that is found by its contents alone

ContentKey = tuple[str, tuple[int, ...], bytes]


@dataclass(frozen=True)
class GraphAlignment:
    """``constants``: name in the second graph -> name in the first. ``nodes``: name in the first graph -> name in the
    second. ``contents``: keys of all float constants of the second graph."""

    constants: Mapping[str, str]
    nodes: Mapping[str, str]
    contents: frozenset[ContentKey] = field(repr=False)


def align_graphs(first: ir.Model, second: ir.Model) -> GraphAlignment:
    """Align two canonical graphs."""
    return Aligner(first, second).run()


def content_of(value: ir.Value) -> ContentKey | None:
    """Equal for float constants of equal type, shape and bytes; None of any other value."""
    tensor = value.const_value
    if tensor is None or not is_float(tensor.dtype):
        return None
    digest = hashlib.sha1(tensor.tobytes(), usedforsecurity=False).digest()
    return str(tensor.dtype), static_shape(tensor), digest


class Aligner:
    """Pairs of values and nodes that are the same, found from weights of equal contents onwards."""

    def __init__(self, first: ir.Model, second: ir.Model) -> None:
        self.first, self.second = first, second
        self.keys = {value: content_of(value) for m in (first, second) for value in m.graph.initializers.values()}
        self.values: dict[ir.Value, ir.Value] = {}  # of the second graph -> of the first
        self.nodes: dict[ir.Node, ir.Node] = {}  # of the first graph -> of the second
        self.todo: list[tuple[ir.Value, ir.Value]] = []

    def run(self) -> GraphAlignment:
        for value, other in self.anchors():
            self.pair_values(value, other)
        while self.todo:
            self.follow(*self.todo.pop())
        constants = {str(b.name): str(a.name) for b, a in self.values.items() if self.keys.get(b) is not None}
        nodes = {str(a.name): str(b.name) for a, b in self.nodes.items()}
        contents = {self.keys[value] for value in self.second.graph.initializers.values()}
        return GraphAlignment(constants, nodes, frozenset(key for key in contents if key is not None))

    def anchors(self) -> list[tuple[ir.Value, ir.Value]]:
        """Constants whose contents occur once in each graph."""
        found: list[dict[ContentKey, list[ir.Value]]] = []
        for model in (self.first, self.second):
            by_key: dict[ContentKey, list[ir.Value]] = defaultdict(list)
            for value in model.graph.initializers.values():
                key = self.keys[value]
                if key is not None and int(np.prod(key[1])) >= MIN_ANCHOR:
                    by_key[key].append(value)
            found.append(by_key)
        first, second = found
        return [(a[0], b[0]) for key, a in first.items() if len(a) == 1 and len(b := second.get(key, [])) == 1]

    def pair_values(self, value: ir.Value, other: ir.Value) -> None:
        if other not in self.values:
            self.values[other] = value
            self.todo.append((value, other))

    def follow(self, value: ir.Value, other: ir.Value) -> None:
        """Pair the nodes that are alone in reading both values in the same place."""
        uses, other_uses = readers(value), readers(other)
        for place, nodes in uses.items():
            others = other_uses.get(place, [])
            if len(nodes) == len(others) == 1:
                self.pair_nodes(nodes[0], others[0])

    def pair_nodes(self, node: ir.Node, other: ir.Node) -> None:
        if node in self.nodes or len(node.outputs) != len(other.outputs):
            return
        self.nodes[node] = other
        for a, b in zip(node.inputs, other.inputs, strict=False):
            key = self.keys.get(a) if a is not None else None
            if a is not None and b is not None and key is not None and key == self.keys.get(b):
                self.pair_values(a, b)
        for out, other_out in zip(node.outputs, other.outputs, strict=True):
            self.pair_values(out, other_out)


def readers(value: ir.Value) -> Mapping[tuple[str, str, int], list[ir.Node]]:
    """(domain, operator, input) -> the nodes that read the value there."""
    found: dict[tuple[str, str, int], list[ir.Node]] = defaultdict(list)
    for node, index in value.uses():
        found[node.domain, node.op_type, index].append(node)
    return found
