"""Allocation paths: the steps that narrow groups, in the order in which a greedy allocation takes them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np

from snpc.planning.config import Budget
from snpc.planning.tied_widths import common_widths, tied_sets
from snpc.types import FloatArray, Group

WidthStep = tuple[str, int]  # group id, its width after the step


@dataclass(frozen=True)
class AllocationPath:
    """``steps[k]``: the groups that step k narrows; several at once where they are tied, or the budget is uniform."""

    groups: tuple[Group, ...]
    steps: tuple[tuple[WidthStep, ...], ...] = field(repr=False)

    def widths_after(self, count: int) -> dict[str, int]:
        """Every group's width after ``count`` steps."""
        return {g.id: g.size for g in self.groups} | {
            name: width for step in self.steps[:count] for name, width in step
        }

    def cumulative(self, curves: Mapping[str, FloatArray]) -> FloatArray:
        """[steps + 1]: the sum over groups of ``curves`` (group id -> [size + 1], by width) after each step."""
        widths = self.widths_after(0)
        totals = [sum(float(curves[name][width]) for name, width in widths.items())]
        for step in self.steps:
            change = sum(float(curves[name][width] - curves[name][widths[name]]) for name, width in step)
            widths.update(step)
            totals.append(totals[-1] + change)
        return np.array(totals)


def greedy_path(
    groups: Sequence[Group],
    costs: Mapping[str, FloatArray],
    unit_savings: Mapping[str, float],
    budget: Budget,
) -> AllocationPath:
    """The smallest loss per saving first; with ``budget.uniform`` the same fraction of every group.

    ``costs``: group id -> [size], the loss of removing one unit of every block, in the order of removal.
    ``unit_savings``: group id -> what removing that unit saves.
    """
    if budget.uniform:
        return AllocationPath(tuple(groups), uniform_steps(groups, budget))
    steps_by_set = [
        [
            (cost / max(savings_per_unit(members, unit_savings), 1e-300), members[0].id, members, widths)
            for cost, widths in convex_hull_steps(members, costs, budget)
        ]
        for members in tied_sets(groups)
    ]
    order = heapq.merge(*steps_by_set, key=lambda step: step[:2])
    return AllocationPath(
        tuple(groups),
        tuple(tuple((g.id, w) for g, w in zip(members, widths, strict=True)) for _, _, members, widths in order),
    )


def savings_per_unit(members: Sequence[Group], unit_savings: Mapping[str, float]) -> float:
    """What a tied set saves when its first group loses a unit, and the others as many channels."""
    return sum(unit_savings[g.id] * members[0].channels / g.channels for g in members)


def uniform_steps(groups: Sequence[Group], budget: Budget) -> tuple[tuple[WidthStep, ...], ...]:
    """A group takes a width when the share to keep is nearer to it than to the next wider one."""
    thresholds: list[tuple[float, str, int]] = []
    for members in tied_sets(groups):
        for wider, narrower in pairwise(common_widths(members, budget)):
            threshold = (wider[0] + narrower[0]) / 2 / members[0].size
            thresholds += [(threshold, g.id, w) for g, w in zip(members, narrower, strict=True)]
    thresholds.sort(key=lambda step: -step[0])
    return tuple(
        tuple(step[1:] for step in equal) for _, equal in groupby(thresholds, key=lambda step: round(step[0], 9))
    )


def convex_hull_steps(
    members: Sequence[Group], costs: Mapping[str, FloatArray], budget: Budget
) -> list[tuple[float, tuple[int, ...]]]:
    """(loss per unit of the first group, width of each group) of each step of a tied set, on the lower convex hull of
    the loss over the width.

    An expensive step that cheap ones follow is averaged with them, since they cannot be taken before it.
    """
    options = common_widths(members, budget)
    widths = np.array([option[0] for option in options])
    losses = np.zeros(len(options))
    for k, group in enumerate(members):
        loss = np.concatenate([[0.0], np.cumsum(costs[group.id])])
        losses += loss[group.size - np.array([option[k] for option in options])]
    steps: list[tuple[float, tuple[int, ...]]] = []
    vertex = 0
    while vertex < len(widths) - 1:
        rest = np.arange(vertex + 1, len(widths))
        slopes = (losses[rest] - losses[vertex]) / (widths[vertex] - widths[rest])
        following = int(rest[len(rest) - 1 - np.argmin(slopes[::-1])])
        slope = float(slopes[following - vertex - 1])
        steps += [(slope, option) for option in options[vertex + 1 : following + 1]]
        vertex = following
    return steps


def widths_within(path: AllocationPath, savings: Callable[[str, int, int], float], limit: float) -> dict[str, int]:
    """Widths after the steps whose savings fit within ``limit``. A step that does not fit is the last of its group.

    ``savings(group id, width before, width after)``: what a step saves.
    """
    widths = path.widths_after(0)
    saved, finished = 0.0, set[str]()
    for step in path.steps:
        if saved >= limit * (1 - 1e-12):
            break
        if any(name in finished for name, _ in step):
            continue
        saving = sum(savings(name, widths[name], width) for name, width in step)
        if saved + saving > limit + 1e-9:
            finished |= {name for name, _ in step}
            continue
        widths.update(step)
        saved += saving
    return widths
