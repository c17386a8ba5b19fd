"""graph -> graph: a bias that is added to a product goes into the product.

onnxruntime adds it in a node of its own where the product has a batch axis, or in the activation behind, which takes
longer than starting the sums from it. What has a batch axis is laid out as rows and back, which moves nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from snpc.graph.shapes import static_shape
from snpc.ops.names import GEMM, RESHAPE
from snpc.passes.canonicalization.fold_shape_arithmetic import infer_shapes
from snpc.passes.fusion.qkv_projection import match_constant_product, separate_bias
from snpc.types import Shape


def fuse_gemm_bias(model: ir.Model) -> tuple[ir.Model, int]:
    """A copy of ``model`` in which sums of a product [.., N, K] x [K, M] and a bias [M] are one node, and how many
    these are. All axes but the first must have fixed sizes."""
    copy = model.clone()
    infer_shapes(copy)
    rows: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in list(copy.graph):
        found = match_biased_product(node)
        if found is None:
            continue
        source, weight, bias = found
        if source not in rows:
            rows[source] = append_reshape(copy.graph, source, [-1, constant_shape(weight)[0]])
        made = ir.node(GEMM, [rows[source], weight, bias], name=f"{node.name}__biased")
        made.outputs[0].name = f"{made.name}_out"
        copy.graph.append(made)
        shape = node.outputs[0].shape
        assert shape is not None
        laid = append_reshape(copy.graph, made.outputs[0], [-1, *(int(d) for d in shape[1:])])  # type: ignore[arg-type]
        node.outputs[0].replace_all_uses_with(laid)
        count += 1
    common.RemoveUnusedNodesPass()(copy)
    copy.graph.sort()
    return copy, count


def match_biased_product(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(rows, weight, bias) where ``node`` adds nothing but a bias to a product with a weight that nothing else uses."""
    out = node.outputs[0]
    if out.is_graph_output() or out.shape is None or len(out.shape) < 3:
        return None
    if not all(isinstance(d, int) for d in out.shape[1:]):
        return None
    value, bias = separate_bias(out)
    found = match_constant_product(value)
    if found is None or bias is None or len(value.uses()) > 1 or value.is_graph_output():
        return None
    rows, weight = found
    return (rows, weight, bias) if constant_shape(bias) == constant_shape(weight)[1:] else None


def constant_shape(constant: ir.Value) -> Shape:
    assert constant.const_value is not None
    return static_shape(constant.const_value)


def append_reshape(graph: ir.Graph, value: ir.Value, target: list[int]) -> ir.Value:
    name = f"{value.name}__laid"
    shape = ir.Value(name=f"{name}_shape", const_value=ir.Tensor(np.asarray(target, np.int64), name=f"{name}_shape"))
    graph.register_initializer(shape)
    made = ir.node(RESHAPE, [value, shape], name=name)
    made.outputs[0].name = f"{name}_out"
    graph.append(made)
    return made.outputs[0]
