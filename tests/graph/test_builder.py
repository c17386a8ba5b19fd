"""Nodes and constants are added under free names, and uses are redirected without losing an output."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from snpc.graph.builder import (
    add_constant,
    copy_node,
    make_node,
    redirect_uses,
    replace_graph_output,
    replace_value,
    share_int64_constant,
    unused_name,
)
from tests.passes.text_graphs import op_types, outputs_of, text_model

X = np.array([[-1.0, 2.0]], np.float32)
TEXT = "small (float[N, 2] x) => (float[N, 2] y) { h = Relu(x) y = Add(h, bias) }"


def small() -> ir.Model:
    return ir.from_proto(text_model(TEXT, {"bias": np.array([1.0, 1.0], np.float32)}))


def test_a_free_name_is_kept_and_a_taken_one_is_lengthened() -> None:
    assert unused_name("a", {"b"}) == "a" and unused_name("a", {"a", "a_"}) == "a__"


def test_constants_say_their_type_unless_asked_not_to() -> None:
    graph = small().graph
    typed = add_constant(graph, np.zeros((2, 3), np.int64), "typed")
    bare = add_constant(graph, np.zeros((2, 3), np.int64), "bare", typed=False)
    assert typed.shape == (2, 3) and typed.dtype == ir.DataType.INT64
    assert bare.shape is None and bare.dtype is None
    assert graph.initializers["typed"] is typed and graph.initializers["bare"] is bare
    half = add_constant(graph, np.zeros(1, ir.DataType.BFLOAT16.numpy()), "half", ir.DataType.BFLOAT16)
    assert half.dtype == ir.DataType.BFLOAT16


def test_an_equal_constant_is_shared() -> None:
    graph = small().graph
    first = share_int64_constant(graph, np.array([1, 2]), "sizes")
    assert share_int64_constant(graph, np.array([1, 2]), "sizes") is first
    assert share_int64_constant(graph, np.array([1, 3]), "sizes").name == "sizes_"


def test_a_node_has_named_outputs_and_attributes() -> None:
    split = make_node("Split", [None], {"axis": 1}, name="parts", outputs=["a", "b"])
    assert [value.name for value in split.outputs] == ["a", "b"] and split.attributes["axis"].as_int() == 1
    assert make_node("Relu", [None], name="act").outputs[0].name == "act_out"
    copy = copy_node(split, [None], name="again", outputs=["c", "d"])
    assert (copy.op_type, copy.name, copy.attributes["axis"].as_int()) == ("Split", "again", 1)


def test_a_value_is_replaced_with_its_name_even_as_an_output() -> None:
    model = small()
    old = list(model.graph)[1]
    new = make_node("Sub", list(old.inputs), name="sub", outputs=[None])
    old.append(new)
    replace_value(old.outputs[0], new.outputs[0])
    model.graph.remove(old)
    assert op_types(model) == ["Relu", "Sub"] and model.graph.outputs[0].name == "y"
    onnx.checker.check_model(ir.to_proto(model))
    np.testing.assert_array_equal(outputs_of(model, {"x": X})[0], [[-1.0, 1.0]])


def test_a_node_is_put_behind_a_value_that_is_an_output() -> None:
    model = small()
    node = list(model.graph)[1]
    output = node.outputs[0]
    users = list(output.uses())
    negative = make_node("Neg", [output], name="negative")
    node.append(negative)
    redirect_uses(users, negative.outputs[0])
    replace_graph_output(model.graph, output, negative.outputs[0], "before")
    assert (model.graph.outputs[0].name, output.name) == ("y", "before")
    np.testing.assert_array_equal(outputs_of(model, {"x": X})[0], [[-1.0, -3.0]])
