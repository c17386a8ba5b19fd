"""What outputs hold, by what the graph does at its end."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from snpc.graph import choose_dim_sizes
from snpc.passes import OutputKind, find_output_kinds
from tests.models.matchers import matcher
from tests.oracle import analysis_of


def kinds_of(body: str, outputs: str, inputs: str = "float[N, 4, 8] x") -> dict[str, OutputKind]:
    """Kinds of the outputs of a graph with the constants w [8, 8], v [8, 20], b [8] and ids."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    constants = {"w": np.ones((8, 8)), "v": np.ones((8, 20)), "b": np.ones(8), "c": np.ones((3, 4, 3, 3)), "s": 30.0}
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(a, np.float32), name) for name, a in constants.items() if name in used
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    return find_output_kinds(model, choose_dim_sizes(model)[1])


def kind_of(body: str, name: str = "y", shape: str = "N, 4, 8", inputs: str = "float[N, 4, 8] x") -> OutputKind:
    return kinds_of(body, f"float[{shape}] {name}", inputs)[name]


@pytest.mark.parametrize(
    ("body", "content", "axis"),
    [
        ("y = Softmax (x)", "probabilities", -1),
        ("y = Softmax <axis = 1> (x)", "probabilities", -2),
        ("y = LogSoftmax (x)", "log_probabilities", -1),
        ("p = Softmax (x) y = Log (p)", "log_probabilities", -1),
        ("p = Softmax <axis = 1> (x) y = Transpose <perm = [0, 2, 1]> (p)", "probabilities", -1),
        ("p = LogSoftmax <axis = 1> (x) q = LogSoftmax <axis = 2> (x) y = Add (p, q)", "log_probabilities", -1),
        ("p = Softmax (x) y = MatMul (p, w)", "values", -1),
        ("y = Relu (x)", "values", -1),
        ("m = MatMul (x, w) y = Sigmoid (m)", "values", -1),
        ("m = MatMul (x, w) y = Add (m, x)", "values", -1),
        ("m = MatMul (x, w) y = LayerNormalization (m, b, b)", "values", -1),
        ("y = MatMul (x, w)", "values", -1),
        ("m = MatMul (x, w) y = Add (m, b)", "linear", -1),
        ("m = MatMul (x, w) n = MatMul (x, w) a = Add (m, n) y = Div (a, s)", "values", -1),
    ],
)
def test_ends_of_graphs(body: str, content: str, axis: int) -> None:
    found = kind_of(body)
    assert (found.content, found.axis) == (content, axis)


def test_a_head_onto_a_vocabulary() -> None:
    assert kind_of("y = MatMul (x, v)", shape="N, 4, 20").content == "logits"


@pytest.mark.parametrize(
    ("name", "content"), [("logits", "logits"), ("class_scores", "logits"), ("image_embeds", "values")]
)
def test_names_are_evidence_of_a_linear_layer_alone(name: str, content: str) -> None:
    assert kind_of(f"{name} = MatMul (x, w)", name).content == content
    assert kind_of(f"{name} = Relu (x)", name).content == "values"


def test_two_heads_that_are_averaged_and_a_soft_cap() -> None:
    heads = "m = MatMul (x, w) n = MatMul (x, w) a = Add (m, b) e = Add (n, b) d = Add (a, e) logits = Div (d, s)"
    assert kind_of(heads, "logits").content == "logits"
    cap = "m = MatMul (x, w) d = Div (m, s) t = Tanh (d) logits = Mul (t, s)"
    assert kind_of(cap, "logits").content == "logits"
    assert kind_of("m = MatMul (x, w) logits = Tanh (m)", "logits").content == "values"


def test_classes_of_pixels_lie_along_axis_1() -> None:
    picture, shape = "float[N, 4, 8, 8] x", "N, 3, 6, 6"
    found = kind_of("logits = Conv (x, c)", "logits", shape, picture)
    assert (found.content, found.axis) == ("logits", -3)
    assert kind_of("heatmap = Conv (x, c)", "heatmap", shape, picture).content == "values"


def test_scores_beside_boxes_are_no_distribution() -> None:
    """A detector often has a sigmoid for every class, of which a softmax knows nothing."""
    body = "logits = MatMul (x, v) pred_boxes = Sigmoid (boxes)"
    inputs = "float[N, 4, 8] x, float[N, 4, 4] boxes"
    kinds = kinds_of(body, "float[N, 4, 20] logits, float[N, 4, 4] pred_boxes", inputs)
    assert {kind.content for kind in kinds.values()} == {"values"}


def test_caches_by_structure_and_by_name() -> None:
    cache = "float[N, 2, P, 4] past, float[N, 2, T, 4] x"
    found = kind_of("y = Concat <axis = 2> (past, x)", shape="N, 2, R, 4", inputs=cache)
    assert found.content == "cache"
    assert kind_of("y = Relu (x)", shape="N, 4, 8").content == "values"
    assert kind_of("present_0_key = Identity (x)", "present_0_key").content == "cache"


def test_the_assignment_of_a_matcher() -> None:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(matcher()))
    (found,) = find_output_kinds(model, choose_dim_sizes(model)[1]).values()
    assert (found.content, found.axis) == ("log_probabilities", -1)


@pytest.mark.parametrize(
    ("name", "content"),
    [("vit_timm__ts17", "logits"), ("llama__ts17", "logits"), ("bert__ts17", "values"), ("bert_mean__ts17", "values")],
)
def test_exports(name: str, content: str) -> None:
    source = analysis_of(name).traced_graph
    contents = {kind.content for kind in find_output_kinds(source.model, source.facts).values()}
    assert contents == {content}


def test_keys_and_values_that_an_attention_node_returns() -> None:
    inputs = "float[N, 4, 8] x, float[N, 2, P, 4] pk, float[N, 2, P, 4] pv"
    outputs = "float[N, 4, 8] y, float[N, 2, T, 4] nk, float[N, 2, T, 4] nv"
    body = "y, nk, nv = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x, , , , pk, pv)"
    contents = {name: kind.content for name, kind in kinds_of(body, outputs, inputs).items()}
    assert contents == {"y": "values", "nk": "cache", "nv": "cache"}
