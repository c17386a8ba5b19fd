"""Packed projections, in every order that exporters write: which columns are queries is told by what they meet, never
by where they stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from snpc.passes.analyze import Analysis
from tests.oracle import TOLERANCE, analysis_at, cut, prunable, random_cuts

HEADS, SIZE, WIDTH = 2, 8, 12

PACKED = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, N, 12] x) => (float[B, N, 12] y)
    <int64[{rank}] apart = {{{apart}}}, int64[3] merge = {{0, 0, -1}}, int64[3] parts = {{{parts}}},
     float root = {{0.35355338}},
     int64[1] axis = {{{axis}}}>
    {{
        f = MatMul(x, w)
        b = Add(f, bias)
        r = Reshape(b, apart)
        {order} = Split <axis = {axis}> (r, parts)
        {squeeze}
        qt = Transpose <perm = [0, 2, 1, 3]> (q)
        kt = Transpose <perm = [0, 2, 3, 1]> (k)
        vt = Transpose <perm = [0, 2, 1, 3]> (v)
        raw = MatMul(qt, kt)
        scores = Mul(raw, root)
        p = Softmax <axis = -1> (scores)
        c = MatMul(p, vt)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cm = Reshape(ct, merge)
        y = MatMul(cm, wo)
    }}"""
SQUEEZE = "q = Squeeze(q0, axis) k = Squeeze(k0, axis) v = Squeeze(v0, axis)"
LAYOUTS = {
    "parts outside": {"rank": 5, "apart": "0, 0, 3, 2, 8", "parts": "1, 1, 1", "axis": 2, "squeeze": SQUEEZE},
    "parts in each head": {"rank": 5, "apart": "0, 0, 2, 3, 8", "parts": "1, 1, 1", "axis": 3, "squeeze": SQUEEZE},
    "head count left open": {"rank": 4, "apart": "0, 0, -1, 24", "parts": "8, 8, 8", "axis": 3, "squeeze": ""},
}


def packed(path: Path, layout: str, order: str) -> tuple[Analysis, dict[str, np.ndarray]]:
    form = LAYOUTS[layout]
    names = [f"{part}0" if form["squeeze"] else part for part in order]
    rng = np.random.default_rng(0)
    model = parser.parse_model(PACKED.format(**form, order=", ".join(names)))
    for name, shape in {"w": (WIDTH, 48), "bias": (48,), "wo": (16, WIDTH)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype("f4") * 0.5, name))
    onnx.checker.check_model(model)
    return analysis_at(path / "m.onnx", model), {"x": rng.normal(size=(3, 5, WIDTH)).astype(np.float32)}


def columns(layout: str, order: str, part: str) -> set[int]:
    """Where a part's columns lie in the packed weight, from the layout alone."""
    grid = np.arange(48).reshape(3, HEADS, SIZE) if layout == "parts outside" else np.arange(48).reshape(HEADS, 3, SIZE)
    return set(grid.take(order.index(part), 0 if layout == "parts outside" else 1).reshape(-1).tolist())


@pytest.mark.parametrize("order", ["qkv", "qvk", "vqk"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_roles_come_from_what_meets(layout: str, order: str, tmp_path: Path) -> None:
    """CodeGen writes q, v, k; GPT-NeoX and Bloom pack per head."""
    analysis, _ = packed(tmp_path, layout, order)
    found = {}
    for group in prunable(analysis.groups, "qk", "vo"):
        site = next(s for s in group.sites if s.tensor == "w" and s.axis == 1)
        found[group.role] = set(np.flatnonzero(site.units >= 0).tolist())
        assert (group.blocks, group.size) == (HEADS, SIZE)
    assert found == {
        "qk": columns(layout, order, "q") | columns(layout, order, "k"),
        "vo": columns(layout, order, "v"),
    }


@pytest.mark.parametrize("roles", [("qk",), ("vo",), ("qk", "vo")])
@pytest.mark.parametrize("order", ["qkv", "qvk", "vqk"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_widths_that_one_tensor_ties_are_cut_apart(
    layout: str, order: str, roles: tuple[str, ...], tmp_path: Path
) -> None:
    """One [.., 3, heads, width] holds one width: cutting queries and keys alone must take it apart. Half of 8 twice
    over is 8 again, so heads counted by -1 would pass unseen with half as many."""
    analysis, feeds = packed(tmp_path, layout, order)
    for ratio in (0.5, 0.25):
        pair = cut(analysis, random_cuts(prunable(analysis.groups, *roles), 5, ratio))
        assert pair.error(feeds, "off") < TOLERANCE
        assert pair.error(feeds, "all") < TOLERANCE
        shapes = {v.name: v for v in onnx.shape_inference.infer_shapes(onnx.load_from_string(pair.sliced)).graph.output}
        assert [d.dim_value for d in shapes["y"].type.tensor_type.shape.dim][-1] == WIDTH
