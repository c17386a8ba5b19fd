"""Outlook: what a plan takes before anything is written, what its curves predict, and up to where they are safe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from snpc.planning.allocate import allocation_path, predicted_drift, required_savings
from snpc.planning.config import Budget, ResourceTarget
from snpc.planning.plan import SlicePlan, UnitScores
from snpc.planning.savings import saved_at
from snpc.planning.tied_widths import smallest_widths
from snpc.types import Group, Role

SAFE_DRIFT = 0.07
"""Up to this predicted drift outputs hardly change. Real drift is larger: curves are of one group at a time."""
MARGIN = 1.1  # a prediction that is hardly beyond the limit is no news
LARGE_SHARE = 0.5  # of what the widths can save at most
SHARE_STEP = 100  # targets are offered in hundredths


@dataclass(frozen=True)
class PlanOutlook:
    """What a plan takes, and what that is predicted to do.

    ``removed``: role -> share of its units that goes. ``saved_share``: of what the widths of these roles can save at
    most, the part that goes. ``drift``: predicted change of the outputs, as the root of the curves' sum; None where no
    curves were measured. ``limit``: up to which it is thought safe. ``safe``: the smallest target whose predicted drift
    is within the limit; None where nothing was measured or nothing can go.
    """

    removed: Mapping[Role, float]
    saved_share: float
    drift: float | None = None
    limit: float = SAFE_DRIFT
    safe: ResourceTarget | None = None

    @property
    def is_cliff(self) -> bool:
        """Is more taken than the curves say is safe, or, where there are none, more than half of all that can go?"""
        return self.exceeds_curves or (self.drift is None and self.takes_most)

    @property
    def exceeds_curves(self) -> bool:
        return self.drift is not None and self.drift > MARGIN * self.limit

    @property
    def takes_most(self) -> bool:
        return self.saved_share > LARGE_SHARE


def plan_outlook(
    groups: Sequence[Group], scores: UnitScores, budget: Budget, slices: SlicePlan, limit: float = SAFE_DRIFT
) -> PlanOutlook:
    """The outlook of ``slices``, which ``budget`` made of the ``scores`` of ``groups``. ``limit``: see
    ``PlanOutlook``."""
    removed = removed_shares(groups, slices)
    unmeasured = {g.id for g in groups if g.approximate and not g.normalized_inside}
    unmeasured |= {g.id for g in groups if g.role in ("head", "experts") and g.id not in scores.curves}
    measured = [g for g in groups if g.id not in unmeasured]
    if not measured:
        return PlanOutlook(removed, max(removed.values(), default=0.0))
    # A latency and a drift are met by trial; what they take is told in MACs.
    kind = budget.target.kind if budget.target is not None and budget.target.kind != "latency" else "macs"
    target = ResourceTarget(kind, 1.0)
    roles = tuple({g.role: None for g in measured})
    aim = replace(budget, ratio=None, max_drift=None, max_ppl=None, max_drop=None, target=target, roles=roles)
    kept = {group.id: slices.kept_width(group) for group in measured}
    saved, most = (saved_at(w, scores, measured, target) for w in (kept, smallest_widths(measured, budget)))
    share = saved / most if most else 0.0
    if len(measured) < len(groups) or any(g.id not in scores.curves for g in measured):
        return PlanOutlook(removed, share)
    drift = float(np.sqrt(max(sum(float(scores.curves[g.id][slices.kept_width(g)]) for g in measured), 0.0)))
    return PlanOutlook(removed, share, drift, limit, safe_target(measured, scores, aim, limit))


def removed_shares(groups: Sequence[Group], slices: SlicePlan) -> dict[Role, float]:
    """Role -> share of the units of ``groups`` that goes."""
    units: dict[Role, list[int]] = defaultdict(lambda: [0, 0])
    for group in groups:
        units[group.role][0] += group.blocks * (group.size - slices.kept_width(group))
        units[group.role][1] += group.blocks * group.size
    return {role: gone / whole for role, (gone, whole) in units.items()}


def safe_target(groups: Sequence[Group], scores: UnitScores, budget: Budget, limit: float) -> ResourceTarget | None:
    """The least share of the dense model's MACs, parameters or bytes (as the budget's target) whose predicted drift is
    within ``limit``. It is rounded up to hundredths; None where nothing can go so.
    """
    target = budget.target
    assert target is not None
    path, saved = allocation_path(groups, scores, budget)
    last = int(np.flatnonzero(predicted_drift(path, scores) <= limit)[-1])
    required, _, _ = required_savings(scores, replace(target, share=0.0), 0.0)  # of a model of which nothing is left
    assert target.kind != "latency"
    whole = required + scores.analysis.saved_before(target.kind)
    share = np.ceil(SHARE_STEP * (required - float(saved[last])) / whole - 1e-9) / SHARE_STEP
    return ResourceTarget(target.kind, float(share)) if 0 < share < 1 else None
