"""Selections of columns of a table: how one is marked in a graph, and found again.

A selection is a Gather along the last axis. Where each head reads columns of its own, the indices of all heads stand
one behind the other, and a Reshape and, where heads stand before tokens, a Transpose follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.ops import GATHER, RESHAPE, TRANSPOSE
from snpc.types import IntArray

TABLE_WIDTH_KEY = "snpc.table_width"  # on the indices of a selection: how many columns the table has


def mark_selection(indices: ir.Value, table_width: int) -> None:
    """Say that a stored constant holds the columns that are read of a table of ``table_width`` columns."""
    indices.meta[TABLE_WIDTH_KEY] = table_width


def selects_columns(indices: ir.Value) -> bool:
    """Whether a stored constant says which columns of a table are read."""
    return TABLE_WIDTH_KEY in indices.meta


@dataclass(frozen=True)
class ColumnSelection:
    """A selection in a graph. ``columns``: [heads, columns that are read]; ``nodes``: those that make it."""

    table: ir.Value
    table_width: int
    columns: IntArray
    nodes: tuple[ir.Node, ...]

    @property
    def output(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    @property
    def same_in_all_heads(self) -> bool:
        return bool((self.columns == self.columns[0]).all())

    @property
    def key(self) -> object:
        """Equal for selections that need one value only."""
        if self.same_in_all_heads:
            return self.table, self.columns[0].tobytes()
        return self.table, self.columns.tobytes(), self.columns.shape, len(self.nodes)


def selection_at(node: ir.Node) -> ColumnSelection | None:
    """The selection that starts with ``node``, if one does and a cut has left it in this form."""
    if (node.domain, node.op_type) != ("", GATHER):
        return None
    table, indices = node.inputs
    if table is None or indices is None or indices.const_value is None or not selects_columns(indices):
        return None
    nodes, heads = [node], 1
    reshape = only_consumer(node.outputs[0], RESHAPE)
    if reshape is not None and (target := reshape.inputs[1]) is not None and target.const_value is not None:
        nodes.append(reshape)
        heads = int(target.const_value.numpy()[2])
        transpose = only_consumer(reshape.outputs[0], TRANSPOSE)
        nodes += [transpose] if transpose is not None else []
    columns = np.asarray(indices.const_value.numpy()).reshape(heads, -1)
    return ColumnSelection(table, int(indices.meta[TABLE_WIDTH_KEY]), columns, tuple(nodes))


def only_consumer(value: ir.Value, op: str) -> ir.Node | None:
    """The one node that reads ``value``, if it is of this operator."""
    users = list(value.consumers())
    return users[0] if len(users) == 1 and (users[0].domain, users[0].op_type) == ("", op) else None
