"""What a model costs does not depend on how its weights are stored."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import snpc
from tests.command_line import invoke
from tests.models.exports import export, load_feeds
from tests.models.quantized import FORMS

WIDTHS = (64, 128, 32)
LENGTH = 5
MACS = LENGTH * (64 * 128 + 128 * 32)


def two_layers(path: Path, widths: tuple[int, ...] = WIDTHS) -> Path:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), f"w{k}")
        for k, shape in enumerate(itertools.pairwise(widths))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "act"),
        helper.make_node("MatMul", ["b", "w1"], ["y"], "second"),
    ]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, LENGTH, widths[0]])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, LENGTH, widths[-1]])]
    graph = helper.make_graph(nodes, "layers", ends, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


EXACT = sorted(set(FORMS) - {"dynamic_optimized", "qdq_optimized"})


@pytest.mark.parametrize("form", EXACT)
def test_quantized_files_hold_the_parameters_and_macs_of_their_float_model(form: str, tmp_path: Path) -> None:
    """Scales and zero points are no parameters, and packed weights count one by one."""
    source, target = export("llama__dyn20"), tmp_path / "quantized.onnx"
    FORMS[form](source, target, load_feeds("llama__dyn20"))
    before, after = (snpc.analyze(snpc.load(path)).cost for path in (source, target))
    assert (after.params, after.macs, after.not_counted) == (before.params, before.macs, ())
    assert after.bytes < 0.45 * before.bytes


@pytest.mark.parametrize("form", sorted(FORMS))
def test_quantized_weights_and_products_count(form: str, tmp_path: Path) -> None:
    """Also in what onnxruntime saves of the graph that it runs: integer products fused with their scales."""
    source, target = two_layers(tmp_path / "float.onnx"), tmp_path / "quantized.onnx"
    FORMS[form](source, target, {"x": np.random.default_rng(1).standard_normal((1, LENGTH, 64)).astype(np.float32)})
    cost = snpc.analyze(snpc.load(target)).cost
    assert (cost.params, cost.macs, cost.not_counted) == (64 * 128 + 128 * 32, MACS, ())


def test_padding_of_the_last_block_is_no_parameter(tmp_path: Path) -> None:
    source, target = two_layers(tmp_path / "float.onnx", (40, 72, 8)), tmp_path / "quantized.onnx"
    FORMS["int4_blocks"](source, target, {})
    assert [n.op_type for n in onnx.load(target).graph.node] == ["MatMulNBits", "Relu", "MatMulNBits"]
    assert snpc.analyze(snpc.load(target)).cost.params == 40 * 72 + 72 * 8


def test_products_that_are_not_counted_are_named(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[2].op_type, model.graph.node[2].domain = "SecretMatMul", "acme"
    model.opset_import.append(helper.make_opsetid("acme", 1))
    onnx.save(model, path)
    assert snpc.analyze(snpc.load(path)).cost.not_counted == ("1 SecretMatMul",)
    assert "MACs not counted: 1 SecretMatMul" in invoke("inspect", path).stdout


@pytest.mark.parametrize(("bits", "per_byte"), [(4, 2), (8, 1)])
def test_quantized_experts_count_as_their_weights_and_as_those_that_are_chosen(
    bits: int, per_byte: int, tmp_path: Path
) -> None:
    experts, width, hidden, chosen, tokens = 6, 16, 32, 2, 5
    shapes = {"inner": (experts, hidden, width // per_byte), "outer": (experts, width, hidden // per_byte)}
    held = [numpy_helper.from_array(np.ones(shape, np.uint8), name) for name, shape in shapes.items()]
    scales = {"inner_scales": (experts, hidden), "outer_scales": (experts, width)}
    held += [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in scales.items()]
    inputs = ["x", "router", "inner", "inner_scales", "", "outer", "outer_scales"]
    node = helper.make_node("QMoE", inputs, ["y"], "experts", domain="com.microsoft", k=chosen, expert_weight_bits=bits)
    ends = {"x": [tokens, width], "router": [tokens, experts], "y": [tokens, width]}
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in ends.items()}
    graph = helper.make_graph([node], "g", [values["x"], values["router"]], [values["y"]], held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "experts.onnx")
    cost = snpc.analyze(snpc.load(tmp_path / "experts.onnx")).cost
    assert cost.params == cost.quantized_params == 2 * experts * width * hidden
    assert cost.quantized[0].form == f"QMoE int{bits}"
    assert cost.macs == tokens * chosen * 2 * width * hidden
    assert not cost.not_counted
