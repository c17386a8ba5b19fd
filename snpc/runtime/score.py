"""analysis (+ calibration data) -> scores: what a criterion says of every unit of every group."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from snpc.criteria import Criterion, make_criterion, needs_data
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.plan import Scores
from snpc.runtime.calibration import Calibration
from snpc.runtime.measure import wanted_statistics
from snpc.runtime.moments import NEEDS
from snpc.runtime.statistics import Progress, Statistics, check_model, measure_statistics
from snpc.types import FloatArray, Group, Numbers, Role

CLOSED = {name for names in NEEDS.values() for name in names}


def score(
    analysis: Analysis,
    criterion: str | Criterion = "magnitude",
    calibration: Calibration | None = None,
    *,
    roles: Sequence[Role] = ("qk", "vo", "ffn"),
    skip: Collection[str] = (),
    provider: str = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
) -> Scores:
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
            provider=provider,
            threads=threads,
            progress=progress,
        )
    return scores_of(analysis, criterion, groups, statistics)


def scores_of(
    analysis: Analysis, criterion: str | Criterion, groups: Sequence[Group], statistics: Statistics | None
) -> Scores:
    """Score the units of these groups from what was measured. Raises UserError where that is missing."""
    judge = make_criterion(criterion) if isinstance(criterion, str) else criterion
    spelled = criterion if isinstance(criterion, str) else judge.name
    needed = [g for g in groups if wanted_statistics(analysis, {g.id: judge.probes(g.role)})]
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
        check_model(statistics, analysis)
    sums = statistics.sums if statistics is not None else {}
    unknown = [g.id for g in needed if statistics is not None and (g.id not in sums or CLOSED & set(sums[g.id]))]
    if statistics is not None and unknown:
        raise UserError(
            f"the statistics of {statistics.model} hold nothing for scoring {unknown[0]}: measure again with the same "
            "--roles, --include, --exclude and --method"
        )
    samples = statistics.samples if statistics is not None and needed else 0
    values = {g.id: judge.score(numbers_of(analysis, g, sums.get(g.id, {}), samples)) for g in groups}
    return Scores(analysis, spelled, values, samples)


# -- weights as rows per unit ----------------------------------------------------------------------------------------


def numbers_of(analysis: Analysis, group: Group, sums: Mapping[str, FloatArray], samples: int) -> Numbers:
    produce, consume = head_rows(analysis, group) if group.role == "head" else own_rows(analysis, group)
    return Numbers(group.role, group.blocks, group.size, produce, consume, sums, samples)


def own_rows(analysis: Analysis, group: Group) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """weight name -> [blocks * size, fan] for what makes the units, and for what reads them."""
    produce: dict[str, FloatArray] = {}
    consume: dict[str, FloatArray] = {}
    for site in group.sites:
        if site.kind in ("produce", "consume"):
            target = produce if site.kind == "produce" else consume
            for k, rows in enumerate(unit_rows(analysis, site.tensor, site.axis, np.asarray(site.units), group)):
                target[site.tensor if not k else f"{site.tensor}#{k}"] = rows
    return produce, consume


def unit_rows(
    analysis: Analysis, tensor: str, axis: int, units: np.ndarray[tuple[int], np.dtype[np.int64]], group: Group
) -> list[FloatArray]:
    """[units, fan] arrays. A packed weight holds a unit several times (its Q and its K column): one array each."""
    value = analysis.traced.model.graph.initializers[tensor].const_value
    assert value is not None
    rows = np.moveaxis(value.numpy(), axis, 0)
    rows = rows.reshape(len(rows), -1)
    count = group.blocks * group.size
    place = np.flatnonzero(units >= 0)
    place = place[np.argsort(units[place], kind="stable")]
    owner = units[place]
    turn = np.arange(len(owner)) - np.searchsorted(owner, owner)  # the how-many-eth row of its unit
    found = []
    for k in range(int(turn.max(initial=-1)) + 1):
        picked = np.zeros((count, rows.shape[1]))
        picked[owner[turn == k]] = rows[place[turn == k]]
        found.append(picked)
    return found


def head_rows(analysis: Analysis, group: Group) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """The rows of a head's Q/K and V units, flattened per head; keys are prefixed "qk:" or "vo:"."""
    produce: dict[str, FloatArray] = {}
    consume: dict[str, FloatArray] = {}
    for child in analysis.groups:
        heads = blocks_to_heads(group, child) if child.role in ("qk", "vo") else None
        if heads is None:
            continue
        makes, reads = own_rows(analysis, child)
        for rows, target in ((makes, produce), (reads, consume)):
            for name, array in rows.items():
                flat = array.reshape(child.blocks, -1)
                ordered = np.zeros((group.size, flat.shape[1]))
                ordered[heads] = flat
                target[f"{child.role}:{name}"] = ordered
    return produce, consume


def blocks_to_heads(group: Group, child: Group) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
    """For each block of ``child`` the head that covers it; None where it is not this group's child."""
    mine = {(s.tensor, s.axis): s.units for s in group.sites}
    heads = np.full(child.blocks, -1, np.int64)
    for site in child.sites:
        units = mine.get((site.tensor, site.axis))
        if units is not None:
            both = (site.units >= 0) & (units >= 0)
            heads[site.units[both] // child.size] = units[both]
    return heads if (heads >= 0).all() else None
