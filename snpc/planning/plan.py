"""Scores of units, and the slice plan made of them: which units each group keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from snpc.passes import Analysis
from snpc.passes.slicing import Cuts
from snpc.planning.config import Budget, Effort
from snpc.types import FloatArray, Group

PruningMethod = Literal["select", "parallel", "auto"]


@dataclass(frozen=True)
class LatencyCurves:
    """Measured times in ms.

    ``dense``: of the original. ``base``: of the analyzed model at full width, without rows that no output depends on.
    ``saved``: group id -> [size + 1], the part of ``base`` that is saved, by units per block that are kept.
    """

    dense: float
    base: float
    saved: Mapping[str, FloatArray] = field(repr=False)


@dataclass(frozen=True)
class UnitScores:
    """A score per unit: group id -> [blocks, size], higher = keep, from so many calibration ``samples``."""

    analysis: Analysis
    criterion: str
    values: Mapping[str, FloatArray] = field(repr=False)
    samples: int = 0
    method: PruningMethod = "select"
    curves: Mapping[str, FloatArray] = field(default_factory=dict, repr=False)
    """Where measured: group id -> [size + 1], change of the outputs, like a squared error, by units per block kept."""
    drift_exponent: float = 0.5
    """The drift is so high a power of that change."""
    latency: LatencyCurves | None = None
    energies: Mapping[str, FloatArray] = field(default_factory=dict, repr=False)
    """For the allocator dimap: group id -> [blocks, size], sum of the squared weights of each unit."""
    comparable: bool = False
    """Do the scores of different groups have the same unit, such as that of a loss?"""
    effort: Effort = "normal"


@dataclass(frozen=True)
class SlicePlan:
    """Which units each group keeps: group id -> one list of positions per block, in ascending order."""

    analysis: Analysis
    criterion: str
    options: Mapping[str, Any]
    keep: Mapping[str, tuple[tuple[int, ...], ...]] = field(repr=False)
    method: PruningMethod = "select"
    """"select": weights are sliced as they are. "parallel": they are refitted to the plan first, on calibration data.
    "auto": refitted one layer after the other, each on the activations of the pruned layers before it."""
    data: Mapping[str, Any] | None = field(default=None, repr=False)
    """The record of the calibration data (``Calibration.record``), of a plan that was read from a file."""
    rotated: tuple[str, ...] = ()
    """The residual streams whose units are directions of a basis that is found on the data, of such a plan."""

    def kept_width(self, group: Group) -> int:
        """Units per block that are kept."""
        rows = self.keep.get(group.id)
        return len(rows[0]) if rows else group.size


def select_units(scores: UnitScores, budget: Budget, widths: Mapping[str, int]) -> SlicePlan:
    """The best units of each group, as many as ``widths`` (group id -> width) say."""
    groups = [g for g in scores.analysis.groups if widths.get(g.id, g.size) < g.size]
    keep = {g.id: top_units(scores.values[g.id], widths[g.id]) for g in groups}
    options = {**budget.to_options(), "effort": scores.effort}
    return SlicePlan(scores.analysis, scores.criterion, options, keep, scores.method)


def top_units(scores: FloatArray, width: int) -> tuple[tuple[int, ...], ...]:
    """The ``width`` best positions of each block, ascending; ties go to the lower position."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :width]
    return tuple(tuple(sorted(int(k) for k in row)) for row in order)


# -- to the rewriter -------------------------------------------------------------------------------------------------


def cuts_of(plan: SlicePlan) -> Cuts:
    """(constant, axis) -> [axis length], true where a position is removed."""
    cuts: dict[tuple[str, int], Any] = {}
    for group in plan.analysis.groups:
        rows = plan.keep.get(group.id)
        if rows is None:
            continue
        removed = np.ones((group.blocks, group.size), bool)
        for block, row in enumerate(rows):
            removed[block, list(row)] = False
        flat = np.concatenate([removed.reshape(-1), [False]])  # index -1: of no unit
        for site in group.sites:
            key = (site.tensor, site.axis)
            cuts[key] = cuts.get(key, False) | flat[site.units]
    return cuts
