"""Sizes that no input changes are written down; what depends on the input is still computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import snpc
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.canonicalization.fold_shape_arithmetic import FoldShapeArithmetic
from snpc.runtime.io.save import save
from tests.models.exports import EXPORTS, export
from tests.oracle import feeds_of, require, run


def settled(model: ir.Model, folder: Path) -> Path:
    path = folder / "settled.onnx"
    save(finalize(FoldShapeArithmetic()(model).model), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return path


def types(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_outputs_stay(name: str, tmp_path: Path) -> None:
    require(name)
    path = settled(snpc.load(export(name)).graph.clone(), tmp_path)
    for wanted, found in zip(run(export(name), feeds_of(name)), run(path, feeds_of(name)), strict=True):
        assert np.array_equal(wanted, found)


def test_attention_of_a_fixed_length_computes_no_target_any_more(tmp_path: Path) -> None:
    require("vit_timm__ts17")
    path = settled(snpc.load(export("vit_timm__ts17")).graph.clone(), tmp_path)
    graph = onnx.load(path).graph
    stored = {i.name for i in graph.initializer}
    targets = [node.input[1] for node in graph.node if node.op_type == "Reshape" and "attn" in node.name]
    assert targets and all(name in stored for name in targets)
    before, after = types(export("vit_timm__ts17")).count("Shape"), types(path).count("Shape")
    assert after < before / 2


def reshaped(shape: list[int | str], parts: list[int], last: int) -> ir.Model:
    """x of ``shape`` to [*sizes of these axes, last], computed from the shape of x."""
    nodes, names = [helper.make_node("Shape", ["x"], ["sizes"])], []
    for axis in parts:
        nodes.append(helper.make_node("Gather", ["sizes", f"axis{axis}"], [f"size{axis}"]))
        names.append(f"size{axis}")
    nodes += [
        helper.make_node("Concat", [*names, "last"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    constants = [numpy_helper.from_array(np.asarray([axis]), f"axis{axis}") for axis in parts]
    constants.append(numpy_helper.from_array(np.asarray([last]), "last"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"out{k}" for k in range(len(parts) + 1)])
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    )


@pytest.mark.parametrize(
    ("shape", "parts", "last", "wanted"),
    [
        (["batch", 6, 4], [0], 24, [-1, 24]),
        (["batch", 6, 4], [1], -1, [6, -1]),
        ([3, 6, 4], [0, 1], 4, [3, 6, 4]),
        (["batch", 6, 4], [0], -1, [0, -1]),
        (["batch", "length", 4], [0, 1], 4, [0, 0, 4]),
        (["batch", "length", 4], [1, 0], 4, None),  # in other places
        (["batch", "length", 4], [1], -1, None),
    ],
)
def test_targets(shape: list[int | str], parts: list[int], last: int, wanted: list[int] | None, tmp_path: Path) -> None:
    model = reshaped(shape, parts, last)
    x = np.arange(72, dtype=np.float32).reshape(3, 6, 4)
    save(model.clone(), tmp_path / "before.onnx")
    path = settled(model, tmp_path)
    assert np.array_equal(run(tmp_path / "before.onnx", {"x": x})[0], run(path, {"x": x})[0])
    graph = onnx.load(path).graph
    target = {i.name: numpy_helper.to_array(i).tolist() for i in graph.initializer}.get(graph.node[-1].input[1])
    assert target == wanted
    assert (len(graph.node) == 1) == (wanted is not None)


def test_stale_shapes_count_nothing(tmp_path: Path) -> None:
    """A pass that cut a width has left the old one behind."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Shape", ["h"], ["sizes"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Reshape", ["r", "sizes"], ["y"]),
    ]
    w = numpy_helper.from_array(np.ones((4, 5), np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "width"])
    graph = helper.make_graph(nodes, "g", [x], [y], [w])
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 7]))
    model = ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    )
    assert run(settled(model, tmp_path), {"x": np.ones((3, 4), np.float32)})[0].shape == (3, 5)
