"""What is said of shapes that nothing knows: the operator that made the first of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from snpc.passes.analyze import Analysis, analyze
from snpc.runtime.io.load import load

UNKNOWN_OPERATOR = """<ir_version: 8, opset_import: ["": 17, "acme": 1]>
    g (float[B, N, 8] x) => (float[B, N, 4] y) {
        w = acme.Wobble(x)  h = MatMul(w, w1)  b = Relu(h)  y = MatMul(b, w2)
    }"""
UNKNOWN_INPUT = """<ir_version: 8, opset_import: ["": 17]>
    g (float[] x) => (float[] y) { h = MatMul(x, w1)  b = Relu(h)  y = MatMul(b, w2) }"""


def analysis_of_text(text: str, folder: Path, *, drop_input_shape: bool = False) -> Analysis:
    model = parser.parse_model(text)
    if drop_input_shape:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.ClearField("shape")
    for name, shape in (("w1", (8, 16)), ("w2", (16, 4))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    onnx.save(model, folder / "model.onnx")
    return analyze(load(folder / "model.onnx"))


def test_a_pin_names_the_operator_that_made_the_shape_unknown(tmp_path: Path) -> None:
    pins = analysis_of_text(UNKNOWN_OPERATOR, tmp_path).pins
    assert {pin.tensor for pin in pins} == {"w1", "w2"}
    assert all("the shape of w is unknown: Wobble Wobble_0 makes it" in pin.reason for pin in pins)


def test_a_pin_names_an_input_without_a_shape(tmp_path: Path) -> None:
    analysis = analysis_of_text(UNKNOWN_INPUT, tmp_path, drop_input_shape=True)
    assert {pin.reason for pin in analysis.pins} == {"the shape of x is unknown: the file does not say it"}


@pytest.mark.parametrize("opset", [9, 11, 13])
def test_hints_of_the_file_are_not_needed_for_younger_operators(opset: int, tmp_path: Path) -> None:
    """LayerNormalization is of opset 17; onnxruntime has it in every opset."""
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (float[B, N, 8] x) => (float[B, N, 4] y) <float[8] s = {{1, 1, 1, 1, 1, 1, 1, 1}}> {{
        n = LayerNormalization(x, s)  h = MatMul(n, w1)  b = Relu(h)  y = MatMul(b, w2)
    }}"""
    assert [g.role for g in analysis_of_text(text, tmp_path).groups if g.prunable] == ["ffn"]
