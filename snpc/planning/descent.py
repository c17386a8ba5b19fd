"""Allocation paths: the steps that narrow groups, in the order in which a greedy allocation takes them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np

from snpc.planning.config import Budget, allowed_widths
from snpc.types import FloatArray, Group

WidthStep = tuple[str, int]  # group id, its width after the step


@dataclass(frozen=True)
class AllocationPath:
    """``steps[k]``: the groups that step k narrows; several at once where the budget is uniform."""

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
    steps_by_group = [
        [
            (cost / max(unit_savings[g.id], 1e-300), g.id, width)
            for cost, width in convex_hull_steps(g, costs[g.id], budget)
        ]
        for g in groups
    ]
    order = heapq.merge(*steps_by_group, key=lambda step: step[:2])
    return AllocationPath(tuple(groups), tuple(((name, width),) for _, name, width in order))


def uniform_steps(groups: Sequence[Group], budget: Budget) -> tuple[tuple[WidthStep, ...], ...]:
    """A group takes a width when the share to keep is nearer to it than to the next wider one."""
    thresholds: list[tuple[float, str, int]] = []
    for group in groups:
        widths = allowed_widths(group, budget)
        thresholds += [((a + b) / 2 / group.size, group.id, b) for a, b in pairwise(widths)]
    thresholds.sort(key=lambda step: -step[0])
    return tuple(
        tuple(step[1:] for step in equal) for _, equal in groupby(thresholds, key=lambda step: round(step[0], 9))
    )


def convex_hull_steps(group: Group, costs: FloatArray, budget: Budget) -> list[tuple[float, int]]:
    """(loss per unit, width) of each step, on the lower convex hull of the loss over the width.

    An expensive step that cheap ones follow is averaged with them, since they cannot be taken before it.
    """
    widths = np.array(allowed_widths(group, budget))
    loss = np.concatenate([[0.0], np.cumsum(costs)])
    losses = loss[group.size - widths]
    steps: list[tuple[float, int]] = []
    vertex = 0
    while vertex < len(widths) - 1:
        rest = np.arange(vertex + 1, len(widths))
        slopes = (losses[rest] - losses[vertex]) / (widths[vertex] - widths[rest])
        following = int(rest[len(rest) - 1 - np.argmin(slopes[::-1])])
        steps += [(float(slopes[following - vertex - 1]), int(width)) for width in widths[vertex + 1 : following + 1]]
        vertex = following
    return steps


def widths_within(path: AllocationPath, savings: Callable[[str, int, int], float], limit: float) -> dict[str, int]:
    """Widths after the steps whose savings fit within ``limit``. A step that does not fit is the last of its group.

    ``savings(group id, width before, width after)``: what a step saves.
    """
    widths = path.widths_after(0)
    saved, finished = 0.0, set()
    for name, width in (narrowed for step in path.steps for narrowed in step):
        if saved >= limit * (1 - 1e-12):
            break
        if name in finished:
            continue
        saving = savings(name, widths[name], width)
        if saved + saving > limit + 1e-9:
            finished.add(name)
            continue
        widths[name] = width
        saved += saving
    return widths
