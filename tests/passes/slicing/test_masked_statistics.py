"""Where channels are masked, normalizations take their statistics over the kept channels only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from snpc.passes.slicing import mask
from tests.oracle import TOLERANCE, analysis_at, cut, cuts_of, relative_error, run
from tests.passes.text_graphs import Array, text_model

GRAPH = """
    g (float[2, 3, 5] x) => (float[2, 3, 4] y) {
        k = MatMul(x, w)
        NORMALIZED
        y = MatMul(n, v)
    }"""
NORMALIZATIONS = {
    "layer": "n = LayerNormalization <axis = -1, epsilon = 0.00001> (k, gain, bias)",
    "layer with its statistics": "n, m, r = LayerNormalization <axis = -1, epsilon = 0.00001> (k, gain, bias)",
    "layer, spelled out": """
        m = ReduceMean <axes = [-1]> (k)  d = Sub(k, m)  q = Mul(d, d)  a = ReduceMean <axes = [-1]> (q)
        e = Add(a, epsilon)  r = Sqrt(e)  o = Div(d, r)  g1 = Mul(o, gain)  n = Add(g1, bias)""",
    "root mean square, spelled out": """
        q = Mul(k, k)  a = ReduceMean <axes = [-1]> (q)  e = Add(a, epsilon)  r = Sqrt(e)  o = Div(k, r)
        n = Mul(o, gain)""",
}
REMOVED = np.array([False, True, False, False, True, False])
FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 3, 5)).astype(np.float32)}


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"w": (5, 6), "v": (6, 4), "gain": (6,), "bias": (6,)}
    return {n: (rng.standard_normal(s) + 0.5).astype(np.float32) for n, s in shapes.items()} | {
        "epsilon": np.array(1e-5, np.float32)
    }


def normalized(kind: str) -> Array:
    """The output with only the kept channels, computed by the definition."""
    kept = {n: a[..., ~REMOVED] if n in ("w", "gain", "bias") else a for n, a in weights().items()}
    k = (FEEDS["x"] @ kept["w"]).astype(np.float64)
    if kind.startswith("layer"):
        k = k - k.mean(-1, keepdims=True)
    n = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-5) * kept["gain"]
    if kind.startswith("layer"):
        n = n + kept["bias"]
    return n @ kept["v"][~REMOVED]


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_masked_and_sliced_are_the_normalization_of_the_kept_channels(kind: str, tmp_path: Path) -> None:
    analysis = analysis_at(
        tmp_path / "model.onnx", text_model(GRAPH.replace("NORMALIZED", NORMALIZATIONS[kind]), used(kind))
    )
    (group,) = [g for g in analysis.groups if g.approximate]
    pair = cut(analysis, cuts_of([(group, REMOVED[None])]))
    assert relative_error([normalized(kind)], run(pair.masked, FEEDS)) < TOLERANCE
    assert relative_error([normalized(kind)], run(pair.sliced, FEEDS)) < TOLERANCE


def used(kind: str) -> dict[str, Array]:
    text = GRAPH + NORMALIZATIONS[kind]
    return {name: array for name, array in weights().items() if name in text}


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_zeros_alone_would_change_the_statistics(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask, "mask_statistic", lambda *arguments: None)
    analysis = analysis_at(
        tmp_path / "model.onnx", text_model(GRAPH.replace("NORMALIZED", NORMALIZATIONS[kind]), used(kind))
    )
    (group,) = [g for g in analysis.groups if g.approximate]
    pair = cut(analysis, cuts_of([(group, REMOVED[None])]))
    assert relative_error([normalized(kind)], run(pair.masked, FEEDS)) > 1e-3
