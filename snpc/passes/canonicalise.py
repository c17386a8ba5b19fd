"""The one normal form that every later stage reads: a private copy of the model in which

- model-local functions are inlined, branches that always go the same way are what they do, ``Constant`` nodes are
  initializers, and an initializer has no other name (exporters write ``Identity`` for biases that are equal),
- a vector shared by several users, and any constant shared by several pointwise users, is one initializer per user
  (exporters merge equal biases of unrelated layers; a weight shared on purpose stays shared),
- Einstein sums have two operands,
- nodes stand in topological order and every node has a name.

The copies share their bytes, and ``emit`` merges those that end equal, so a model that is not cut is written as read.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from snpc.graph.shapes import is_float, static_shape
from snpc.ops import lookup
from snpc.ops.names import IDENTITY
from snpc.passes.branches import settle_branches
from snpc.passes.einsum import spell_out_sums

ORIGIN = "snpc.origin"


def canonicalise(model: ir.Model) -> ir.Model:
    """Bring ``model`` (this object, in place) into the normal form and return it."""
    if model.functions:
        common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model.graph.sort()
    settle_branches(model)
    drop_aliases(model.graph)
    spell_out_sums(model.graph, model.graph.opset_imports.get("", 1))
    name_nodes(model.graph)
    fork_shared_constants(model.graph)
    return model


def drop_aliases(graph: ir.Graph) -> None:
    for node in list(graph):
        if (node.domain, node.op_type) != ("", IDENTITY) or node.outputs[0].is_graph_output():
            continue
        value = node.inputs[0]
        if value is not None and value.is_initializer() and value.graph is graph:
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)


def name_nodes(graph: ir.Graph) -> None:
    taken: set[str] = set()
    for index, node in enumerate(graph):
        name = node.name or f"{node.op_type}_{index}"
        while name in taken:
            name = f"{name}_{index}"
        node.name = name
        taken.add(name)


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
                node.replace_input_with(index, fork(graph, value, count))


def fork(graph: ir.Graph, value: ir.Value, count: int) -> ir.Value:
    name = f"{value.name}__{count}"
    while name in graph.initializers:
        name += "_"
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    copy.meta[ORIGIN] = value.meta.get(ORIGIN, value.name)
    graph.register_initializer(copy)
    return copy


def origin(value: ir.Value) -> str:
    """The name that this constant has in the user's file."""
    return str(value.meta.get(ORIGIN, value.name))


def merge_forks(graph: ir.Graph) -> None:
    """Give copies that ended with the same contents one initializer again, under the original's name.

    Copies of an uncut constant share one tensor object; cut ones are compared by what they hold.
    """
    families: dict[str, list[ir.Value]] = {}
    for value in graph.initializers.values():
        families.setdefault(origin(value), []).append(value)
    for name, members in families.items():
        if len(members) == 1 and members[0].name == name:
            continue
        kept: list[tuple[object, ir.Value]] = []
        for value in members:
            if not value.uses() and not value.is_graph_output():
                if not value.is_graph_input():
                    del graph.initializers[str(value.name)]
                continue
            key = contents(value)
            twin = next((other for same, other in kept if same == key), None)
            if twin is None:
                kept.append((key, value))
                continue
            value.replace_all_uses_with(twin)
            del graph.initializers[str(value.name)]
        if kept and name not in graph.initializers:
            rename(graph, kept[0][1], name)


def contents(value: ir.Value) -> object:
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.LazyTensor):
        return tensor.tobytes(), tuple(tensor.shape)
    return id(tensor)


def rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    del graph.initializers[str(value.name)]
    value.name = name
    graph.initializers[name] = value
