"""Closed-form compression: measure second moments once, read loss curves off them, decide on a plan.

Groups whose freedom is ``basis`` are rotated before they are cut; of groups that are selected, what reads them is
refitted. Where a group's weights do not have the form that this needs, its units are selected by a criterion and left
as they are; ``Compression.skipped`` says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.choice import Choice
from snpc.passes.plan import Method, Plan, Scores, chosen_groups, make_plan
from snpc.runtime.calibration import Calibration
from snpc.runtime.curves import output_curves
from snpc.runtime.fit import Compression, compress
from snpc.runtime.moments import Progress, measure_moments
from snpc.runtime.score import score
from snpc.types import FloatArray


def ordered(scores: Scores, compression: Compression, method: Method) -> Scores:
    """Scores in which the closed forms set the order of units within their groups."""
    values: dict[str, FloatArray] = dict(scores.values)
    for name, found in compression.eliminations.items():
        ranks = np.empty(len(found.order))
        ranks[found.order] = np.arange(len(found.order))
        values[name] = ranks[None, :]
    for name, parts in compression.rebases.items():
        size = len(parts[0].loss) - 1
        values[name] = np.tile(np.arange(size, 0, -1, dtype=np.float64), (len(parts), 1))
    samples = max(scores.samples, compression.samples)
    return replace(scores, values=values, method=method, samples=samples)


@dataclass(frozen=True)
class Decision:
    """A plan, and the closed forms that it is to be fitted with (None: slice the weights as they are)."""

    plan: Plan
    compression: Compression | None = None
    curves: Mapping[str, FloatArray] = field(default_factory=dict, repr=False)
    """Group id -> [size + 1]: relative squared change of the outputs when so many units per block are kept."""


@dataclass(frozen=True)
class Weighed:
    """All that a plan needs but how much is to go: scores with their curves, and the closed forms."""

    scores: Scores
    compression: Compression | None

    def decide(self, choice: Choice) -> Decision:
        return Decision(make_plan(self.scores, choice), self.compression, self.scores.curves)


def decide(
    analysis: Analysis,
    choice: Choice,
    *,
    calibration: Calibration | None = None,
    method: Method | None = None,
    criterion: str | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Decision:
    """Score and plan in one step.

    ``method`` "auto" needs calibration data and uses closed forms, with ``criterion`` (default "mixed") for the groups
    that have none, one layer after the other ("parallel": all at once); "select" scores by ``criterion`` only (default
    "mixed" with data, "magnitude" without). Left out, it is "auto" where there is data and no criterion was named.
    Raises UserError where data is needed and missing.
    """
    weighed = weigh(
        analysis,
        choice,
        calibration=calibration,
        method=method,
        criterion=criterion,
        provider=provider,
        progress=progress,
    )
    return weighed.decide(choice)


def weigh(
    analysis: Analysis,
    choice: Choice,
    *,
    calibration: Calibration | None = None,
    method: Method | None = None,
    criterion: str | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Weighed:
    """What ``decide`` measures. It holds for every choice that differs from this one in its target only."""
    groups = chosen_groups(analysis, choice)
    method = method or ("auto" if calibration is not None and criterion is None else "select")
    if method != "select" and calibration is None:
        raise UserError(f"--method {method} refits weights from calibration data: give --calib, or --method select")
    judge = criterion if criterion is not None else "mixed" if calibration is not None else "magnitude"
    if method == "select":
        scores = score(analysis, judge, calibration, roles=choice.roles, provider=provider, progress=progress)
        curves: Mapping[str, FloatArray] = {}
        if choice.target is not None and calibration is not None:
            curves = output_curves(Compression.empty(analysis), scores, calibration, groups, provider=provider)
        return Weighed(replace(scores, curves=curves), None)
    assert calibration is not None
    found = compress(measure_moments(analysis, calibration, groups, provider=provider, progress=progress), groups)
    rest = score(
        analysis, judge, calibration, roles=choice.roles, skip=set(found.forms), provider=provider, progress=progress
    )
    scores = ordered(rest, found, method)
    curves = {} if choice.uniform else output_curves(found, scores, calibration, groups, provider=provider)
    return Weighed(replace(scores, curves=curves), found)


def compression_for(plan: Plan, calibration: Calibration | None, *, provider: str = "cpu") -> Compression | None:
    """The closed forms that a plan read from a file is to be fitted with; None where it slices weights as they are.

    Raises UserError where they are needed and there is no data.
    """
    if plan.method == "select":
        return None
    if calibration is None:
        raise UserError(
            f"this plan refits weights (method {plan.method}): give --calib, the data that it was made with"
        )
    groups = [g for g in plan.analysis.groups if g.id in plan.keep]
    return compress(measure_moments(plan.analysis, calibration, groups, provider=provider), groups)
