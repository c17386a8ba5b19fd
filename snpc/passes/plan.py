"""scores -> plan: how many units each group keeps, and which."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.choice import Choice, Target, allowed, parse_target
from snpc.passes.groups import APPROXIMATE
from snpc.passes.slice import Cuts
from snpc.types import FloatArray, Group

Method = Literal["select", "parallel", "auto"]


@dataclass(frozen=True)
class Scores:
    """A score per unit, higher = keep: group id -> [blocks, size]. ``samples`` calibration samples were used."""

    analysis: Analysis
    criterion: str
    values: Mapping[str, FloatArray] = field(repr=False)
    samples: int = 0
    method: Method = "select"
    curves: Mapping[str, FloatArray] = field(default_factory=dict, repr=False)
    """Where known: group id -> [size + 1], relative squared change of the model's outputs when so many are kept."""


@dataclass(frozen=True)
class Plan:
    """Which units each group keeps: group id -> one list of positions per block, in ascending order."""

    analysis: Analysis
    criterion: str
    options: Mapping[str, Any]
    keep: Mapping[str, tuple[tuple[int, ...], ...]] = field(repr=False)
    method: Method = "select"
    """"select": weights are sliced as they are; "parallel": they are refitted to the plan first, from calibration data;
    "auto": so too, one layer after the other, each from what the cut layers before it give."""

    def kept(self, group: Group) -> int:
        """Units per block that stay."""
        rows = self.keep.get(group.id)
        return len(rows[0]) if rows else group.size


def chosen_groups(analysis: Analysis, choice: Choice) -> list[Group]:
    """Groups that the choice is about. Raises UserError where there are none, saying why."""
    mine = [g for g in analysis.groups if g.role in choice.roles]
    named = [
        g
        for g in mine
        if (not choice.include or re.search(choice.include, g.id))
        and not (choice.exclude and re.search(choice.exclude, g.id))
    ]
    found = [g for g in named if g.prunable and g.size > 1]
    name = analysis.model.path.name
    if choice.target is not None and any(g.freedom_reason == APPROXIMATE for g in found):
        raise UserError(
            f"{name}: --target cannot weigh the residual width, since what other normalisation statistics cost is not "
            "measured: cut it with --ratio, or leave out the role residual"
        )
    if found:
        return found
    if mine and not named:
        raise UserError(f"{name}: --include/--exclude leave no group; `snpc inspect` lists their names")
    pins = sorted((p for g in named for p in g.pins), key=lambda p: p.kind == "norm") or list(analysis.pins)
    why = f", for example {pins[0].tensor} axis {pins[0].axis}: {pins[0].reason} ({pins[0].operator})" if pins else ""
    raise UserError(
        f"{name}: nothing to prune in the roles {', '.join(choice.roles)}{why}; `snpc inspect` lists every pin"
    )


def make_plan(scores: Scores, choice: Choice) -> Plan:
    """Decide which units stay."""
    groups = chosen_groups(scores.analysis, choice)
    widths: dict[str, int] = {}
    if choice.target is not None:
        widths = target_widths(groups, scores, choice, parse_target(choice.target))
    for role in choice.roles if choice.target is None else ():
        mine = [g for g in groups if g.role == role]
        widths |= uniform_widths(mine, choice) if choice.uniform else ranked_widths(mine, scores, choice)
    keep = {g.id: keep_best(scores.values[g.id], widths[g.id]) for g in groups if widths[g.id] < g.size}
    options = {k: v for k, v in asdict(choice).items() if v is not None}
    return Plan(scores.analysis, scores.criterion, options, keep, scores.method)


def keep_best(scores: FloatArray, width: int) -> tuple[tuple[int, ...], ...]:
    """The ``width`` best positions of each block, ascending; ties go to the lower position."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :width]
    return tuple(tuple(sorted(int(k) for k in row)) for row in order)


def uniform_widths(groups: Sequence[Group], choice: Choice) -> dict[str, int]:
    """Every group keeps the share 1 - ratio, to the nearest width it may have."""
    assert choice.ratio is not None
    share = 1 - choice.ratio
    return {g.id: min(allowed(g, choice), key=lambda w: (abs(w - g.size * share), -w)) for g in groups}


def ranked_widths(groups: Sequence[Group], scores: Scores, choice: Choice) -> dict[str, int]:
    """Remove the share ``ratio`` of the units of one role, where it costs least."""
    prices = {g.id: float(g.blocks) for g in groups}
    assert choice.ratio is not None
    return spend(groups, scores, choice, prices, choice.ratio * sum(g.blocks * g.size for g in groups))


def target_widths(groups: Sequence[Group], scores: Scores, choice: Choice, target: Target) -> dict[str, int]:
    """Reach a share of the model's MACs, parameters or bytes, taking it from all roles where it costs least."""
    whole = float(getattr(scores.analysis.cost, target.kind))
    prices = {g.id: worth(scores.analysis, g, target) / g.size for g in groups}
    most = sum(prices[g.id] * (g.size - min(allowed(g, choice))) for g in groups)
    free = float(scores.analysis.dead_macs) if target.kind == "macs" else 0.0
    budget = (1 - target.share) * whole - free
    if budget > most:
        raise UserError(
            f"target {target.kind}={target.share:g} cannot be reached: with these roles and widths the least is "
            f"{target.kind}={1 - (most + free) / whole:.3f}; allow more roles, or narrower groups"
        )
    return spend(groups, scores, choice, prices, budget, reach=True)


def worth(analysis: Analysis, group: Group, target: Target) -> float:
    """What the group accounts for of what the target counts."""
    if target.kind == "macs":
        return float(group.macs)
    if target.kind == "params":
        return float(group.params)
    weight = analysis.traced.model.graph.initializers[group.sites[0].tensor].const_value
    assert weight is not None
    return group.params * weight.nbytes / weight.size


def spend(
    groups: Sequence[Group],
    scores: Scores,
    choice: Choice,
    prices: Mapping[str, float],
    budget: float,
    reach: bool = False,
) -> dict[str, int]:
    """Widths after steps worth ``budget``, the least loss per price first. ``prices``: what one unit of every block is
    worth. ``reach``: take the step that goes over the budget too, so that it is met."""
    ladders = {
        g.id: [(cost / max(prices[g.id], 1e-300), width) for cost, width in ladder(g, step_costs(scores, g), choice)]
        for g in groups
    }
    widths = {g.id: g.size for g in groups}
    removed = 0.0
    while removed < budget * (1 - 1e-12):
        steps = [(rungs[0][0], name) for name, rungs in ladders.items() if rungs]
        if not steps:
            break
        _, name = min(steps)
        _, width = ladders[name].pop(0)
        worth = prices[name] * (widths[name] - width)
        if not reach and removed + worth > budget + 1e-9:
            ladders[name] = []
            continue
        widths[name] = width
        removed += worth
    return widths


def step_costs(scores: Scores, group: Group) -> FloatArray:
    """[size]: what removing one unit of every block costs, cheapest first; comparable between groups.

    From a curve: the growth of the change of the model's outputs. From scores: the score, relative to the group's mean.
    """
    curve = scores.curves.get(group.id)
    if curve is not None:
        growth: FloatArray = np.diff(curve[::-1])
        return growth
    ordered: FloatArray = np.sort(scores.values[group.id], axis=1).mean(0)
    mean = float(ordered.mean())
    return ordered / mean if mean > 0 and math.isfinite(mean) else ordered


def ladder(group: Group, ordered: FloatArray, choice: Choice) -> list[tuple[float, int]]:
    """(cost per unit, width) of each step down, on the lower convex hull of the loss: a dear step with cheap ones
    behind it is averaged with them, since they cannot be taken before it."""
    widths = allowed(group, choice)
    loss = np.concatenate([[0.0], np.cumsum(ordered)])
    rungs: list[tuple[float, int]] = []
    here = 0
    while here < len(widths) - 1:
        gone = loss[group.size - np.array(widths)]
        rest = np.arange(here + 1, len(widths))
        slopes = (gone[rest] - gone[here]) / (widths[here] - np.array(widths)[rest])
        there = int(rest[len(rest) - 1 - np.argmin(slopes[::-1])])
        rungs += [(float(slopes[there - here - 1]), width) for width in widths[here + 1 : there + 1]]
        here = there
    return rungs


# -- to the rewriter -------------------------------------------------------------------------------------------------


def cuts_of(plan: Plan) -> Cuts:
    """(constant, axis) -> which positions go."""
    cuts: dict[tuple[str, int], Any] = {}
    for group in plan.analysis.groups:
        rows = plan.keep.get(group.id)
        if rows is None:
            continue
        gone = np.ones((group.blocks, group.size), bool)
        for block, row in enumerate(rows):
            gone[block, list(row)] = False
        flat = np.concatenate([gone.reshape(-1), [False]])
        for site in group.sites:
            key = (site.tensor, site.axis)
            cuts[key] = cuts.get(key, False) | flat[site.units]
    return cuts
