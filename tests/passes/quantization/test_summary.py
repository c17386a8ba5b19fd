"""What is said of a quantized file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest
from onnx import helper

import snpc
from snpc.passes.quantization.summary import describe_quantization
from tests.command_line import VIT, invoke
from tests.models.exports import export, load_feeds
from tests.models.quantized import FORMS


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("int4_blocks", "93 % of the weights are quantized (MatMulNBits int4, blocks of 32)"),
        ("int8_blocks", "(MatMulNBits int8, blocks of 32)"),
        ("uint4_blocks_pairs", "(DequantizeLinear uint4, blocks of 32)"),
        ("int4_blocks_and_table", "(MatMulNBits int4, blocks of 32; GatherBlockQuantized int4, blocks of 32)"),
        ("dynamic", "(MatMulInteger int8; Gather uint8)"),
        ("qdq", "(DequantizeLinear int8)"),
        ("operators", "(QLinearMatMul int8; Gather uint8)"),
    ],
)
def test_forms_are_named(form: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model q.onnx"
    FORMS[form](export("llama__dyn20"), path, load_feeds("llama__dyn20"))
    analysis = snpc.analyze(snpc.load(path))
    text = describe_quantization(analysis.model, analysis.cost)
    assert said in text
    assert f"snpc dequantize '{path}' -o float.onnx" in text
    shown = invoke("inspect", path).stdout
    assert text in shown
    assert "and are cut as they are stored; `--dequantize`" in text
    report = json.loads(invoke("inspect", path, "--json", "-").stdout)
    assert sum(entry["params"] for entry in report["quantized"]) > 0.9 * report["params"]


def test_nothing_is_said_of_a_float_model() -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    assert describe_quantization(analysis.model, analysis.cost) == ""
    assert analysis.cost.quantized == ()


def test_what_stays_is_said(tmp_path: Path) -> None:
    """A node whose weight lies as no rule knows, and then all of them."""
    path = tmp_path / "q.onnx"
    FORMS["int4_blocks"](export("llama__dyn20"), path, {})
    model = onnx.load(path)
    first, *rest = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    first.attribute.append(helper.make_attribute("weight_prepacked", 1))
    onnx.save(model, path)
    assert "cut as they are stored, but for 1 MatMulNBits, which stay" in invoke("inspect", path).stdout
    for node in rest:
        node.attribute.append(helper.make_attribute("weight_prepacked", 1))
    onnx.save(model, path)
    said = invoke("prune", path, "--ratio", 0.3, code=2).stderr
    assert re.search(r"nothing to prune .*MatMulNBits int4.*--dequantize", said)
    assert "axis" not in invoke("inspect", path).stdout  # no table of pins, which tell of other things
