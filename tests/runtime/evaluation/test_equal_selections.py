"""Scores that are equal up to rounding change places; a detector is then compared in front of and behind the selection.

Every token has a twin with the same score: its features are swapped in pairs, and so are the rows of the first weight.
Which of the two comes first is rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import snpc
from snpc.errors import CheckFailed
from snpc.passes.slicing import rewrite
from tests.passes.text_graphs import Array, text_model

WIDTH, HIDDEN, TOKENS, BOX = 32, 256, 64, 4

SCORES = f"""
    detector (float[B, {TOKENS}, {WIDTH}] x) => (OUTPUTS) {{
        swapped = Gather <axis = 2> (x, swap)
        both = Concat <axis = 1> (x, swapped)
        up = MatMul(both, w1)
        biased = Add(up, b1)
        hidden = Relu(biased)
        scores3 = MatMul(hidden, w2)
        scores = Squeeze(scores3, last)
        SELECTION
    }}"""
READ = "up2 = MatMul(boxes, v1) hidden2 = Relu(up2) y = MatMul(hidden2, v2)"
OUTPUT = f"float[M, N, {BOX}] y"
SELECTIONS = {
    "TopK": (OUTPUT, f"best, index = TopK <axis = 1> (scores, half) boxes = Gather <axis = 0> (table, index) {READ}"),
    "ArgMax": (
        f"{OUTPUT}, int64[B, {TOKENS}] index",
        f"pairs = Reshape(scores, twins) index = ArgMax <axis = 1, keepdims = 0> (pairs) "
        f"boxes = Gather <axis = 0> (table, index) {READ}",
    ),
    "Greater": (
        f"float[K, {BOX}] y",
        "first, second = Split <axis = 1> (scores) larger = Greater(first, second) where = NonZero(larger) "
        f"rows = Gather <axis = 0> (where, one) boxes = Gather <axis = 0> (table, rows) {READ}",
    ),
    "NonMaxSuppression": (
        f"float[K, {BOX}] y",
        "row = Unsqueeze(scores, one1) corners3 = Unsqueeze(corners, zero1) shape = Shape(scores) "
        "batch = Slice(shape, zero1, one1) more = Concat <axis = 0> (batch, box) spread = Expand(corners3, more) "
        "found = NonMaxSuppression(spread, row, most, overlap, least) rows = Gather <axis = 1> (found, two) "
        f"boxes = Gather <axis = 0> (table, rows) {READ}",
    ),
}


def detector(name: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    starts = np.arange(2 * TOKENS, dtype=np.float32)[:, None]
    weights: dict[str, Array] = {
        "w1": np.repeat(draw(WIDTH // 2, HIDDEN), 2, axis=0),
        "b1": draw(HIDDEN),
        "w2": draw(HIDDEN, 1),
        "v1": draw(BOX, 16),
        "v2": draw(16, BOX),
        "table": draw(2 * TOKENS, BOX),
        "corners": np.concatenate([starts, starts, starts + 0.5, starts + 0.5], axis=1),
        "swap": np.arange(WIDTH).reshape(-1, 2)[:, ::-1].reshape(-1).copy(),
        "twins": np.array([0, 2, TOKENS]),
        "half": np.array([TOKENS]),
        "last": np.array([2]),
        "one": np.array(1),
        "two": np.array(2),
        "zero1": np.array([0]),
        "one1": np.array([1]),
        "box": np.array([2 * TOKENS, 4]),
        "most": np.array(TOKENS),
        "overlap": np.float32(0.5),
        "least": np.float32(-100),
    }
    outputs, selection = SELECTIONS[name]
    text = SCORES.replace("OUTPUTS", outputs).replace("SELECTION", selection)
    return text_model(text, {k: v for k, v in weights.items() if k in text})


def saved(name: str, folder: Path) -> Path:
    path = folder / "detector.onnx"
    onnx.save(detector(name), path)
    return path


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_a_detector_with_ties_is_cut(name: str, tmp_path: Path) -> None:
    verdict = snpc.prune(saved(name, tmp_path), tmp_path / "half.onnx", ratio=0.5, uniform=True).verification
    (check,) = [text for text in verdict.structure if "on the same selections" in text]
    assert f"in front of {name}" in check
    assert {d.output for d in verdict.equals_mask} == {v.name for v in detector(name).graph.output}
    assert all(d.relative < 1e-6 for d in verdict.equals_mask)
    shapes = {t.name: list(t.dims) for t in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert shapes["w1"] == [WIDTH, HIDDEN // 2]


@pytest.mark.parametrize("name", list(SELECTIONS))
@pytest.mark.parametrize("weight", ["w2", "v2"], ids=["in front", "behind"])
def test_a_wrong_rewrite_is_found_on_both_sides(
    name: str, weight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows than planned, on either side of the selection."""
    right: Callable[..., Any] = rewrite.slice_model

    def wrong(*arguments: Any) -> Any:
        sliced = right(*arguments)
        value = sliced.model.graph.initializers[weight]
        value.const_value = ir.Tensor(np.roll(value.const_value.numpy(), 1, 0), name=weight)
        return sliced

    monkeypatch.setattr(rewrite, "slice_model", wrong)
    with pytest.raises(CheckFailed, match=rf"differs from its masked original .* nothing is written.* what {name} "):
        snpc.prune(saved(name, tmp_path), tmp_path / "half.onnx", ratio=0.5)
    assert not (tmp_path / "half.onnx").exists()
