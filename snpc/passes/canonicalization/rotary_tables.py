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

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from snpc.graph import (
    ColumnSelection,
    ShapeFacts,
    alternative_dim_sizes,
    analyzed_selection,
    base_dim_sizes,
    infer_graph,
    movement_behind,
    movement_root,
    nodes_for_analysis,
    nodes_for_file,
    selects_columns,
    stored_selection,
    unused_name,
)
from snpc.ops import COS, MUL, SIN, lookup, rotary_tables
from snpc.types import Shape


class ForkRotaryTables(ir.passes.InPlacePass):
    """Put a selection of all columns, in order, between a rotary table and each of its uses. A selection that an
    earlier cut has left in the file becomes one for each use."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [*find_rotations(graph), *find_rotary_inputs(graph)]
        if not found:
            return ir.passes.PassResult(model, False)
        sizes = base_dim_sizes(graph)[0]
        facts = [infer_graph(model, at, measure=False) for at in (sizes, alternative_dim_sizes(sizes))]
        taken = {str(node.name) for node in graph}
        selections = [(node, index, selection_of(node, index, facts)) for node, index in found]
        for node, index, selection in selections:
            if selection is not None:
                name = unused_name(f"{node.name}_columns", taken)
                taken.add(name)
                nodes = nodes_for_analysis(graph, selection, name)
                graph.insert_before(node, nodes)
                node.replace_input_with(index, nodes[-1].outputs[0])
        return ir.passes.PassResult(model, any(selection is not None for *_, selection in selections))


class SimplifyColumnSelections(ir.passes.InPlacePass):
    """Write of each selection of columns what it needs: no node where it reads all columns in order, no axis of heads
    where all heads read the same columns, and one selection for equal ones."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        present: dict[object, ir.Value] = {}
        indices: dict[bytes, ir.Value] = {}
        for node in list(graph):
            found = analyzed_selection(node)
            if found is None or found[1].is_graph_output():  # of a segment: the next one reads it
                continue
            selection, result = found
            if selection.is_whole:
                present.setdefault(selection.key, selection.table)
            if selection.key not in present:
                nodes = nodes_for_file(graph, selection, str(node.name), indices)
                graph.insert_before(node, nodes)
                present[selection.key] = nodes[-1].outputs[0]
            result.replace_all_uses_with(present[selection.key])
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


def selection_of(node: ir.Node, index: int, facts: list[ShapeFacts]) -> ColumnSelection | None:
    """The selection at one use of a table, by the shapes at two sizes of the dynamic dimensions; None where these do
    not tell, or where it is one for the analysis already."""
    value, turned = node.inputs[index], node.inputs[1 - index] if is_product(node) else None
    assert value is not None
    width, rank = width_and_rank(value, facts)
    if width < 2 or is_selected(value):
        return None
    heads = {
        heads_of(at.shape.get(value) or (), at.shape.get(turned)) if turned is not None else (1, 1) for at in facts
    }
    count, axis = heads.pop() if len(heads) == 1 else (1, 1)
    earlier = stored_selection(value, rank)
    if earlier is None:
        return ColumnSelection(value, rank, width, np.tile(np.arange(width), (count, 1)), axis)
    table, columns, earlier_axis = earlier
    width, rank = width_and_rank(table, facts)
    if len(columns) > 1:
        count, axis = 1, earlier_axis
    return ColumnSelection(table, rank, width, np.tile(columns, (count, 1)), axis) if width else None


def is_selected(value: ir.Value) -> bool:
    """Whether ``value`` is a selection for the analysis."""
    indices = (node.inputs[1] for node in movement_behind(value) if len(node.inputs) > 1)
    return any(constant is not None and selects_columns(constant) for constant in indices)


def width_and_rank(table: ir.Value, facts: list[ShapeFacts]) -> tuple[int, int]:
    """(columns, axes) of a table; (0, 0) where shapes do not tell."""
    shapes = [at.shape.get(table) or () for at in facts]
    same = bool(shapes[0]) and all(shape[-1:] == shapes[0][-1:] for shape in shapes)
    return (shapes[0][-1], len(shapes[0])) if same else (0, 0)


def heads_of(table: Shape, turned: Shape | None) -> tuple[int, int]:
    """(number of heads, their axis) of what a table turns: that of the axes 1 and 2, tokens and heads in either order,
    along which the table does not vary. One head where that is not one of them."""
    if turned is None or len(turned) != 4 or len(table) < 2 or table[-1] != turned[-1]:
        return 1, 1
    aligned = (1,) * (4 - len(table)) + table
    broadcast = [axis for axis in (1, 2) if aligned[axis] == 1]
    return (turned[broadcast[0]], broadcast[0]) if len(broadcast) == 1 else (1, 1)
