"""softmax(s QK') keeps its temperature when Q and K become narrower, wherever the scale s stands."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from snpc.graph import choose_dim_sizes
from snpc.passes.canonicalization.canonicalize import canonicalize
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.slicing.attention_scale import ScalePlan, is_standard_scale, plan_scales
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.passes.slicing.slice import find_removed_units
from tests.passes.text_graphs import Array, attention_model, outputs_of

X = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
HALF = np.array([False, False, True, True] * 2)  # of each head of width 4, the last two channels go
CUT = {("wq", 1): HALF, ("wk", 1): HALF}


def scalar(number: float) -> Array:
    return np.array(number, np.float32)


def traced(proto: onnx.ModelProto) -> TracedGraph:
    model = canonicalize(ir.from_proto(proto))
    return trace_graph(model, *choose_dim_sizes(model))


def plan_of(proto: onnx.ModelProto) -> ScalePlan:
    graph = traced(proto)
    removed = find_removed_units(graph.trace, graph.units, CUT)
    return plan_scales(graph.model, graph.facts, graph.trace, removed)


SCALES = {
    "a factor": ("ss = Mul(s, scale)", {"scale": scalar(0.5)}, 1 / math.sqrt(2)),
    "a divisor": ("ss = Div(s, scale)", {"scale": scalar(2.0)}, math.sqrt(2)),
    "a factor first": ("ss = Mul(scale, s)", {"scale": scalar(0.5)}, 1 / math.sqrt(2)),
}


@pytest.mark.parametrize("kind", SCALES)
def test_a_standard_scale_becomes_that_of_the_new_width(kind: str) -> None:
    node, weights, expected = SCALES[kind]
    plan = plan_of(attention_model(node, **weights))
    ((_, index),) = plan.scalars
    assert index == (0 if kind == "a factor first" else 1)
    assert next(iter(plan.scalars.values())) == pytest.approx(expected)
    # s changes by sqrt(4/2): what makes Q takes the inverse, so that the scores of the kept channels stay.
    for factors in plan.multiply.values():
        np.testing.assert_allclose(factors, 1 / math.sqrt(2))
    assert set(plan.multiply) == {("wq", 1), ("bq", 0)} and not plan.insert


@pytest.mark.parametrize("node", ["ss = Mul(s, scale)", "ss = Div(s, scale)"])
def test_another_scale_keeps_its_value(node: str) -> None:
    plan = plan_of(attention_model(node, scale=scalar(0.3)))
    assert [pytest.approx(0.3, rel=1e-6)] == list(plan.scalars.values())
    assert not plan.multiply and not plan.insert and not plan.attributes


def test_without_a_scale_nothing_changes() -> None:
    plan = plan_of(attention_model("ss = Identity(s)"))
    assert plan == ScalePlan()


@pytest.mark.parametrize("kind", SCALES)
def test_scores_of_the_kept_channels_are_the_same(kind: str) -> None:
    """The sliced model against the original with the removed columns of Wq, bq and Wk at zero."""
    node, weights, _ = SCALES[kind]
    proto = attention_model(node, **weights)
    sliced = rewrite_model(traced(proto), CUT).model
    assert sliced.graph.initializers["wq"].shape == (8, 4)
    for tensor in proto.graph.initializer:
        if tensor.name in ("wq", "wk", "bq"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[..., HALF] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    (expected,), (actual,) = outputs_of(proto, {"x": X}), outputs_of(sliced, {"x": X})
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_where_q_is_not_linear_in_constants_a_node_scales_it() -> None:
    proto = attention_model("ss = Mul(s, scale)", scale=scalar(0.5))
    position = next(k for k, node in enumerate(proto.graph.node) if node.output[0] == "q4")
    proto.graph.node.insert(position, onnx.helper.make_node("Tanh", ["qb"], ["qa"]))
    proto.graph.node[position + 1].input[0] = "qa"
    plan = plan_of(proto)
    assert not plan.multiply and list(plan.insert.values()) == [pytest.approx(1 / math.sqrt(2))]
    sliced = rewrite_model(traced(proto), CUT).model
    assert sum(node.op_type == "Mul" for node in sliced.graph) == 2


def test_which_scales_count_as_standard() -> None:
    assert is_standard_scale(0.125, 64) and is_standard_scale(0.1251, 64)
    assert not is_standard_scale(0.13, 64) and not is_standard_scale(1.0, 1) and not is_standard_scale(-0.125, 64)
