"""Constants that several nodes read: forked for the analysis, merged again before writing."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph.shapes import is_float, static_shape
from snpc.ops import lookup

ORIGIN_KEY = "snpc.origin"


def is_vector(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and sum(n > 1 for n in static_shape(tensor)) <= 1


def fork_shared_constants(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if len(uses) < 2 or value.is_graph_input() or value.is_graph_output() or not is_float(value.dtype):
            continue
        vector = is_vector(value)
        for count, (node, index) in enumerate(uses):
            per_position = lookup(node.domain, node.op_type).kind in ("pointwise", "normalise")
            if count and node.graph is graph and (vector or per_position):
                node.replace_input_with(index, fork_constant(graph, value, count))


def fork_constant(graph: ir.Graph, value: ir.Value, count: int) -> ir.Value:
    name = f"{value.name}__{count}"
    while name in graph.initializers:
        name += "_"
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    copy.meta[ORIGIN_KEY] = value.meta.get(ORIGIN_KEY, value.name)
    graph.register_initializer(copy)
    return copy


def original_name(value: ir.Value) -> str:
    """The name that this constant has in the user's file."""
    return str(value.meta.get(ORIGIN_KEY, value.name))


def merge_forks(graph: ir.Graph) -> None:
    """Give copies that ended with the same contents one initializer again, under the original's name.

    Copies of an uncut constant share one tensor object; cut ones are compared by what they hold.
    """
    families: dict[str, list[ir.Value]] = {}
    for value in graph.initializers.values():
        families.setdefault(original_name(value), []).append(value)
    for name, members in families.items():
        if len(members) == 1 and members[0].name == name:
            continue
        kept: list[tuple[object, ir.Value]] = []
        for value in members:
            if not value.uses() and not value.is_graph_output():
                if not value.is_graph_input():
                    del graph.initializers[str(value.name)]
                continue
            key = content_key(value)
            twin = next((other for same, other in kept if same == key), None)
            if twin is None:
                kept.append((key, value))
                continue
            value.replace_all_uses_with(twin)
            del graph.initializers[str(value.name)]
        if kept and name not in graph.initializers:
            rename_initializer(graph, kept[0][1], name)


def content_key(value: ir.Value) -> object:
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.LazyTensor):
        return tensor.tobytes(), tuple(tensor.shape)
    return id(tensor)


def rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    del graph.initializers[str(value.name)]
    value.name = name
    graph.initializers[name] = value
