"""Loss curves: trials near the plan, curves that fall with the width, and effects of samples that are removed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import snpc
from snpc.errors import UserError
from snpc.pipeline.planner import PlanRequest, make_plan, with_closed_form_order
from snpc.pipeline.score import score
from snpc.planning.allocate import allocate_widths
from snpc.planning.config import Budget
from snpc.runtime.closed_form.masked_weights import changed_constants
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.memory import SpillableStore
from snpc.runtime.sensitivity.curve_fit import UNUSABLE_CHANGE, OutputChange, fit_curves
from snpc.runtime.sensitivity.loss_curves import (
    CURVE_SHARES,
    REFINEMENT_ROUNDS,
    StreamRefits,
    measurable_widths,
    measure_loss_curves,
    nearest_widths,
    trial_constants,
    trial_edits,
)
from snpc.runtime.sensitivity.segmented_model import open_segmented_model
from snpc.types import AnyArray, Group
from tests.closed_forms import calibration_of, closed_forms_of, prunable_of
from tests.models.groups import make_group
from tests.models.streams import TOKENS, WIDTH, write_stream
from tests.oracle import analysis_at, analysis_of, feeds_of, relative_error, run


@pytest.mark.parametrize("name", ["vit_timm__ts17", "bert__ts17", "llama__ts17", "albert__ts17", "swin_timm__ts17"])
def test_a_trial_changes_what_it_is_said_to_touch(name: str) -> None:
    """Else the segmented model would not have these weights as inputs, or run segments that nothing changes."""
    analysis, closed_forms = analysis_of(name), closed_forms_of(name)
    scores = with_closed_form_order(
        score(analysis, "magnitude", None, skip=set(closed_forms.kinds)), closed_forms, "auto"
    )
    for g in prunable_of(analysis):
        width = min(measurable_widths(g))
        changed = changed_constants(analysis.traced_graph, *trial_edits(closed_forms, scores, g, width))
        assert changed and changed == set(trial_constants(closed_forms, scores, g, width))


def test_a_trial_of_a_rotated_stream_is_the_model_that_is_written(tmp_path: Path) -> None:
    """With what reads it refitted, and not only with fewer directions."""
    analysis = analysis_at(tmp_path / "m.onnx", write_stream("layer norm"))
    calibration = calibration_of(analysis, TOKENS)
    plan = snpc.plan(analysis, Budget(0.5, roles=("residual",)), calibration, method="parallel")
    written = run(snpc.apply(plan, tmp_path / "p.onnx").path, TOKENS)
    assert plan.closed_forms is not None and plan.scores is not None
    refits = StreamRefits(plan.closed_forms, plan.scores, calibration, Execution())
    (group,) = (g for g in plan.analysis.groups if g.role == "residual")
    changed = {group.id: changed_constants(plan.analysis.traced_graph, *refits.trial_edits(group, WIDTH // 2))}
    with open_segmented_model(plan.analysis, changed) as model:
        dense = model.dense_states(TOKENS, SpillableStore(1 << 30))
        outputs = model.outputs_with(dense, group.id, refits.trial_constants(group, WIDTH // 2))
    assert relative_error(written, [outputs[spec.name] for spec in analysis.model.outputs]) < 1e-4
    assert relative_error(run(analysis.model.path, TOKENS), written) > 1e-2


class Spy:
    """Which widths are tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[tuple[str, int]] = []
        monkeypatch.setattr("snpc.runtime.sensitivity.loss_curves.trial_constants", self)

    def __call__(self, closed_forms: Any, scores: Any, group: Group, width: int) -> dict[str, AnyArray]:
        self.tried.append((group.id, width))
        return trial_constants(closed_forms, scores, group, width)


@pytest.mark.parametrize("many", [1, 99], ids=["first one trial each", "first four"])
@pytest.mark.parametrize(
    "budget", [Budget(target="macs=0.7"), Budget(0.4), Budget(0.7), Budget(max_drift=0.3)], ids=str
)
def test_curves_are_measured_near_the_plan_that_they_make(
    budget: Budget, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snpc.runtime.sensitivity.loss_curves.MIN_GROUPS_PER_ROLE", many)
    name = "vit_timm__ts17"
    analysis, closed_forms = analysis_of(name), closed_forms_of(name)
    groups = prunable_of(analysis)
    scores = with_closed_form_order(
        score(analysis, "magnitude", None, skip=set(closed_forms.kinds)), closed_forms, "auto"
    )
    calibration = calibration_of(analysis, feeds_of(name))
    spy = Spy(monkeypatch)
    curves = measure_loss_curves(closed_forms, scores, calibration, groups, budget)
    assert len(set(spy.tried)) == len(spy.tried), "nothing is tried twice"
    mild = budget.max_drift is None and budget.ratio != 0.7
    first = 1 if many == 1 and mild else len(CURVE_SHARES)
    assert first * len(groups) <= len(spy.tried) <= (first + REFINEMENT_ROUNDS) * len(groups)
    assert all(width in measurable_widths(g) for g in groups for name, width in spy.tried if name == g.id)
    # What the plan comes to has been seen, but where the last measurements have moved it on.
    planned = allocate_widths(groups, replace(scores, curves=curves), budget)
    near = {(g.id, nearest_widths(g, [planned[g.id] / g.size])[0]) for g in groups}
    assert len(near & set(spy.tried)) >= 0.75 * len(groups)
    assert len({width for _, width in spy.tried}) > 1


def test_a_target_out_of_reach_is_refused_before_anything_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_timm__ts17"
    analysis, closed_forms = analysis_of(name), closed_forms_of(name)
    groups = prunable_of(analysis)
    scores = with_closed_form_order(
        score(analysis, "magnitude", None, skip=set(closed_forms.kinds)), closed_forms, "auto"
    )
    spy = Spy(monkeypatch)
    with pytest.raises(UserError, match=r"macs=0\.01 cannot be reached"):
        measure_loss_curves(
            closed_forms, scores, calibration_of(analysis, feeds_of(name)), groups, Budget(target="macs=0.01")
        )
    assert not spy.tried


def test_curves_for_all_choices_do_not_depend_on_one() -> None:
    analysis = analysis_of("vit_timm__ts17")
    calibration = calibration_of(analysis, feeds_of("vit_timm__ts17"))
    budgets = (Budget(target="macs=0.7"), Budget(0.0))
    requests = [PlanRequest(budget, full_curves=True) for budget in budgets]
    first, second = (make_plan(analysis, request, calibration).loss_curves for request in requests)
    assert all(np.array_equal(first[name], curve) for name, curve in second.items())


@pytest.mark.parametrize("budget", [None, Budget(target="macs=0.7")], ids=str)
def test_curves_fall_with_the_width(budget: Budget | None) -> None:
    analysis, closed_forms = analysis_of("bert__ts17"), closed_forms_of("bert__ts17")
    scores = with_closed_form_order(
        score(analysis, "magnitude", None, skip=set(closed_forms.kinds)), closed_forms, "auto"
    )
    calibration = calibration_of(analysis, feeds_of("bert__ts17"))
    curves = measure_loss_curves(closed_forms, scores, calibration, prunable_of(analysis), budget)
    for g in prunable_of(analysis):
        curve = curves[g.id]
        assert curve.shape == (g.size + 1,)
        assert (np.diff(curve) <= 0).all()
        assert curve[0] > 0
        assert curve[-1] <= 1e-6 * curve[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(2, 4), st.floats(0.2, 3))
def test_what_samples_do_to_all_groups_is_taken_off(seed: int, pools: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    groups = [make_group(f"g{k}", "ffn", 1, 60) for k in range(12)]
    shapes = {g.id: np.linspace(1, 0, 61) ** 2 for g in groups}
    truth = {g.id: shapes[g.id] * np.exp(rng.normal() + 0.2 * rng.normal() * np.arange(61) / 60) for g in groups}
    effect = spread * rng.normal(size=pools)
    found = [
        OutputChange(g, width, (turn + k) % pools, float(truth[g.id][width] * np.exp(effect[(turn + k) % pools])))
        for turn, g in enumerate(groups)
        for k, width in enumerate(measurable_widths(g))
    ]
    curves = fit_curves(shapes, found)
    # Each truth is a parabola in the width, as a logarithm: but for a common factor, it is found, drawn a little
    # towards the others.
    wrong = np.array([np.log(curves[g.id][w] / truth[g.id][w]) for g in groups for w in measurable_widths(g)])
    assert wrong.std() <= 0.05


def changes_of(shape: AnyArray, factors: dict[int, float], name: str = "g") -> list[OutputChange]:
    g = make_group(name, "ffn", 1, len(shape) - 1)
    return [OutputChange(g, width, 0, float(shape[width] * factor)) for width, factor in factors.items()]


def test_noise_is_smoothed_and_groups_of_a_role_help_each_other() -> None:
    """The truth is the same bend for all; each group sees it with noise of its own."""
    rng = np.random.default_rng(0)
    shape, widths = np.linspace(1, 0, 61) ** 2, (15, 30, 45, 55)
    bend = {w: float(np.exp(1.5 * w / 60)) for w in widths}
    seen = {f"g{k}": {w: f * float(np.exp(0.3 * rng.normal())) for w, f in bend.items()} for k in range(20)}
    found = [c for name, factors in seen.items() for c in changes_of(shape, factors, name)]
    curves = fit_curves(dict.fromkeys(seen, shape), found)
    off, alone = [], []
    for name, factors in seen.items():
        truth = np.log([bend[w] for w in widths])
        own = np.log([factors[w] for w in widths])
        line = np.log([curves[name][w] / shape[w] for w in widths])
        off.append(line - truth - np.mean(own - truth))  # its level is all that it knows better
        alone.append(np.polyval(np.polyfit(widths, own, 2), widths) - truth - np.mean(own - truth))
    assert np.std(off) < 0.8 * np.std(alone)


def test_what_is_no_parabola_passes_through_its_points() -> None:
    """And leaves the others alone: as does what nothing moves."""
    shape = np.linspace(1, 0, 41)
    odd = {5: 1.0, 10: 0.5, 20: 1e-3, 30: 1e-4, 38: 1e-9}
    plain = dict.fromkeys(odd, 2.0)
    found = [*changes_of(shape, odd, "odd"), *changes_of(shape, plain, "plain")]
    found += changes_of(shape, dict.fromkeys(odd, 0.0), "dead")
    curves = fit_curves(dict.fromkeys(("odd", "plain", "dead", "unmeasured"), shape), found)
    for width, factor in odd.items():
        assert curves["odd"][width] == pytest.approx(shape[width] * factor)
        assert curves["plain"][width] == pytest.approx(2 * shape[width], rel=1e-3)
    assert curves["dead"].max() < 1e-200
    np.testing.assert_array_equal(curves["unmeasured"], shape)
    np.testing.assert_array_equal(fit_curves({"unmeasured": shape}, [])["unmeasured"], shape)


def test_a_trial_that_breaks_an_output_is_the_worst_there_is() -> None:
    """An infinite change was a curve of NaN, and the plan arbitrary."""
    shape = np.linspace(1, 0, 41)
    found = changes_of(shape, {5: np.inf, 10: np.inf, 20: 2.0, 30: 2.0, 38: 2.0}, "broken")
    found += changes_of(shape, {5: 2.0, 20: 2.0, 38: 2.0}, "sound")
    found += changes_of(shape, {5: np.inf, 20: np.inf}, "hopeless")
    curves = fit_curves(dict.fromkeys(("broken", "sound", "hopeless"), shape), found)
    assert all(np.isfinite(curve).all() and (np.diff(curve) <= 0).all() for curve in curves.values())
    assert (curves["broken"][:11] == UNUSABLE_CHANGE).all() and curves["broken"][11] < 10
    assert (curves["hopeless"][:21] == UNUSABLE_CHANGE).all()
    np.testing.assert_allclose(curves["broken"][20:], curves["sound"][20:], rtol=1e-2)


def test_a_curve_without_numbers_names_its_group() -> None:
    shape = np.linspace(1, 0, 41)
    with pytest.raises(UserError, match="g: its loss curve holds NaN or infinity"):
        fit_curves({"g": shape * np.nan}, changes_of(shape, {5: 1.0}))
