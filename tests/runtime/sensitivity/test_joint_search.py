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
from snpc.planning.config import Budget
from snpc.planning.plan import UnitScores
from snpc.runtime.execution.memory import SpillableStore
from snpc.runtime.sensitivity.joint_search import ResourceLimit, pair_groups, search_widths
from snpc.runtime.sensitivity.plan_trials import TrialWeights, open_plan_trials
from tests.closed_forms import calibration_of, closed_forms_of, prunable_of
from tests.models.groups import make_group
from tests.oracle import analysis_of, feeds_of

NAME = "vit_timm__ts17"


def misled_scores() -> UnitScores:
    """Curves that call the first feed-forward layer free and the others dear, so that a plan cuts it to nothing."""
    closed_forms, groups = closed_forms_of(NAME), prunable_of(analysis_of(NAME))
    uniform = score(analysis_of(NAME), "magnitude", None, skip=set(closed_forms.kinds))
    scores = with_closed_form_order(uniform, closed_forms, "auto")
    first = next(group.id for group in groups if group.role == "ffn")
    curves = {}
    for group in groups:
        curve = closed_forms.loss_curve(group)
        assert curve is not None
        curves[group.id] = curve / curve[0] * (1e-6 if group.id == first else 1.0)
    return replace(scores, curves=curves)


@pytest.mark.parametrize(("multiple", "gain"), [(1, 0.9), (4, 1.0)])
def test_a_misled_plan_gets_better_at_the_same_size(multiple: int, gain: float) -> None:
    """With coarse widths, no worse."""
    budget = Budget(target="params=0.8", round_to=multiple)
    closed_forms, groups, scores = closed_forms_of(NAME), prunable_of(analysis_of(NAME)), misled_scores()
    calibration = calibration_of(analysis_of(NAME), feeds_of(NAME))
    found = search_widths(closed_forms, scores, calibration, groups, budget)
    start, limit = allocate_widths(groups, scores, budget), ResourceLimit.of(groups, scores, budget)
    assert limit.total(found) >= limit.required
    assert all(width in limit.options[group_id] for group_id, width in found.items())
    weights = TrialWeights(closed_forms, scores, groups, SpillableStore(0))
    with open_plan_trials(weights, calibration) as trials:
        batches = trials.take(99)
        assert trials.change(found, batches) <= gain * trials.change(start, batches)
    assert found == search_widths(closed_forms, scores, calibration, groups, budget), "nothing is drawn"


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


costs = st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1)


@given(costs, costs)
def test_pairs_gain_and_have_no_group_twice(
    narrower: dict[str, tuple[float, int]], wider: dict[str, tuple[float, int]]
) -> None:
    pairs = pair_groups(narrower, wider)
    used = [group for pair in pairs for group in pair]
    assert len(used) == len(set(used))
    assert all(narrower[giver][0] + wider[taker][0] < 0 for giver, taker in pairs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.data())
def test_what_does_not_save_enough_is_narrowed_until_it_does(sizes: list[int], data: st.DataObject) -> None:
    groups = tuple(make_group(f"g{k}", "ffn", 1, size) for k, size in enumerate(sizes))
    savings = {g.id: (k + 1.0) * (g.size - np.arange(g.size + 1)) for k, g in enumerate(groups)}
    options = {g.id: sorted({g.size, *data.draw(st.sets(st.integers(1, g.size), min_size=1))}) for g in groups}
    most = sum(float(savings[g.id][options[g.id][0]]) for g in groups)
    limit = ResourceLimit(groups, savings, options, data.draw(st.floats(0, 1.2)) * most, most)
    widths = {g.id: data.draw(st.sampled_from(options[g.id])) for g in groups}
    met = limit.meet(widths, [g.id for g in groups])
    if met is None:
        assert limit.required > most
        return
    assert limit.total(met) >= limit.required
    assert all(met[name] in options[name] and met[name] <= width for name, width in widths.items())
