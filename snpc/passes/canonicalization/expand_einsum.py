"""Einstein sums of other than two operands, spelled out: of one as a sum and a transposition, of more as products of
two, from the left as runtimes do it. What has an ellipsis, or a letter twice in a term, stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from snpc.ops.contraction import parse_einsum
from snpc.ops.names import EINSUM, REDUCE_SUM, REDUCTION_AXES_INPUT_SINCE, TRANSPOSE


def expand_einsum(graph: ir.Graph, version: int) -> None:
    """In place. ``version``: opset of the standard operators."""
    for node in list(graph):
        terms = einsum_terms(node)
        if terms is None or len(terms) == 3:
            continue
        spelled = list(
            pairwise_products(node, terms) if len(terms) > 3 else reduce_and_transpose(graph, node, terms, version)
        )
        if not spelled:
            continue
        graph.insert_before(node, spelled)
        made, out = spelled[-1].outputs[0], node.outputs[0]
        made.type, made.shape = out.type, out.shape
        out.replace_all_uses_with(made, replace_graph_outputs=True)
        made.name, out.name = out.name, None
        graph.remove(node, safe=True)


def einsum_terms(node: ir.Node) -> list[str] | None:
    """The terms of an Einstein sum, output last; None for other nodes, and for sums that are not spelled out."""
    equation = node.attributes.get("equation") if node.op_type == EINSUM and not node.domain else None
    if equation is None or "." in equation.as_string() or any(v is None for v in node.inputs):
        return None
    terms = parse_einsum(equation.as_string(), [()] * len(node.inputs))
    known = set("".join(terms[:-1]))
    plain = all(len(set(term)) == len(term) for term in terms) and set(terms[-1]) <= known
    return terms if plain and len(terms) == len(node.inputs) + 1 else None


def pairwise_products(node: ir.Node, terms: list[str]) -> Iterator[ir.Node]:
    left, value = terms[0], node.inputs[0]
    for index in range(1, len(terms) - 1):
        later = set("".join(terms[index + 1 :]))
        last = index == len(terms) - 2
        out = terms[-1] if last else "".join(c for c in dict.fromkeys(left + terms[index]) if c in later)
        product = ir.Node(
            "",
            EINSUM,
            [value, node.inputs[index]],
            [ir.AttrString("equation", f"{left},{terms[index]}->{out}")],
            num_outputs=1,
            name=f"{node.name or node.outputs[0].name}__{index}",
        )
        product.outputs[0].name = f"{node.outputs[0].name}__{index}"
        yield product
        left, value = out, product.outputs[0]


def reduce_and_transpose(graph: ir.Graph, node: ir.Node, terms: list[str], version: int) -> Iterator[ir.Node]:
    (term, out), value = terms, node.inputs[0]
    axes = [k for k, c in enumerate(term) if c not in out]
    name = str(node.outputs[0].name)
    if axes:
        inputs, attrs = [value], [ir.AttrInt64("keepdims", 0)]
        if version >= REDUCTION_AXES_INPUT_SINCE[REDUCE_SUM]:
            inputs.append(axes_constant(graph, np.asarray(axes, np.int64), f"{name}__axes"))
        else:
            attrs.append(ir.AttrInt64s("axes", axes))
        reduced = ir.Node("", REDUCE_SUM, inputs, attrs, num_outputs=1, name=f"{name}__sum")
        reduced.outputs[0].name = f"{name}__sum"
        yield reduced
        value = reduced.outputs[0]
    kept = [c for c in term if c in out]
    perm = [ir.AttrInt64s("perm", [kept.index(c) for c in out])]
    yield ir.Node("", TRANSPOSE, [value], perm, num_outputs=1, name=f"{name}__order")


def axes_constant(graph: ir.Graph, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]], name: str) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
