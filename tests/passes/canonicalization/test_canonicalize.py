"""What no output depends on is no part of the canonical graph, so no stage meets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import snpc
from snpc.runtime.io.load import load
from tests.models.encoders import Encoder

ENCODER = Encoder(depth=2)
INPUT = "x"  # [batch, patches, width]


def weight(model: onnx.ModelProto, name: str, *shape: int) -> str:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def add_unread_branch(model: onnx.ModelProto) -> None:
    up, down = weight(model, "unread_up", ENCODER.width, 24), weight(model, "unread_down", 24, 3)
    model.graph.node.extend(
        [
            helper.make_node("MatMul", [INPUT, up], ["unread_1"]),
            helper.make_node("Relu", ["unread_1"], ["unread_2"]),
            helper.make_node("MatMul", ["unread_2", down], ["unread_3"]),
        ]
    )


def add_unread_identities(model: onnx.ModelProto) -> None:
    source = next(n.output[0] for n in model.graph.node if n.op_type == "LayerNormalization")
    for k in range(3):
        model.graph.node.append(helper.make_node("Identity", [source], [f"unread_{k}"]))
        source = f"unread_{k}"


def add_unread_loop(model: onnx.ModelProto) -> None:
    """A Loop that multiplies the input by a weight, and a product behind it."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["state", "unread_w"], ["next"]), helper.make_node("Identity", ["go"], ["again"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    weight(model, "unread_w", ENCODER.width, ENCODER.width)
    model.graph.initializer.append(numpy_helper.from_array(np.int64(2), "unread_trips"))
    down = weight(model, "unread_down", ENCODER.width, 3)
    model.graph.node.extend(
        [
            helper.make_node("Loop", ["unread_trips", "", INPUT], ["unread_1"], body=body),
            helper.make_node("MatMul", ["unread_1", down], ["unread_2"]),
        ]
    )


def add_unread_weight(model: onnx.ModelProto) -> None:
    weight(model, "unread", 5, ENCODER.width)


def add_unread_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("unread", TensorProto.FLOAT, ["batch", 7]))


def add_branch_of_an_unread_input(model: onnx.ModelProto) -> None:
    """The input stays an input, though only a branch that nothing reads used it."""
    model.graph.input.append(helper.make_tensor_value_info("unread", TensorProto.FLOAT, ["batch", 7]))
    model.graph.node.append(helper.make_node("MatMul", ["unread", weight(model, "unread_w", 7, 9)], ["unread_1"]))


UNREAD = (
    add_unread_branch,
    add_unread_identities,
    add_unread_loop,
    add_unread_weight,
    add_unread_input,
    add_branch_of_an_unread_input,
)


@pytest.mark.parametrize("add", UNREAD, ids=lambda add: add.__name__)
@pytest.mark.parametrize("calibrated", [False, True], ids=["magnitude", "calibrated"])
def test_what_no_output_depends_on_changes_nothing(
    tmp_path: Path, add: Callable[[onnx.ModelProto], None], calibrated: bool
) -> None:
    plain, grown = ENCODER.model(), ENCODER.model()
    add(grown)
    onnx.checker.check_model(grown, full_check=True)
    feeds = ENCODER.feeds(batch=4)
    inputs = {v.name for v in grown.graph.input}
    data = {name: array for name, array in {**feeds, "unread": np.ones((4, 7), np.float32)}.items() if name in inputs}
    outputs = []
    for name, model, calibration in (("plain", plain, feeds), ("grown", grown, data)):
        onnx.save(model, tmp_path / f"{name}.onnx")
        path = tmp_path / f"{name}-half.onnx"
        snpc.prune(tmp_path / f"{name}.onnx", path, ratio=0.5, calibration=[calibration] if calibrated else None)
        outputs.append(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, calibration))
    for expected, found in zip(*outputs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=0)
    assert not any(n.startswith("unread") for n in load(tmp_path / "grown.onnx").graph.graph.initializers)
    assert not any(t.name.startswith("unread") for t in onnx.load(tmp_path / "grown-half.onnx").graph.initializer)
