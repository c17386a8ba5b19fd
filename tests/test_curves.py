"""Curves: what is measured in pieces is what the whole model does, and averaging takes off what samples do to all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Array, analysis_of, feeds_of, run, written
from test_compress import calibration_of, chosen, compressed
from test_plan import group

from snpc.runtime.chain import chain_of
from snpc.runtime.compress import ordered
from snpc.runtime.curves import Change, calibrated, fitted_curves, output_curves, probed_widths, trial
from snpc.runtime.memory import Shelf
from snpc.runtime.score import score
from snpc.types import AnyArray


@pytest.mark.parametrize("name", ["vit_timm__ts17", "bert__ts17", "bart__ts17", "albert__ts17", "swin_timm__ts17"])
def test_a_chain_says_what_the_whole_model_says(name: str) -> None:
    """Also with changed weights: then against the model in which they are changed."""
    analysis, found = analysis_of(name), compressed(name)
    groups = chosen(analysis)
    scores = ordered(score(analysis, "magnitude", None, skip=set(found.forms)), found, "auto")
    tried = {g.id: trial(found, scores, g, min(probed_widths(g))) for g in groups}
    feeds = feeds_of(name)
    expected = run(written(analysis.traced.model.clone()), feeds)
    with chain_of(analysis, tried, "cpu") as chain:
        states = chain.states(feeds, Shelf(0))
        same([states[-1][output] for output in chain.outputs], expected)
        for g in groups[:: max(1, len(groups) // 4)]:
            model = analysis.traced.model.clone()
            for key, array in tried[g.id].items():
                model.graph.initializers[key].const_value = tensor(array, key)
            moved = run(written(model), feeds)
            same(list(chain.changed(states, g.id, tried[g.id]).values()), moved)
            assert any(not np.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(moved, expected, strict=True))


def same(found: list[AnyArray], expected: list[Array]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


def tensor(array: AnyArray, name: str) -> object:
    import onnx_ir as ir

    return ir.Tensor(array, name=name)


def test_a_chain_has_a_piece_per_layer() -> None:
    """Else every trial would run the whole model."""
    analysis, found = analysis_of("vit_timm__ts17"), compressed("vit_timm__ts17")
    groups = chosen(analysis)
    scores = ordered(score(analysis, "magnitude", None, skip=set(found.forms)), found, "auto")
    with chain_of(analysis, {g.id: trial(found, scores, g, 1) for g in groups}, "cpu") as chain:
        assert len(chain.pieces) >= 2 * len({g.layer for g in groups})
        for g in groups:
            first, last = chain.spans[g.id]
            assert first == last
        starts = {g.layer: chain.spans[g.id][0] for g in groups if g.role == "ffn"}
        assert len(set(starts.values())) == len(starts)


def test_curves_fall_with_the_width() -> None:
    analysis, found = analysis_of("bert__ts17"), compressed("bert__ts17")
    scores = ordered(score(analysis, "magnitude", None, skip=set(found.forms)), found, "auto")
    calibration = calibration_of(analysis, feeds_of("bert__ts17"))
    curves = output_curves(found, scores, calibration, chosen(analysis))
    for g in chosen(analysis):
        curve = curves[g.id]
        assert curve.shape == (g.size + 1,)
        assert (np.diff(curve) <= 0).all()
        assert curve[0] > 0
        assert curve[-1] <= 1e-6 * curve[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(2, 4), st.floats(0.2, 3))
def test_what_samples_do_to_all_groups_is_taken_off(seed: int, pools: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    groups = [group(f"g{k}", "ffn", 1, 60) for k in range(12)]
    shapes = {g.id: np.linspace(1, 0, 61) ** 2 for g in groups}
    truth = {g.id: shapes[g.id] * np.exp(rng.normal() + 0.2 * rng.normal() * np.arange(61) / 60) for g in groups}
    effect = spread * rng.normal(size=pools)
    found = [
        Change(g, width, (turn + k) % pools, float(truth[g.id][width] * np.exp(effect[(turn + k) % pools])))
        for turn, g in enumerate(groups)
        for k, width in enumerate(probed_widths(g))
    ]
    curves = fitted_curves(shapes, found)
    # Each truth is a parabola in the width, as a logarithm: but for a common factor, it is found.
    wrong = np.array([np.log(curves[g.id][w] / truth[g.id][w]) for g in groups for w in probed_widths(g)])
    assert wrong.std() <= 1e-6


def test_what_is_no_parabola_passes_through_its_points() -> None:
    shape = np.linspace(1, 0, 41)
    measured = {5: 1.0, 10: 0.5, 20: 1e-3, 30: 1e-4, 38: 1e-9}
    curve = calibrated(shape, measured)
    for width, value in measured.items():
        assert curve[width] == pytest.approx(value)
    noisy = {w: float(shape[w] * np.exp(0.3 * (-1) ** k)) for k, w in enumerate((5, 12, 19, 26, 33, 38))}
    smooth = np.array([np.log(calibrated(shape, noisy)[w] / shape[w]) for w in noisy])
    assert np.abs(smooth).max() < 0.25
