"""Names that several constants define: one is kept where they are equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import snpc
from snpc.passes.analyze import analyze
from snpc.runtime.io.load import load
from tests.oracle import TOLERANCE, Array, relative_error, run, written

RNG = np.random.default_rng(0)
FIRST, SECOND = (RNG.normal(size=(8, 16)).astype(np.float32) for _ in range(2))
WIDE = RNG.normal(size=(8, 64)).astype(np.float32)  # stays in the file while it is loaded
LAST = RNG.normal(size=(64, 4)).astype(np.float32)


def constant(array: Array, name: str = "u") -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, "value"))


def network() -> list[onnx.NodeProto]:
    product = helper.make_node("MatMul", ["x", "u"], ["a"])
    return [product, helper.make_node("Relu", ["a"], ["b"]), helper.make_node("MatMul", ["b", "v"], ["y"])]


def model(nodes: list[onnx.NodeProto], *tensors: Array) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(LAST, "v"), *(numpy_helper.from_array(array, "u") for array in tensors)]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", n])] for name, n in (("x", 8), ("y", 4))
    )
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


EQUAL = {
    "two_initializers": model(network(), WIDE, WIDE),
    "an_initializer_and_a_node": model([constant(WIDE), *network()], WIDE),
    "two_nodes": model([constant(WIDE), constant(WIDE), *network()]),
    "a_node_behind_the_consumer": model([constant(WIDE), *network(), constant(WIDE)]),
    "all": model([constant(WIDE), constant(WIDE), *network()], WIDE, WIDE),
}
DIFFERENT = {
    "two_initializers": model(network(), FIRST, SECOND),
    "an_initializer_and_a_node": model([constant(FIRST), *network()], SECOND),
    "two_nodes": model([constant(FIRST), constant(SECOND), *network()]),
    "shapes": model([constant(FIRST), *network()], FIRST.reshape(16, 8)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_one_of_equal_constants_is_kept(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(EQUAL[name], path)
    feeds = {"x": RNG.normal(size=(3, 8)).astype(np.float32)}
    loaded = load(path)
    assert [spec.name for spec in (*loaded.inputs, *loaded.outputs)] == ["x", "y"]
    assert [(g.role, g.size) for g in analyze(loaded).groups if g.prunable] == [("ffn", 64)]
    assert relative_error(run(path, feeds), run(written(loaded.graph), feeds)) < TOLERANCE
    pruned = snpc.prune(path, tmp_path / "pruned.onnx", ratio=0.5, method="select")
    assert pruned.verification.equals_mask


@pytest.mark.parametrize("name", DIFFERENT)
def test_one_name_with_different_contents_is_refused(name: str, tmp_path: Path) -> None:
    """onnxruntime takes one or the other, by size and version: nobody can know what such a file means."""
    onnx.save(DIFFERENT[name], tmp_path / "model.onnx")
    with pytest.raises(snpc.UserError, match="u is defined twice, with different contents"):
        load(tmp_path / "model.onnx")
