"""Fuses a product and the bias that is added to it into one Gemm.

Where the product has a batch axis, onnxruntime adds the bias in a node of its own or in the activation that follows,
which takes longer than starting the sums from it. A value with a batch axis is reshaped to rows and back, which copies
nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from snpc.graph import add_constant, make_node, static_shape
from snpc.ops import GEMM, RESHAPE
from snpc.passes.canonicalization import infer_shapes
from snpc.passes.fusion.fuse_attention import FusionResult
from snpc.passes.fusion.qkv_projection import match_constant_product, separate_bias
from snpc.types import Shape


class FuseGemmBias(ir.passes.FunctionalPass):
    """Replace the sum of a product [.., N, K] x [K, M] and a bias [M] by one Gemm, between two Reshapes.

    All axes but the first must have fixed sizes.
    """

    def call(self, model: ir.Model) -> FusionResult:
        copy = model.clone()
        infer_shapes(copy)
        rows: dict[ir.Value, ir.Value] = {}
        count = 0
        for node in list(copy.graph):
            match = match_biased_product(node)
            if match is None:
                continue
            source, weight, bias = match
            if source not in rows:
                rows[source] = append_reshape(copy.graph, source, [-1, constant_shape(weight)[0]])
            gemm = make_node(GEMM, [rows[source], weight, bias], name=f"{node.name}__biased")
            copy.graph.append(gemm)
            shape = node.outputs[0].shape
            assert shape is not None
            target = [-1, *(int(d) for d in shape[1:])]  # type: ignore[arg-type]
            node.outputs[0].replace_all_uses_with(append_reshape(copy.graph, gemm.outputs[0], target))
            count += 1
        common.RemoveUnusedNodesPass()(copy)
        copy.graph.sort()
        return FusionResult(copy, count > 0, count)


def match_biased_product(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(rows, weight, bias) where ``node`` adds a bias to a product without other consumers; None for other nodes."""
    out = node.outputs[0]
    if out.is_graph_output() or out.shape is None or len(out.shape) < 3:
        return None
    if not all(isinstance(d, int) for d in out.shape[1:]):
        return None
    value, bias = separate_bias(out)
    product = match_constant_product(value)
    if product is None or bias is None or len(value.uses()) > 1 or value.is_graph_output():
        return None
    rows, weight = product
    return (rows, weight, bias) if constant_shape(bias) == constant_shape(weight)[1:] else None


def constant_shape(constant: ir.Value) -> Shape:
    assert constant.const_value is not None
    return static_shape(constant.const_value)


def append_reshape(graph: ir.Graph, value: ir.Value, target: list[int]) -> ir.Value:
    name = f"{value.name}__laid"
    shape = add_constant(graph, np.asarray(target, np.int64), f"{name}_shape", typed=False)
    node = make_node(RESHAPE, [value, shape], name=name)
    graph.append(node)
    return node.outputs[0]
