"""Closed forms of fused attention nodes: the same, unit by unit, as of the separate nodes that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

import snpc
from snpc.passes.analyze import Analysis
from snpc.passes.weights.edits import WeightEdits, apply_edits
from snpc.planning.config import Budget
from snpc.runtime.closed_form.fit import ClosedForms, apply_basis
from snpc.types import Group
from tests.closed_forms import Feeds, calibration_of, random_feeds
from tests.models.exports import export
from tests.models.fused import fuse_attention_of
from tests.oracle import analysis_of, feeds_of, relative_error, run, written

ROLES = ("qk", "vo")


def attention_groups(analysis: Analysis) -> list[Group]:
    return [g for role in ROLES for g in analysis.groups if g.role == role and g.prunable]


def compressed(analysis: Analysis, feeds: Feeds) -> ClosedForms:
    groups = attention_groups(analysis)
    return snpc.solve_closed_forms(
        analysis, snpc.measure_statistics(analysis, calibration_of(analysis, feeds, 8), groups), groups
    )


def check_same(fused: Analysis, plain: Analysis, feeds: Feeds, folder: Path) -> None:
    """Curves, outputs at full rank, and outputs of what is cut."""
    groups, others = attention_groups(fused), attention_groups(plain)
    assert [(g.role, g.blocks, g.size) for g in groups] == [(g.role, g.blocks, g.size) for g in others]
    found, expected = compressed(fused, feeds), compressed(plain, feeds)
    assert sorted(found.kinds.values()) == sorted(expected.kinds.values())
    for group, other in zip(groups, others, strict=True):
        curve, known = found.loss_curve(group), expected.loss_curve(other)
        assert curve is not None and known is not None
        # queries may be scaled before the product or behind it
        np.testing.assert_allclose(curve / curve[0], known / known[0], rtol=1e-3, atol=1e-4)
    edits = WeightEdits()
    for group in groups:
        apply_basis(edits, found, group)
    before = run(fused.model.path, feeds)
    assert relative_error(before, run(written(apply_edits(fused.traced_graph, edits)), feeds)) < 1e-4
    outputs = []
    for analysis in (fused, plain):
        data = calibration_of(analysis, feeds, 8)
        made = snpc.plan(analysis, Budget(0.5, ROLES, uniform=True), calibration=data, method="parallel")
        result = snpc.apply(made, folder / "p.onnx")
        outputs.append(run(result.path, feeds))
    assert relative_error(before, outputs[0]) > 1e-2
    assert relative_error(outputs[1], outputs[0]) < 2e-2


def test_weights_inside_the_node(tmp_path: Path) -> None:
    """com.microsoft.Attention, as onnxruntime's optimiser writes it."""
    name = "bert__ts17"
    onnx.save(fuse_attention_of(export(name).read_bytes(), name, tmp_path, 12), tmp_path / "fused.onnx")
    fused = snpc.analyze(snpc.load(tmp_path / "fused.onnx"))
    assert sum(n.op_type == "Attention" for n in fused.traced_graph.model.graph) == 2
    check_same(fused, analysis_of(name), random_feeds(name, 16), tmp_path)


def test_attention_of_the_standard(tmp_path: Path) -> None:
    names = ("bert__dyn23_sdpa", "bert__dyn20_sdpa")
    check_same(analysis_of(names[0]), analysis_of(names[1]), random_feeds(names[1], 16), tmp_path)


def test_layer_after_layer(tmp_path: Path) -> None:
    """A node that mixes int32 lengths with its activations crosses a border between segments."""
    name = "bert__ts17"
    onnx.save(fuse_attention_of(export(name).read_bytes(), name, tmp_path, 12), tmp_path / "fused.onnx")
    analysis = snpc.analyze(snpc.load(tmp_path / "fused.onnx"))
    data, feeds = calibration_of(analysis, random_feeds(name, 16), 8), feeds_of(name)
    outputs = []
    for method, criterion in (("auto", None), ("select", "mixed")):
        made = snpc.plan(analysis, Budget(0.5, ROLES), calibration=data, method=method, criterion=criterion)  # type: ignore[arg-type]
        result = snpc.apply(made, tmp_path / "p.onnx")
        outputs.append(relative_error(run(analysis.model.path, feeds), run(result.path, feeds)))
    assert outputs[0] < 0.8 * outputs[1]


HEAD = '<ir_version: 9, opset_import: ["": 17, "com.microsoft": 1]>'
FUSED = """
  block (float[batch, tokens, 16] x) => (float[batch, tokens, 16] y) {
      q = MatMul (x, Wq)
      k = MatMul (x, Wk)
      v = MatMul (x, Wv)
      c = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, b)
      y = MatMul (c, Wo)
  }
"""
PLAIN = """
  block (float[batch, tokens, 16] x)
    => (float[batch, tokens, 16] y)
    <int64[4] heads = {0, 0, 2, 8}, int64[3] flat = {0, 0, 16}, float scale = {0.35355339}> {
      q = MatMul (x, Wq)
      k = MatMul (x, Wk)
      v = MatMul (x, Wv)
      qb = Add (q, bq)
      kb = Add (k, bk)
      vb = Add (v, bv)
      q4 = Reshape (qb, heads)
      k4 = Reshape (kb, heads)
      v4 = Reshape (vb, heads)
      qt = Transpose <perm = [0, 2, 1, 3]> (q4)
      kt = Transpose <perm = [0, 2, 3, 1]> (k4)
      vt = Transpose <perm = [0, 2, 1, 3]> (v4)
      s = MatMul (qt, kt)
      scaled = Mul (s, scale)
      p = Softmax <axis = -1> (scaled)
      c4 = MatMul (p, vt)
      ct = Transpose <perm = [0, 2, 1, 3]> (c4)
      c = Reshape (ct, flat)
      y = MatMul (c, Wo)
  }
"""


def test_one_bias_for_query_key_and_value(tmp_path: Path) -> None:
    """com.microsoft.MultiHeadAttention adds them itself; without, the means of the values would be wrong."""
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=(16, 16)).astype(np.float32) * 0.4 for n in ("Wq", "Wk", "Wv", "Wo")}
    biases = {n: rng.normal(size=16).astype(np.float32) for n in ("bq", "bk", "bv")}
    analyses = []
    for text, arrays in ((FUSED, {**weights, "b": np.concatenate(list(biases.values()))}), (PLAIN, weights | biases)):
        model = onnx.parser.parse_model(HEAD + text)
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
        path = tmp_path / f"{len(analyses)}.onnx"
        onnx.save(model, path)
        analyses.append(snpc.analyze(snpc.load(path)))
    feeds = {"x": rng.normal(size=(24, 6, 16)).astype(np.float32)}
    check_same(*analyses, feeds, tmp_path)


def test_padded_tokens_do_not_count_inside_a_node(tmp_path: Path) -> None:
    """Other values where nobody looks: the same statistics of what the node makes inside."""
    rng = np.random.default_rng(1)
    text = FUSED.replace("x) =>", "x, int32[batch, tokens] mask) =>").replace("(q, k, v, b)", "(q, k, v, b, mask)")
    model = onnx.parser.parse_model(HEAD + text)
    arrays = {n: rng.normal(size=(16, 16)).astype(np.float32) for n in ("Wq", "Wk", "Wv", "Wo")}
    arrays["b"] = rng.normal(size=48).astype(np.float32)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.save(model, tmp_path / "m.onnx")
    analysis = snpc.analyze(snpc.load(tmp_path / "m.onnx"))
    x, mask = rng.normal(size=(4, 6, 16)).astype(np.float32), np.ones((4, 6), np.int32)
    mask[1:, 4:] = 0
    groups = attention_groups(analysis)
    sums = [
        snpc.measure_statistics(analysis, calibration_of(analysis, {"x": given, "mask": mask}), groups).sums
        for given in (x, np.where(mask[..., None] == 0, 5, x).astype(np.float32))
    ]
    for group in groups:
        for key, value in sums[0][group.id].items():
            assert np.abs(value - sums[1][group.id][key]).max() < 1e-5 * np.abs(value).max(), key
