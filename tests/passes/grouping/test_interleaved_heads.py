"""Heads that alternate along a flat axis keep the same positions; heads that lie one behind the other do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from snpc.passes.analyze import Analysis
from snpc.passes.grouping.interleaved_heads import unify_interleaved_blocks
from tests.oracle import TOLERANCE, analysis_at, cut, prunable, random_cuts
from tests.passes.text_graphs import Array, text_model

# The flat width of 6 is [heads, 3], or [3, heads] where heads are interleaved.
ATTENTION = """
    g (float[2, 3, 5] x) => (float[2, 3, 4] y) {
        q = MatMul(x, wq)  q4 = Reshape(q, split)  qt = Transpose <perm = [0, HEAD, 1, WIDTH]> (q4)
        k = MatMul(x, wk)  k4 = Reshape(k, split)  kt = Transpose <perm = [0, HEAD, WIDTH, 1]> (k4)
        v = MatMul(x, wv)  v4 = Reshape(v, split)  vt = Transpose <perm = [0, HEAD, 1, WIDTH]> (v4)
        s = MatMul(qt, kt)  p = Softmax <axis = -1> (s)  c = MatMul(p, vt)
        ct = Transpose <perm = BACK> (c)  f = Reshape(ct, flat)  y = MatMul(f, wo)
    }"""
FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 3, 5)).astype(np.float32)}


def attention_analysis(interleaved: bool, path: Path) -> Analysis:
    rng = np.random.default_rng(0)
    shapes = {"wq": (5, 6), "wk": (5, 6), "wv": (5, 6), "wo": (6, 4)}
    weights: dict[str, Array] = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    weights |= {"split": np.array([0, 0, 3, 2] if interleaved else [0, 0, 2, 3]), "flat": np.array([0, 0, 6])}
    head, width, back = ("3", "2", "[0, 2, 3, 1]") if interleaved else ("2", "3", "[0, 2, 1, 3]")
    text = ATTENTION.replace("HEAD", head).replace("WIDTH", width).replace("BACK", back)
    return analysis_at(path / "model.onnx", text_model(text, weights))


@pytest.mark.parametrize("interleaved", [False, True])
def test_cuts_of_heads_equal_the_masked_model(interleaved: bool, tmp_path: Path) -> None:
    analysis = attention_analysis(interleaved, tmp_path)
    groups = prunable(analysis.groups, "qk", "vo")
    shape = (1, 3) if interleaved else (2, 3)
    assert [(group.role, group.blocks, group.size) for group in groups] == [("qk", *shape), ("vo", *shape)]
    for seed in range(3):
        assert cut(analysis, random_cuts(groups, seed)).error(FEEDS) < TOLERANCE


def pairs_of(axis: list[int], block: list[int]) -> set[tuple[int, int]]:
    pairs = unify_interleaved_blocks(np.array(axis), np.array(block))
    return {(int(a), int(b)) for left, right in pairs for a, b in zip(left, right, strict=True)}


def test_blocks_that_alternate_are_unified_position_by_position() -> None:
    assert pairs_of([10, 20, 11, 21, 12, 22], [0, 1, 0, 1, 0, 1]) == {(10, 20), (11, 21), (12, 22)}


def test_blocks_in_runs_are_left_alone() -> None:
    assert pairs_of([10, 11, 20, 21], [0, 0, 1, 1]) == set()


def test_a_block_that_repeats_as_a_whole_is_left_alone() -> None:
    """The units of a key head occur once per query head that reads it."""
    assert pairs_of([10, 11, 20, 21, 10, 11], [0, 0, 1, 1, 0, 0]) == set()


def test_units_outside_of_blocks_are_left_alone() -> None:
    assert pairs_of([10, 1, 11, 2], [0, -1, 0, -1]) == set()
