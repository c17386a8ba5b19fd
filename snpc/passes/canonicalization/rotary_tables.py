"""Rotary tables that layers share: each layer, and each head, selects columns of its own of them.

Exporters compute the cosines and sines of the positions once, and every head of every layer multiplies by the same
table. A pair of channels could then go in all of them or in none. So a selection of columns is put in front of each use
for the analysis: its positions have labels of their own, which are not those of the table. What is left of it after a
cut is simplified before the file is written: nothing where all columns are read in order, one Gather where all heads of
a layer read the same.

A rotation is found by its form, ``x * cosine + turned x * sine``, not by how the table is made: it may be stored,
looked up by position, or computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph import (
    Attribute,
    ColumnSelection,
    ShapeFacts,
    add_constant,
    alternative_dim_sizes,
    base_dim_sizes,
    infer_graph,
    make_node,
    mark_selection,
    movement_root,
    selection_at,
    share_int64_constant,
    unused_name,
)
from snpc.ops import COS, GATHER, MUL, RESHAPE, SIN, TRANSPOSE, lookup, rotary_tables
from snpc.types import Shape


@dataclass(frozen=True)
class TableUse:
    """Input ``index`` of ``node`` is a rotary table of ``rank`` axes, whose last one has ``width`` columns.

    ``heads``: how many heads are turned by it, each of which may select columns of its own; 1 where all of them select
    the same. ``heads_axis``: 1 or 2 of the four axes of what is turned.
    """

    node: ir.Node
    index: int
    rank: int
    width: int
    heads: int = 1
    heads_axis: int = 1


class ForkRotaryTables(ir.passes.InPlacePass):
    """Put a selection of all columns, in order, between a rotary table and each of its uses."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [*find_rotations(graph), *find_rotary_inputs(graph)]
        if not found:
            return ir.passes.PassResult(model, False)
        sizes = base_dim_sizes(graph)[0]
        facts = [infer_graph(model, at, measure=False) for at in (sizes, alternative_dim_sizes(sizes))]
        uses = [use for node, index in found if (use := table_use(node, index, facts)) is not None]
        names = {str(node.name) for node in graph}
        for use in uses:
            insert_selection(graph, use, names)
        return ir.passes.PassResult(model, bool(uses))


class SimplifyColumnSelections(ir.passes.InPlacePass):
    """Leave of each selection of columns what it needs: no node where it reads all columns in order, no axis of heads
    where all heads read the same columns, and one selection for equal ones."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        present: dict[object, ir.Value] = {}
        indices: dict[tuple[int, bytes], ir.Value] = {}
        for node in list(graph):
            selection = selection_at(node)
            if selection is None or selection.output.is_graph_output():  # of a segment: the next one reads it
                continue
            if selection.key not in present:
                present[selection.key] = simplified(graph, selection, indices)
            twin = present[selection.key]
            if twin is not selection.output:
                selection.output.replace_all_uses_with(twin)
                modified = True
        return ir.passes.PassResult(model, modified)


# -- finding them ----------------------------------------------------------------------------------------------------


def find_rotations(graph: ir.Graph) -> Iterator[tuple[ir.Node, int]]:
    """(product, index of the table among its inputs) for both products of every ``x * cosine + turned x * sine``."""
    for node in graph:
        spec = lookup(node.domain, node.op_type)
        if spec.kind != "pointwise" or spec.effect != "add" or len(node.inputs) != 2:
            continue
        left, right = (value.producer() if value is not None else None for value in node.inputs)
        if left is None or right is None or not is_product(left) or not is_product(right):
            continue
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            tables = left.inputs[1 - i], right.inputs[1 - j]
            turned = turned_roots(left.inputs[i])
            if turned and turned == turned_roots(right.inputs[j]) and all(is_table(value) for value in tables):
                yield left, 1 - i
                yield right, 1 - j
                break


def find_rotary_inputs(graph: ir.Graph) -> Iterator[tuple[ir.Node, int]]:
    """(node, index of the table among its inputs) of nodes that turn inside, by a table that is no initializer."""
    for node in graph:
        for index in rotary_tables(node.domain, node.op_type):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and not value.is_initializer() and is_table(value):
                yield node, index


def is_product(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == ("", MUL) and None not in node.inputs


def turned_roots(value: ir.Value | None) -> set[ir.Value]:
    """What ``value`` is a rearrangement of, apart from signs and types; empty where that is stored."""
    roots: set[ir.Value] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        node = value.producer() if value is not None else None
        if value is None or (node is None and value.is_initializer()):
            return set()
        spec = lookup(node.domain, node.op_type) if node is not None else None
        if node is None or spec is None:
            roots.add(value)
        elif spec.kind == "concat":
            todo += node.inputs
        elif spec.kind == "movement" or (spec.kind == "pointwise" and len(node.inputs) == 1 and keeps_size(node)):
            todo.append(node.inputs[0])
        else:
            roots.add(value)
    return roots


def keeps_size(node: ir.Node) -> bool:
    """Whether a node of one input changes no more than a sign or a type."""
    return lookup(node.domain, node.op_type).effect in ("scale", "same")


def is_table(value: ir.Value | None) -> bool:
    """Whether cosines or sines, or stored numbers, are all that ``value`` is made of, but for factors and types."""
    while value is not None:
        value = movement_root(value)
        node = value.producer()
        if node is None:
            return value.is_initializer()
        if (node.domain, node.op_type) in (("", COS), ("", SIN)):
            return True
        spec = lookup(node.domain, node.op_type)
        if spec.kind == "concat":
            return all(is_table(part) for part in node.inputs)
        if spec.kind != "pointwise" or spec.effect not in ("scale", "same"):
            return False
        rest = [v for v in node.inputs if v is not None and not (v.is_initializer() and is_scalar(v))]
        if len(rest) != 1:
            return False
        value = rest[0]
    return False


def is_scalar(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size == 1


def table_use(node: ir.Node, index: int, facts: list[ShapeFacts]) -> TableUse | None:
    """The use of a table, by the shapes at two sizes of the dynamic dimensions; None where these do not tell."""
    table, turned = node.inputs[index], node.inputs[1 - index] if is_product(node) else None
    assert table is not None
    shapes = [at.shape.get(table) or () for at in facts]
    width = shapes[0][-1] if shapes[0] else 0
    if width < 2 or any(shape[-1:] != (width,) for shape in shapes):
        return None
    heads = {
        heads_of(shape, at.shape.get(turned)) if turned else (1, 1) for shape, at in zip(shapes, facts, strict=True)
    }
    return TableUse(node, index, len(shapes[0]), width, *(heads.pop() if len(heads) == 1 else ()))


def heads_of(table: Shape, turned: Shape | None) -> tuple[int, int]:
    """(number of heads, their axis) of what a table turns: that of the axes 1 and 2, tokens and heads in either order,
    along which the table does not vary. One head where that is not one of them."""
    if turned is None or len(turned) != 4 or len(table) < 2 or table[-1] != turned[-1]:
        return 1, 1
    aligned = (1,) * (4 - len(table)) + table
    broadcast = [axis for axis in (1, 2) if aligned[axis] == 1]
    return (turned[broadcast[0]], broadcast[0]) if len(broadcast) == 1 else (1, 1)


# -- writing them -----------------------------------------------------------------------------------------------------


def insert_selection(graph: ir.Graph, use: TableUse, names: set[str]) -> None:
    """Put a selection in front of one use. ``names`` of nodes are taken; those of the new ones join them."""
    table = use.node.inputs[use.index]
    assert table is not None
    name = f"{use.node.name}_columns"
    indices = add_constant(graph, np.tile(np.arange(use.width), use.heads), unused_name(name, graph.initializers))
    mark_selection(indices, use.width)
    nodes = [named_node(names, GATHER, [table, indices], {"axis": use.rank - 1}, name)]
    if use.heads > 1:
        shape = np.array([0 if use.rank == 4 else 1, -1, use.heads, use.width])
        target = share_int64_constant(graph, shape, f"rotary_heads_{use.heads}_{use.width}")
        nodes.append(named_node(names, RESHAPE, [nodes[-1].outputs[0], target], {}, f"{name}_heads"))
    if use.heads > 1 and use.heads_axis == 1:
        nodes.append(named_node(names, TRANSPOSE, [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}, f"{name}_turned"))
    graph.insert_before(use.node, nodes)
    use.node.replace_input_with(use.index, nodes[-1].outputs[0])


def named_node(
    names: set[str], op: str, inputs: list[ir.Value], attributes: Mapping[str, Attribute], name: str
) -> ir.Node:
    name = unused_name(name, names)
    names.add(name)
    return make_node(op, inputs, attributes, name=name)


def simplified(graph: ir.Graph, selection: ColumnSelection, indices: dict[tuple[int, bytes], ir.Value]) -> ir.Value:
    """The table itself, one selection for all heads, or the selection as it is. ``indices``: those that are in use, by
    the width of the table and their contents."""
    gather, columns = selection.nodes[0], selection.columns
    if selection.same_in_all_heads:
        columns = columns[0]
        if np.array_equal(columns, np.arange(selection.table_width)):
            return selection.table
    key = selection.table_width, columns.tobytes()
    if len(selection.nodes) == 1 or not selection.same_in_all_heads:
        assert gather.inputs[1] is not None
        gather.replace_input_with(1, indices.setdefault(key, gather.inputs[1]))
        return selection.output
    if key not in indices:
        indices[key] = add_constant(graph, columns, unused_name(f"{gather.name}_of_all_heads", graph.initializers))
    name = f"{gather.name}_same"
    same = make_node(GATHER, [selection.table, indices[key]], {"axis": gather.attributes["axis"]}, name=name)
    graph.insert_before(gather, same)
    return same.outputs[0]
