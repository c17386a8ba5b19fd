"""Constants with several consumers: forked for the analysis, merged again before writing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, is_float, make_node, static_shape, unused_name
from snpc.ops import GATHER, lookup, rotary_tables
from snpc.types import AnyArray

ORIGIN_KEY = "snpc.origin"


class ForkSharedConstants(ir.passes.InPlacePass):
    """Give an initializer of its own to each consumer of a float vector, to each pointwise or normalizing consumer of
    any float constant, and to each layer that turns queries and keys by a table. The copies share one tensor object."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for value in list(graph.initializers.values()):
            uses = list(value.uses())
            if len(uses) < 2 or value.is_graph_input() or value.is_graph_output() or not is_float(value.dtype):
                continue
            vector = is_vector(value)
            for count, (node, index) in enumerate(uses):
                per_position = lookup(node.domain, node.op_type).kind in ("pointwise", "normalize")
                turns = index in rotary_tables(node.domain, node.op_type)
                if count and node.graph is graph and (vector or per_position or turns):
                    node.replace_input_with(index, fork_constant(graph, value, count))
                    modified = True
        return ir.passes.PassResult(model, modified)


class MergeForkedConstants(ir.passes.InPlacePass):
    """Give copies that ended with the same contents one initializer again, under the original's name.

    Copies of an uncut constant share one tensor object; cut ones are compared by their contents.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        families: dict[str, list[ir.Value]] = {}
        for value in graph.initializers.values():
            families.setdefault(original_name(value), []).append(value)
        for name, members in families.items():
            if len(members) > 1 or members[0].name != name:
                modified = merge_family(graph, name, members) or modified
        return ir.passes.PassResult(model, modified)


class ShareRotaryTables(ir.passes.InPlacePass):
    """Write what layers kept of one rotary table as selections of its columns, where they kept different ones: a table
    has a row for each position, so that one per layer would be large. Runtimes fold the selection when they load."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        families: dict[str, list[ir.Value]] = {}
        for value in graph.initializers.values():
            if value.uses() and all(k in rotary_tables(node.domain, node.op_type) for node, k in value.uses()):
                families.setdefault(original_name(value), []).append(value)
        for name, members in families.items():
            if len(members) > 1 and all(len(static_shape(tensor_of(v))) == 2 for v in members):
                share_columns(graph, name, members)
                modified = True
        return ir.passes.PassResult(model, modified)


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def share_columns(graph: ir.Graph, name: str, members: list[ir.Value]) -> None:
    """Replace tables by selections of the columns of one that has them all."""
    columns: dict[bytes, int] = {}
    distinct: list[AnyArray] = []
    kept = []
    for value in members:
        table = np.asarray(tensor_of(value).numpy())
        for column in table.T:
            if columns.setdefault(column.tobytes(), len(columns)) == len(distinct):
                distinct.append(column)
        kept.append(np.array([columns[column.tobytes()] for column in table.T], np.int64))
    whole = add_constant(graph, np.stack(distinct, 1), unused_name(f"{name}_columns", graph.initializers))
    nodes = []
    for value, index in zip(members, kept, strict=True):
        label = unused_name(f"{value.name}_selected", graph.initializers)
        node = make_node(GATHER, [whole, add_constant(graph, index, f"{label}_indices")], {"axis": 1}, name=label)
        value.replace_all_uses_with(node.outputs[0])
        del graph.initializers[str(value.name)]
        nodes.append(node)
    graph.insert_before(graph[0], nodes)


def is_vector(value: ir.Value) -> bool:
    """At most one axis is longer than 1."""
    tensor = value.const_value
    return tensor is not None and sum(n > 1 for n in static_shape(tensor)) <= 1


def fork_constant(graph: ir.Graph, value: ir.Value, count: int) -> ir.Value:
    name = unused_name(f"{value.name}__{count}", graph.initializers)
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    copy.meta[ORIGIN_KEY] = value.meta.get(ORIGIN_KEY, value.name)
    graph.register_initializer(copy)
    return copy


def original_name(value: ir.Value) -> str:
    """The name that this constant has in the user's file."""
    return str(value.meta.get(ORIGIN_KEY, value.name))


def merge_family(graph: ir.Graph, name: str, members: list[ir.Value]) -> bool:
    """Merge those copies of the constant ``name`` that are equal, and drop those without a use. Whether any changed."""
    kept: list[tuple[object, ir.Value]] = []
    modified = False
    for value in members:
        if not value.uses() and not value.is_graph_output():
            if not value.is_graph_input():
                del graph.initializers[str(value.name)]
                modified = True
            continue
        key = content_key(value)
        twin = next((other for same, other in kept if same == key), None)
        if twin is None:
            kept.append((key, value))
            continue
        value.replace_all_uses_with(twin)
        del graph.initializers[str(value.name)]
        modified = True
    if kept and name not in graph.initializers:
        rename_initializer(graph, kept[0][1], name)
        modified = True
    return modified


def content_key(value: ir.Value) -> object:
    """Equal for constants of equal contents: by object for tensors that no edit has touched, else by their bytes."""
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.LazyTensor):
        return tensor.tobytes(), tuple(tensor.shape)
    return id(tensor)


def rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    del graph.initializers[str(value.name)]
    value.name = name
    graph.initializers[name] = value
