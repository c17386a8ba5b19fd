"""What a model costs does not depend on how its weights are stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import snpc
from tests.command_line import invoke

quantization = pytest.importorskip("onnxruntime.quantization")
WIDTHS = (64, 128, 32)
LENGTH = 5
MACS = LENGTH * (64 * 128 + 128 * 32)


def two_layers(path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), f"w{k}")
        for k, shape in enumerate(itertools.pairwise(WIDTHS))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "act"),
        helper.make_node("MatMul", ["b", "w1"], ["y"], "second"),
    ]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, LENGTH, 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, LENGTH, 32])]
    graph = helper.make_graph(nodes, "layers", ends, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class OneBatch(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.batches = iter([{"x": np.random.default_rng(1).standard_normal((1, LENGTH, 64)).astype(np.float32)}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def dynamically(source: Path, target: Path) -> None:
    quantization.quantize_dynamic(source, target)


def with_pairs(source: Path, target: Path) -> None:
    quantization.quantize_static(source, target, OneBatch(), per_channel=True)


def with_operators(source: Path, target: Path) -> None:
    quantization.quantize_static(source, target, OneBatch(), quant_format=quantization.QuantFormat.QOperator)


def optimized(source: Path, target: Path) -> None:
    """As onnxruntime saves the graph that it runs: integer products fused with their scales."""
    import onnxruntime as ort

    with_pairs(source, target)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])


def to_four_bits(source: Path, target: Path) -> None:
    module = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = module.MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=False)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


FORMS = (dynamically, with_pairs, with_operators, optimized, to_four_bits)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_quantized_weights_and_products_count(form: Callable[[Path, Path], None], tmp_path: Path) -> None:
    source, target = two_layers(tmp_path / "float.onnx"), tmp_path / "quantized.onnx"
    form(source, target)
    assert {t.data_type for t in onnx.load(target).graph.initializer} & {TensorProto.INT8, TensorProto.UINT8}
    before, after = (snpc.analyze(snpc.load(path)).cost for path in (source, target))
    assert before.macs == after.macs == MACS
    assert before.params == 64 * 128 + 128 * 32
    assert before.params <= after.params < 1.1 * before.params  # scales and zero points of floats count
    assert after.not_counted == ()


def test_products_that_are_not_counted_are_named(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[2].op_type, model.graph.node[2].domain = "SecretMatMul", "acme"
    model.opset_import.append(helper.make_opsetid("acme", 1))
    onnx.save(model, path)
    assert snpc.analyze(snpc.load(path)).cost.not_counted == ("1 SecretMatMul",)
    assert "MACs not counted: 1 SecretMatMul" in invoke("inspect", path).stdout
