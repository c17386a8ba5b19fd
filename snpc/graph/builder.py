"""Adds constants and nodes to a graph, under names that are free, and redirects uses to what was added.

Every writer of snpc makes its nodes here. A node is made first and placed by its writer (``append``, ``prepend``), as
only the writer knows what it must stand before or behind.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from snpc.types import AnyArray, IntArray

Attribute = ir.Attr | int | float | str | Sequence[int] | ir.TensorProtocol
"""What an attribute of a new node can hold."""


def unused_name(name: str, taken: Container[str]) -> str:
    """``name``, with as many ``_`` behind it as make it free."""
    while name in taken:
        name += "_"
    return name


def add_constant(
    graph: ir.Graph, array: AnyArray, name: str, dtype: ir.DataType | None = None, *, typed: bool = True
) -> ir.Value:
    """A new initializer that holds ``array``. ``name`` must be free; ``dtype``: where numpy has no such type.

    ``typed``: whether the value says its type and shape besides its tensor. A model file repeats them in
    ``value_info``, and so do engines that read and write it; where no pass asks for them, they are left out.
    """
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    if typed:
        return ir.tape.Tape(graph).initializer(tensor, name)
    value = ir.Value(name=name, const_value=tensor)
    graph.register_initializer(value)
    return value


def share_int64_constant(graph: ir.Graph, array: IntArray, name: str) -> ir.Value:
    """The initializer of this name where it holds ``array`` already, else a new one under a free name."""
    present = graph.initializers.get(name)
    if present is not None and present.const_value is not None and np.array_equal(present.const_value.numpy(), array):
        return present
    return add_constant(graph, array, unused_name(name, graph.initializers))


def make_node(
    op: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Attribute] | None = None,
    *,
    name: str | None,
    outputs: Sequence[str | None] | None = None,
    domain: str = "",
) -> ir.Node:
    """A node that stands in no graph yet. ``outputs``: names of its outputs (None: as the graph will call it), by
    default one called ``<name>_out``."""
    names = [f"{name}_out"] if outputs is None else outputs
    node = ir.node(op, inputs, attributes=attributes or None, domain=domain, num_outputs=len(names), name=name)
    for value, output in zip(node.outputs, names, strict=True):
        value.name = output
    return node


def copy_node(node: ir.Node, inputs: Sequence[ir.Value | None], *, name: str, outputs: Sequence[str]) -> ir.Node:
    """``node`` once more, with its attributes, on other inputs and under other names."""
    attributes = list(node.attributes.values())
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(outputs), name=name)
    for value, output in zip(copy.outputs, outputs, strict=True):
        value.name = output
    return copy


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """``new`` takes the place of ``old`` for all that use it, outputs of the graph included, with its name and type."""
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None


def redirect_uses(users: Sequence[tuple[ir.Node, int]], new: ir.Value) -> None:
    """Make ``users``, taken before the nodes in between were added, use ``new``."""
    for user, index in users:
        user.replace_input_with(index, new)


def replace_graph_output(graph: ir.Graph, old: ir.Value, new: ir.Value, old_name: str) -> None:
    """``new`` becomes the output of the graph that ``old`` was, under its name; ``old`` is called ``old_name``."""
    graph.outputs[graph.outputs.index(old)] = new
    new.name, old.name = old.name, old_name
