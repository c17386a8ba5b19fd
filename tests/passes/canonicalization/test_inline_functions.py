"""Functions that grow without end are counted before they are inlined."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from snpc.errors import UserError
from snpc.passes.canonicalization.inline_functions import function_copies
from snpc.runtime.io.load import from_protobuf, load

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]


def call(callee: str, source: str, target: str) -> onnx.NodeProto:
    return helper.make_node(callee, [source], [target], domain="my")


def doubling(depth: int, innermost: onnx.NodeProto) -> onnx.ModelProto:
    """x -> F<depth> -> MatMul -> y; each function calls the one before twice, F0 runs ``innermost``."""
    functions = [helper.make_function("my", "F0", ["a"], ["z"], [innermost], OPSETS)]
    for k in range(1, depth + 1):
        body = [call(f"F{k - 1}", "a", "b"), call(f"F{k - 1}", "b", "z")]
        functions.append(helper.make_function("my", f"F{k}", ["a"], ["z"], body, OPSETS))
    weight = numpy_helper.from_array(np.ones((8, 4), np.float32), "w")
    nodes = [call(f"F{depth}", "x", "h"), helper.make_node("MatMul", ["h", "w"], ["y"])]
    ends = [helper.make_tensor_value_info("x", 1, ["B", 8]), helper.make_tensor_value_info("y", 1, ["B", 4])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, functions=functions, opset_imports=OPSETS, ir_version=8)


RELU = helper.make_node("Relu", ["a"], ["z"])


def test_copies_are_counted_as_they_are_inlined(tmp_path: Path) -> None:
    model = doubling(4, RELU)
    counted = function_copies(from_protobuf(model))
    assert {name: count for (_, name, _), count in counted.items()} == {f"F{k}": 2 ** (4 - k) for k in range(5)}
    onnx.save(model, tmp_path / "m.onnx")
    operators = [node.op_type for node in load(tmp_path / "m.onnx").graph.graph]
    assert operators.count("Relu") == counted["my", "F0", ""]


@pytest.mark.parametrize("depth", [14, 60, 400])
def test_functions_that_grow_without_end_are_refused_at_once(depth: int, tmp_path: Path) -> None:
    onnx.save(doubling(depth, RELU), tmp_path / "m.onnx")
    started = time.perf_counter()
    with pytest.raises(UserError, match=rf"m\.onnx: its {depth + 1} functions expand to \d+ nodes.*onnx\.inliner"):
        load(tmp_path / "m.onnx")
    assert time.perf_counter() - started < 20


def test_a_function_that_is_called_like_an_operator_is_refused(tmp_path: Path) -> None:
    """onnxruntime runs the operator; inlining would run the function."""
    model = doubling(1, RELU)
    body = [helper.make_node("Neg", ["a"], ["z"])]
    model.functions.append(helper.make_function("", "Relu", ["a"], ["z"], body, OPSETS))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"m\.onnx: its function Relu stands in the domain of ONNX's own operators"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("callee", ["F0", "F2"])
def test_functions_that_call_each_other_in_a_circle(callee: str, tmp_path: Path) -> None:
    onnx.save(doubling(2, call(callee, "a", "z")), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"m\.onnx: its functions call each other in a circle: my\.F"):
        load(tmp_path / "m.onnx")
