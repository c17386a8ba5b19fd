"""Which values are never below zero, by the operators that make them."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from snpc.passes.quantization.not_negative import is_never_negative

CASES = {
    "Relu (x)": True,
    "Softmax (x)": True,
    "Mul (x, x)": True,
    "Pow (x, two)": True,
    "Pow (x, three)": False,
    "Mul (x, y)": False,
    "Sub (x, x)": False,
    "Add (x, two)": False,
}
BEHIND = {
    "ReduceMean (a)": True,
    "Add (a, two)": True,
    "Add (a, minus)": False,
    "Transpose (a)": True,
    "Sub (two, a)": False,
    "Clip (minus, two)": True,
    "Clip (minus, minus)": False,
}


def last_value(*lines: str) -> ir.Value:
    nodes = " ".join(lines)
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[4,4] x, float[4,4] y) => (float[4,4] out)
        <float two = {{2}}, float three = {{3}}, float minus = {{-1}}> {{ {nodes} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    return model.graph.outputs[0]


@pytest.mark.parametrize("call", CASES)
def test_operators(call: str) -> None:
    assert is_never_negative(last_value(f"out = {call}")) == CASES[call]


@pytest.mark.parametrize("call", BEHIND)
def test_what_follows_a_value_that_is_not_negative(call: str) -> None:
    """As the variance of a normalization, plus its epsilon."""
    assert is_never_negative(last_value("a = Mul (x, x)", f"out = {call}")) == BEHIND[call]
