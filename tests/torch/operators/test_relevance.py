"""Relevance through attention: the same whether an exporter has fused its nodes, and none of it is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

import snpc  # noqa: E402
from snpc.torch.operators.relevance import relevance_rules  # noqa: E402
from snpc.torch.pruning.gates import apply_gates, canonical_module, make_gate  # noqa: E402

HEADS, WIDTH, HIDDEN = 2, 5, 12
SPLIT = """
  {0}s = Reshape ({0}, shape)
  {0}h = Transpose <perm = [0, 2, 1, 3]> ({0}s)
"""
CORES = {
    "separate nodes": "".join(SPLIT.format(name) for name in "qkv")
    + """
  kt = Transpose <perm = [0, 1, 3, 2]> (kh)
  raw = MatMul (qh, kt)
  scores = Div (raw, root)
  shares = Softmax <axis = -1> (scores)
  mixed = MatMul (shares, vh)
  back = Transpose <perm = [0, 2, 1, 3]> (mixed)
  c = Reshape (back, flat)
""",
    "Attention": "c = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)",
    "MultiHeadAttention": "c = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v)",
    "packed Attention": "c = com.microsoft.Attention <num_heads = 2> (h, QKV, none)",
}
PROJECTIONS = "q = MatMul ({0}, Q) k = MatMul ({0}, K) v = MatMul (h, V)"


def net(form: str, source: str, path: Path) -> snpc.Analysis:
    """A hidden layer h of x, which values are made of; queries and keys are made of ``source``."""
    projections = "" if form == "packed Attention" else PROJECTIONS.format(source)
    body = f"g = MatMul (x, A) h = Relu (g) {projections} {CORES[form]} logits = MatMul (c, O)"
    text = f"""<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
    net (float[n, t, 6] x) => (float[n, t, 4] logits) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    width = HEADS * WIDTH
    given = 6 if source == "x" else HIDDEN
    shapes = {"A": (6, HIDDEN), "Q": (given, width), "K": (given, width), "V": (HIDDEN, width), "O": (width, 4)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    if form == "packed Attention":
        arrays["QKV"] = np.concatenate([arrays.pop(name) for name in "QKV"], axis=1)
        arrays["none"] = np.zeros(3 * width, np.float32)
    if form == "separate nodes":
        arrays["shape"], arrays["flat"] = np.array([0, 0, HEADS, WIDTH]), np.array([0, 0, width])
        arrays["root"] = np.array(WIDTH**0.5, np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    onnx.save(model, path)
    return snpc.analyze(snpc.load(path))


def relevance(analysis: snpc.Analysis) -> tuple[float, dict[str, np.ndarray]]:
    """What is asked about, and how much of it is left at every unit, by role."""
    groups = [g for g in analysis.groups if g.prunable and g.role in ("qk", "vo", "ffn", "other")]
    gates = [make_gate(analysis, g) for g in groups]
    module = canonical_module(analysis)
    factors = {g.id: torch.ones(g.blocks, g.size, requires_grad=True) for g in groups}
    x = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(0))
    with apply_gates(module, gates, factors), relevance_rules(module):
        answer = module({"x": x})["logits"].max(-1).values.sum()
        answer.backward()
    found = {g.role: factors[g.id].grad.numpy() / gate.exponent for g, gate in zip(groups, gates, strict=True)}
    assert len(found) == len(groups) == 3
    return answer.item(), found


@pytest.mark.parametrize(
    ("form", "source"),
    [("Attention", "x"), ("MultiHeadAttention", "x"), ("Attention", "h"), ("packed Attention", "h")],
)
def test_fused_attention_hands_back_what_its_parts_do(form: str, source: str, tmp_path: Path) -> None:
    answer, expected = relevance(net("separate nodes", source, tmp_path / "a.onnx"))
    same, found = relevance(net(form, source, tmp_path / "b.onnx"))
    assert same == pytest.approx(answer, rel=1e-5)
    assert found.keys() == expected.keys()
    for role, array in expected.items():
        np.testing.assert_allclose(found[role], array, rtol=1e-3, atol=1e-4 * np.abs(array).max())


@pytest.mark.parametrize("form", ["separate nodes", "Attention", "MultiHeadAttention"])
def test_relevance_is_conserved_through_attention(form: str, tmp_path: Path) -> None:
    """All of it reaches the context; of a product of weights and values half goes to the values, which the hidden
    layer makes, and half to the weights."""
    answer, found = relevance(net(form, "x", tmp_path / "net.onnx"))
    hidden = found["ffn"] if "ffn" in found else found["other"]
    assert found["vo"].sum() == pytest.approx(answer, rel=1e-4)
    assert hidden.sum() == pytest.approx(answer / 2, rel=1e-4)
    assert np.abs(found["qk"]).max() > 1e-3
