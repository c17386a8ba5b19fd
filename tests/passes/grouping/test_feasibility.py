"""A group is pinned exactly if cutting it would leave a tensor that is not rectangular."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import snpc
from snpc.passes.analyze import Analysis
from snpc.passes.propagation.removal import NotRectangular, RemovedUnits, slice_shape
from tests.oracle import TOLERANCE, analysis_at, cut, prunable, random_cuts
from tests.passes.text_graphs import Array, text_model

# The values of an attention are concatenated from two products: on the axis of the heads, or on that of their width.
CONCATENATED_VALUES = """
    g (float[2, 3, 5] x) => (float[2, 3, 6] y) {
        q = MatMul(x, wq)  q4 = Reshape(q, qk_shape)  qt = Transpose <perm = [0, 2, 1, 3]> (q4)
        k = MatMul(x, wk)  k4 = Reshape(k, qk_shape)  kt = Transpose <perm = [0, 2, 3, 1]> (k4)
        s = MatMul(qt, kt)  p = Softmax <axis = -1> (s)
        a = MatMul(x, w1)  a4 = Reshape(a, v_shape)  b = MatMul(x, w2)  b4 = Reshape(b, v_shape)
        v = Concat <axis = AXIS> (a4, b4)  vt = Transpose <perm = [0, 2, 1, 3]> (v)
        c = MatMul(p, vt)  ct = Transpose <perm = [0, 2, 1, 3]> (c)  f = Reshape(ct, flat)  y = MatMul(f, wo)
    }"""
FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 3, 5)).astype(np.float32)}


def analysis_of_concat(axis: int, path: Path) -> Analysis:
    heads = 4 if axis == 2 else 2
    rng = np.random.default_rng(0)
    shapes = {"wq": (5, 2 * heads), "wk": (5, 2 * heads), "w1": (5, 4), "w2": (5, 4), "wo": (8, 6)}
    weights: dict[str, Array] = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    weights |= {"qk_shape": np.array([0, 0, heads, 2]), "v_shape": np.array([0, 0, 2, 2]), "flat": np.array([0, 0, 8])}
    return analysis_at(path / "model.onnx", text_model(CONCATENATED_VALUES.replace("AXIS", str(axis)), weights))


def test_heads_from_two_weights_get_as_narrow(tmp_path: Path) -> None:
    """[heads of a and heads of b, width]: a narrower width of a alone is not rectangular, so both are one group."""
    analysis = analysis_of_concat(2, tmp_path)
    (group,) = (group for group in analysis.groups if group.role == "vo")
    assert {site.tensor for site in group.sites} == {"w1", "w2", "wo"}
    assert (group.blocks, group.size, group.prunable) == (4, 2, True)
    for chosen in ([group], prunable(analysis.groups, "head"), prunable(analysis.groups)):
        assert cut(analysis, random_cuts(chosen, 0)).error(FEEDS) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"method": "select", "criterion": "activation"}], ids=["auto", "activation"])
def test_heads_from_two_weights_are_calibrated(options: dict[str, Any], tmp_path: Path) -> None:
    analysis = analysis_of_concat(2, tmp_path)
    out = tmp_path / "half.onnx"
    snpc.prune(analysis.model.path, out, ratio=0.5, roles=("vo",), calibration=[FEEDS], **options)
    shapes = {t.name: list(t.dims) for t in onnx.load(out).graph.initializer}
    assert shapes["w1"][1] == shapes["w2"][1] == 2


def test_widths_from_two_weights_are_cut_on_their_own(tmp_path: Path) -> None:
    """[heads, width of a and width of b]: every head loses as many units of a."""
    analysis = analysis_of_concat(3, tmp_path)
    groups = prunable(analysis.groups, "vo")
    assert [(group.blocks, group.size) for group in groups] == [(2, 2), (2, 2)]
    for seed, group in enumerate(groups):
        assert cut(analysis, random_cuts([group], seed)).error(FEEDS) < TOLERANCE


def is_box(kept: Array) -> bool:
    """Whether the rows of a matrix that keep anything keep the same number, or the columns do."""
    return any(len({int(n) for n in kept.sum(axis) if n}) <= 1 for axis in (0, 1))


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=4, max_size=4))
def test_a_matrix_of_units_is_sliced_exactly_if_it_stays_rectangular(rows: list[list[bool]]) -> None:
    removed = np.array(rows)
    labels = np.arange(12, dtype=np.int32).reshape(4, 3)
    units = RemovedUnits(removed.reshape(-1), np.repeat(np.arange(0, 12, 3), 3))
    if not is_box(~removed):
        with pytest.raises(NotRectangular):
            slice_shape((4, 3), [labels], units)
        return
    sliced = slice_shape((4, 3), [labels], units)
    assert np.prod(sliced.new_shape) == (~removed).sum()
    assert sorted(sliced.slice_array(labels).reshape(-1)) == labels[~removed].tolist()
