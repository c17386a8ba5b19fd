"""A map of tokens that stands for a layer computes what its definition says, in opsets that differ in ReduceMean."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import snpc
from snpc.passes import cost_without, remove_sublayers
from snpc.passes.sublayers import Substitute, TokenMap
from snpc.runtime.execution import temporary_session
from tests.models.residual import WIDTH, random_weights, residual_model

RANK = 2


def random_map(read: str, pooled: bool, seed: int = 0) -> Substitute:
    rng = np.random.default_rng(seed)
    reduce, expand, pools = (
        rng.normal(size=shape).astype(np.float32) for shape in ((WIDTH, RANK), (RANK, WIDTH), (2, WIDTH, RANK))
    )
    return Substitute(rng.normal(size=WIDTH), TokenMap(read, reduce, expand, pools if pooled else None))


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("pooled", [True, False])
def test_a_map_computes_its_definition(opset: int, pooled: bool) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Tanh", ["r"], ["t"]),
        helper.make_node("MatMul", ["t", "w0"], ["b0"], "/l0/MatMul"),
        helper.make_node("Add", ["r", "b0"], ["y"]),
    ]
    model = residual_model(nodes, random_weights(1))
    model.opset_import[0].version = opset
    analysis = snpc.analyze(snpc.load(model))
    (layer,) = analysis.sublayers
    assert layer.read == "t"
    substitute = random_map(layer.read, pooled)
    without = remove_sublayers(analysis, [layer.name], {layer.name: substitute})
    x = np.random.default_rng(1).normal(size=(2, 3, WIDTH)).astype(np.float32)
    with temporary_session(without.traced_graph.model.clone()) as run:
        found = run({"x": x})["y"]
    stream, found_map = np.maximum(x, 0), substitute.map
    assert found_map is not None
    tokens = np.tanh(stream)
    inner = tokens @ found_map.reduce
    if found_map.pooled is not None:
        inner = inner + tokens.mean(1, keepdims=True) @ found_map.pooled[0] + tokens[:, :1] @ found_map.pooled[1]
    np.testing.assert_allclose(found, stream + inner @ found_map.expand + substitute.constant, atol=1e-5)

    cost, macs = cost_without(analysis, [layer.name], {layer.name: substitute}), found_map.macs(2, 3)
    assert cost.macs == analysis.cost.macs - layer.macs + macs == macs
    assert cost.params == found_map.params + WIDTH
