"""Expands Einsum nodes that do not have two operands: one operand becomes a ReduceSum and a Transpose, three or more
become a chain of products of two, from the left as runtimes do it. An equation with an ellipsis, or with a letter
twice in one term, stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from snpc.graph import Attribute, add_constant, make_node, opset_version, replace_value
from snpc.ops import EINSUM, REDUCE_SUM, REDUCTION_AXES_INPUT_SINCE, TRANSPOSE, parse_einsum


class ExpandEinsum(ir.passes.InPlacePass):
    """Leave no Einsum of other than two operands, where that can be expressed."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            terms = einsum_terms(node)
            if terms is None or len(terms) == 3:
                continue
            if len(terms) > 3:
                expansion = list(pairwise_products(node, terms))
            else:
                expansion = list(reduce_and_transpose(model.graph, node, terms, opset_version(model)))
            if not expansion:
                continue
            model.graph.insert_before(node, expansion)
            replace_value(node.outputs[0], expansion[-1].outputs[0])
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def einsum_terms(node: ir.Node) -> list[str] | None:
    """The terms of an equation, output last; None for other nodes, and for equations that are not expanded."""
    equation = node.attributes.get("equation") if node.op_type == EINSUM and not node.domain else None
    if equation is None or "." in equation.as_string() or any(v is None for v in node.inputs):
        return None
    terms = parse_einsum(equation.as_string(), [()] * len(node.inputs))
    letters = set("".join(terms[:-1]))
    plain = all(len(set(term)) == len(term) for term in terms) and set(terms[-1]) <= letters
    return terms if plain and len(terms) == len(node.inputs) + 1 else None


def pairwise_products(node: ir.Node, terms: list[str]) -> Iterator[ir.Node]:
    """Einsum nodes of two operands that compute ``node``, each keeping only letters that a later term still needs."""
    left, value = terms[0], node.inputs[0]
    for index in range(1, len(terms) - 1):
        later = set("".join(terms[index + 1 :]))
        last = index == len(terms) - 2
        out = terms[-1] if last else "".join(c for c in dict.fromkeys(left + terms[index]) if c in later)
        product = make_node(
            EINSUM,
            [value, node.inputs[index]],
            {"equation": f"{left},{terms[index]}->{out}"},
            name=f"{node.name or node.outputs[0].name}__{index}",
            outputs=[f"{node.outputs[0].name}__{index}"],
        )
        yield product
        left, value = out, product.outputs[0]


def reduce_and_transpose(graph: ir.Graph, node: ir.Node, terms: list[str], version: int) -> Iterator[ir.Node]:
    """A ReduceSum over the letters that the output lacks, then a Transpose. ``version``: opset of the graph."""
    (term, out), value = terms, node.inputs[0]
    axes = [k for k, c in enumerate(term) if c not in out]
    name = str(node.outputs[0].name)
    if axes:
        inputs = [value]
        attributes: dict[str, Attribute] = {"keepdims": 0}
        if version >= REDUCTION_AXES_INPUT_SINCE[REDUCE_SUM]:
            inputs.append(add_constant(graph, np.asarray(axes, np.int64), f"{name}__axes"))
        else:
            attributes["axes"] = axes
        reduced = make_node(REDUCE_SUM, inputs, attributes, name=f"{name}__sum", outputs=[f"{name}__sum"])
        yield reduced
        value = reduced.outputs[0]
    kept = [c for c in term if c in out]
    perm = ir.AttrInt64s("perm", [kept.index(c) for c in out])  # may be empty, which has no type of its own
    yield make_node(TRANSPOSE, [value], {"perm": perm}, name=f"{name}__order", outputs=[None])
