"""Dequantization against onnxruntime: weights are exactly its own, outputs those of the quantized file."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType

import snpc
from snpc.passes.quantization.dequantize import Dequantize, quantized_operators
from tests.models.exports import export, load_feeds
from tests.models.quantized import FORMS, optimized, statically

Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"
WEIGHT_ONLY = sorted(name for name in FORMS if "blocks" in name)
ROUNDED = sorted(set(FORMS) - set(WEIGHT_ONLY))  # activations too


def outputs_of(path: Path, feeds: Mapping[str, Array]) -> list[Array]:
    """Without fusions: onnxruntime would multiply some forms in eight bits."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def relative(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)) / np.sqrt(np.mean(b**2)))


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int]],
    held: Mapping[str, Array | onnx.TensorProto],
    path: Path,
    opset: int = 21,
) -> Path:
    """A model whose only output is ``y``; ``inputs``: shapes, of float32 or, where they start with ``i``, int64."""
    types = {name: TensorProto.INT64 if name.startswith("i") else TensorProto.FLOAT for name in inputs}
    given = [helper.make_tensor_value_info(name, types[name], shape) for name, shape in inputs.items()]
    stored = [
        array if isinstance(array, onnx.TensorProto) else numpy_helper.from_array(array, name)
        for name, array in held.items()
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", given, [out], stored)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def float_weights(path: Path) -> dict[str, Array]:
    """The constants of two axes and more of the float model."""
    graph = snpc.load(path).graph.clone()
    assert Dequantize()(graph).modified
    assert not quantized_operators(graph)
    tensors = {str(v.name): v.const_value for v in graph.graph.initializers.values()}
    return {name: t.numpy() for name, t in tensors.items() if t is not None and len(t.shape) > 1}


# -- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WEIGHT_ONLY)
def test_quantized_weights_become_what_onnxruntime_makes_of_them(form: str, tmp_path: Path) -> None:
    source, feeds = export("llama__dyn20"), load_feeds("llama__dyn20")
    FORMS[form](source, tmp_path / "quantized.onnx", feeds)
    model = snpc.dequantize(tmp_path / "quantized.onnx", tmp_path / "float.onnx")
    assert model.dequantization is not None
    assert model.dequantization.left == {}
    quantized, floats = (outputs_of(tmp_path / f"{name}.onnx", feeds)[0] for name in ("quantized", "float"))
    assert relative(floats, quantized) < 1e-5
    assert relative(floats, outputs_of(source, feeds)[0]) > 1e-4  # it was quantized


@pytest.mark.parametrize("form", ROUNDED)
@pytest.mark.parametrize("name", ["llama__dyn20", "vit_timm__ts17"])
def test_quantized_activations_are_no_longer_rounded(name: str, form: str, tmp_path: Path) -> None:
    """The float model is closer to the quantized one, and no farther from the original, than rounding brings these
    apart."""
    source, feeds = export(name), load_feeds(name)
    FORMS[form](source, tmp_path / "quantized.onnx", feeds)
    model = snpc.dequantize(tmp_path / "quantized.onnx", tmp_path / "float.onnx")
    assert model.dequantization is not None
    assert model.dequantization.left == {}
    assert sum(model.dequantization.replaced.values()) > 10
    quantized, floats = (outputs_of(tmp_path / f"{which}.onnx", feeds)[0] for which in ("quantized", "float"))
    original = outputs_of(source, feeds)[0]
    assert relative(floats, quantized) < 0.04
    assert relative(floats, original) < 1.05 * relative(quantized, original)
    dense, found = (
        sorted((g.role, g.blocks, g.size) for g in snpc.analyze(m).groups) for m in (snpc.load(source), model)
    )
    assert found == dense


EVERY_OPERATOR: dict[str, Any] = {"op_types_to_quantize": None}
IN_OPERATORS = {**EVERY_OPERATOR, "quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8}


@pytest.mark.parametrize("options", [EVERY_OPERATOR, IN_OPERATORS], ids=["pairs", "operators"])
@pytest.mark.parametrize("is_optimized", [False, True], ids=["", "optimized"])
def test_files_in_which_everything_is_quantized(options: dict[str, Any], is_optimized: bool, tmp_path: Path) -> None:
    """Sums, concatenations, softmax and activations on bytes, and bytes that are moved."""
    source, feeds, target = export("vit_timm__ts17"), load_feeds("vit_timm__ts17"), tmp_path / "quantized.onnx"
    writer = functools.partial(statically, **options)
    if is_optimized:
        optimized(source, target, feeds, writer)
    else:
        writer(source, target, feeds)
    model = snpc.dequantize(target, tmp_path / "float.onnx")
    assert model.dequantization is not None
    assert model.dequantization.left == {}
    quantized, floats, original = (outputs_of(p, feeds)[0] for p in (target, tmp_path / "float.onnx", source))
    assert relative(floats, quantized) < 0.1
    assert relative(floats, original) < relative(quantized, original)
    dense, found = (snpc.analyze(m) for m in (snpc.load(source), model))
    assert [(g.role, g.blocks, g.size) for g in found.groups] == [(g.role, g.blocks, g.size) for g in dense.groups]


def test_what_one_reader_needs_quantized_is_there_twice(tmp_path: Path) -> None:
    """Bytes that an operator without a rule reads stay beside the floats that the others read."""
    held = {"s": np.float32(0.1), "z": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("Reshape", ["q", "shape"], ["r"], "reshape"),
        helper.make_node("DequantizeLinear", ["r", "s", "z"], ["a"], "floats"),
        helper.make_node("Cast", ["r"], ["b"], "codes", to=TensorProto.FLOAT),
        helper.make_node("Add", ["a", "b"], ["y"], "sum"),
    ]
    constants = {**{k: np.asarray(v) for k, v in held.items()}, "shape": np.array([2, 2])}
    path = graph_of(nodes, {"x": [4]}, constants, tmp_path / "m.onnx")
    feeds = {"x": np.array([0.31, -0.52, 1.0, 2.04], np.float32)}
    snpc.dequantize(path, tmp_path / "float.onnx")
    floats, quantized = (outputs_of(p, feeds)[0] for p in (tmp_path / "float.onnx", path))
    np.testing.assert_allclose(floats, quantized, atol=0.051)
    assert not np.array_equal(floats, quantized)


def test_a_relu_that_a_range_replaced_comes_back(tmp_path: Path) -> None:
    """onnxruntime's quantizer drops a Relu in front of a range that starts at zero, which then cuts off the rest."""
    rng = np.random.default_rng(0)
    weights = {f"w{k}": rng.standard_normal(s).astype(np.float32) for k, s in enumerate(((16, 32), (32, 8)))}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["y"]),
    ]
    source = graph_of(nodes, {"x": [4, 16]}, weights, tmp_path / "source.onnx")
    feeds = {"x": rng.standard_normal((4, 16)).astype(np.float32)}
    statically(source, tmp_path / "quantized.onnx", feeds, op_types_to_quantize=["MatMul", "Relu"])
    kept = [n.op_type for n in onnx.load(tmp_path / "quantized.onnx").graph.node]
    snpc.dequantize(tmp_path / "quantized.onnx", tmp_path / "float.onnx")
    made = [n.op_type for n in onnx.load(tmp_path / "float.onnx").graph.node]
    assert "Relu" not in kept
    assert made == ["MatMul", "Clip", "MatMul"]
    floats, original = (outputs_of(path, feeds)[0] for path in (tmp_path / "float.onnx", source))
    assert relative(floats, original) < 0.03


# -- single nodes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "zero_points"),
    [*itertools.product((2, 4, 8), ("default", "packed")), (2, "float"), (4, "float")],  # onnxruntime runs no others
)
@pytest.mark.parametrize("rows", [64, 40])
def test_packed_weights(bits: int, zero_points: str, rows: int, tmp_path: Path) -> None:
    """MatMulNBits on the identity: onnxruntime's own weight. 40 rows end inside a block."""
    rng, columns, block = np.random.default_rng(bits), 24, 32
    blocks = -(-rows // block)
    held = {
        "w": rng.integers(0, 256, (columns, blocks, block * bits // 8), dtype=np.uint8),
        "s": rng.uniform(0.5, 1.5, columns * blocks).astype(np.float32),
    }
    if zero_points == "packed":
        held["z"] = rng.integers(0, 256, (columns * -(-blocks * bits // 8)), dtype=np.uint8)
    elif zero_points == "float":
        held["z"] = rng.uniform(0, 3, columns * blocks).astype(np.float32)
    sizes = {"K": rows, "N": columns, "bits": bits, "block_size": block}
    node = helper.make_node("MatMulNBits", ["x", *held], ["y"], domain=MICROSOFT, **sizes)
    path = graph_of([node], {"x": [rows, rows]}, held, tmp_path / "m.onnx")
    (expected,) = outputs_of(path, {"x": np.eye(rows, dtype=np.float32)})
    (weight,) = float_weights(path).values()
    rounding = 1e-5 if zero_points == "float" else 0  # onnxruntime multiplies before it subtracts there
    np.testing.assert_allclose(weight, expected, rtol=0, atol=rounding)


def test_packed_weights_with_groups_and_a_bias(tmp_path: Path) -> None:
    """Rows of GPTQ weights name their group; with groups in order they mean what blocks mean."""
    rng = np.random.default_rng(3)
    held = {
        "w": rng.integers(0, 256, (8, 2, 16), dtype=np.uint8),
        "s": rng.uniform(0.5, 1.5, 16).astype(np.float32),
        "g": (np.arange(64) // 32).astype(np.int32),
        "b": rng.standard_normal(8).astype(np.float32),
    }
    sizes = {"K": 64, "N": 8, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "w", "s", "", "g", "b"], ["y"], domain=MICROSOFT, **sizes)
    plain = helper.make_node("MatMulNBits", ["x", "w", "s", "", "", "b"], ["y"], domain=MICROSOFT, **sizes)
    expected = outputs_of(
        graph_of([plain], {"x": [64, 64]}, held, tmp_path / "plain.onnx"), {"x": np.eye(64, dtype=np.float32)}
    )[0]
    path = graph_of([node], {"x": [64, 64]}, held, tmp_path / "m.onnx")
    snpc.dequantize(path, tmp_path / "float.onnx")
    (floats,) = outputs_of(tmp_path / "float.onnx", {"x": np.eye(64, dtype=np.float32)})
    np.testing.assert_allclose(floats, expected, rtol=1e-6)
    shuffled = {**held, "g": held["g"][::-1].copy()}
    mixed = float_weights(graph_of([node], {"x": [64, 64]}, shuffled, tmp_path / "g.onnx"))
    ordered = float_weights(path)
    scales = held["s"].reshape(8, 2).T  # [group, column]
    (a,), (b,) = (list(w.values()) for w in (mixed, ordered))
    np.testing.assert_allclose(a / scales[shuffled["g"]], b / scales[held["g"]], rtol=1e-5)


@pytest.mark.parametrize("stored", ["int4", "uint4", "packed", "bytes"])
@pytest.mark.parametrize("with_zero_points", [False, True])
def test_block_quantized_tables(stored: str, with_zero_points: bool, tmp_path: Path) -> None:
    """GatherBlockQuantized, all rows gathered."""
    rng = np.random.default_rng(4)
    kinds = {"int4": TensorProto.INT4, "uint4": TensorProto.UINT4}
    bits = 8 if stored == "bytes" else 4
    held: dict[str, Array | onnx.TensorProto] = {}
    if stored in kinds:
        low = -8 if stored == "int4" else 0
        for name, shape in (("w", (11, 32)), ("z", (11, 2))):
            values = rng.integers(low, low + 16, shape)
            held[name] = helper.make_tensor(name, kinds[stored], shape, values.reshape(-1).tolist())
    else:
        width = 32 * bits // 8
        held = {
            "w": rng.integers(0, 256, (11, width), dtype=np.uint8),
            "z": rng.integers(0, 256, (11, 2 * bits // 8), dtype=np.uint8),
        }
    held["s"] = rng.uniform(0.5, 1.5, (11, 2)).astype(np.float32)
    if not with_zero_points:
        del held["z"]
    names = ["w", "ids", "s", *(["z"] if with_zero_points else [])]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": 16, "bits": bits}
    node = helper.make_node("GatherBlockQuantized", names, ["y"], domain=MICROSOFT, **attributes)
    path = graph_of([node], {"ids": [11]}, held, tmp_path / "m.onnx")
    (expected,) = outputs_of(path, {"ids": np.arange(11)})
    (table,) = float_weights(path).values()
    np.testing.assert_array_equal(table, expected)


PER_TENSOR, PER_ROW, PER_COLUMN, IN_BLOCKS = (), (12,), (20,), (12, 4)


@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.INT32])
@pytest.mark.parametrize(("scales", "axis"), [(PER_TENSOR, 1), (PER_ROW, 0), (PER_COLUMN, 1), (IN_BLOCKS, -1)])
def test_dequantize_linear(kind: int, scales: tuple[int, ...], axis: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    low, high = {TensorProto.INT4: (-8, 8), TensorProto.UINT8: (0, 256)}.get(kind, (-128, 128))
    values = {"w": rng.integers(low, high, (12, 20)), "z": rng.integers(low, high, scales)}
    if kind == TensorProto.INT32:
        values["z"] = np.zeros(scales, np.int64)  # the standard takes no other
    held: dict[str, Array | onnx.TensorProto] = {
        name: helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist()) for name, array in values.items()
    }
    held["s"] = rng.uniform(0.5, 1.5, scales).astype(np.float32)
    block = {"block_size": 5} if scales == IN_BLOCKS else {}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=axis, **block),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    path = graph_of(nodes, {"x": [12, 20]}, held, tmp_path / "m.onnx")
    (expected,) = outputs_of(path, {"x": np.zeros((12, 20), np.float32)})
    (weight,) = float_weights(path).values()
    np.testing.assert_array_equal(weight, expected)


def test_a_table_that_is_gathered_before_it_is_dequantized(tmp_path: Path) -> None:
    """Embeddings of dynamic quantization: rows of bytes are looked up, and then made float."""
    rng = np.random.default_rng(6)
    held = {"w": rng.integers(0, 256, (9, 8), dtype=np.uint8), "s": np.float32(0.1), "z": np.uint8(7)}
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    path = graph_of(nodes, {"ids": [9]}, {k: np.asarray(v) for k, v in held.items()}, tmp_path / "m.onnx")
    (expected,) = outputs_of(path, {"ids": np.arange(9)})
    (table,) = float_weights(path).values()
    np.testing.assert_array_equal(table, expected)


def test_a_table_with_two_readers_stays_one(tmp_path: Path) -> None:
    """Encoder and decoder look up rows of one table."""
    source = export("encdec__dyn20")
    FORMS["int4_blocks_and_table"](source, tmp_path / "quantized.onnx", {})
    model = snpc.dequantize(tmp_path / "quantized.onnx")
    assert model.dequantization is not None
    assert model.dequantization.replaced["GatherBlockQuantized"] == 2
    assert snpc.analyze(model).cost.params == snpc.analyze(snpc.load(source)).cost.params


def test_a_table_that_shares_the_weight_of_the_last_layer(tmp_path: Path) -> None:
    """As onnxruntime-genai's builder writes tied embeddings: one constant, laid out anew for the table."""
    rng = np.random.default_rng(7)
    held = {
        "w": rng.integers(0, 256, (11, 2, 16), dtype=np.uint8),
        "s": rng.uniform(0.5, 1.5, 22).astype(np.float32),
        "rows": np.array([11, 32]),
        "blocks": np.array([11, 2]),
    }
    sizes = {"K": 64, "N": 11, "bits": 4, "block_size": 32}
    look_up = {"gather_axis": 0, "quantize_axis": 1, "block_size": 32, "bits": 4}
    nodes = [
        helper.make_node("Reshape", ["w", "rows"], ["table"]),
        helper.make_node("Reshape", ["s", "blocks"], ["scales"]),
        helper.make_node("GatherBlockQuantized", ["table", "ids", "scales"], ["h"], domain=MICROSOFT, **look_up),
        helper.make_node("MatMulNBits", ["h", "w", "s"], ["y"], domain=MICROSOFT, **sizes),
    ]
    path, feeds = graph_of(nodes, {"ids": [5]}, held, tmp_path / "m.onnx"), {"ids": np.array([3, 1, 4, 1, 10])}
    assert snpc.analyze(snpc.load(path)).cost.params == 11 * 64
    model = snpc.dequantize(path, tmp_path / "float.onnx")
    assert model.dequantization is not None
    assert model.dequantization.left == {}
    floats, quantized = (outputs_of(p, feeds)[0] for p in (tmp_path / "float.onnx", path))
    np.testing.assert_allclose(floats, quantized, rtol=1e-5, atol=1e-5 * float(np.abs(quantized).max()))


@pytest.mark.parametrize("per_column", [False, True])
def test_fused_attention(per_column: bool, tmp_path: Path) -> None:
    """QAttention, as onnxruntime's transformer optimizer and its quantizer write it."""
    rng = np.random.default_rng(8)
    columns = 48 if per_column else 1
    held = {
        "s": np.asarray(0.02, np.float32),
        "z": np.asarray(120, np.uint8),
        "w": rng.integers(-127, 128, (16, 48), dtype=np.int8),
        "b": rng.standard_normal(48).astype(np.float32),
        "ws": rng.uniform(0.002, 0.006, columns).astype(np.float32),
        "wz": np.zeros(columns, np.int8),
    }
    if not per_column:
        held |= {"ws": held["ws"].reshape(()), "wz": held["wz"].reshape(())}
    names = ["q", "w", "b", "s", "ws", "", "z", "wz"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QAttention", names, ["y"], domain=MICROSOFT, num_heads=4, unidirectional=1),
    ]
    path = graph_of(nodes, {"x": [2, 5, 16]}, held, tmp_path / "m.onnx")
    snpc.dequantize(path, tmp_path / "float.onnx")
    feeds = {"x": rng.uniform(-2, 2, (2, 5, 16)).astype(np.float32)}  # within the range of its bytes
    assert [n.op_type for n in onnx.load(tmp_path / "float.onnx").graph.node] == ["Attention"]
    floats, quantized = (outputs_of(p, feeds)[0] for p in (tmp_path / "float.onnx", path))
    assert relative(floats, quantized) < 0.01


@pytest.mark.parametrize("kind", [0, 1], ids=["float4", "normal"])
def test_levels_of_four_bits(kind: int, tmp_path: Path) -> None:
    """MatMulBnb4: blocks run over the rows of its transpose. It is not cut, and its pin says what takes it."""
    rng = np.random.default_rng(9)
    held = {
        "enter": rng.standard_normal((8, 72)).astype(np.float32),
        "w": rng.integers(0, 256, 72 * 24 // 2, dtype=np.uint8),
        "largest": rng.uniform(0.1, 1, 72 * 24 // 32).astype(np.float32),
    }
    sizes = {"K": 72, "N": 24, "block_size": 32, "quant_type": kind}
    nodes = [
        helper.make_node("MatMul", ["x", "enter"], ["h"]),
        helper.make_node("MatMulBnb4", ["h", "w", "largest"], ["y"], domain=MICROSOFT, **sizes),
    ]
    path = graph_of(nodes, {"x": [3, 8]}, held, tmp_path / "m.onnx")
    assert any("--dequantize" in pin.reason for pin in snpc.analyze(snpc.load(path)).pins)
    model = snpc.dequantize(path, tmp_path / "float.onnx")
    feeds = {"x": rng.standard_normal((3, 8)).astype(np.float32)}
    floats, quantized = (outputs_of(p, feeds)[0] for p in (tmp_path / "float.onnx", path))
    assert relative(floats, quantized) < 1e-6
    assert any(g.size == 72 and g.prunable for g in snpc.analyze(model).groups)


def test_values_of_another_scale_stay_quantized(tmp_path: Path) -> None:
    """Bytes that are read with another scale than they were written with are multiplied; no rule says so."""
    held = {"s": np.float32(0.1), "t": np.float32(0.2), "z": np.uint8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "t", "z"], ["y"]),
    ]
    path = graph_of(nodes, {"x": [4]}, {k: np.asarray(v) for k, v in held.items()}, tmp_path / "m.onnx")
    graph = snpc.load(path).graph.clone()
    Dequantize()(graph)
    assert quantized_operators(graph) == {"QuantizeLinear": 1, "DequantizeLinear": 1}


def test_a_product_of_two_layers_in_every_form(tmp_path: Path) -> None:
    """Convolution, its bias, and a Gemm: QLinearConv and QGemm hold biases of int32."""
    source, feeds = export("convnet__ts17"), load_feeds("convnet__ts17")
    for form in ("operators", "dynamic", "qdq_per_channel"):
        FORMS[form](source, tmp_path / "quantized.onnx", feeds)
        model = snpc.dequantize(tmp_path / "quantized.onnx", tmp_path / "float.onnx")
        assert model.dequantization is not None
        assert model.dequantization.left == {}
        quantized, floats = (outputs_of(tmp_path / f"{which}.onnx", feeds)[0] for which in ("quantized", "float"))
        assert relative(floats, quantized) < 0.03, form
