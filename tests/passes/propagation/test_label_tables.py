"""Label tables as text, one small graph per operator kind: what each propagation rule says, to be read in a diff.

Every value is listed with its factors (label arrays), then the pairs, covers and pins of the label table. After an
intended change, `pytest tests/passes/propagation/test_label_tables.py --update-golden` writes the files anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from snpc.passes.analyze import Analysis
from snpc.passes.grouping.traced import TracedGraph
from snpc.passes.propagation.labels import LabelFlag
from snpc.passes.propagation.propagate import PROPAGATION_RULES
from tests.golden import check_golden
from tests.oracle import TOLERANCE, analysis_at, cut, prunable, random_cuts

FOLDER = Path(__file__).parent / "golden"
HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'


@dataclass(frozen=True)
class Case:
    """A graph in ONNX text; ``weights``: float initializers by shape, ``constants``: integer ones by value."""

    kind: str
    text: str
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, object] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        model = parser.parse_model(HEAD + self.text)
        rng = np.random.default_rng(0)
        for name, shape in self.weights.items():
            array = rng.standard_normal(shape).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        for name, value in self.constants.items():
            model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return model


CASES = {
    "movement_split_heads": Case(
        "movement",
        """g (float[2,3,5] x) => (float[2,3,5] y) {
            k = MatMul(x, w)  r = Reshape(k, heads)  t = Transpose <perm = [0, 2, 1, 3]> (r)
            u = Transpose <perm = [0, 2, 1, 3]> (t)  f = Reshape(u, flat)  y = MatMul(f, v) }""",
        {"w": (5, 4), "v": (4, 5)},
        {"heads": [0, 0, 2, 2], "flat": [0, 0, 4]},
    ),
    "movement_single_index": Case(
        "movement",
        """g (float[2,3] x) => (float[2] y, float[2,5] z) {
            k = MatMul(x, w)  y = Gather <axis = 1> (k, at)  z = MatMul(k, v) }""",
        {"w": (3, 4), "v": (4, 5)},
        {"at": 1},
    ),
    "concat": Case(
        "concat",
        """g (float[2,3] x) => (float[2,5] y) {
            a = MatMul(x, w)  b = MatMul(x, u)  c = Concat <axis = 1> (a, x, b)  y = MatMul(c, v) }""",
        {"w": (3, 2), "u": (3, 4), "v": (9, 5)},
    ),
    "pointwise_residual_sum": Case(
        "pointwise",
        """g (float[2,3] x) => (float[2,5] y) {
            k = MatMul(x, w)  b = Add(k, bias)  r = Relu(b)  h = MatMul(r, square)  s = Add(r, h)
            y = MatMul(s, v) }""",
        {"w": (3, 4), "bias": (4,), "square": (4, 4), "v": (4, 5)},
    ),
    "pointwise_unlabeled_partner": Case(
        "pointwise",
        """g (float[2,3] x, float[2,4] z) => (float[2,5] y) { k = MatMul(x, w)  s = Add(k, z)  y = MatMul(s, v) }""",
        {"w": (3, 4), "v": (4, 5)},
    ),
    "contraction_scores": Case(
        "contraction",
        """g (float[2,3,5] x) => (float[2,3,3] y) {
            q = MatMul(x, wq)  k = MatMul(x, wk)  t = Transpose <perm = [0, 2, 1]> (k)  y = MatMul(q, t) }""",
        {"wq": (5, 4), "wk": (5, 4)},
    ),
    "grouped_convolution": Case(
        "contraction",
        """g (float[1,3,5,5] x) => (float[1,2,3,3] y) {
            a = Conv(x, w)  b = Conv <group = 2> (a, grouped)  y = Conv(b, v) }""",
        {"w": (4, 3, 1, 1), "grouped": (6, 2, 3, 3), "v": (2, 6, 1, 1)},
    ),
    "depthwise_convolution": Case(
        "contraction",
        """g (float[1,3,5,5] x) => (float[1,2,3,3] y) {
            a = Conv(x, w)  b = Conv <group = 4> (a, depthwise, bias)  y = Conv(b, v) }""",
        {"w": (4, 3, 1, 1), "depthwise": (4, 1, 3, 3), "bias": (4,), "v": (2, 4, 1, 1)},
    ),
    "normalization": Case(
        "normalize",
        """g (float[2,3] x) => (float[2,5] y) {
            k = MatMul(x, w)  n = LayerNormalization <axis = -1> (k, gain, bias)  y = MatMul(n, v) }""",
        {"w": (3, 4), "gain": (4,), "bias": (4,), "v": (4, 5)},
    ),
    "reduction": Case(
        "reduce",
        """g (float[2,3,5] x) => (float[2,6] y) {
            k = MatMul(x, w)  m = ReduceMean <keepdims = 0> (k, tokens)  y = MatMul(m, v) }""",
        {"w": (5, 4), "v": (4, 6)},
        {"tokens": [1]},
    ),
    "attention": Case(
        "attention",
        """g (float[2,3,5] x) => (float[2,3,5] y) {
            q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
            a = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v)  y = MatMul(a, wo) }""",
        {"wq": (5, 4), "wk": (5, 4), "wv": (5, 4), "wo": (4, 5)},
    ),
    "packed_projection": Case(
        "attention",
        """g (float[2,3,5] x) => (float[2,3,5] y) {
            a = com.microsoft.Attention <num_heads = 2> (x, w, b)  y = MatMul(a, wo) }""",
        {"w": (5, 12), "b": (12,), "wo": (4, 5)},
    ),
    "rotary": Case(
        "rotary",
        """g (float[1,3,5] x, int64[1,3] at) => (float[1,3,3] y) {
            q = MatMul(x, wq)  r = com.microsoft.RotaryEmbedding <num_heads = 1> (q, at, cosine, sine)
            k = MatMul(x, wk)  t = Transpose <perm = [0, 2, 1]> (k)  y = MatMul(r, t) }""",
        {"wq": (5, 4), "wk": (5, 4), "cosine": (7, 2), "sine": (7, 2)},
    ),
    "sample": Case(
        "sample",
        """g (float[2,3,5] x, float[4,1,3,2] grid) => (float[2,3,5] y) {
            k = MatMul(x, w)  h = Reshape(k, heads)  t = Transpose <perm = [0, 2, 3, 1]> (h)  m = Reshape(t, images)
            s = GridSample(m, grid)  b = Reshape(s, back)  c = Transpose <perm = [0, 2, 1]> (b)  y = MatMul(c, v) }""",
        {"w": (5, 4), "v": (4, 5)},
        {"heads": [0, 0, 2, 2], "images": [4, 2, 1, 3], "back": [2, 4, 3]},
    ),
    "scatter": Case(
        "scatter",
        """g (float[3,5] x) => (float[3,5] y) {
            k = MatMul(x, w)  u = MatMul(x, other)  r = Slice(u, zero, one, zero)  s = ScatterND(k, rows, r)
            y = MatMul(s, v) }""",
        {"w": (5, 4), "other": (5, 4), "v": (4, 5)},
        {"rows": [[2]], "zero": [0], "one": [1]},
    ),
    "shape_only": Case(
        "shape",
        """g (float[2,3] x) => (float[2,4] y) { k = MatMul(x, w)  s = Shape(k)  r = Reshape(k, s)  y = Relu(r) }""",
        {"w": (3, 4)},
    ),
    "opaque": Case(
        "opaque",
        """g (float[2,3] x) => (float[2,5] y) {
            k = MatMul(x, w)  c = CenterCropPad <axes = [1]> (k, count)  y = MatMul(c, v) }""",
        {"w": (3, 4), "v": (2, 5)},
        {"count": [2]},
    ),
    "choose": Case(
        "choose",
        """g (float[2,3] x) => (float[2,5] y) {
            k = MatMul(x, w)  best, at = TopK <axis = 1> (k, count)  y = MatMul(best, v) }""",
        {"w": (3, 4), "v": (2, 5)},
        {"count": [2]},
    ),
    "experts": Case(
        "choose",
        """g (float[2,3] x) => (float[2,3] y) {
            k = MatMul(x, router)  best, at = TopK <axis = 1> (k, count)  number = Reshape(at, flat)
            up = Gather(stack, number)  column = Unsqueeze(x, last)  h = MatMul(up, column)  r = Relu(h)
            down = Gather(back, number)  m = MatMul(down, r)  o = Squeeze(m, last)  y = Mul(o, best) }""",
        {"router": (3, 4), "stack": (4, 6, 3), "back": (4, 3, 6)},
        {"count": [1], "flat": [-1], "last": [-1]},
    ),
    "experts_in_one_node": Case(
        "experts",
        """g (float[2,3] x) => (float[2,4] y) {
            r = MatMul(x, router)  m = com.microsoft.MoE <k = 1, activation_type = "relu"> (x, r, up, , down)
            y = MatMul(m, v) }""",
        {"router": (3, 4), "up": (4, 5, 3), "down": (4, 3, 5), "v": (3, 4)},
    ),
    "one_hot": Case(
        "one_hot",
        """g (float[2,3] x) => (float[2,4] y) {
            k = MatMul(x, router)  best, at = TopK <axis = 1> (k, count)  o = OneHot(at, depth, zero_and_one)
            s = ReduceSum <keepdims = 0> (o, count)  y = MatMul(s, v) }""",
        {"router": (3, 4), "v": (4, 4), "zero_and_one": (2,)},
        {"count": [1], "depth": [4]},
    ),
}


def label_text(traced_graph: TracedGraph) -> Iterator[str]:
    """One line per value with its factors, then one per flag, pair, cover and pin of the label table."""
    trace = traced_graph.trace
    for value, labeled in trace.values.items():
        factors = "; ".join(f"{list(f.shape)} {f.reshape(-1).tolist()}" for f in labeled.factors)
        yield f"{value.name}{list(labeled.shape)}{' constant' if labeled.constant else ''}: {factors or '-'}"
    for (node, name), labeled in trace.inner_values.items():
        factors = "; ".join(f"{list(f.shape)} {f.reshape(-1).tolist()}" for f in labeled.factors)
        yield f"inside {node.op_type}, {name}{list(labeled.shape)}: {factors or '-'}"
    for flag in LabelFlag:
        labels = np.flatnonzero(trace.table.flags[: trace.table.count] & int(flag))
        if len(labels):
            yield f"flag {flag.name}: {labels.tolist()}"
    for left, right in trace.table.pairs:
        yield "pairs " + ", ".join(f"{a}={b}" for a, b in zip(left.tolist(), right.tolist(), strict=True))
    for cover in trace.table.covers:
        rows = zip(cover.coarse.tolist(), cover.fine.tolist(), strict=True)
        yield f"cover ({cover.kind}) " + ", ".join(f"{coarse} covers {fine}" for coarse, fine in rows)
    for pin in trace.table.pins:
        yield f"pin ({pin.kind}) {pin.labels.tolist()}: {pin.reason}; {pin.tensor} axis {pin.axis}, {pin.operator}"


def feeds_for(model: onnx.ModelProto) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(1)
    feeds = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        floats = value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        feeds[value.name] = rng.standard_normal(shape).astype(np.float32) if floats else np.arange(3)[None]
    return feeds


def check_against_oracle(analysis: Analysis, model: onnx.ModelProto) -> None:
    """The sliced model equals the masked one: a golden file of wrong labels would be worse than none."""
    groups = prunable(analysis.groups)
    if groups:
        pair = cut(analysis, random_cuts(groups, seed=0))
        assert pair.error(feeds_for(model)) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_label_table(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = CASES[name].model()
    analysis = analysis_at(tmp_path / "model.onnx", model)
    check_against_oracle(analysis, model)
    groups = (f"group {g.id} {g.blocks} x {g.size}{' pinned' if g.pins else ''}" for g in analysis.groups)
    text = "\n".join([*label_text(analysis.traced_graph), *groups]) + "\n"
    check_golden(request, FOLDER / f"{name}.txt", text)


def test_every_operator_kind_has_a_label_table() -> None:
    assert {case.kind for case in CASES.values()} == set(PROPAGATION_RULES)


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)
