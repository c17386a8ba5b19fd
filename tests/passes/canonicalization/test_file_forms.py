"""One model in many forms: what is found and cut does not depend on how a tool has written weights and graph."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from snpc.passes.analyze import Analysis, analyze
from snpc.passes.canonicalization.canonicalize import canonicalize
from snpc.runtime.io.load import load
from snpc.runtime.io.save import save
from tests.models.exports import export
from tests.oracle import TOLERANCE, Feeds, Level, analysis_of, cut, feeds_of, prunable, random_cuts, relative_error, run

BASE = "bert__ts17"
Form = Callable[[onnx.ModelProto], onnx.ModelProto]

FORMS: dict[str, Form] = {}


def form(build: Form) -> Form:
    FORMS[build.__name__] = build
    return build


def weights(model: onnx.ModelProto, rank: int = 1) -> list[TensorProto]:
    return [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) >= rank]


def behind(model: onnx.ModelProto, tensor: TensorProto, stored: np.ndarray, op: str, **attributes: object) -> None:
    """Store ``stored`` instead of ``tensor``, and a node in front that makes of it what was there."""
    name = tensor.name
    model.graph.initializer.remove(tensor)
    model.graph.initializer.append(numpy_helper.from_array(stored, f"{name}.stored"))
    node = helper.make_node(op, [f"{name}.stored"], [name], name=f"{name}.{op}", **attributes)
    model.graph.node.insert(0, node)


@form
def constant_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in list(model.graph.initializer):
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    return model


@form
def behind_identity(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in weights(model):
        behind(model, tensor, numpy_helper.to_array(tensor), "Identity")
    return model


@form
def behind_transpose(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in [t for t in weights(model) if len(t.dims) == 2]:
        behind(model, tensor, np.ascontiguousarray(numpy_helper.to_array(tensor).T), "Transpose", perm=[1, 0])
    return model


@form
def behind_cast(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in weights(model):
        behind(model, tensor, numpy_helper.to_array(tensor).astype(np.float16), "Cast", to=TensorProto.FLOAT)
    return model


@form
def initializers_that_are_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer
    )
    return model


@form
def unnamed_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        node.name = ""
    return model


@form
def one_name_for_all_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        node.name = "node"
    return model


@form
def nodes_out_of_order(model: onnx.ModelProto) -> onnx.ModelProto:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    return model


def in_type(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """Every float a float of another type."""
    for tensor in [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t"))]:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = kind
    for value in (*model.graph.output, *model.graph.input):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    del model.graph.value_info[:]
    return model


@form
def half(model: onnx.ModelProto) -> onnx.ModelProto:
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    return float16.convert_float_to_float16(model, keep_io_types=False)


@form
def onnxruntime_extended(model: onnx.ModelProto) -> onnx.ModelProto:
    return by_onnxruntime(model, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)


@form
def onnxruntime_basic(model: onnx.ModelProto) -> onnx.ModelProto:
    return by_onnxruntime(model, ort.GraphOptimizationLevel.ORT_ENABLE_BASIC)


def by_onnxruntime(model: onnx.ModelProto, level: ort.GraphOptimizationLevel) -> onnx.ModelProto:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = f"{folder}/model.onnx"
        options.log_severity_level = 4
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


@form
def slimmed(model: onnx.ModelProto) -> onnx.ModelProto:
    return pytest.importorskip("onnxslim").slim(model)


@form
def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    made, sound = pytest.importorskip("onnxsim").simplify(model)
    assert sound
    return made


def fused_by(kind: str, heads: int, width: int) -> Form:
    def build(model: onnx.ModelProto) -> onnx.ModelProto:
        import tempfile

        pytest.importorskip("sympy")
        optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
        logging.disable(logging.WARNING)
        try:
            with tempfile.TemporaryDirectory() as folder:
                onnx.save(model, f"{folder}/model.onnx")
                return optimizer.optimize_model(
                    f"{folder}/model.onnx", model_type=kind, num_heads=heads, hidden_size=width, opt_level=0
                ).model
        finally:
            logging.disable(logging.NOTSET)

    return build


def found(analysis: Analysis) -> Counter[tuple[str, int, int]]:
    return Counter((g.role, g.blocks, g.size) for g in prunable(analysis.groups))


def check(analysis: Analysis, feeds: Feeds, tolerance: float, original: bytes, level: Level = "all") -> None:
    """All widths at once, and the heads alone."""
    for roles in (("qk", "vo", "ffn"), ("head",)):
        groups = prunable(analysis.groups, *roles)
        assert groups, roles
        pair = cut(analysis, random_cuts(groups, 2, 0.5))
        masked = run(pair.masked, feeds)
        assert relative_error(masked, run(pair.sliced, feeds, level)) < tolerance
        assert relative_error(run(original, feeds), masked) > 1e-3
        assert len(pair.sliced) < len(pair.masked)


@pytest.mark.parametrize("name", FORMS)
def test_any_form_is_cut_as_the_original(name: str, tmp_path: Path) -> None:
    feeds = feeds_of(BASE)
    model = FORMS[name](onnx.load(export(BASE)))
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyze(load(tmp_path / "model.onnx"))
    assert found(analysis) == found(analysis_of(BASE))
    broken = ("nodes_out_of_order", "one_name_for_all_nodes")  # onnxruntime does not take these
    original = export(BASE).read_bytes() if name in broken else model.SerializeToString()
    check(analysis, feeds, 2e-2 if name == "half" else TOLERANCE, original)


def test_double_precision_is_kept(tmp_path: Path) -> None:
    name = "t5__ts17"  # onnxruntime has no Erf of doubles
    model = in_type(onnx.load(export(name)), TensorProto.DOUBLE)
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyze(load(tmp_path / "model.onnx"))
    assert found(analysis) == found(analysis_of(name))
    check(analysis, feeds_of(name), 1e-10, model.SerializeToString(), "off")  # fusions compute in single


FUSED = {
    "bert__ts17": fused_by("bert", 4, 48),
    "bert__dyn20_sdpa": fused_by("bert", 4, 48),
    "gpt2__dyn20_sdpa": fused_by("gpt2", 4, 48),
    "llama__dyn20_sdpa": fused_by("gpt2", 4, 48),
    "vit_hf__ts17": fused_by("vit", 4, 48),
    "t5__ts17": fused_by("bert", 4, 48),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_the_transformers_optimizer_writes_is_cut(name: str, tmp_path: Path) -> None:
    """com.microsoft's fused nodes, made from exports by the tool that makes them."""
    feeds = feeds_of(name)
    model = FUSED[name](onnx.load(export(name)))
    assert any(node.domain == "com.microsoft" for node in model.graph.node)
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyze(load(tmp_path / "model.onnx"))
    wanted = {k: v for k, v in found(analysis_of(name)).items() if k[0] in ("qk", "vo", "ffn", "head")}
    assert {k: v for k, v in found(analysis).items() if k[0] in ("qk", "vo", "ffn", "head")} == wanted
    groups = prunable(analysis.groups, "qk", "vo", "ffn", "residual")
    pair = cut(analysis, random_cuts(groups, 2, {"residual": 0.25}))
    masked = run(pair.masked, feeds)
    assert relative_error(masked, run(pair.sliced, feeds)) < TOLERANCE
    assert relative_error(run(model.SerializeToString(), feeds), masked) > 1e-3


def test_bfloat16_is_sliced_as_it_is(tmp_path: Path) -> None:
    """onnxruntime runs little of it: the weights that stay must be those of the original, bit for bit."""
    model = in_type(onnx.load(export(BASE)), TensorProto.BFLOAT16)
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyze(load(tmp_path / "model.onnx"))
    assert found(analysis) == found(analysis_of(BASE))
    groups = prunable(analysis.groups, "ffn")
    removed = random_cuts(groups, 2, 0.5)
    sliced = onnx.load_from_string(cut(analysis, removed).sliced)
    before = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    after = {t.name: t for t in sliced.graph.initializer}
    for (name, axis), gone in removed.items():
        assert after[name].data_type == TensorProto.BFLOAT16
        np.testing.assert_array_equal(numpy_helper.to_array(after[name]), np.compress(~gone, before[name], axis))


def test_external_data_stays_external(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load(export(BASE)), path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    analysis = analyze(load(path))
    assert found(analysis) == found(analysis_of(BASE))
    check(analysis, feeds_of(BASE), TOLERANCE, export(BASE).read_bytes())
    pair = cut(analysis, random_cuts(prunable(analysis.groups, "ffn"), 2, 0.5))
    save(pair.rewritten.model, tmp_path / "half.onnx", external=True)
    assert (tmp_path / "half.onnx.data").is_file()
    assert (tmp_path / "half.onnx").stat().st_size < 60_000
    assert relative_error(run(pair.masked, feeds_of(BASE)), run(tmp_path / "half.onnx", feeds_of(BASE))) < TOLERANCE


def test_an_intermediate_value_that_is_an_output_stays(tmp_path: Path) -> None:
    model = onnx.load(export(BASE))
    (node,) = (n for n in model.graph.node if n.name == "/model/encoder/layer.0/intermediate/dense/Add")
    model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyze(load(tmp_path / "model.onnx"))
    lost = found(analysis_of(BASE)) - found(analysis)
    assert lost == Counter({("ffn", 1, 96): 1})
    check(analysis, feeds_of(BASE), TOLERANCE, model.SerializeToString())


def test_functions_of_the_model_are_looked_into(tmp_path: Path) -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18, "own": 1]>
        g (float[B, 16] x) => (float[B, 4] y) { h = own.Layer(x, a, b)  y = MatMul(h, c) }
        <opset_import: ["": 18], domain: "own">
        Layer (x, w, bias) => (y) { m = MatMul(x, w)  s = Add(m, bias)  y = Relu(s) }""")
    rng = np.random.default_rng(0)
    for name, shape in {"a": (16, 12), "b": (12,), "c": (12, 4)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyze(load(tmp_path / "model.onnx"))
    assert found(analysis) == Counter({("ffn", 1, 12): 1})
    pair = cut(analysis, random_cuts(analysis.groups[:1], 1))
    feeds = {"x": rng.normal(size=(3, 16)).astype(np.float32)}
    assert relative_error(run(pair.masked, feeds), run(pair.sliced, feeds)) < TOLERANCE


def test_quantised_weights_are_taken_by_their_float_values(tmp_path: Path) -> None:
    model = onnx.load(export(BASE))
    plain = found(analysis_of(BASE))
    (tensor,) = (t for t in weights(model) if t.name == first_dense(model))
    array = numpy_helper.to_array(tensor)
    scale = np.float32(np.abs(array).max() / 127)
    behind(model, tensor, np.round(array / scale).astype(np.int8), "DequantizeLinear")
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(scale), "scale"))
    model.graph.node[0].input.append("scale")
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyze(load(tmp_path / "model.onnx"))
    assert found(analysis) == plain


def first_dense(model: onnx.ModelProto) -> str:
    (node,) = (n for n in model.graph.node if n.name == "/model/encoder/layer.0/intermediate/dense/MatMul")
    return node.input[1]


def test_forms_do_not_change_the_base() -> None:
    """The forms above are made from a fresh copy each."""
    first = onnx.load(export(BASE))
    behind_cast(copy.deepcopy(first))
    assert first == onnx.load(export(BASE))


def test_a_constant_has_one_name() -> None:
    """A bias that another layer reads through an Identity, as torch exports equal ones, is a bias of that layer."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x) => (float[n, 4] y, float[4] kept)
        <float[4] b = {1.0, 2.0, 3.0, 4.0}>
        { other = Identity(b)  kept = Identity(b)  h = Add(x, b)  g2 = Relu(h)  y = Add(g2, other) }
    """)
    graph = canonicalize(onnx_ir.from_proto(model)).graph
    assert [node.op_type for node in graph] == ["Identity", "Add", "Relu", "Add"]
    read = [str(node.inputs[1].name) for node in graph if node.op_type == "Add"]
    assert len(set(read)) == 2 and all(name in graph.initializers for name in read)
