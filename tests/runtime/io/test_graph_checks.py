"""Graphs that break the rules of ONNX, where later stages would stumble: one line each, which names the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from snpc.errors import UserError
from snpc.runtime.io.load import load
from tests.command_line import write_tiny


def with_middle(path: Path, node: onnx.NodeProto, opset: int = 17) -> Path:
    """x [B, 4, 8] -> 16 hidden units ``a`` -> Relu -> b -> ``node`` -> c -> y."""
    rng = np.random.default_rng(0)
    held = [
        numpy_helper.from_array(rng.normal(size=s).astype("f4"), n) for n, s in {"u": (8, 16), "v": (16, 4)}.items()
    ]
    held.append(numpy_helper.from_array(np.zeros((8, 0, 4), "f4"), "empty"))
    nodes = [helper.make_node("MatMul", ["x", "u"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), node,
             helper.make_node("MatMul", ["c", "v"], ["y"])]  # fmt: skip
    ends = [helper.make_tensor_value_info("x", 1, ["B", 4, 8]), helper.make_tensor_value_info("y", 1, None)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def attributed(operator: str, name: str, **fields: Any) -> onnx.NodeProto:
    node = helper.make_node(operator, ["b"], ["c"])
    node.attribute.add(name=name, **fields)
    return node


MALFORMED = {
    "a reference": (attributed("Softmax", "axis", type=2, ref_attr_name="outer"), "Softmax c takes its axis from"),
    "another type": (attributed("Softmax", "axis", type=1, f=1.0), "axis of Softmax c is of type FLOAT, not INT"),
    "none": (helper.make_node("Cast", ["b"], ["c"]), "Cast c lacks its attribute to"),
    "too many inputs": (helper.make_node("Relu", ["b", "b"], ["c"]), "Relu c has 2 inputs"),
    "too few inputs": (helper.make_node("Add", ["b"], ["c"]), "Add c has 1 inputs"),
    "nothing there": (helper.make_node("Relu", ["nowhere"], ["c"]), "reads nowhere, which no node produces"),
    "no entries": (helper.make_node("Einsum", ["x", "empty"], ["c"], equation="btd,dhk->bthk"),
                   r"multiplies by empty, which has no entries \(\[8,0,4\]\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_graphs_that_break_the_rules_are_refused(kind: str, tmp_path: Path) -> None:
    node, words = MALFORMED[kind]
    with pytest.raises(UserError, match=rf"m\.onnx: .*{words}.*; run onnx\.checker on it"):
        load(with_middle(tmp_path / "m.onnx", node))


def test_an_operator_that_the_opset_does_not_have_is_left_alone(tmp_path: Path) -> None:
    """onnxruntime's optimizer writes operators into opsets before they were in the standard."""
    node = helper.make_node("LayerNormalization", ["b", "gain"], ["c"])
    path = with_middle(tmp_path / "m.onnx", node, opset=12)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(16, "f4"), "gain"))
    onnx.save(model, path)
    assert load(path).graph.graph.num_nodes() == 4


def test_absurd_opset_versions_are_no_bugs(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = 1 << 40
    onnx.save(model, path)
    load(path)


def test_what_a_file_says_of_a_weight_elsewhere_does_not_count(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.value_info.append(helper.make_tensor_value_info("fc1.weight", 7, ["N", None, 3]))
    onnx.save(model, path)
    value = load(path).graph.graph.initializers["fc1.weight"]
    assert (value.shape, value.dtype) == ([8, 32], 1)


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ([1 << 33, 0], "a long axis without entries"),
        ([2] * 65, "65 axes"),
        ([1 << 62] * 40, "its shape needs more than any file has"),
        ([-1], r"has the shape \[-1\]"),
    ],
    ids=str,
)
def test_sizes_that_no_weight_has(dims: list[int], words: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.initializer.add(name="big", data_type=onnx.TensorProto.UINT4).dims.extend(dims)
    onnx.save(model, path)
    with pytest.raises(UserError, match=f"big .*{words}") as refusal:
        load(path)
    assert len(str(refusal.value)) < 600


def test_small_empty_weights_are_read(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.initializer.add(name="past", data_type=1).dims.extend([2, 12, 0, 64])
    onnx.save(model, path)
    load(path)
