"""Small graphs around a residual stream [2, 3, 4], to show one thing each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 4


def residual_model(
    nodes: Sequence[onnx.NodeProto], weights: Mapping[str, npt.NDArray[np.float32]], outputs: Sequence[str] = ("y",)
) -> onnx.ModelProto:
    """A model from x to ``outputs``, all of the shape of the stream."""
    shape = [2, 3, WIDTH]
    graph = helper.make_graph(
        list(nodes),
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [numpy_helper.from_array(matrix, name) for name, matrix in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def random_weights(count: int) -> dict[str, npt.NDArray[np.float32]]:
    """w0, w1, .. of the width of the stream."""
    rng = np.random.default_rng(0)
    return {f"w{number}": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for number in range(count)}


def linear_layers(weights: Sequence[npt.NDArray[np.float32]]) -> onnx.ModelProto:
    """x plus x times each of the weights: parallel layers, of which the branches are b0, b1, .."""
    nodes = [helper.make_node("MatMul", ["x", f"w{k}"], [f"b{k}"], f"/l{k}/MatMul") for k in range(len(weights))]
    total = "x"
    for k in range(len(weights)):
        name = "y" if k == len(weights) - 1 else f"s{k}"
        nodes.append(helper.make_node("Add", [total, f"b{k}"], [name], f"/l{k}/Add"))
        total = name
    return residual_model(nodes, {f"w{k}": matrix for k, matrix in enumerate(weights)})
