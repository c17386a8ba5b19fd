"""Savings: how many MACs, parameters, bytes or ms go with units. What several groups cut at once is counted once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from snpc.passes import Analysis
from snpc.planning.config import ResourceTarget
from snpc.planning.descent import AllocationPath
from snpc.planning.plan import UnitScores
from snpc.types import FloatArray, Group, SharedProduct


def savings_by_width(scores: UnitScores, group: Group, target: ResourceTarget) -> FloatArray:
    """[size + 1]: what the group saves where no other is cut, by units per block that are kept."""
    if target.kind == "latency":
        assert scores.latency is not None
        return scores.latency.saved[group.id]
    removed: FloatArray = 1 - np.arange(group.size + 1) / group.size
    return resource_use(scores.analysis, group, target) * removed


def resource_use(analysis: Analysis, group: Group, target: ResourceTarget) -> float:
    """MACs, parameters or weight bytes that the group accounts for."""
    if target.kind == "macs":
        return float(group.macs)
    if target.kind == "params":
        return float(group.params)
    return group.params * bytes_per_parameter(analysis, group.sites[0].tensor)


def bytes_per_parameter(analysis: Analysis, tensor: str) -> float:
    weight = analysis.traced_graph.model.graph.initializers[tensor].const_value
    assert weight is not None
    return float(weight.nbytes / weight.size)


def saved_at(widths: Mapping[str, int], scores: UnitScores, groups: Sequence[Group], target: ResourceTarget) -> float:
    """What all ``groups`` save at these widths, by group id."""
    alone = sum(float(savings_by_width(scores, g, target)[widths[g.id]]) for g in groups)
    gone = {g.id: 1 - widths[g.id] / g.size for g in groups}
    shared = products_of_several(scores.analysis, groups, target)
    return alone - sum(weight * product.counted_twice(gone) for product, weight in shared)


def saved_along(path: AllocationPath, scores: UnitScores, target: ResourceTarget) -> FloatArray:
    """[steps + 1]: what is saved after each step of the path."""
    alone = path.cumulative({g.id: savings_by_width(scores, g, target) for g in path.groups})
    by_group: dict[str, list[int]] = defaultdict(list)
    shared = products_of_several(scores.analysis, path.groups, target)
    for number, (product, _) in enumerate(shared):
        for group_id in product.counted:
            by_group[group_id].append(number)
    sizes, gone = {g.id: g.size for g in path.groups}, {g.id: 0.0 for g in path.groups}
    twice, changes = [0.0] * len(shared), [0.0]
    for step in path.steps:
        gone |= {name: 1 - width / sizes[name] for name, width in step}
        change = 0.0
        for number in {number for name, _ in step for number in by_group[name]}:
            product, weight = shared[number]
            now = weight * product.counted_twice(gone)
            change, twice[number] = change + now - twice[number], now
        changes.append(change)
    saved: FloatArray = alone - np.array(list(accumulate(changes)))
    return saved


def products_of_several(
    analysis: Analysis, groups: Sequence[Group], target: ResourceTarget
) -> list[tuple[SharedProduct, float]]:
    """The products of which these groups cut more than one axis, and what one of its MACs or parameters weighs. Times
    are measured of a group alone, and none is known to be counted twice."""
    kind = "macs" if target.kind == "macs" else "params"
    names = {g.id for g in groups}
    return [
        (product, bytes_per_parameter(analysis, product.tensor) if target.kind == "bytes" else 1.0)
        for product in (analysis.shared_products if target.kind != "latency" else ())
        if product.kind == kind and sum(not names.isdisjoint(axis) for axis in product.axes) > 1
    ]
