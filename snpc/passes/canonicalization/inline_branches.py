"""Branches whose condition is the same at all sizes: exporters ask for the rank of something that they did not know."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts, choose_dim_sizes, has_subgraphs
from snpc.ops import lookup
from snpc.ops.names import IDENTITY, SHAPE


def inline_branches(model: ir.Model) -> None:
    """Replace every branch of ``model`` (in place) whose condition only depends on constants and ranks by what it does;
    also those that this brings to light."""
    while any(lookup(node.domain, node.op_type).branches for node in model.graph):
        _, facts = choose_dim_sizes(model)
        settled = [(node, taken) for node in model.graph if (taken := constant_branch(node, facts)) is not None]
        if not settled:
            return
        for node, taken in settled:
            splice_branch(model.graph, node, taken)


def constant_branch(node: ir.Node, facts: ShapeFacts) -> ir.Graph | None:
    names = lookup(node.domain, node.op_type).branches
    condition = node.inputs[0] if names else None
    if not names or condition is None or condition not in facts.value or not is_input_independent(condition, facts):
        return None
    return node.attributes[names[0 if bool(facts.value[condition].reshape(-1)[0]) else 1]].as_graph()


def is_input_independent(value: ir.Value, facts: ShapeFacts) -> bool:
    """Is it the same whatever the inputs and their sizes are?"""
    node = value.producer()
    if node is None:
        return value.is_initializer() and not value.is_graph_input()
    spec = lookup(node.domain, node.op_type)
    if spec.kind == "shape" and len(node.inputs) == 1 and node.inputs[0] is not None:
        above = node.inputs[0].producer()
        one = facts.shape.get(value) in ((), (1,))
        return above is not None and above.op_type == SHAPE and not above.attributes and one
    given = [v for v in node.inputs if v is not None]
    return (
        bool(given)
        and not (spec.is_random or has_subgraphs(node))
        and all(is_input_independent(v, facts) for v in given)
    )


def splice_branch(graph: ir.Graph, node: ir.Node, taken: ir.Graph) -> None:
    """Put what ``taken`` does in the place of ``node``."""
    names = {str(v.name) for inner in graph for v in inner.outputs} | {str(v.name) for v in graph.inputs}
    names |= set(graph.initializers)
    results = list(taken.outputs)
    for value in list(taken.initializers.values()):
        del taken.initializers[str(value.name)]
        value.name = unused_value_name(str(value.name), names)
        graph.register_initializer(value)
    inside = list(taken)
    taken.outputs.clear()
    taken.remove(inside)
    for inner in inside:
        inner.name = None
        for value in inner.outputs:
            value.name = unused_value_name(str(value.name), names)
    graph.insert_before(node, inside)
    for result, out in zip(results, list(node.outputs), strict=True):
        alias = ir.node(IDENTITY, [result])
        alias.outputs[0].type, alias.outputs[0].shape = out.type, out.shape
        graph.insert_before(node, alias)
        out.replace_all_uses_with(alias.outputs[0], replace_graph_outputs=True)
        alias.outputs[0].name, out.name = out.name, None
    graph.remove(node)


def unused_value_name(name: str, names: set[str]) -> str:
    while name in names:
        name += "_"
    names.add(name)
    return name
