"""A branch that every input takes is inlined; one that depends on the input stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from snpc.passes.canonicalization.inline_branches import InlineBranches
from tests.passes.text_graphs import op_types, outputs_of, text_model

X = np.arange(6, dtype=np.float32).reshape(2, 3)
WEIGHTS = {"two": np.array(2), "three": np.array(3), "yes": np.array(True), "no": np.array(False)}

IF = """
    y = If (c) <
        then_branch = taken () => (float[A, B] t) { d = Add(x, x)  t = Relu(d) },
        else_branch = other () => (float[A, B] e) { d = Sub(x, x)  e = Neg(d) }
    >"""


def model_with(condition: str, more: str = "") -> onnx.ModelProto:
    return text_model(f"branch (float[N, 3] x{more}) => (float[A, B] y) {{ {condition} {IF} }}", WEIGHTS)


@pytest.mark.parametrize(
    ("condition", "branch"),
    [
        ("s = Shape(x) r = Size(s) c = Equal(r, two)", ["Add", "Relu"]),
        ("s = Shape(x) r = Size(s) c = Equal(r, three)", ["Sub", "Neg"]),
        ("c = Identity(yes)", ["Add", "Relu"]),
        ("c = Not(yes)", ["Sub", "Neg"]),
    ],
)
def test_a_condition_of_constants_and_ranks_is_decided(condition: str, branch: list[str]) -> None:
    proto = model_with(condition)
    result = InlineBranches()(ir.from_proto(proto))
    assert result.modified and "If" not in op_types(result.model)
    assert [op for op in op_types(result.model) if op in ("Add", "Relu", "Sub", "Neg")] == branch
    onnx.checker.check_model(ir.to_proto(result.model))
    np.testing.assert_array_equal(outputs_of(result.model, {"x": X})[0], outputs_of(proto, {"x": X})[0])


@pytest.mark.parametrize(
    ("condition", "more"),
    [("c = Identity(flag)", ", bool flag"), ("s = Shape(x) n = Gather(s, zero) c = Equal(n, two)", "")],
)
def test_a_condition_that_depends_on_the_input_or_a_size_stays(condition: str, more: str) -> None:
    proto = model_with(condition, more)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "zero"))
    result = InlineBranches()(ir.from_proto(proto))
    assert not result.modified and op_types(result.model)[-1] == "If"


def test_names_of_an_inlined_body_do_not_clash() -> None:
    """Both branches of both nodes call a value ``d``."""
    second = IF.replace("y = If (c)", "z = If (c)").replace("(x, x)", "(y, x)")
    text = f"branch (float[N, 3] x) => (float[A, B] z) {{ c = Identity(yes) {IF} {second} }}"
    proto = text_model(text, WEIGHTS)
    result = InlineBranches()(ir.from_proto(proto))
    names = [value.name for node in result.model.graph for value in node.outputs]
    assert len(names) == len(set(names)) and "If" not in op_types(result.model)
    np.testing.assert_array_equal(outputs_of(result.model, {"x": X})[0], outputs_of(proto, {"x": X})[0])
