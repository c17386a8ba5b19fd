"""Caches of keys and values: pinned with an advice, or narrowed together with what fills them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper, parser

from snpc.cli import main
from snpc.passes.analyze import Analysis, analyze
from snpc.passes.slicing.mask import mask_model
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.runtime.evaluation.compare import narrow_caches
from snpc.runtime.io.load import load
from tests.oracle import TOLERANCE, Array, prunable, random_cuts, relative_error, run, written

HEAD = '<ir_version: 10, opset_import: ["": {opset}{domain}]>'
MICROSOFT = ', "com.microsoft": 1'
WEIGHTS = {"wq": (16, 32), "wk": (16, 32), "wv": (16, 32), "wo": (32, 16)}
GROUPED = {"wq": (16, 128), "wk": (16, 64), "wv": (16, 64), "wo": (128, 16)}
PAST = "float[B, {h}, P, {d}] pk, float[B, {h}, P, {d}] pv"
PRESENT = "float[B, {h}, T, {d}] nk, float[B, {h}, T, {d}] nv"


def graph(inner: str, opset: int = 17, domain: str = "", more: str = "", heads: int = 4, size: int = 8) -> str:
    past, present = (text.format(h=heads, d=size) for text in (PAST, PRESENT))
    return f"""{HEAD.format(opset=opset, domain=domain)}
    step (float[B, N, 16] x, {past}{more}) => (float[B, N, 16] y, {present})
    <int64[4] heads = {{0, 0, {heads}, {size}}}, int64[3] merge = {{0, 0, -1}}, float scale = {{0.35355339}}> {{
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        {inner}
        y = MatMul(c, wo)
    }}"""


SEPARATE = graph("""
    q4 = Reshape(q, heads)  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    k4 = Reshape(k, heads)  kh = Transpose <perm = [0, 2, 1, 3]> (k4)
    v4 = Reshape(v, heads)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    nk = Concat <axis = 2> (pk, kh)  nv = Concat <axis = -2> (pv, vh)
    kt = Transpose <perm = [0, 1, 3, 2]> (nk)  s0 = MatMul(qh, kt)  s = Mul(s0, scale)
    p = Softmax(s)  a = MatMul(p, nv)
    ct = Transpose <perm = [0, 2, 1, 3]> (a)  c = Reshape(ct, merge)""")
STACKED = """
    <ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    step (float[B, N, 16] x, float[2, B, 4, P, 8] pk) => (float[B, N, 16] y, float[2, B, 4, T, 8] nk) {
        c, nk = com.microsoft.Attention <num_heads = 4, unidirectional = 1> (x, w, b, , pk)  y = MatMul(c, wo)
    }"""
STACKED_BY_NODES = graph("""
    q4 = Reshape(q, heads)  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    k4 = Reshape(k, heads)  kh = Transpose <perm = [0, 2, 1, 3]> (k4)
    v4 = Reshape(v, heads)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    pk5, pv5 = Split <axis = 0, split = [1, 1]> (past)
    pk = Squeeze <axes = [0]> (pk5)  pv = Squeeze <axes = [0]> (pv5)
    nk = Concat <axis = 2> (pk, kh)  nv = Concat <axis = -2> (pv, vh)
    nk5 = Unsqueeze <axes = [0]> (nk)  nv5 = Unsqueeze <axes = [0]> (nv)  present = Concat <axis = 0> (nk5, nv5)
    kt = Transpose <perm = [0, 1, 3, 2]> (nk)  s0 = MatMul(qh, kt)  s = Mul(s0, scale)
    p = Softmax <axis = 3> (s)  a = MatMul(p, nv)
    ct = Transpose <perm = [0, 2, 1, 3]> (a)  c = Reshape(ct, merge)""", 11).replace(
    PAST.format(h=4, d=8), "float[2, B, 4, P, 8] past"
).replace(PRESENT.format(h=4, d=8), "float[2, B, 4, T, 8] present")  # fmt: skip
MODELS: dict[str, tuple[str, Mapping[str, tuple[int, ...]]]] = {
    "separate": (SEPARATE, WEIGHTS),
    "attention": (
        graph("c, nk, nv = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v, , pk, pv)", 24), WEIGHTS
    ),
    "multi_head": (
        graph("c, nk, nv = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, b3, , , pk, pv)", 17, MICROSOFT),
        {**WEIGHTS, "b3": (96,)},
    ),
    "grouped": (
        graph(
            """c, nk, nv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, scale = 0.2>
            (q, k, v, pk, pv, lens, total)""",
            17, MICROSOFT, ", int32[B] lens, int32 total", 2, 32,
        ),
        GROUPED,
    ),
    "stacked_by_nodes": (STACKED_BY_NODES, WEIGHTS),
    "stacked": (STACKED, {"w": (16, 96), "b": (96,), "wo": (32, 16)}),
}  # fmt: skip
TIED_VALUES = ("stacked", "stacked_by_nodes")  # keys and values keep the same positions
EQUAL_WIDTHS = ("grouped", "multi_head")  # keys and values keep equally many positions
EXTRA: dict[str, dict[str, Array]] = {"grouped": {"lens": np.array([4, 4], np.int32), "total": np.array(5, np.int32)}}


def saved(name: str, folder: Path) -> Path:
    text, weights = MODELS[name]
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for weight, shape in weights.items():
        array = rng.normal(size=shape).astype(np.float32) * shape[0] ** -0.5
        model.graph.initializer.append(numpy_helper.from_array(array, weight))
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def feeds_for(path: Path, batch: int = 2, past: int = 4) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    sizes = {"B": batch, "N": 1, "P": past}
    made = dict(EXTRA.get(path.stem, {}))
    for value in onnx.load(path).graph.input:
        shape = [sizes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        made.setdefault(value.name, rng.normal(size=shape).astype(np.float32))
    return made


def analyze_file(path: Path) -> Analysis:
    return analyze(load(path), prune_kv_cache=True)


@pytest.mark.parametrize("name", MODELS)
def test_without_being_asked_caches_keep_their_width(name: str, tmp_path: Path) -> None:
    analysis = analyze(load(saved(name, tmp_path)))
    assert not prunable(analysis.groups, "qk", "vo", "head")
    assert any("--prune-kv-cache" in pin.reason for pin in analysis.pins)


@pytest.mark.parametrize("name", MODELS)
def test_past_and_present_narrow_together(name: str, tmp_path: Path) -> None:
    path = saved(name, tmp_path)
    analysis, feeds = analyze_file(path), feeds_for(path)
    roles = {g.role for g in prunable(analysis.groups)}
    assert roles == ({"qk", "head"} if name in TIED_VALUES else {"qk", "vo", "head"})
    original = run(path, feeds)
    names = [o.name for o in onnx.load(path).graph.output]
    alone = [("head",), ("qk", "vo")] if name in EQUAL_WIDTHS else [(r,) for r in sorted(roles)]
    for wanted in (*alone, tuple(roles)):
        rewritten = rewrite_model(analysis.traced_graph, random_cuts(prunable(analysis.groups, *wanted), 3, 0.5))
        cut = rewritten.sliced_interface()
        assert {n for n in cut if n in feeds}, "no cache became narrower"
        masked = run(written(mask_model(rewritten.source.model, rewritten.source.trace, rewritten.removed)), feeds)
        sliced = written(rewritten.model)
        onnx.checker.check_model(onnx.load_from_string(sliced), full_check=True)
        expected = narrow_caches(dict(zip(names, masked, strict=True)), cut)
        got = run(sliced, narrow_caches(feeds, cut), "all")
        assert relative_error(list(expected.values()), got) < TOLERANCE, wanted
        assert relative_error([original[0]], [masked[0]]) > 1e-3


@pytest.mark.parametrize("name", ["separate", "attention", "multi_head"])
def test_a_loop_can_go_on_from_what_it_gave(name: str, tmp_path: Path) -> None:
    """What a step hands on is what the next one takes: the same shapes, the same positions."""
    path = saved(name, tmp_path)
    analysis = analyze_file(path)
    rewritten = rewrite_model(analysis.traced_graph, random_cuts(prunable(analysis.groups, "qk", "vo"), 3, 0.5))
    feeds = narrow_caches(feeds_for(path), rewritten.sliced_interface())
    sliced = written(rewritten.model)
    _, keys, values = run(sliced, feeds)
    assert keys.shape[2] == feeds["pk"].shape[2] + 1
    _, longer, _ = run(sliced, {**feeds, "pk": keys, "pv": values})
    np.testing.assert_array_equal(longer[:, :, : keys.shape[2]], keys)


def test_a_cache_that_no_output_hands_on_stays(tmp_path: Path) -> None:
    path = saved("separate", tmp_path)
    model = onnx.load(path)
    del model.graph.output[1:]
    onnx.save(model, path)
    analysis = analyze_file(path)
    assert not prunable(analysis.groups, "qk", "vo")
    assert any("no output returns this cache" in pin.reason for pin in analysis.pins)


def test_the_command_line_narrows_caches_where_asked(tmp_path: Path) -> None:
    path = saved("separate", tmp_path)
    plan, out = tmp_path / "half.plan.json", tmp_path / "half.onnx"
    refused = CliRunner().invoke(main, ["plan", str(path), "--ratio", "0.5", "-o", str(plan)])
    assert refused.exit_code == 2
    assert "--prune-kv-cache" in refused.output
    for command in (
        ["plan", str(path), "--ratio", "0.5", "--prune-kv-cache", "-o", str(plan)],
        ["apply", str(path), str(plan), "-o", str(out)],
        ["verify", str(path), str(out), "--plan", str(plan)],
        ["prune", str(path), "--ratio", "0.5", "--prune-kv-cache", "-o", str(out)],
    ):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    shapes = {v.name: v.type.tensor_type.shape.dim[3].dim_value for v in onnx.load(out).graph.input if v.name != "x"}
    assert shapes == {"pk": 4, "pv": 4}
    without = CliRunner().invoke(main, ["verify", str(path), str(out)])
    assert without.exit_code == 1
    assert "inputs are not the original's" in without.output
