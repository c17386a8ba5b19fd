"""Curves without trials are comparable between groups, also where one unit holds nearly all of a group's energy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from snpc.planning.plan import UnitScores
from snpc.runtime.closed_form.fit import ClosedForms
from snpc.runtime.sensitivity.predicted_curves import predicted_curves, relative_loss
from tests.closed_forms import closed_forms_of, prunable_of
from tests.models.groups import make_group
from tests.oracle import analysis_of

SIZE = 128


def test_one_giant_unit_does_not_make_the_others_free() -> None:
    rng = np.random.default_rng(0)
    plain, giant, third = (make_group(name, "ffn", 1, SIZE) for name in ("plain", "giant", "third"))
    values = {group.id: rng.uniform(1, 2, (1, SIZE)) for group in (plain, giant, third)}
    values["giant"][0, 5] = 1e5
    analysis = analysis_of("vit_timm__ts17")
    scores, empty = UnitScores(analysis, "magnitude", values), ClosedForms.empty(analysis)
    curves = predicted_curves(empty, scores, [plain, giant, third])
    half = SIZE // 2
    assert curves["giant"][half] == pytest.approx(curves["plain"][half], rel=0.1)
    shares = [float(relative_loss(empty, scores, group)[half]) for group in (plain, giant)]
    assert shares[1] < 0.01 * shares[0], "which the share of the whole group's loss would say"


def test_the_order_within_a_group_and_the_level_of_a_role_stay() -> None:
    name = "vit_timm__ts17"
    closed_forms, groups = closed_forms_of(name), prunable_of(analysis_of(name))
    values = {g.id: np.ones((g.blocks, g.size)) for g in groups}
    scores = UnitScores(closed_forms.analysis, "magnitude", values)
    curves = predicted_curves(closed_forms, scores, groups)
    for role in {g.role for g in groups}:
        factors = []
        for group in (g for g in groups if g.role == role):
            relative = relative_loss(closed_forms, scores, group)
            assert np.allclose(curves[group.id], curves[group.id][0] * relative, rtol=1e-9)
            factors.append(float(curves[group.id][0]))
        assert min(factors) <= 1 + 1e-9 and max(factors) >= 1 - 1e-9, "the median group keeps its level"


def test_a_group_that_loses_nothing_is_free() -> None:
    groups = [make_group(name, "ffn", 1, SIZE) for name in "abc"]
    values = {group.id: np.zeros((1, SIZE)) for group in groups}
    analysis = analysis_of("vit_timm__ts17")
    scores = UnitScores(analysis, "magnitude", values)
    curves = predicted_curves(ClosedForms.empty(analysis), scores, groups)
    assert all(np.all(curve == 0) for curve in curves.values())
    some = replace(scores, values={**values, "b": np.ones((1, SIZE))})
    mixed = predicted_curves(ClosedForms.empty(analysis), some, groups)
    assert np.isfinite(np.concatenate(list(mixed.values()))).all() and mixed["b"][SIZE // 2] > mixed["a"][SIZE // 2]
