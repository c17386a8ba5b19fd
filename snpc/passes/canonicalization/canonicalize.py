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

from snpc.ops.names import IDENTITY
from snpc.passes.canonicalization.expand_einsum import expand_einsum
from snpc.passes.canonicalization.inline_branches import inline_branches
from snpc.passes.canonicalization.shared_constants import fork_shared_constants


def canonicalize(model: ir.Model) -> ir.Model:
    """Bring ``model`` (this object, in place) into the normal form and return it."""
    if model.functions:
        common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model.graph.sort()
    inline_branches(model)
    eliminate_initializer_aliases(model.graph)
    expand_einsum(model.graph, model.graph.opset_imports.get("", 1))
    name_nodes(model.graph)
    fork_shared_constants(model.graph)
    return model


def eliminate_initializer_aliases(graph: ir.Graph) -> None:
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
