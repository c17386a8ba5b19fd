"""Small pre-norm models around a residual stream: token ids, an embedding, one hidden layer, logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser

VOCABULARY, WIDTH, HIDDEN, CLASSES = 20, 8, 12, 5

TOKENS = {"ids": np.random.default_rng(1).integers(0, VOCABULARY, (6, 7))}

HEAD = '<ir_version: 10, opset_import: ["": 17]>'
STREAM = """
    stream (int64[B, N] ids) => (float[B, N, {outputs}] y)
    <float two = {{2.0}}, float small = {{0.00001}}, float scale = {{3.0}}>
    {{
        e = Gather(table, ids)
        {embedded}
        {first}
        u = MatMul(n, up)
        r = Relu(u)
        d0 = MatMul(r, down)
        d1 = Add(d0, down_bias)
        {branch}
        s = Add(x, d)
        {second}
        {last}
    }}"""
LAYER = "{y} = LayerNormalization <axis = -1> ({x}, {g}, {b})"
LAYER_SPELLED = """
    {y}1 = ReduceMean <axes = [-1]> ({x})
    {y}2 = Sub({x}, {y}1)
    {y}3 = Pow({y}2, two)
    {y}4 = ReduceMean <axes = [-1]> ({y}3)
    {y}5 = Add({y}4, small)
    {y}6 = Sqrt({y}5)
    {y}7 = Div({y}2, {y}6)
    {y}8 = Mul({y}7, {g})
    {y} = Add({y}8, {b})"""
ROOT_MEAN_SQUARE = """
    {y}1 = Pow({x}, two)
    {y}2 = ReduceMean <axes = [-1]> ({y}1)
    {y}3 = Add({y}2, small)
    {y}4 = Sqrt({y}3)
    {y}5 = Div({x}, {y}4)
    {y} = Mul({g}, {y}5)"""
CAST_ROOT_MEAN_SQUARE = """
    {y}0 = Cast <to = 1> ({x})
    {y}1 = Pow({y}0, two)
    {y}2 = ReduceMean <axes = [-1]> ({y}1)
    {y}3 = Add({y}2, small)
    {y}4 = Sqrt({y}3)
    {y}5 = Div({y}0, {y}4)
    {y}6 = Cast <to = 10> ({y}5)
    {y} = Mul({g}, {y}6)"""
CAST_LAYER = """
    {y}0 = LayerNormalization <axis = -1> ({x}, {g}, {b})
    {y} = Cast <to = 10> ({y}0)"""
PLAIN, SCALED = "x = Identity(e)", "x = Mul(e, scale)"
ADDED, WEIGHED = "d = Identity(d1)", "d = Mul(d1, gamma)"
TWICE = "c = Concat <axis = -1> (m, m) y = MatMul(c, out_twice)"
OWN, TIED = "y = MatMul(m, out)", "w = Transpose <perm = [1, 0]> (table) y = MatMul(m, w)"

# (behind the embedding, normalization, behind the hidden layer, last layer)
STREAM_FORMS = {
    "layer norm": (PLAIN, LAYER, ADDED, OWN),
    "layer norm spelled out": (PLAIN, LAYER_SPELLED, ADDED, OWN),
    "root mean square": (PLAIN, ROOT_MEAN_SQUARE, ADDED, OWN),
    "scaled embeddings": (SCALED, ROOT_MEAN_SQUARE, ADDED, OWN),
    "scale per channel": (PLAIN, LAYER, WEIGHED, OWN),
    "read twice by one weight": (PLAIN, LAYER, ADDED, TWICE),
    "tied to the embeddings": (PLAIN, ROOT_MEAN_SQUARE, ADDED, TIED),
    "layer norm, tied to the embeddings": (PLAIN, LAYER, ADDED, TIED),
}
# (... , what stays in single precision)
HALF_FORMS = {
    "all in half precision": (PLAIN, LAYER, ADDED, OWN, ""),
    "spelled out in half precision": (PLAIN, LAYER_SPELLED, ADDED, OWN, ""),
    "normalized in single precision": (PLAIN, CAST_ROOT_MEAN_SQUARE, ADDED, OWN, "two small"),
    "products in half precision": (
        PLAIN, CAST_LAYER, "d2 = Cast <to = 1> (d1) d = Identity(d2)", OWN, "table g1 g2 b1 b2"
    ),
}  # fmt: skip
# begin behind what works on single channels
ENTERED_FORMS = {
    "an activation behind the embeddings": ("x = Relu(e)", LAYER, ADDED, OWN),
    "normalized embeddings": (LAYER.format(x="e", y="x", g="g0", b="b0"), LAYER, ADDED, OWN),
    "normalized embeddings that a weight reads": (
        LAYER.format(x="e", y="x", g="g0", b="b0"), LAYER, "d2 = MatMul(x, square) d = Add(d1, d2)", OWN
    ),
}  # fmt: skip
KEPT_FORMS = {
    "an activation on the stream": ("x = Relu(e)", LAYER, ADDED, OWN, "Relu"),
    "a gate on the stream": (PLAIN, LAYER, "d2 = Mul(d1, x) d = Identity(d2)", OWN, "Mul"),
    "normalized behind the sum": (
        PLAIN, "{y} = LayerNormalization <axis = -1> ({x}, {g}, {b})", "d = Add(d1, n)", OWN, "normalized"
    ),
    "a reader of the stream as it is": (PLAIN, LAYER, ADDED, "y = MatMul(s, out)", "subtract its mean"),
    "a gain that is computed": (
        PLAIN, "{y}g = Cast <to = 1> ({g}) {y} = LayerNormalization <axis = -1> ({x}, {y}g, {b})", ADDED, OWN,
        "gain or bias",
    ),
}  # fmt: skip


def write_half_stream(form: str) -> onnx.ModelProto:
    """A model of ``HALF_FORMS``: weights and output in float16, apart from what the form says."""
    model, single = write_stream(form), HALF_FORMS[form][-1].split()
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in single:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in model.graph.output:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return model


def write_stream(form: str) -> onnx.ModelProto:
    """A model of one of these forms, in float32. Each direction of its stream has half of the last one's size."""
    embedded, norm, branch, last, *_ = {**STREAM_FORMS, **KEPT_FORMS, **HALF_FORMS, **ENTERED_FORMS}[form]
    model = parser.parse_model(
        HEAD
        + STREAM.format(
            outputs=VOCABULARY if last == TIED else CLASSES,
            embedded=embedded,
            first=norm.format(x="x", y="n", g="g1", b="b1"),
            branch=branch,
            second=norm.format(x="s", y="m", g="g2", b="b2"),
            last=last,
        )
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in stream_weights().items() if n in used)
    return model


def stream_weights() -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    directions = 0.5 ** np.arange(WIDTH)[:, None] * np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]

    def written(rows: int) -> npt.NDArray[np.float64]:
        return np.asarray(3.0 * rng.normal(size=(rows, WIDTH)) @ directions)

    arrays = {
        "table": written(VOCABULARY),
        "up": rng.normal(size=(WIDTH, HIDDEN)),
        "down": written(HIDDEN),
        "down_bias": written(1)[0],
        "out": rng.normal(size=(WIDTH, CLASSES)),
        "gamma": rng.uniform(0.5, 1.5, WIDTH),
        **{name: rng.uniform(0.5, 1.5, WIDTH) for name in ("g1", "g2")},
        **{name: rng.normal(size=WIDTH) for name in ("b1", "b2")},
        "out_twice": rng.normal(size=(2 * WIDTH, CLASSES)),
        "square": written(WIDTH),
        "g0": rng.uniform(0.5, 1.5, WIDTH),
        "b0": 0.1 * rng.normal(size=WIDTH),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}
