"""Selections of columns of a table that heads share: how one is written into a graph, and found again.

For the analysis a selection is a Gather along the last axis. Where each head reads columns of its own, the indices of
all heads stand one behind the other, and a Reshape and, where heads stand before tokens, a Transpose follow. A file
holds it with columns as rows, which runtimes copy whole: an eighth of the time at 256 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph.builder import add_constant, make_node, share_int64_constant, unused_name
from snpc.ops import GATHER, RESHAPE, TRANSPOSE
from snpc.types import IntArray

TABLE_WIDTH_KEY = "snpc.table_width"  # on the indices of a selection: how many columns the table has
ROWS_TO_HEADS = {1: (0, 1, 3, 2), 2: (0, 3, 1, 2)}  # axis of heads -> from [batch, heads, columns, tokens]


@dataclass(frozen=True)
class ColumnSelection:
    """``columns``: [heads, columns that each reads] of ``table``, which has ``rank`` axes and ``width`` columns on the
    last one. One row where all heads read the same; ``heads_axis``: else that of the four axes of the result, 1 or 2.
    """

    table: ir.Value
    rank: int
    width: int
    columns: IntArray
    heads_axis: int

    @property
    def key(self) -> object:
        """Equal for selections that need one value only."""
        return self.table, self.columns.shape, self.columns.tobytes(), self.heads_axis if len(self.columns) > 1 else 0

    @property
    def is_whole(self) -> bool:
        """Whether all columns are read in order."""
        return len(self.columns) == 1 and np.array_equal(self.columns[0], np.arange(self.width))

    def batch_size(self) -> int:
        """The first number of a Reshape of the table: that of the samples is copied, where it has such an axis."""
        return 0 if self.rank == 4 else 1


def selects_columns(indices: ir.Value) -> bool:
    """Whether a stored constant says which columns of a table are read, in the form for the analysis."""
    return TABLE_WIDTH_KEY in indices.meta


# -- for the analysis ------------------------------------------------------------------------------------------------


def nodes_for_analysis(graph: ir.Graph, selection: ColumnSelection, name: str) -> list[ir.Node]:
    """The nodes of a selection, called after ``name``; the last one gives the result."""
    heads, width = selection.columns.shape
    indices = add_constant(graph, selection.columns.reshape(-1), unused_name(name, graph.initializers))
    indices.meta[TABLE_WIDTH_KEY] = selection.width
    nodes = [make_node(GATHER, [selection.table, indices], {"axis": selection.rank - 1}, name=name)]
    if heads > 1:
        shape = np.array([selection.batch_size(), -1, heads, width])
        target = share_int64_constant(graph, shape, f"rotary_heads_{heads}_{width}")
        nodes.append(make_node(RESHAPE, [nodes[-1].outputs[0], target], name=f"{name}_heads"))
    if heads > 1 and selection.heads_axis == 1:
        nodes.append(make_node(TRANSPOSE, [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}, name=f"{name}_turned"))
    return nodes


def analyzed_selection(node: ir.Node) -> tuple[ColumnSelection, ir.Value] | None:
    """(selection, its result) that starts with ``node``, if one does and a cut has left it in this form."""
    indices = stored_input(node, GATHER)
    if indices is None or not selects_columns(indices):
        return None
    table, output, columns = node.inputs[0], node.outputs[0], contents(indices)[None]
    reshape, heads_axis = only_consumer(output, RESHAPE), 1
    target = stored_input(reshape, RESHAPE) if reshape is not None else None
    if reshape is not None and target is not None:
        output, columns, heads_axis = reshape.outputs[0], columns.reshape(int(contents(target)[2]), -1), 2
        transpose = only_consumer(output, TRANSPOSE)
        if transpose is not None:
            output, heads_axis = transpose.outputs[0], 1
    if (columns == columns[0]).all():
        columns = columns[:1]
    assert table is not None
    rank = node.attributes["axis"].as_int() + 1
    return ColumnSelection(table, rank, int(indices.meta[TABLE_WIDTH_KEY]), columns, heads_axis), output


def selected_table(value: ir.Value) -> ir.Value:
    """The table of which ``value`` is a selection in the form for the analysis; ``value`` itself where it is none."""
    node = value.producer()
    while node is not None and (node.domain, node.op_type) in (("", RESHAPE), ("", TRANSPOSE)):
        node = producer_of(node)
    indices = stored_input(node, GATHER)
    table = node.inputs[0] if node is not None else None
    return table if table is not None and indices is not None and selects_columns(indices) else value


# -- as files hold it ------------------------------------------------------------------------------------------------


def nodes_for_file(
    graph: ir.Graph, selection: ColumnSelection, name: str, indices: dict[bytes, ir.Value]
) -> list[ir.Node]:
    """The nodes of a selection, called after ``name``; the last one gives the result. ``indices``: constants of
    selections by their contents, to which new ones are added."""
    heads, width = selection.columns.shape
    key = selection.columns.tobytes()
    if key not in indices:
        indices[key] = add_constant(
            graph, selection.columns.reshape(-1), unused_name(f"{name}_read", graph.initializers)
        )
    if heads == 1:
        return [make_node(GATHER, [selection.table, indices[key]], {"axis": selection.rank - 1}, name=f"{name}_read")]
    tokens = selection.rank - (2 if selection.heads_axis == 1 else 3)
    perm = list(range(selection.rank))
    perm[tokens], perm[-1] = perm[-1], perm[tokens]
    rows = make_node(TRANSPOSE, [selection.table], {"perm": perm}, name=f"{name}_rows")
    read = make_node(GATHER, [rows.outputs[0], indices[key]], {"axis": tokens}, name=f"{name}_read")
    shape = np.array([selection.batch_size(), heads, width, -1])
    target = share_int64_constant(graph, shape, f"rotary_rows_{heads}_{width}")
    apart = make_node(RESHAPE, [read.outputs[0], target], name=f"{name}_apart")
    perm = list(ROWS_TO_HEADS[selection.heads_axis])
    return [rows, read, apart, make_node(TRANSPOSE, [apart.outputs[0]], {"perm": perm}, name=f"{name}_back")]


def stored_selection(value: ir.Value, rank: int) -> tuple[ir.Value, IntArray, int] | None:
    """(table, columns [heads, columns], axis of heads) of a selection in a file whose result is ``value``, of ``rank``
    axes; None where it is none."""
    node = value.producer()
    indices = stored_input(node, GATHER)
    if node is not None and indices is not None and node.inputs[0] is not None:
        axis = node.attributes.get_int("axis", 0) % rank
        return (node.inputs[0], contents(indices)[None], 1) if axis == rank - 1 else None
    perm = permutation_of(node)
    heads_axis = next((axis for axis, known in ROWS_TO_HEADS.items() if known == perm), 0)
    apart = producer_of(node)
    target, read = stored_input(apart, RESHAPE), producer_of(apart)
    indices, rows = stored_input(read, GATHER), producer_of(read)
    if not heads_axis or target is None or read is None or indices is None or rows is None or rows.inputs[0] is None:
        return None
    shape, perm = contents(target), permutation_of(rows)
    tokens = len(perm) - (2 if heads_axis == 1 else 3)
    swapped = [*range(len(perm))]
    if len(shape) != 4 or shape[3] != -1 or shape[1] * shape[2] != contents(indices).size or tokens < 0:
        return None
    swapped[tokens], swapped[-1] = swapped[-1], swapped[tokens]
    if tuple(swapped) != perm or read.attributes.get_int("axis", 0) != tokens:
        return None
    return rows.inputs[0], contents(indices).reshape(shape[1], shape[2]), heads_axis


# -- nodes -----------------------------------------------------------------------------------------------------------


def stored_input(node: ir.Node | None, op: str) -> ir.Value | None:
    """The second input of a node of this operator, where it is a stored vector."""
    if node is None or (node.domain, node.op_type) != ("", op) or len(node.inputs) < 2:
        return None
    value = node.inputs[1]
    return value if value is not None and value.const_value is not None and len(value.const_value.shape) == 1 else None


def contents(value: ir.Value) -> IntArray:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.int64)


def permutation_of(node: ir.Node | None) -> tuple[int, ...]:
    """The order of axes of a Transpose; empty for other nodes."""
    if node is None or (node.domain, node.op_type) != ("", TRANSPOSE) or "perm" not in node.attributes:
        return ()
    return tuple(node.attributes["perm"].as_ints())


def producer_of(node: ir.Node | None) -> ir.Node | None:
    """What makes the first input of ``node``."""
    value = node.inputs[0] if node is not None and node.inputs else None
    return value.producer() if value is not None else None


def only_consumer(value: ir.Value, op: str) -> ir.Node | None:
    """The one node that reads ``value``, if it is of this operator."""
    users = list(value.consumers())
    return users[0] if len(users) == 1 and (users[0].domain, users[0].op_type) == ("", op) else None
