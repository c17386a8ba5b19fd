"""What a plan takes and is predicted to do, by scores and curves that are made up."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

import snpc
from snpc.planning import PlanOutlook, UnitScores, groups_to_prune, make_slice_plan, plan_outlook
from snpc.types import FloatArray
from tests.command_line import VIT

ROLES = ("qk", "vo", "ffn")


@pytest.fixture(scope="module")
def vit() -> snpc.Analysis:
    return snpc.analyze(snpc.load(VIT))


def outlook_of(analysis: snpc.Analysis, budget: snpc.Budget, curves: Mapping[str, FloatArray]) -> PlanOutlook:
    groups = groups_to_prune(analysis, budget)
    values = {g.id: np.tile(np.arange(g.size, dtype=float), (g.blocks, 1)) for g in groups}
    scores = UnitScores(analysis, "made up", values, curves=curves)
    return plan_outlook(groups, scores, budget, make_slice_plan(scores, budget))


def quadratic(analysis: snpc.Analysis, height: float) -> dict[str, FloatArray]:
    """Group id -> [size + 1]: ``height`` times the square of the share that goes."""
    return {g.id: height * np.linspace(1, 0, g.size + 1) ** 2 for g in analysis.groups if g.role in ROLES}


def test_what_goes_of_each_role(vit: snpc.Analysis) -> None:
    outlook = outlook_of(vit, snpc.Budget(ratio=0.5), {})
    assert outlook.removed == pytest.approx(dict.fromkeys(ROLES, 0.5))
    assert outlook.drift is None and outlook.safe is None
    assert outlook.saved_share == pytest.approx(0.5, abs=0.03)
    assert not outlook_of(vit, snpc.Budget(ratio=0.4), {}).is_cliff
    assert outlook_of(vit, snpc.Budget(ratio=0.6), {}).is_cliff  # more than half of all that can go


def test_the_drift_is_the_root_of_the_sum_of_the_curves(vit: snpc.Analysis) -> None:
    curves = quadratic(vit, 0.01)
    outlook = outlook_of(vit, snpc.Budget(ratio=0.5, uniform=True), curves)
    assert outlook.drift == pytest.approx((len(curves) * 0.01 * 0.25) ** 0.5)
    assert outlook.is_cliff and outlook.exceeds_curves


@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_the_safe_target_is_the_last_one_within_the_limit(vit: snpc.Analysis, kind: str) -> None:
    curves = quadratic(vit, 0.02)
    outlook = outlook_of(vit, snpc.Budget(target=f"{kind}=0.4"), curves)  # type: ignore[arg-type]
    assert outlook.is_cliff and outlook.safe is not None and outlook.safe.kind == kind
    assert 0.4 < outlook.safe.share < 1
    again = outlook_of(vit, snpc.Budget(target=outlook.safe), curves)
    assert again.drift is not None and again.drift <= again.limit and not again.is_cliff
    smaller = snpc.ResourceTarget(outlook.safe.kind, outlook.safe.share - 0.06)
    assert outlook_of(vit, snpc.Budget(target=smaller), curves).is_cliff


def test_a_ratio_is_answered_in_macs(vit: snpc.Analysis) -> None:
    outlook = outlook_of(vit, snpc.Budget(ratio=0.7), quadratic(vit, 0.02))
    assert outlook.safe is not None and outlook.safe.kind == "macs"


def test_large_cuts_that_the_curves_call_safe_are_no_cliff(vit: snpc.Analysis) -> None:
    outlook = outlook_of(vit, snpc.Budget(ratio=0.8), quadratic(vit, 1e-6))
    assert outlook.takes_most and not outlook.is_cliff


def test_roles_without_curves_leave_the_drift_open(vit: snpc.Analysis) -> None:
    outlook = outlook_of(vit, snpc.Budget(ratio=0.5, roles=("ffn", "residual")), quadratic(vit, 0.02))
    assert outlook.drift is None and outlook.removed["residual"] == pytest.approx(0.5)
    heads = outlook_of(vit, snpc.Budget(ratio=0.5, roles=("head",)), {})
    assert heads.drift is None and heads.removed == {"head": 0.5} and not heads.is_cliff
