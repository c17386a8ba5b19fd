"""Dead-node elimination: nodes and initializers that no output depends on, in subgraphs too."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


class EliminateDeadNodes(ir.passes.InPlacePass):
    """Remove nodes and initializers that no output depends on.

    A removed loop or branch no longer reads what its body reads: ``onnx_ir`` alone keeps these uses, and so the
    values.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in reversed(list(model.graph)):
            if any(value.uses() or value.is_graph_output() for value in node.outputs):
                continue
            for body in subgraphs(node):
                for inner in ir.traversal.RecursiveGraphIterator(body):
                    for index in range(len(inner.inputs)):
                        inner.replace_input_with(index, None)
            model.graph.remove(node, safe=True)
            modified = True
        result = common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified or result.modified)


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The bodies of a loop or a branch."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found
