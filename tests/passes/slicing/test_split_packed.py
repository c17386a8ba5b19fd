"""Q, K and V that share one reshape get their own before they are cut to different widths."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from snpc.errors import CheckFailed
from snpc.graph import choose_dim_sizes
from snpc.passes.canonicalization.canonicalize import canonicalize
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.propagation.removal import RemovedUnits
from snpc.passes.slicing.mask import mask_model
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.passes.slicing.slice import find_removed_units
from snpc.passes.slicing.split_packed import non_rectangular_values, split_packed
from tests.passes.text_graphs import Array, op_types, outputs_of, text_model

X = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)

# x W -> [B, N, 3, H, D] -> one value per part, by a Split with Squeezes or by Gathers.
PACKED = """
    packed (float[B, N, 8] x) => (float[B, N, 8] y) {
        w = MatMul(x, wqkv)
        box = Reshape(w, shape)
        parts = Transpose <perm = [2, 0, 3, 1, 4]> (box)
        PICK
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul(q, kt)
        p = Softmax <axis = -1> (s)
        c = MatMul(p, v)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cf = Reshape(ct, flat)
        y = MatMul(cf, wo)
    }"""
PICKS = {
    "gather": "q = Gather <axis = 0> (parts, zero) k = Gather <axis = 0> (parts, one) "
    "v = Gather <axis = 0> (parts, two)",
    "split": "q1, k1, v1 = Split <axis = 0> (parts, ones) "
    "q = Squeeze(q1, axis) k = Squeeze(k1, axis) v = Squeeze(v1, axis)",
}


def packed(pick: str) -> TracedGraph:
    rng = np.random.default_rng(0)
    weights: dict[str, Array] = {
        "wqkv": rng.standard_normal((8, 24)).astype(np.float32),
        "wo": rng.standard_normal((8, 8)).astype(np.float32),
        "shape": np.array([0, 0, 3, 2, 4]),
        "flat": np.array([0, 0, -1]),
        "ones": np.array([1, 1, 1]),
        "axis": np.array([0]),
        **{name: np.array(k) for k, name in enumerate(("zero", "one", "two"))},
    }
    model = canonicalize(ir.from_proto(text_model(PACKED.replace("PICK", PICKS[pick]), weights)))
    return trace_graph(model, *choose_dim_sizes(model))


def cut_of(count: int, parts: str = "qk") -> dict[tuple[str, int], Array]:
    """The last ``count`` channels of each head of width 4, in these parts of the packed weight."""
    head = np.arange(4) >= 4 - count
    removed = [np.tile(head, 2) if part in parts else np.zeros(8, bool) for part in "qkv"]
    return {("wqkv", 1): np.concatenate(removed)}


def removed_by(graph: TracedGraph, cut: dict[tuple[str, int], Array]) -> RemovedUnits:
    return find_removed_units(graph.trace, graph.units, cut)


def test_values_that_stop_being_rectangular() -> None:
    graph = packed("gather")
    names = {value.name for value in non_rectangular_values(graph.trace, removed_by(graph, cut_of(1)))}
    assert names == {"box", "parts"}
    assert not non_rectangular_values(graph.trace, removed_by(graph, cut_of(1, "qkv")))


@pytest.mark.parametrize("pick", PICKS)
def test_a_split_graph_computes_the_same(pick: str) -> None:
    graph = packed(pick)
    ragged = non_rectangular_values(graph.trace, removed_by(graph, cut_of(1)))
    model = split_packed(graph.model, graph.facts, graph.trace, ragged, graph.dim_sizes)
    onnx.checker.check_model(ir.to_proto(model))
    np.testing.assert_array_equal(outputs_of(model, {"x": X})[0], outputs_of(graph.model, {"x": X})[0])
    again = trace_graph(model, graph.dim_sizes)
    assert not non_rectangular_values(again.trace, removed_by(again, cut_of(1)))


def test_the_nodes_of_a_split_graph() -> None:
    graph = packed("gather")
    ragged = non_rectangular_values(graph.trace, removed_by(graph, cut_of(1)))
    model = split_packed(graph.model, graph.facts, graph.trace, ragged, graph.dim_sizes)
    types = op_types(model)
    assert types[:2] == ["MatMul", "Split"] and types.count("Reshape") == 3 + 1 and "Gather" not in types


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize(("parts", "count"), [("qk", 1), ("qk", 3), ("v", 2), ("qkv", 2)])
def test_parts_cut_to_different_widths_equal_the_masked_model(pick: str, parts: str, count: int) -> None:
    graph = packed(pick)
    cut = cut_of(count, parts)
    rewritten = rewrite_model(graph, cut)
    assert rewritten.model.graph.initializers["wqkv"].shape == (8, 24 - int(cut["wqkv", 1].sum()))
    masked = mask_model(rewritten.source.model, rewritten.source.trace, rewritten.removed)
    (expected,), (actual,) = outputs_of(masked, {"x": X}), outputs_of(rewritten.model, {"x": X})
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_packed_value_that_is_read_otherwise_is_refused() -> None:
    graph = packed("gather")
    box = next(v for node in graph.model.graph for v in node.outputs if v.name == "parts")
    relu = ir.node("Relu", [box], name="reader")
    graph.model.graph.append(relu)
    ragged = non_rectangular_values(graph.trace, removed_by(graph, cut_of(1)))
    with pytest.raises(CheckFailed, match="reader reads parts of different widths"):
        split_packed(graph.model, graph.facts, graph.trace, ragged, graph.dim_sizes)
