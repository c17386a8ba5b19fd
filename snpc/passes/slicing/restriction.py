"""A model that says less: logits of some entries of the vocabulary, or of the last position only.

A smaller vocabulary is a cut as any other: rows of the tables that token ids address, and the positions of all weights
whose units reach the logits. No label joins the two where they are not one tensor, so both are named here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import add_constant, make_node, replace_graph_output, unused_name
from snpc.ops import GATHER, lookup
from snpc.passes.grouping import TracedGraph
from snpc.passes.propagation import varying_axes
from snpc.passes.slicing.slice import Cuts
from snpc.types import BoolArray, IntArray


def find_logits(traced_graph: TracedGraph, ids: str) -> ir.Value:
    """The output [batch, tokens, vocabulary] of a model with token ids [batch, tokens] in the input ``ids``. Raises
    UserError where there is none."""
    facts = traced_graph.facts
    tokens = next(facts.shape.get(v) for v in traced_graph.model.graph.inputs if v.name == ids)
    for value in traced_graph.model.graph.outputs:
        shape, labeled = facts.shape.get(value), traced_graph.trace.values.get(value)
        if shape is None or labeled is None or len(shape) != 3 or shape[:2] != tokens:
            continue
        if any(varying_axes(labels) == {2} for labels in labeled.factors):
            return value
    raise UserError("it has no output with logits over a vocabulary for every token")


def vocabulary_cuts(traced_graph: TracedGraph, ids: str, kept: IntArray) -> Cuts:
    """(constant, axis) -> positions that go, so that the entries ``kept``, ascending, stay."""
    model, trace, units = traced_graph.model, traced_graph.trace, traced_graph.units
    logits = find_logits(traced_graph, ids)
    labels = next(f for f in trace.values[logits].factors if varying_axes(f) == {2}).reshape(-1)
    tables = list(addressed_tables(next(v for v in model.graph.inputs if v.name == ids)))
    if not tables:
        raise UserError(f"input {ids} addresses no table of embeddings")
    sizes = [int(table.const_value.shape[0]) for table in tables if table.const_value is not None]  # type: ignore[arg-type]
    least = min(len(labels), *sizes)
    if kept[-1] >= least:
        raise UserError(f"entry {kept[-1]} of the vocabulary is not among its {least}")
    gone = np.zeros(trace.table.count + 1, bool)
    gone[units.unit_of_label[labels[removed_mask(len(labels), kept)]]] = True
    cuts: dict[tuple[str, int], BoolArray] = {}
    for axis in trace.table.axes:
        mask = gone[units.unit_of_label[axis.first_label : axis.first_label + axis.size]]
        if mask.any():
            cuts[str(axis.constant.name), axis.axis] = mask
    for table, size in zip(tables, sizes, strict=True):
        cuts[str(table.name), 0] = removed_mask(size, kept)
    return cuts


def removed_mask(size: int, kept: IntArray) -> BoolArray:
    """[size]: true where an entry goes."""
    mask = np.ones(size, bool)
    mask[kept] = False
    return mask


def addressed_tables(ids: ir.Value) -> Iterator[ir.Value]:
    """The constants whose rows ``ids`` address. Raises UserError where the ids are used otherwise: their numbers would
    no longer mean the same."""
    for node, index in ids.uses():
        spec = lookup(node.domain, node.op_type)
        table = node.inputs[0]
        if index == 0 and (spec.kind == "movement" or (spec.kind == "pointwise" and spec.effect == "same")):
            yield from addressed_tables(node.outputs[0])
        elif index == 1 and spec.selects and table is not None and table.const_value is not None:
            yield table
        elif spec.kind != "shape":
            raise UserError(
                f"{node.op_type} {node.name} reads the token ids themselves, and other ids would mean something else there"
            )


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
