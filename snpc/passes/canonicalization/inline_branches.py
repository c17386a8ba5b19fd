"""Inlines branches whose condition no input can change: exporters branch on ranks that they did not know."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph import ShapeFacts, choose_dim_sizes, has_subgraphs, make_node, replace_value, unused_name
from snpc.ops import IDENTITY, SHAPE, lookup


class InlineBranches(ir.passes.InPlacePass):
    """Replace every branch whose condition depends on constants and ranks only, and those that this brings to light."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        while any(lookup(node.domain, node.op_type).branches for node in model.graph):
            _, facts = choose_dim_sizes(model)
            branches = [(node, body) for node in model.graph if (body := constant_branch(node, facts)) is not None]
            if not branches:
                break
            for node, body in branches:
                splice_branch(model.graph, node, body)
            modified = True
        return ir.passes.PassResult(model, modified)


def constant_branch(node: ir.Node, facts: ShapeFacts) -> ir.Graph | None:
    """The branch that is always taken; None where the input decides, and for other nodes."""
    names = lookup(node.domain, node.op_type).branches
    condition = node.inputs[0] if names else None
    if not names or condition is None or condition not in facts.value or not is_input_independent(condition, facts):
        return None
    return node.attributes[names[0 if bool(facts.value[condition].reshape(-1)[0]) else 1]].as_graph()


def is_input_independent(value: ir.Value, facts: ShapeFacts) -> bool:
    """Is the value the same for all inputs of the model and all their sizes?"""
    node = value.producer()
    if node is None:
        return value.is_initializer() and not value.is_graph_input()
    spec = lookup(node.domain, node.op_type)
    if spec.kind == "shape" and len(node.inputs) == 1 and node.inputs[0] is not None:
        source = node.inputs[0].producer()
        one = facts.shape.get(value) in ((), (1,))
        return source is not None and source.op_type == SHAPE and not source.attributes and one
    inputs = [v for v in node.inputs if v is not None]
    return (
        bool(inputs)
        and not (spec.is_random or has_subgraphs(node))
        and all(is_input_independent(v, facts) for v in inputs)
    )


def splice_branch(graph: ir.Graph, node: ir.Node, body: ir.Graph) -> None:
    """Replace ``node`` by the nodes of ``body``, under names that are free in ``graph``."""
    names = {str(v.name) for inner in graph for v in inner.outputs} | {str(v.name) for v in graph.inputs}
    names |= set(graph.initializers)
    results = list(body.outputs)
    for value in list(body.initializers.values()):
        del body.initializers[str(value.name)]
        value.name = claim_name(str(value.name), names)
        graph.register_initializer(value)
    body_nodes = list(body)
    body.outputs.clear()
    body.remove(body_nodes)
    for inner in body_nodes:
        inner.name = None
        for value in inner.outputs:
            value.name = claim_name(str(value.name), names)
    graph.insert_before(node, body_nodes)
    for result, out in zip(results, list(node.outputs), strict=True):
        alias = make_node(IDENTITY, [result], name=None, outputs=[None])
        graph.insert_before(node, alias)
        replace_value(out, alias.outputs[0])
    graph.remove(node)


def claim_name(name: str, names: set[str]) -> str:
    """A free name, which is taken from then on."""
    name = unused_name(name, names)
    names.add(name)
    return name
