"""Constants with several consumers: forked for the analysis, merged again before writing."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph import is_float, static_shape, unused_name
from snpc.ops import lookup

ORIGIN_KEY = "snpc.origin"


class ForkSharedConstants(ir.passes.InPlacePass):
    """Give each consumer of a float vector, and each pointwise or normalizing consumer of any float constant, an
    initializer of its own. The copies share one tensor object."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for value in list(graph.initializers.values()):
            uses = list(value.uses())
            if len(uses) < 2 or value.is_graph_input() or value.is_graph_output() or not is_float(value.dtype):
                continue
            vector = is_vector(value)
            for count, (node, index) in enumerate(uses):
                per_position = lookup(node.domain, node.op_type).kind in ("pointwise", "normalize")
                if count and node.graph is graph and (vector or per_position):
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
