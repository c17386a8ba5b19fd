"""Dead-node elimination: nodes and initializers that no output depends on, in subgraphs too."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from snpc.ops import required_outputs


class EliminateDeadNodes(ir.passes.InPlacePass):
    """Remove nodes and initializers that no output depends on.

    A removed loop or branch no longer reads what its body reads: ``onnx_ir`` alone keeps these uses, and so the
    values. It also drops optional outputs that nothing reads; those that onnxruntime wants stay.
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
        required = {node: names for node in model.graph if (names := names_to_keep(node))}
        result = common.RemoveUnusedNodesPass()(model)
        for node, names in required.items():
            restore_outputs(node, names)
        return ir.passes.PassResult(model, modified or result.modified)


def names_to_keep(node: ir.Node) -> dict[int, str]:
    """Index of an output that has to stay -> its name."""
    required = required_outputs(node.domain, node.op_type, node.inputs)
    return {k: name for k in required if k < len(node.outputs) and (name := node.outputs[k].name)}


def restore_outputs(node: ir.Node, names: Mapping[int, str]) -> None:
    """Give the outputs their names again; those at the end may be gone."""
    node.resize_outputs(max(len(node.outputs), max(names) + 1))
    for index, name in names.items():
        node.outputs[index].name = name


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The bodies of a loop or a branch."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found
