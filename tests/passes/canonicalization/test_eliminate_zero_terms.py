"""Zeros that are added are no operand: heads of ``baddbmm`` can be cut, and what would change a shape stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from snpc.passes.canonicalization.eliminate_zero_terms import EliminateZeroTerms
from snpc.runtime.io.load import load
from tests.oracle import TOLERANCE, analysis_at, cut, prunable, random_cuts
from tests.passes.text_graphs import Array, text_model

# What torch writes for baddbmm(empty, q, k, beta=0, alpha=0.5), heads merged into the axis of samples.
BADDBMM = """
    attention (float[B, N, 8] x) => (float[B, N, 8] y) {
        q = MatMul(x, wq)  q4 = Reshape(q, split)  qt = Transpose <perm = [0, 2, 1, 3]> (q4)  q3 = Reshape(qt, merge)
        k = MatMul(x, wk)  k4 = Reshape(k, split)  kt = Transpose <perm = [0, 2, 3, 1]> (k4)  k3 = Reshape(kt, merget)
        v = MatMul(x, wv)  v4 = Reshape(v, split)  vt = Transpose <perm = [0, 2, 1, 3]> (v4)  v3 = Reshape(vt, merge)
        scores = MatMul(q3, k3)  scaled = Mul(scores, alpha)
        size = Shape(scores)  empty = ConstantOfShape(size)  nothing = Mul(empty, beta)  sum = Add(nothing, scaled)
        p = Softmax <axis = -1> (sum)  c3 = MatMul(p, v3)  c4 = Reshape(c3, unmerge)
        ct = Transpose <perm = [0, 2, 1, 3]> (c4)  c = Reshape(ct, flat)  y = MatMul(c, wo)
    }"""


def baddbmm() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights: dict[str, Array] = {
        name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("wq", "wk", "wv", "wo")
    }
    weights |= {"alpha": np.float32(0.5), "beta": np.float32(0), "split": np.array([0, 0, 2, 4])}
    weights |= {"merge": np.array([-1, 6, 4]), "merget": np.array([-1, 4, 6]), "unmerge": np.array([-1, 2, 6, 4])}
    model = text_model(BADDBMM, weights | {"flat": np.array([0, 0, 8])})
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 6
    return model


def test_whole_heads_of_baddbmm_can_be_cut(tmp_path: Path) -> None:
    analysis = analysis_at(tmp_path / "model.onnx", baddbmm())
    groups = prunable(analysis.groups)
    assert {(g.role, g.blocks, g.size) for g in groups} == {("qk", 2, 4), ("vo", 2, 4), ("head", 1, 2)}
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 6, 8)).astype(np.float32)}
    for role in ("head", "vo"):
        assert cut(analysis, random_cuts(prunable(groups, role), 0)).error(feeds) < TOLERANCE


@pytest.mark.parametrize(
    ("zeros", "is_removed"),
    [
        ("z = ConstantOfShape(same)", True),
        ("z = ConstantOfShape(row)", True),
        ("z = ConstantOfShape <value = float {1}> (same)", False),
        ("z = ConstantOfShape(more)", False),
        ("one = ConstantOfShape <value = float {1}> (same)  z = Mul(one, half)", False),
        ("one = ConstantOfShape <value = float {1}> (row)  e = Expand(one, same)  z = Mul(e, none)", True),
    ],
)
def test_only_zeros_that_broadcast_nothing_are_removed(zeros: str, is_removed: bool, tmp_path: Path) -> None:
    text = f"g (float[2, 3] x) => (float[M, 2, 3] y) {{ {zeros}  s = Add(x, z)  r = Relu(s)  y = Unsqueeze(r, first) }}"
    text = text if "more" not in zeros else text.replace("Unsqueeze(r, first)", "Identity(r)")
    numbers = {"same": np.array([2, 3]), "row": np.array([3]), "more": np.array([4, 2, 3]), "first": np.array([0])}
    numbers |= {"half": np.float32(0.5), "none": np.float32(0)}
    model = text_model(text, {name: np.asarray(array) for name, array in numbers.items() if name in text})
    onnx.save(model, tmp_path / "model.onnx")
    graph = load(tmp_path / "model.onnx").graph
    assert ("Add" not in {node.op_type for node in graph.graph}) == is_removed
    assert not EliminateZeroTerms()(graph).modified
