"""The joint search: what it returns meets the target, is allowed, and changes the outputs less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import snpc
from snpc.errors import UserError
from snpc.pipeline.planner import with_closed_form_order
from snpc.pipeline.score import score
from snpc.planning.allocate import allocate_widths
from snpc.planning.config import Budget, allowed_widths
from snpc.planning.plan import UnitScores
from snpc.planning.savings import savings_by_width
from snpc.runtime.execution.memory import SpillableStore
from snpc.runtime.sensitivity.joint_search import MAX_FACTOR, MeasuredSlopes, WidthSteps, search_widths
from snpc.runtime.sensitivity.plan_trials import TrialWeights, Widths, open_plan_trials
from tests.closed_forms import calibration_of, closed_forms_of, prunable_of
from tests.oracle import analysis_of, feeds_of

NAME = "vit_timm__ts17"


def misled_scores() -> UnitScores:
    """Curves that call the first feed-forward layer cheap, so that a plan cuts it most."""
    closed_forms, groups = closed_forms_of(NAME), prunable_of(analysis_of(NAME))
    uniform = score(analysis_of(NAME), "magnitude", None, skip=set(closed_forms.kinds))
    scores = with_closed_form_order(uniform, closed_forms, "auto")
    first = next(group.id for group in groups if group.role == "ffn")
    curves = {}
    for group in groups:
        curve = closed_forms.loss_curve(group)
        assert curve is not None
        curves[group.id] = curve / curve[0] * (0.05 if group.id == first else 1.0)
    return replace(scores, curves=curves)


@pytest.mark.parametrize(("multiple", "gain"), [(1, 0.9), (4, 1.0)])
def test_a_misled_plan_gets_better_at_the_same_size(multiple: int, gain: float) -> None:
    """With coarse widths, no worse."""
    budget = Budget(target="params=0.8", round_to=multiple)
    assert budget.target is not None
    closed_forms, groups, scores = closed_forms_of(NAME), prunable_of(analysis_of(NAME)), misled_scores()
    calibration = calibration_of(analysis_of(NAME), feeds_of(NAME))
    found, start = (
        search_widths(closed_forms, scores, calibration, groups, budget),
        allocate_widths(groups, scores, budget),
    )
    saved = sum(float(savings_by_width(scores, g, budget.target)[found[g.id]]) for g in groups)
    assert saved >= 0.2 * analysis_of(NAME).cost.params
    assert all(found[group.id] in allowed_widths(group, budget) for group in groups)
    assert change(scores, found) <= gain * change(scores, start)
    assert found == search_widths(closed_forms, scores, calibration, groups, budget), "nothing is drawn"


def change(scores: UnitScores, widths: Widths) -> float:
    """Of the outputs, on all samples."""
    groups = prunable_of(analysis_of(NAME))
    weights = TrialWeights(closed_forms_of(NAME), scores, groups, SpillableStore(0))
    with open_plan_trials(weights, calibration_of(analysis_of(NAME), feeds_of(NAME))) as trials:
        return trials.change(widths, trials.take(99))


def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(UserError, match=r"params=0\.01 cannot be reached"):
        search_widths(
            closed_forms_of(NAME),
            misled_scores(),
            calibration_of(analysis_of(NAME), feeds_of(NAME)),
            prunable_of(analysis_of(NAME)),
            Budget(target="params=0.01"),
        )


def test_a_plan_of_effort_search_is_a_searched_one() -> None:
    analysis = analysis_of(NAME)
    data = calibration_of(analysis, feeds_of(NAME))
    plan = snpc.plan(analysis, Budget(target="params=0.7"), data, effort="search")
    assert plan.slices.options["effort"] == "search" and plan.closed_forms is not None and plan.scores is not None
    for share in ("0.7", "0.8"):
        budget = Budget(target=f"params={share}")
        searched = search_widths(plan.closed_forms, plan.scores, data, plan.groups, budget)
        assert {g.id: plan.for_budget(budget).slices.kept_width(g) for g in plan.groups} == searched


def test_curves_are_changed_by_what_was_measured_beside_them() -> None:
    line = np.linspace(1.0, 0.0, 11)
    slopes = MeasuredSlopes(dict.fromkeys("abcde", line))
    for _ in range(2):  # sums over rounds: the same as one round
        for name, ratio in (("a", 1.0), ("b", 2.0), ("c", 0.5), ("d", 100.0), ("e", -1.0)):
            slopes.add(name, (4, 6), 0.2 * ratio)
    middle = np.median([1.0, 2.0, 0.5, 100.0])
    expected = {"a": 1 / middle, "b": 2 / middle, "c": 0.5 / middle, "d": MAX_FACTOR, "e": 1 / MAX_FACTOR}
    assert slopes.factors() == pytest.approx(expected)
    for name, curve in slopes.corrected_curves(0.5).items():
        np.testing.assert_allclose(curve, line * expected[name] ** 0.5)


def test_curves_stay_where_nothing_was_measured() -> None:
    slopes = MeasuredSlopes({"a": np.array([1.0, 0.5, 0.0]), "b": np.zeros(3)})
    slopes.add("a", (1, 2), float("inf"))
    slopes.add("b", (1, 2), 0.1)
    assert slopes.factors() == {} and np.array_equal(slopes.corrected_curves(1.0)["a"], [1.0, 0.5, 0.0])


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 60), min_size=1), st.floats(0.1, 20), st.data())
def test_steps_lead_to_allowed_widths_on_both_sides(options: set[int], units: float, data: st.DataObject) -> None:
    allowed = sorted(options)
    width = data.draw(st.sampled_from(allowed))
    narrow, wide = WidthSteps({"g": units}, {"g": allowed}).beside("g", width)
    assert narrow in allowed and wide in allowed and narrow <= width <= wide
    assert (narrow < width) == (width > allowed[0]) and (wide > width) == (width < allowed[-1])
    assert all(abs(narrow - (width - units)) <= abs(w - (width - units)) for w in allowed if w < width)
