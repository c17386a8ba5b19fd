"""scores -> plan: how many units each group keeps, and which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from snpc.passes.analyze import Analysis
from snpc.passes.slicing.slice import Cuts
from snpc.planning.config import Budget
from snpc.types import FloatArray, Group

PruningMethod = Literal["select", "parallel", "auto"]


@dataclass(frozen=True)
class LatencyCurves:
    """Measured times in ms: of the ``dense`` model, of ``base``, the same with nothing narrowed yet (but for rows that
    nobody reads), and group id -> [size + 1], what is ``saved`` of that when so many units per block are kept."""

    dense: float
    base: float
    saved: Mapping[str, FloatArray] = field(repr=False)


@dataclass(frozen=True)
class UnitScores:
    """A score per unit, higher = keep: group id -> [blocks, size]. ``samples`` calibration samples were used."""

    analysis: Analysis
    criterion: str
    values: Mapping[str, FloatArray] = field(repr=False)
    samples: int = 0
    method: PruningMethod = "select"
    curves: Mapping[str, FloatArray] = field(default_factory=dict, repr=False)
    """Where known: group id -> [size + 1], relative squared change of the model's outputs when so many are kept."""
    latency: LatencyCurves | None = None
    energies: Mapping[str, FloatArray] = field(default_factory=dict, repr=False)
    """Where asked for: group id -> [blocks, size], squared weights of each unit."""
    comparable: bool = False
    """Are scores of different groups in one unit, such as that of a loss?"""


@dataclass(frozen=True)
class SlicePlan:
    """Which units each group keeps: group id -> one list of positions per block, in ascending order."""

    analysis: Analysis
    criterion: str
    options: Mapping[str, Any]
    keep: Mapping[str, tuple[tuple[int, ...], ...]] = field(repr=False)
    method: PruningMethod = "select"
    """"select": weights are sliced as they are; "parallel": they are refitted to the plan first, from calibration data;
    "auto": so too, one layer after the other, each from what the cut layers before it give."""

    def kept_width(self, group: Group) -> int:
        """Units per block that stay."""
        rows = self.keep.get(group.id)
        return len(rows[0]) if rows else group.size


def select_units(scores: UnitScores, budget: Budget, widths: Mapping[str, int]) -> SlicePlan:
    """The best units of each group, as many as ``widths`` (group id -> width) say."""
    groups = [g for g in scores.analysis.groups if widths.get(g.id, g.size) < g.size]
    keep = {g.id: top_units(scores.values[g.id], widths[g.id]) for g in groups}
    return SlicePlan(scores.analysis, scores.criterion, budget.to_options(), keep, scores.method)


def top_units(scores: FloatArray, width: int) -> tuple[tuple[int, ...], ...]:
    """The ``width`` best positions of each block, ascending; ties go to the lower position."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :width]
    return tuple(tuple(sorted(int(k) for k in row)) for row in order)


# -- to the rewriter -------------------------------------------------------------------------------------------------


def cuts_of(plan: SlicePlan) -> Cuts:
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
