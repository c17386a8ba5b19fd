"""Walks over a graph: what a node reads, what lies upstream and downstream of a value."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts
from snpc.ops import lookup


def used_values(node: ir.Node) -> Iterator[ir.Value]:
    """What a node uses, the bodies of its subgraphs included."""
    for value in node.inputs:
        if value is not None:
            yield value
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from used_values(inner)


def movement_behind(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that only move positions, from the producer of ``value`` upstream, as far as one follows another."""
    while (node := value.producer()) is not None and node.inputs:
        source = node.inputs[0]
        if lookup(node.domain, node.op_type).kind != "movement" or source is None:
            return
        yield node
        value = source


def movement_root(value: ir.Value) -> ir.Value:
    """What ``value`` is a movement of: the first value upstream that another kind of node makes, or none."""
    for node in movement_behind(value):
        source = node.inputs[0]
        assert source is not None
        value = source
    return value


def ancestor_nodes(value: ir.Value) -> set[ir.Node]:
    """All nodes upstream of ``value``."""
    ancestors: set[ir.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in ancestors:
            ancestors.add(node)
            todo += used_values(node)
    return ancestors


def data_dependent_values(model: ir.Model) -> frozenset[ir.Value]:
    """Values that depend on the contents of the graph's inputs, not only on their shapes."""
    return dependent_values(model, [value for value in model.graph.inputs if not value.is_initializer()])


def dependent_values(
    model: ir.Model, values: Iterable[ir.Value], without: Container[ir.Node] = ()
) -> frozenset[ir.Value]:
    """``values``, and all that depend on their contents, other than through the nodes ``without``."""
    dependents = set(values)
    for node in model.graph:
        if (
            node not in without
            and lookup(node.domain, node.op_type).kind != "shape"
            and any(v in dependents for v in node.inputs)
        ):
            dependents.update(node.outputs)
    return frozenset(dependents)


@dataclass(frozen=True)
class ScalarFactor:
    """A node that multiplies by one number, or divides by it: input ``index`` of ``node``; ``factor`` multiplies."""

    node: ir.Node
    index: int
    factor: float
    divides: bool

    def stored_number(self, factor: float) -> float:
        """The number to store so that the node multiplies by ``factor``."""
        return 1.0 / factor if self.divides else factor


def scalar_factor_of(node: ir.Node, facts: ShapeFacts) -> tuple[ScalarFactor | None, bool]:
    """(the number this node multiplies by, whether values only move through it)."""
    spec = lookup(node.domain, node.op_type)
    if spec.kind == "movement" or (spec.effect == "same" and spec.kind == "pointwise"):
        return None, True
    if spec.kind != "pointwise" or spec.effect != "scale" or len(node.inputs) != 2:
        return None, False
    for index in (1, 0):
        value = node.inputs[index]
        array = facts.value.get(value) if value is not None else None
        if array is not None and array.dtype.kind == "f" and array.size == 1 and float(array.reshape(-1)[0]) > 0:
            divides = spec.divides
            if divides and index == 0:
                continue
            number = float(array.reshape(-1)[0])
            return ScalarFactor(node, index, 1.0 / number if divides else number, divides), False
    return None, False


def step_upstream(node: ir.Node, facts: ShapeFacts) -> tuple[ScalarFactor | None, ir.Value | None]:
    """(the number this node multiplies by, the input it multiplies or moves); (None, None) for any other node."""
    scalar, moves = scalar_factor_of(node, facts)
    if scalar is not None:
        return scalar, node.inputs[1 - scalar.index]
    return None, node.inputs[0] if moves else None


def reads_only_shape(node: ir.Node) -> bool:
    """Does a node depend on the shape of its input alone?"""
    return lookup(node.domain, node.op_type).kind == "shape"


def is_stored_constant(value: ir.Value) -> bool:
    """Is it an initializer with contents?"""
    return value.producer() is None and value.const_value is not None
