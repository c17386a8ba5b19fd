"""Allocation: how wide each group stays under a ratio, a target or a drift limit."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.passes.quantization import describe_quantization, is_mostly_quantized
from snpc.planning.config import Budget, ResourceTarget
from snpc.planning.descent import AllocationPath, greedy_path, widths_within
from snpc.planning.dimap import dimap_widths_at
from snpc.planning.plan import SlicePlan, UnitScores, select_units
from snpc.planning.savings import saved_along, saved_at, savings_by_width
from snpc.planning.tied_widths import (
    check_ties_are_whole,
    common_widths,
    groups_ranked_together,
    smallest_widths,
    tied_sets,
)
from snpc.types import FloatArray, Group

NATS_PER_CHANGE = 7.0  # of a language model: a change of 1 is as far as equal probabilities, log(50 000) less its own
GUESSED_DRIFT = 0.2  # of the first plan that is tried for a score on labels
GUESSED_FACTOR = 1.1  # on the perplexity, where the dense model's is not known yet


def groups_to_prune(analysis: Analysis, budget: Budget) -> list[Group]:
    """The prunable groups that the budget selects. Raises UserError where there are none, with the reason."""
    of_roles = [g for g in analysis.groups if g.role in budget.roles]
    named = [
        g
        for g in of_roles
        if (not budget.include or re.search(budget.include, g.id))
        and not (budget.exclude and re.search(budget.exclude, g.id))
    ]
    prunable = [g for g in named if g.prunable and g.size > 1]
    name = analysis.model.path.name
    check_ties_are_whole(prunable, analysis.groups, name)
    if prunable:
        return prunable
    if of_roles and not named:
        raise UserError(f"{name}: --include/--exclude leave no group; `snpc inspect` lists their names")
    pins = sorted((p for g in named for p in g.pins), key=lambda p: p.kind in ("norm", "head_norm")) or list(
        analysis.pins
    )
    quantization = describe_quantization(analysis.model, analysis.cost)
    if quantization and analysis.model.quantized is None and is_mostly_quantized(analysis.cost):
        raise UserError(f"{name}: nothing to prune in the roles {', '.join(budget.roles)}: {quantization}")
    why = f", for example {pins[0].tensor} axis {pins[0].axis}: {pins[0].reason} ({pins[0].operator})" if pins else ""
    roles = Counter(g.role for g in analysis.groups if g.prunable and g.size > 1 and g.role not in budget.roles)
    others = f"; there are {' and '.join(f'{n} of {role}' for role, n in roles.items())} (--roles)" if roles else ""
    raise UserError(
        f"{name}: nothing to prune in the roles {', '.join(budget.roles)}{why}{others}; `snpc inspect` lists every pin"
    )


def check_ranked_streams(analysis: Analysis, groups: Sequence[Group], budget: Budget) -> None:
    """Raise UserError where the budget ranks a residual stream whose loss is not known."""
    known = {stream.group: stream for stream in analysis.stream_bases}
    for group in groups if budget.ratio is None else ():
        stream = known.get(group.id)
        if group.approximate and not group.normalized_inside and (stream is None or not stream.rotated):
            why = "it is rotated with --calib DATA, and without --criterion, --method select and the role layer"
            if stream is not None:
                why = stream.reason or "its channels lose less than a rotation"
            raise UserError(
                f"{analysis.model.path.name}: --target and --max-drift cannot rank the residual width, since what its "
                f"normalizations lose is known of a rotated stream only, and {group.id} is none: {why}; cut it with "
                "--ratio, or leave out the role residual"
            )


def make_slice_plan(scores: UnitScores, budget: Budget) -> SlicePlan:
    """Allocate the widths, and choose the units that stay."""
    groups = groups_to_prune(scores.analysis, budget)
    check_ranked_streams(scores.analysis, groups, budget)
    return select_units(scores, budget, allocate_widths(groups, scores, budget))


def allocate_widths(groups: Sequence[Group], scores: UnitScores, budget: Budget) -> dict[str, int]:
    """Group id -> units per block to keep. Raises UserError where the target is out of reach."""
    if budget.allocator == "dimap":
        return dimap_widths(groups, scores, budget)
    if budget.target is not None:
        return target_widths(groups, scores, budget)
    if budget.max_drift is not None:
        return drift_widths(groups, scores, budget)
    if budget.max_ppl is not None:
        return perplexity_widths(groups, scores, budget)
    if budget.max_drop is not None:  # a guess, for the first that is measured
        path, _ = allocation_path(groups, scores, budget)
        return path.widths_after(int(np.flatnonzero(predicted_drift(path, scores) <= GUESSED_DRIFT)[-1]))
    if budget.uniform:
        return uniform_widths(groups, budget)
    ranked = groups_ranked_together(groups, budget.roles)
    return {k: v for members in ranked for k, v in ranked_widths(members, scores, budget).items()}


def uniform_widths(groups: Sequence[Group], budget: Budget) -> dict[str, int]:
    """Every group keeps the share 1 - ratio, rounded to the nearest allowed width."""
    assert budget.ratio is not None
    share = 1 - budget.ratio
    widths: dict[str, int] = {}
    for members in tied_sets(groups):
        whole = members[0].size * share
        nearest = min(common_widths(members, budget), key=lambda w: (abs(w[0] - whole), -w[0]))
        widths |= zip((g.id for g in members), nearest, strict=True)
    return widths


def ranked_widths(groups: Sequence[Group], scores: UnitScores, budget: Budget) -> dict[str, int]:
    """Remove the fraction ``ratio`` of the units of one role, or of several that are tied, smallest loss first."""
    assert budget.ratio is not None
    blocks = {g.id: float(g.blocks) for g in groups}
    path = greedy_path(groups, {g.id: removal_costs(scores, g) for g in groups}, blocks, budget)
    removable = budget.ratio * sum(g.blocks * g.size for g in groups)
    return widths_within(path, lambda name, before, after: blocks[name] * (before - after), removable)


def dimap_widths(groups: Sequence[Group], scores: UnitScores, budget: Budget) -> dict[str, int]:
    """One threshold per role on the relative energy of units; for a target, at the ratio of all roles that reaches it.

    Raises UserError where the target is out of reach.
    """
    if any(g.id not in scores.energies for g in groups):
        raise UserError("allocator dimap needs the energies of weights: plan with snpc.plan")
    if budget.target is None:
        assert budget.ratio is not None
        return dimap_widths_at(groups, scores.energies, budget, budget.ratio)
    target = budget.target

    def saved(widths: Mapping[str, int]) -> float:
        return saved_at(widths, scores, groups, target)

    most = dimap_widths_at(groups, scores.energies, budget, 1.0)
    required, reachable, slack = required_savings(scores, target, saved(most))
    check_reachable(budget, required, saved(most) + slack, reachable)
    low, high = 0.0, 1.0
    while (high - low) * sum(g.blocks * g.size for g in groups) > 0.5:
        middle = (low + high) / 2
        enough = saved(dimap_widths_at(groups, scores.energies, budget, middle)) >= required * (1 - 1e-12)
        low, high = (low, middle) if enough else (middle, high)
    return dimap_widths_at(groups, scores.energies, budget, high)


def check_reachable(budget: Budget, required: float, most: float, reachable: str) -> None:
    if required > most * (1 + 1e-12):
        raise UserError(
            f"target {budget.target} cannot be reached: with these roles and widths the least is {reachable}; allow "
            "more roles, or narrower groups"
        )


def allocation_path(groups: Sequence[Group], scores: UnitScores, budget: Budget) -> tuple[AllocationPath, FloatArray]:
    """The steps towards the budget's target, and [steps + 1] the savings after each: MACs, parameters, bytes or ms.

    For limits of quality the savings are MACs.
    """
    target = budget.target if budget.target is not None else ResourceTarget("macs", 0.0)
    savings = {g.id: savings_by_width(scores, g, target) for g in groups}
    least = smallest_widths(groups, budget)
    unit_savings = {g.id: float(savings[g.id][least[g.id]]) / max(g.size - least[g.id], 1) for g in groups}
    path = greedy_path(groups, {g.id: removal_costs(scores, g) for g in groups}, unit_savings, budget)
    return path, saved_along(path, scores, target)


def target_widths(groups: Sequence[Group], scores: UnitScores, budget: Budget) -> dict[str, int]:
    """Reach the target, cutting first where the predicted loss is smallest. A latency is a predicted one."""
    assert budget.target is not None
    path, saved = allocation_path(groups, scores, budget)
    required, reachable, slack = required_savings(scores, budget.target, float(saved[-1]))
    check_reachable(budget, required, float(saved[-1]) + slack, reachable)
    return path.widths_after(int(np.argmax(saved >= min(required, float(saved[-1])) * (1 - 1e-12))))


def required_savings(scores: UnitScores, target: ResourceTarget, most: float) -> tuple[float, str, float]:
    """(savings that the target requires, the target that is reached with the savings ``most`` in words, error margin of
    the prediction)."""
    if target.kind == "latency":
        assert scores.latency is not None
        dense, least = scores.latency.dense, scores.latency.base - most
        text = f"{least:.3g}ms" if target.ms is not None else f"{least / dense:.3f}"
        return scores.latency.base - target.milliseconds(dense), f"latency={text} (predicted)", 0.1 * dense
    whole = float(getattr(scores.analysis.cost, target.kind))
    free = float(scores.analysis.saved_before(target.kind))
    return (1 - target.share) * whole - free, f"{target.kind}={1 - (most + free) / whole:.3f}", 0.0


def drift_widths(groups: Sequence[Group], scores: UnitScores, budget: Budget) -> dict[str, int]:
    """The narrowest widths at which the drift that the loss curves predict is within ``max_drift``."""
    path, _ = allocation_path(groups, scores, budget)
    assert budget.max_drift is not None
    return path.widths_after(int(np.flatnonzero(predicted_drift(path, scores) <= budget.max_drift)[-1]))


def predicted_drift(path: AllocationPath, scores: UnitScores) -> FloatArray:
    """[steps + 1]: drift of the outputs, the sum over groups as if they were independent."""
    drift: FloatArray = predicted_change(path, scores, "--max-drift") ** scores.drift_exponent
    return drift


def perplexity_widths(groups: Sequence[Group], scores: UnitScores, budget: Budget) -> dict[str, int]:
    """The narrowest widths at which the growth of the perplexity is predicted to be within ``max_ppl``. Of a limit that
    is no factor it is a guess, for the first that is measured."""
    path, _ = allocation_path(groups, scores, budget)
    assert budget.max_ppl is not None
    factor = budget.max_ppl.value if budget.max_ppl.relative else GUESSED_FACTOR
    return path.widths_after(int(np.flatnonzero(predicted_surprise(path, scores) <= np.log(factor))[-1]))


def predicted_surprise(path: AllocationPath, scores: UnitScores) -> FloatArray:
    """[steps + 1]: nats by which the next token becomes less likely, roughly: whoever needs it right measures it."""
    return NATS_PER_CHANGE * predicted_change(path, scores, "--max-ppl")


def predicted_change(path: AllocationPath, scores: UnitScores, flag: str) -> FloatArray:
    """[steps + 1]: change of the outputs, the sum over groups as if they were independent."""
    if any(g.id not in scores.curves for g in path.groups):
        raise UserError(f"{flag} needs calibration data, on which it is measured: give --calib")
    return np.maximum(path.cumulative(scores.curves), 0.0)


def removal_costs(scores: UnitScores, group: Group) -> FloatArray:
    """[size]: the loss of removing one unit of every block, in the order of removal; comparable between groups.

    From a loss curve: its growth. From scores: the score, relative to the group's mean unless scores are comparable.
    """
    curve = scores.curves.get(group.id)
    if curve is not None:
        growth: FloatArray = np.diff(curve[::-1])
        return growth
    ordered: FloatArray = np.sort(scores.values[group.id], axis=1).mean(0)
    if scores.comparable:
        return np.sort(scores.values[group.id], axis=1).sum(0)  # type: ignore[no-any-return]
    mean = float(ordered.mean())
    return ordered / mean if mean > 0 and math.isfinite(mean) else ordered
