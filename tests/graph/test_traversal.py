"""Walks upstream stop where a value is computed, not moved."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from snpc.graph import choose_dim_sizes
from snpc.graph.traversal import is_stored_constant, movement_behind, movement_root, step_upstream
from tests.passes.text_graphs import text_model

TEXT = """
    walk (float[N, 6] x) => (float[A, B] y) {
        r = Reshape(w, shape)
        t = Transpose <perm = [1, 0]> (r)
        s = Mul(t, half)
        u = Unsqueeze(s, zero)
        m = MatMul(x, t)
        q = Squeeze(u, zero)
        y = MatMul(m, q)
    }"""
WEIGHTS = {
    "w": np.ones(36, np.float32),
    "shape": np.array([6, 6]),
    "zero": np.array([0]),
    "half": np.array(0.5, np.float32),
}


def values() -> tuple[ir.Model, dict[str, ir.Value]]:
    model = ir.from_proto(text_model(TEXT, WEIGHTS))
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    return model, made | dict(model.graph.initializers)


def test_the_root_of_a_moved_constant_is_the_constant() -> None:
    _, value = values()
    assert movement_root(value["t"]) is value["w"] and is_stored_constant(movement_root(value["t"]))
    assert [node.op_type for node in movement_behind(value["t"])] == ["Transpose", "Reshape"]


def test_the_walk_stops_at_a_computation() -> None:
    _, value = values()
    assert movement_root(value["q"]) is value["s"] and movement_root(value["m"]) is value["m"]
    assert not is_stored_constant(value["m"])


def test_a_step_passes_a_scalar_or_a_movement_and_nothing_else() -> None:
    model, value = values()
    _, facts = choose_dim_sizes(model)
    scale, product, movement = (value[name].producer() for name in ("s", "m", "t"))
    assert scale is not None and product is not None and movement is not None
    scalar, source = step_upstream(scale, facts)
    assert scalar is not None and scalar.factor == 0.5 and source is value["t"]
    assert step_upstream(movement, facts) == (None, value["r"])
    assert step_upstream(product, facts) == (None, None)
