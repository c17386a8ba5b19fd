"""scores -> plan: how many units each group keeps, and which. Also the plan as a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.slice import Cuts
from snpc.types import ROLES, FloatArray, Group, Role

FORMAT = 1
Method = Literal["select", "parallel", "auto"]
DEFAULT_ROLES: tuple[Role, ...] = ("qk", "vo", "ffn")


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
class Target:
    """``kind`` ("macs" or "params") is to come down to ``share`` of the dense model's."""

    kind: Literal["macs", "params"]
    share: float


def parse_target(text: str) -> Target:
    """``macs=0.6`` or ``params=0.6``."""
    kind, _, number = text.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if kind not in ("macs", "params") or not 0 < share <= 1:
        raise UserError(f"target {text!r}: must look like macs=0.6 or params=0.6, a share of the dense model in (0, 1]")
    return Target("macs" if kind == "macs" else "params", share)


@dataclass(frozen=True)
class Choice:
    """What to cut. ``ratio``: fraction of the units of every role in ``roles`` that goes, in [0, 1); or ``target``:
    the share of the MACs or parameters to come down to ("macs=0.6"), taken from all roles where it costs least.

    ``uniform`` takes the same share of every group; otherwise units are ranked across the groups of a role by score
    relative to their group's mean. Widths are multiples of ``round_to`` and at least ``min_width`` (where the group has
    that many). ``include``/``exclude``: regular expressions searched in group ids.
    """

    ratio: float | None = None
    roles: tuple[Role, ...] = DEFAULT_ROLES
    target: str | None = None
    uniform: bool = False
    round_to: int = 1
    min_width: int = 1
    include: str | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.target is None):
            raise UserError("give either --ratio R or --target macs=R (or params=R), one of the two")
        if self.target is not None:
            parse_target(self.target)
            if self.uniform or "head" in self.roles:
                raise UserError("--target chooses widths itself: leave out --uniform and the role head")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UserError(
                f"ratio {self.ratio:g} is not in [0, 1): it is the fraction of units to remove, such as 0.5"
            )
        if self.round_to < 1 or self.min_width < 1:
            raise UserError("--round-to and --min-width must be at least 1")
        unknown = [r for r in self.roles if r not in ROLES]
        if unknown or not self.roles:
            raise UserError(
                f"unknown role {', '.join(map(repr, unknown)) or '(none given)'}: choose from {', '.join(ROLES)}"
            )
        for pattern in (self.include, self.exclude):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression ({error})") from None


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
    if found:
        return found
    name = analysis.model.path.name
    if mine and not named:
        raise UserError(f"{name}: --include/--exclude leave no group; `snpc inspect` lists their names")
    pins = [p for g in named for p in g.pins] or list(analysis.pins)
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


def floor_of(group: Group, choice: Choice) -> int:
    """The least width the options allow."""
    return min(group.size, max(choice.min_width, choice.round_to))


def allowed(group: Group, choice: Choice) -> list[int]:
    """Widths a group may have, descending; its own width first."""
    least = floor_of(group, choice)
    multiples = range(group.size - group.size % choice.round_to, 0, -choice.round_to)
    return [group.size, *(w for w in multiples if least <= w < group.size)]


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
    """Reach a share of the model's MACs or parameters, taking it from all roles where it costs least."""
    cost = scores.analysis.cost
    whole = float(cost.macs if target.kind == "macs" else cost.params)
    prices = {g.id: (g.macs if target.kind == "macs" else g.params) / g.size for g in groups}
    most = sum(prices[g.id] * (g.size - min(allowed(g, choice))) for g in groups)
    free = float(scores.analysis.dead_macs) if target.kind == "macs" else 0.0
    budget = (1 - target.share) * whole - free
    if budget > most:
        raise UserError(
            f"target {target.kind}={target.share:g} cannot be reached: with these roles and widths the least is "
            f"{target.kind}={1 - (most + free) / whole:.3f}; allow more roles, or narrower groups"
        )
    return spend(groups, scores, choice, prices, budget, reach=True)


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


# -- the file --------------------------------------------------------------------------------------------------------


def plan_to_json(plan: Plan) -> str:
    """Small, readable, editable: one line per block."""
    groups = []
    for group in plan.analysis.groups:
        rows = plan.keep.get(group.id)
        if rows is not None:
            opening = json.dumps(
                {"id": group.id, "role": group.role, "blocks": group.blocks, "size": group.size, "kept": len(rows[0])}
            )
            lines = ",\n      ".join(json.dumps(list(row)) for row in rows)
            groups.append(f'    {opening[:-1]}, "keep": [\n      {lines}]}}')
    head = {
        "snpc_plan": FORMAT,
        "model": plan.analysis.model.path.name,
        "digest": plan.analysis.model.digest,
        "method": plan.method,
        "criterion": plan.criterion,
        "options": dict(plan.options),
    }
    body = ",\n".join(groups)
    return json.dumps(head, indent=2)[:-2] + f',\n  "groups": [\n{body}\n  ]\n}}\n'


def plan_from_json(text: str, analysis: Analysis, name: str) -> Plan:
    """Read a plan for this model. Raises UserError for another model, unknown groups, or lists that cannot be kept."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise UserError(f"{name}: not a snpc plan (nested too deeply)") from None
    if not isinstance(data, dict) or data.get("snpc_plan") != FORMAT:
        raise UserError(f'{name}: not a snpc plan (it needs "snpc_plan": {FORMAT}); `snpc plan` writes one')
    if data.get("digest") != analysis.model.digest:
        raise UserError(
            f"{name}: made for another model ({data.get('model')}, digest {str(data.get('digest'))[:12]}), "
            f"not for {analysis.model.path.name} ({analysis.model.digest[:12]}); make a new plan"
        )
    groups = {g.id: g for g in analysis.groups}
    keep: dict[str, tuple[tuple[int, ...], ...]] = {}
    entries, options = data.get("groups"), data.get("options", {})
    if not isinstance(entries, list) or not isinstance(options, dict):
        raise UserError(f'{name}: not a snpc plan ("groups" must be a list, "options" an object)')
    for entry in entries:
        group = groups.get(str(entry.get("id"))) if isinstance(entry, dict) else None
        if group is None:
            raise UserError(
                f"{name}: unknown group {entry.get('id') if isinstance(entry, dict) else entry!r}; "
                "`snpc inspect` lists them"
            )
        if group.id in keep:
            raise UserError(f"{name}: {group.id} is listed twice; keep one")
        keep[group.id] = checked_rows(entry.get("keep"), group, name)
    method = data.get("method", "select")
    if method not in get_args(Method):
        raise UserError(f"{name}: unknown method {method!r}; it is one of {', '.join(get_args(Method))}")
    return Plan(analysis, str(data.get("criterion", "by hand")), options, keep, method)


def checked_rows(rows: Any, group: Group, name: str) -> tuple[tuple[int, ...], ...]:
    where = f"{name}: {group.id}"
    if group.pins:
        raise UserError(f"{where} is pinned ({group.pins[0].reason}); remove it from the plan")
    if not isinstance(rows, list) or len(rows) != group.blocks or not all(isinstance(r, list) for r in rows):
        raise UserError(f'{where}: needs {group.blocks} lists in "keep", one per block')
    for row in rows:
        if not row or not all(type(k) is int and 0 <= k < group.size for k in row) or len(set(row)) != len(row):
            raise UserError(f'{where}: "keep" must hold different positions from 0 to {group.size - 1}, at least one')
    if len({len(row) for row in rows}) > 1:
        counts = sorted({len(row) for row in rows})
        raise UserError(f"{where}: every block must keep the same number of units, not {counts[0]} and {counts[-1]}")
    return tuple(tuple(sorted(row)) for row in rows)
