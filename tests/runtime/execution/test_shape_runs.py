"""What shape inference does not know is read from a run, and what follows can be cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import snpc
from snpc.graph import infer_graph, register_shape_source
from snpc.passes.analyze import analyze
from snpc.runtime.execution import run_for_shapes
from snpc.runtime.io.load import load
from tests.oracle import Array

RNG = np.random.default_rng(0)
FFN = "a = MatMul(r, w1)  b = Relu(a)  y = MatMul(b, w2)"
WEIGHTS: dict[str, Array] = {
    name: (RNG.normal(size=shape) * 0.3).astype(np.float32) for name, shape in (("w1", (32, 24)), ("w2", (24, 5)))
}

# In front of a feed-forward layer stands what has no shape rule, or sizes that depend on data.
MODELS: dict[str, str] = {
    "no_rule": f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[B, N, 32] x) => (float[B, N, 5] y) {{ r = com.microsoft.Trilu(x)  {FFN} }}""",
    "loop": f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[B, N, 32] x) => (float[B, N, 5] y) <int64 trips = {{3}}, bool go = {{1}}> {{
        r = Loop (trips, go, x)
            <body = body (int64 i, bool c, float[B2, N2, 32] s) => (bool d, t) {{ d = Identity(c)  t = Tanh(s) }}>
        {FFN}
    }}""",
    "chosen_rows": f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 32] x) => (float[M, 5] y) <int64[1] last = {{1}}, float zero = {{0.0}}> {{
        s = ReduceSum <keepdims = 0> (x, last)  p = Greater(s, zero)  i = NonZero(p)
        t = Transpose <perm = [1, 0]> (i)  r = GatherND(x, t)  {FFN}
    }}""",
    "computed_bound": f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[B, N, 32] x, int64[B, N] mask) => (float[B, M, 5] y) <int64[1] zero = {{0}}, int64[1] two = {{2}}> {{
        m = ReduceMax <keepdims = 0> (mask)  end = Unsqueeze(m, zero)  r = Slice(x, zero, two, end)  {FFN}
    }}""",
}


def saved(name: str, folder: Path) -> Path:
    model = parser.parse_model(MODELS[name])
    for weight, array in WEIGHTS.items():
        model.graph.initializer.append(numpy_helper.from_array(array, weight))
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_behind_an_unknown_shape_is_cut(name: str, tmp_path: Path) -> None:
    path = saved(name, tmp_path)
    analysis = analyze(load(path))
    assert [(g.role, g.size) for g in analysis.groups if g.prunable] == [("ffn", 24)]
    pruned = snpc.prune(path, tmp_path / "pruned.onnx", ratio=0.5, method="select")
    assert pruned.verification.equals_mask
    assert pruned.after.params < 0.6 * pruned.before.params


def test_a_graph_without_unknown_shapes_is_not_run(tmp_path: Path) -> None:
    asked = []

    def source(*arguments: object) -> dict[object, object]:
        asked.append(arguments)
        return {}

    graph = load(saved("no_rule", tmp_path)).graph
    try:
        register_shape_source(source)  # type: ignore[arg-type]
        infer_graph(graph, {"B": 2, "N": 3})
        assert len(asked) == 1
        graph.graph.remove(graph.graph[0], safe=False)
        infer_graph(graph, {"B": 2, "N": 3}, measure=False)
        assert len(asked) == 1
    finally:
        register_shape_source(run_for_shapes)


def test_axes_that_follow_the_input_are_told_from_fixed_ones(tmp_path: Path) -> None:
    graph = load(saved("no_rule", tmp_path)).graph
    out = graph.graph[0].outputs[0]
    for batch, length in ((2, 7), (3, 5)):
        facts = infer_graph(graph, {"B": batch, "N": length})
        assert facts.shape[out] == (batch, length, 32)
        assert out in facts.measured
