"""The constants on a linear path scale a value; a value that is not linear in constants has no such path."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from snpc.graph import choose_dim_sizes
from snpc.passes.canonicalization.canonicalize import canonicalize
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.weights.linear_path import LinearPath, NotLinear, label_set, trace_linear_path
from tests.passes.text_graphs import attention_model, outputs_of

X = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)


def traced(proto: onnx.ModelProto) -> TracedGraph:
    model = canonicalize(ir.from_proto(proto))
    return trace_graph(model, *choose_dim_sizes(model))


def path_of(graph: TracedGraph, name: str) -> LinearPath:
    """The path that makes operand ``name`` of the score product."""
    product = next(c for c in graph.trace.contractions if c.node.outputs[0].name == "s")
    index = [value.name for value in product.node.inputs if value is not None].index(name)
    path = LinearPath(product.node, index, 3.0)
    value = product.node.inputs[index]
    assert value is not None
    wanted = label_set((product.left, product.right)[index])
    trace_linear_path(path, value, wanted, graph.trace, graph.facts, graph.model)
    return path


@pytest.mark.parametrize(("name", "constants"), [("qt", {("wq", 1), ("bq", 0)}), ("kt", {("wk", 1)})])
def test_scaling_the_constants_scales_the_operand(name: str, constants: set[tuple[str, int]]) -> None:
    graph = traced(attention_model("ss = Identity(s)"))
    path = path_of(graph, name)
    assert {(str(value.name), axis) for value, axis in path.constants} == constants
    assert all(hit.all() for hit in path.constants.values())
    scaled = graph.model.clone()
    for value, _ in path.constants:
        tensor = value.const_value
        assert tensor is not None
        scaled.graph.initializers[str(value.name)].const_value = ir.Tensor(3 * tensor.numpy(), name=value.name)
    for model in (graph.model, scaled):
        model.graph.outputs.append(next(v for node in model.graph for v in node.outputs if v.name == name))
    (_, before), (_, after) = outputs_of(graph.model, {"x": X}), outputs_of(scaled, {"x": X})
    np.testing.assert_allclose(after, 3 * before, rtol=1e-5)


def test_the_path_holds_what_it_passes() -> None:
    path = path_of(traced(attention_model("ss = Identity(s)")), "qt")
    assert sorted(node.op_type for node in path.nodes) == ["Add", "MatMul", "Reshape", "Transpose"]
    assert {value.name for value in path.values} >= {"qt", "q4", "qb", "q"}


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "Exp"])
def test_an_activation_is_not_linear(activation: str) -> None:
    proto = attention_model("ss = Identity(s)")
    position = next(k for k, node in enumerate(proto.graph.node) if node.output[0] == "q4")
    proto.graph.node[position].input[0] = "qa"
    proto.graph.node.insert(position, onnx.helper.make_node(activation, ["qb"], ["qa"]))
    with pytest.raises(NotLinear):
        path_of(traced(proto), "qt")


def test_a_bias_that_is_a_slice_of_a_packed_constant_is_followed_to_it() -> None:
    packed = np.arange(24, dtype=np.float32)
    proto = attention_model("ss = Identity(s)", packed=packed, start=np.array([8]), end=np.array([16]))
    next(node for node in proto.graph.node if node.output[0] == "qb").input[1] = "part"
    proto.graph.node.insert(0, onnx.helper.make_node("Slice", ["packed", "start", "end"], ["part"]))
    path = path_of(traced(proto), "qt")
    hit = next(hit for (value, _), hit in path.constants.items() if value.name == "packed")
    assert np.flatnonzero(hit).tolist() == list(range(8, 16))
