"""Scores: a criterion's value for every unit of every group, from the weights and from calibration data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from snpc.criteria import Criterion, make_criterion, needs_data
from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.planning import UnitScores
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.statistics import (
    CLOSED_FORM_STATISTICS,
    Statistics,
    check_statistics_match,
    criterion_inputs,
    criterion_keys,
    measure_statistics,
    needs_gate_gradients,
    statistic_requests,
)
from snpc.types import Group, Role


def score(
    analysis: Analysis,
    criterion: str | Criterion = "magnitude",
    calibration: Calibration | None = None,
    *,
    roles: Sequence[Role] = ("qk", "vo", "ffn"),
    skip: Collection[str] = (),
    execution: Execution = DEFAULT_EXECUTION,
) -> UnitScores:
    """Score the units of every prunable group of ``roles`` but those whose ids are in ``skip``.

    ``criterion``: a name with options ("snp:terms=4") or a ``Criterion``. Raises UserError where it needs calibration
    data and there is none.
    """
    groups = [g for g in analysis.groups if g.role in roles and g.prunable and g.size > 1 and g.id not in skip]
    statistics = None
    if calibration is not None:
        statistics = measure_statistics(
            analysis,
            calibration,
            groups,
            method="select",
            criterion=criterion,
            execution=execution,
        )
    return score_groups(analysis, criterion, groups, statistics)


def score_groups(
    analysis: Analysis, criterion: str | Criterion, groups: Sequence[Group], statistics: Statistics | None
) -> UnitScores:
    """Score the units of these groups from what was measured. Raises UserError where that is missing."""
    judge = make_criterion(criterion) if isinstance(criterion, str) else criterion
    spelled = criterion if isinstance(criterion, str) else judge.name
    needed = [
        g
        for g in groups
        if needs_gate_gradients(judge, g) or statistic_requests(analysis, {g.id: criterion_keys(judge, g)})
    ]
    if statistics is None and needs_data(judge, [g.role for g in groups]):
        needy = ", ".join(sorted({g.role for g in groups if judge.probes(g.role)}))
        raise UserError(
            f"criterion {judge.name} needs calibration data for {needy}: "
            "give --calib DATA, or choose --criterion magnitude"
        )
    if statistics is not None and needed and statistics.criterion != spelled:
        raise UserError(
            f"criterion {spelled} cannot score {needed[0].id}: the statistics were measured for "
            f"{statistics.criterion}; give --criterion {statistics.criterion}, or measure again"
        )
    if statistics is not None:
        check_statistics_match(statistics, analysis)
    sums = statistics.sums if statistics is not None else {}
    unknown = [
        g.id for g in needed if statistics is not None and (g.id not in sums or is_closed_form_statistic(sums[g.id]))
    ]
    if statistics is not None and unknown:
        raise UserError(
            f"the statistics of {statistics.model} hold nothing for scoring {unknown[0]}: measure again with the same "
            "--roles, --include, --exclude and --method"
        )
    samples = statistics.samples if statistics is not None and needed else 0
    values = {}
    for group in groups:
        try:
            values[group.id] = judge.score(criterion_inputs(analysis, group, sums.get(group.id, {}), samples))
        except np.linalg.LinAlgError as error:
            raise UserError(
                f"criterion {spelled} cannot score {group.id} ({error}): its statistics are not those of real "
                "activations; measure them again, or leave the group out (--exclude)"
            ) from error
    return UnitScores(analysis, spelled, values, samples, comparable=getattr(judge, "comparable", False))


def is_closed_form_statistic(names: Iterable[str]) -> bool:
    """Are these statistics for a closed form, and not for a criterion?"""
    return any(name.partition(":")[0] in CLOSED_FORM_STATISTICS for name in names)
