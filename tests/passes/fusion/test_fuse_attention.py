"""Attention in separate nodes becomes one node, with the same numbers; what does not fit is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.canonicalization.fold_shape_arithmetic import FoldShapeArithmetic
from snpc.passes.fusion.fuse_attention import FuseAttention
from snpc.passes.fusion.fuse_gemm_bias import FuseGemmBias
from snpc.runtime.execution.session import open_session, run_session
from snpc.runtime.io.load import load
from snpc.runtime.io.save import save
from tests.models.exports import export, load_feeds
from tests.oracle import require

FUSED = "MultiHeadAttention"


def fused(path: Path, tmp_path: Path) -> tuple[Path, int]:
    fused = FuseAttention()(load(path).graph)
    model, count = fused.model, fused.count
    out = tmp_path / "fused.onnx"
    save(finalize(model), out)
    assert [n.op_type for n in onnx.load(out).graph.node].count(FUSED) == count
    return out, count


def gap(a: Path, b: Path, feeds: dict[str, np.ndarray]) -> float:
    left, right = (run_session(open_session(path, optimization="off"), feeds) for path in (a, b))
    return max(float(np.abs(left[k] - right[k]).max() / np.abs(left[k]).max()) for k in left)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_timm__ts17", 2),  # packed projection
        ("vit_timm__dyn20_sdpa", 2),  # scale on query and key
        ("vit_timm_qknorm__ts17", 2),  # query and key normalised on the way: laid out by transposes
        ("vit_hf__ts17", 2),  # a cast that changes nothing
        ("swin_timm__ts17_sdpa", 4),  # a bias per window
        ("bert__ts17", 2),  # one mask row for all queries
        ("llama__dyn20", 2),  # rotary, keys repeated for groups of heads
        ("bart__ts17", 6),  # cross attention
    ],
)
def test_fused_attention_says_what_the_separate_nodes_said(name: str, count: int, tmp_path: Path) -> None:
    require(name)
    path = export(name)
    out, found = fused(path, tmp_path)
    assert found == count
    wanted = {i.name for i in open_session(path).get_inputs()}
    assert gap(path, out, {k: v for k, v in load_feeds(name).items() if k in wanted}) < 1e-5


@pytest.mark.parametrize(
    ("name", "inside", "all_of_them"),
    [
        ("vit_timm__ts17", 2, 2),  # one product
        ("vit_timm__dyn20_sdpa", 2, 2),
        ("vit_timm_qknorm__ts17", 0, 2),  # something lies between
        ("vit_hf__ts17", 2, 2),  # three products
        ("swin_timm__ts17_sdpa", 4, 4),
        ("bert__ts17", 2, 2),
        ("llama__dyn20", 0, 2),
        ("bart__ts17", 4, 6),  # in cross attention keys are made of something else
    ],
)
def test_projections_inside_say_what_they_said_outside(
    name: str, inside: int, all_of_them: int, tmp_path: Path
) -> None:
    require(name)
    path = export(name)
    fused = FuseAttention(projections=True)(load(path).graph)
    model, count = fused.model, fused.count
    out = tmp_path / "fused.onnx"
    save(finalize(model), out)
    kinds = [n.op_type for n in onnx.load(out).graph.node]
    assert (count, kinds.count("Attention")) == (inside, inside)
    assert kinds.count(FUSED) == all_of_them - inside
    wanted = {i.name for i in open_session(path).get_inputs()}
    assert gap(path, out, {k: v for k, v in load_feeds(name).items() if k in wanted}) < 1e-5


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("vit_timm__ts17", 8),
        ("vit_hf__ts17", 12),
        ("swin_timm__ts17_sdpa", 8),  # in attention; elsewhere sizes are not inferred
        ("bert__ts17", 0),  # any length
        ("bart__ts17", 0),
    ],
)
def test_biases_inside_products_say_what_they_said_outside(name: str, inside: int, tmp_path: Path) -> None:
    require(name)
    path = export(name)
    fused = FuseGemmBias()(FoldShapeArithmetic()(load(path).graph.clone()))
    model, count = fused.model, fused.count
    out = tmp_path / "biased.onnx"
    save(finalize(model), out)
    onnx.checker.check_model(onnx.load(out), full_check=True)
    before, after = ([n.op_type for n in onnx.load(p).graph.node] for p in (path, out))
    assert after.count("Gemm") == before.count("Gemm") + count
    assert after.count("MatMul") == before.count("MatMul") - count
    assert count == inside
    wanted = {i.name for i in open_session(path).get_inputs()}
    assert gap(path, out, {k: v for k, v in load_feeds(name).items() if k in wanted}) < 1e-5


BLOCK = """
<ir_version: 9, opset_import: ["": 17]>
block (float[batch, n, 8] q0, float[batch, m, 8] k0, float[batch, m, 12] v0, float[1, 1, n, m] mask)
  => (float[batch, n, 12] y OUTPUTS)
<int64[4] qk = {0, 0, 2, 4}, int64[4] vv = {0, 0, 2, 6}, int64[3] flat = {0, 0, 12}, float scale = {SCALE}>
{
    q1 = Reshape (q0, qk)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k1 = Reshape (k0, qk)
    k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v1 = Reshape (v0, vv)
    v = Transpose <perm = [0, 2, 1, 3]> (v1)
    s = MatMul (q, k)
    SCORES
    w = Softmax <axis = AXIS> (t)
    c = MatMul (w, v)
    c1 = Transpose <perm = PERM> (c)
    y0 = Reshape (c1, flat)
    y = Identity (y0)
}
"""
SCALED = "u = Mul (s, scale)\n t = Add (u, mask)"


def block(tmp_path: Path, **changes: str) -> Path:
    parts = {"SCORES": SCALED, "SCALE": "0.3", "AXIS": "-1", "PERM": "[0, 2, 1, 3]", "OUTPUTS": "", **changes}
    text = BLOCK
    for key, value in parts.items():
        text = text.replace(key, value)
    path = tmp_path / "block.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def block_feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"q0": (2, 3, 8), "k0": (2, 5, 8), "v0": (2, 5, 12), "mask": (1, 1, 3, 5)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_scale_bias_and_unequal_widths_are_carried_over(tmp_path: Path) -> None:
    path = block(tmp_path)
    out, count = fused(path, tmp_path)
    node = next(n for n in onnx.load(out).graph.node if n.op_type == FUSED)
    assert count == 1
    assert {a.name: a.f or a.i for a in node.attribute} == {"num_heads": 2, "scale": pytest.approx(0.3)}
    assert gap(path, out, block_feeds()) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"SCORES": "u = Add (s, mask)\n t = Mul (u, scale)"},  # scaled behind the mask
        {"SCORES": "t = Tanh (s)"},  # capped scores
        {"AXIS": "2"},  # a softmax over queries
        {"PERM": "[0, 2, 3, 1]"},  # heads lie inside widths
        {"OUTPUTS": ", float[batch, 2, n, m] w"},  # the weights are asked for
    ],
)
def test_what_does_not_fit_is_left_alone(tmp_path: Path, changes: dict[str, str]) -> None:
    path = block(tmp_path, **changes)
    out, count = fused(path, tmp_path)
    assert count == 0
    assert gap(path, out, block_feeds()) < 1e-6


def test_parts_of_one_product_go_in_as_its_columns(tmp_path: Path) -> None:
    """Q, K and V of unequal widths, cut from one product by a Split; the bias of the scores is carried over."""
    head = "block (float[batch, 3, 8] x, float[1, 1, 3, 3] mask) => (float[batch, 3, 12] y)"
    front = """    p0 = MatMul (x, W)
    p = Add (p0, B)
    q0, k0, v0 = Split <axis = 2> (p, parts)
    q1 ="""
    text = BLOCK.replace(BLOCK[BLOCK.index("block (") : BLOCK.index("<int64[4] qk")], head + "\n")
    text = text.replace("    q1 =", front).replace("int64[4] qk", "int64[3] parts = {8, 8, 12}, int64[4] qk")
    for key, value in {"SCORES": SCALED, "SCALE": "0.3", "AXIS": "-1", "PERM": "[0, 2, 1, 3]"}.items():
        text = text.replace(key, value)
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    for name, shape in (("W", (8, 28)), ("B", (28,))):
        array = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "block.onnx")
    result = FuseAttention(projections=True)(load(tmp_path / "block.onnx").graph)
    fused_model, count = result.model, result.count
    save(finalize(fused_model), tmp_path / "out.onnx")
    kinds = [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]
    assert count == 1 and "MatMul" not in kinds and "Split" not in kinds
    feeds = {"x": rng.normal(size=(2, 3, 8)), "mask": rng.normal(size=(1, 1, 3, 3))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    assert gap(tmp_path / "block.onnx", tmp_path / "out.onnx", feeds) < 1e-6
