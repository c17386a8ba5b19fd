"""scores -> plan: how many units each group keeps, and which. Also the plan as a file."""

from __future__ import annotations

import itertools
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
Method = Literal["select", "auto"]
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
    """Loss curves where a closed form has one: group id -> [size + 1], squared output error when so many are kept."""


@dataclass(frozen=True)
class Choice:
    """What to cut. ``ratio``: fraction of the units of every role in ``roles`` that goes, in [0, 1).

    ``uniform`` takes the same share of every group; otherwise units are ranked across the groups of a role by score
    relative to their group's mean. Widths are multiples of ``round_to`` and at least ``min_width`` (where the group has
    that many). ``include``/``exclude``: regular expressions searched in group ids.
    """

    ratio: float
    roles: tuple[Role, ...] = DEFAULT_ROLES
    uniform: bool = False
    round_to: int = 1
    min_width: int = 1
    include: str | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
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
    """"select": weights are sliced as they are; "auto": they are refitted to the plan first, from calibration data."""

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
    for role in choice.roles:
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
    return {g.id: min(allowed(g, choice), key=lambda w: (abs(w - g.size * (1 - choice.ratio)), -w)) for g in groups}


def ranked_widths(groups: Sequence[Group], scores: Scores, choice: Choice) -> dict[str, int]:
    """Cut where a step costs least: its cost is the mean score of the units it removes, over the group's mean score."""
    total = sum(g.blocks * g.size for g in groups)
    budget = choice.ratio * total
    ladders = {g.id: ladder(g, step_costs(scores, g), choice) for g in groups}
    widths = {g.id: g.size for g in groups}
    blocks = {g.id: g.blocks for g in groups}
    removed = 0.0
    while True:
        steps = [(rungs[0][0], name) for name, rungs in ladders.items() if rungs]
        if not steps:
            return widths
        _cost, name = min(steps)
        _, width = ladders[name].pop(0)
        units = blocks[name] * (widths[name] - width)
        if removed + units > budget + 1e-9:
            ladders[name] = []
            continue
        widths[name] = width
        removed += units


def step_costs(scores: Scores, group: Group) -> FloatArray:
    """[size]: what removing one unit of every block costs, cheapest first; comparable between groups of a role.

    From a loss curve: the growth of the squared output error, relative to the output. From scores: the score, relative
    to the group's mean.
    """
    curve = scores.curves.get(group.id)
    if curve is not None:
        return np.diff(curve[::-1]) / max(float(curve[0]), 1e-300)
    ordered: FloatArray = np.sort(scores.values[group.id], axis=1).mean(0)
    mean = float(ordered.mean())
    return ordered / mean if mean > 0 and math.isfinite(mean) else ordered


def ladder(group: Group, ordered: FloatArray, choice: Choice) -> list[tuple[float, int]]:
    """(cost, width) of each step down, made to rise: a cheap step behind a dear one cannot be taken first."""
    widths = allowed(group, choice)
    rungs: list[tuple[float, int]] = []
    highest = -math.inf
    for above, below in itertools.pairwise(widths):
        highest = max(highest, float(ordered[group.size - above : group.size - below].mean()))
        rungs.append((highest, below))
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
