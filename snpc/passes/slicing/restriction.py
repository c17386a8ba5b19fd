"""A model that says less: logits of some entries of the vocabulary, or of the last position only.

A smaller vocabulary is a cut as any other: rows of the tables that token ids address, and the positions of all weights
whose units reach the logits. No label joins the two where they are not one tensor, so both are named here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import add_constant, make_node, replace_graph_output, static_shape, unused_name
from snpc.ops import GATHER, lookup
from snpc.passes.grouping import TracedGraph
from snpc.passes.propagation import varying_axes
from snpc.passes.slicing.slice import Cuts
from snpc.types import BoolArray, IntArray


def find_logits(traced_graph: TracedGraph, ids: str) -> ir.Value:
    """The output [batch, tokens, vocabulary] of a model with token ids [batch, tokens] in the input ``ids``: as wide as
    a table that these address, or wider. Raises UserError where there is none."""
    facts = traced_graph.facts
    source = next(v for v in traced_graph.model.graph.inputs if v.name == ids)
    tokens = facts.shape.get(source)
    entries = min((rows_of(table) for _, table in readers_of_ids(source) if table is not None), default=2)
    for value in traced_graph.model.graph.outputs:
        shape, labeled = facts.shape.get(value), traced_graph.trace.values.get(value)
        if shape is None or labeled is None or len(shape) != 3 or shape[:2] != tokens or shape[2] < entries:
            continue
        if any(varying_axes(labels) == {2} for labels in labeled.factors):
            return value
    raise UserError("it has no output with logits over a vocabulary for every token")


def vocabulary_cuts(traced_graph: TracedGraph, ids: str, kept: IntArray) -> Cuts:
    """(constant, axis) -> positions that go, so that the entries ``kept``, ascending, stay."""
    model, trace, units = traced_graph.model, traced_graph.trace, traced_graph.units
    logits = find_logits(traced_graph, ids)
    labels = next(f for f in trace.values[logits].factors if varying_axes(f) == {2}).reshape(-1)
    tables = addressed_tables(model, ids)
    least = min(len(labels), *map(rows_of, tables))
    if kept[-1] >= least:
        raise UserError(f"entry {kept[-1]} of the vocabulary is not among its {least}")
    gone = np.zeros(trace.table.count + 1, bool)
    gone[units.unit_of_label[labels[removed_mask(len(labels), kept)]]] = True
    cuts: dict[tuple[str, int], BoolArray] = {}
    for axis in trace.table.axes:
        mask = gone[units.unit_of_label[axis.first_label : axis.first_label + axis.size]]
        if mask.any():
            cuts[str(axis.constant.name), axis.axis] = mask
    for table in tables:
        cuts[str(table.name), 0] = removed_mask(rows_of(table), kept)
    return cuts


def removed_mask(size: int, kept: IntArray) -> BoolArray:
    """[size]: true where an entry goes."""
    mask = np.ones(size, bool)
    mask[kept] = False
    return mask


def readers_of_ids(ids: ir.Value) -> Iterator[tuple[ir.Node, ir.Value | None]]:
    """(node, the table whose rows it reads by ``ids``); None where it reads the ids themselves."""
    for node, index in ids.uses():
        spec = lookup(node.domain, node.op_type)
        table = node.inputs[0]
        if index == 0 and (spec.kind == "movement" or (spec.kind == "pointwise" and spec.effect == "same")):
            yield from readers_of_ids(node.outputs[0])
        elif index == 1 and spec.selects and table is not None and table.const_value is not None:
            yield node, table
        elif spec.kind != "shape":
            yield node, None


def addressed_tables(model: ir.Model, ids: str) -> list[ir.Value]:
    """The constants whose rows the input ``ids`` addresses. Raises UserError where there is none, and where the ids are
    used otherwise: their numbers would no longer mean the same."""
    readers = list(readers_of_ids(next(v for v in model.graph.inputs if v.name == ids)))
    other = next((node for node, table in readers if table is None), None)
    if other is not None:
        raise UserError(
            f"{other.op_type} {other.name} reads the token ids themselves, where other ids would mean something else"
        )
    tables = [table for _, table in readers if table is not None]
    if not tables:
        raise UserError(f"input {ids} addresses no table of embeddings")
    return list(dict.fromkeys(tables))


def rows_of(table: ir.Value) -> int:
    """The number of rows of a table."""
    assert table.const_value is not None
    return static_shape(table.const_value)[0]


def keep_last_row(model: ir.Model, logits: str) -> None:
    """Let the output ``logits`` [batch, tokens, vocabulary] be that of the last token, [batch, 1, vocabulary]."""
    graph = model.graph
    value = next(v for v in graph.outputs if v.name == logits)
    index = add_constant(graph, np.array([-1], np.int64), unused_name(f"{logits}__last", graph.initializers))
    node = make_node(GATHER, [value, index], {"axis": 1}, name=f"{logits}__last_row")
    graph.append(node)
    node.outputs[0].type = value.type
    if value.shape is not None:
        node.outputs[0].shape = ir.Shape([value.shape[0], 1, *value.shape[2:]])
    replace_graph_output(graph, value, node.outputs[0], f"{logits}__all")
