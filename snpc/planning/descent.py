"""How widths come down: every step that a budget allows, in the order in which they are taken."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np

from snpc.planning.config import Budget, allowed_widths
from snpc.types import FloatArray, Group

WidthStep = tuple[str, int]  # group id, the width that it comes down to


@dataclass(frozen=True)
class AllocationPath:
    """``steps[k]``: what the k-th step narrows, several groups at once where a budget is uniform."""

    groups: tuple[Group, ...]
    steps: tuple[tuple[WidthStep, ...], ...] = field(repr=False)

    def widths_after(self, count: int) -> dict[str, int]:
        """Every group's width after ``count`` steps."""
        return {g.id: g.size for g in self.groups} | {
            name: width for step in self.steps[:count] for name, width in step
        }

    def cumulative(self, curves: Mapping[str, FloatArray]) -> FloatArray:
        """[steps + 1]: the sum over groups of ``curves`` (group id -> [size + 1], by width) after so many steps."""
        widths = self.widths_after(0)
        found = [sum(float(curves[name][width]) for name, width in widths.items())]
        for step in self.steps:
            change = sum(float(curves[name][width] - curves[name][widths[name]]) for name, width in step)
            widths.update(step)
            found.append(found[-1] + change)
        return np.array(found)


def greedy_path(
    groups: Sequence[Group],
    costs: Mapping[str, FloatArray],
    prices: Mapping[str, float],
    budget: Budget,
) -> AllocationPath:
    """The least loss per price first; with ``budget.uniform`` the same share of every group.

    ``costs``: group id -> [size], what removing one unit of every block loses, in the order in which they go;
    ``prices``: what that unit is worth.
    """
    if budget.uniform:
        return AllocationPath(tuple(groups), uniform_steps(groups, budget))
    ladders = [
        [(cost / max(prices[g.id], 1e-300), g.id, width) for cost, width in convex_hull_steps(g, costs[g.id], budget)]
        for g in groups
    ]
    order = heapq.merge(*ladders, key=lambda rung: rung[:2])
    return AllocationPath(tuple(groups), tuple(((name, width),) for _, name, width in order))


def uniform_steps(groups: Sequence[Group], budget: Budget) -> tuple[tuple[WidthStep, ...], ...]:
    """A group takes a width when the share to keep comes nearer to it than to the width above."""
    found = []
    for group in groups:
        widths = allowed_widths(group, budget)
        found += [((a + b) / 2 / group.size, group.id, b) for a, b in pairwise(widths)]
    found.sort(key=lambda step: -step[0])
    return tuple(tuple(step[1:] for step in alike) for _, alike in groupby(found, key=lambda step: round(step[0], 9)))


def convex_hull_steps(group: Group, ordered: FloatArray, budget: Budget) -> list[tuple[float, int]]:
    """(cost per unit, width) of each step down, on the lower convex hull of the loss: a dear step with cheap ones
    behind it is averaged with them, since they cannot be taken before it."""
    widths = np.array(allowed_widths(group, budget))
    loss = np.concatenate([[0.0], np.cumsum(ordered)])
    gone = loss[group.size - widths]
    rungs: list[tuple[float, int]] = []
    here = 0
    while here < len(widths) - 1:
        rest = np.arange(here + 1, len(widths))
        slopes = (gone[rest] - gone[here]) / (widths[here] - widths[rest])
        there = int(rest[len(rest) - 1 - np.argmin(slopes[::-1])])
        rungs += [(float(slopes[there - here - 1]), int(width)) for width in widths[here + 1 : there + 1]]
        here = there
    return rungs


def widths_within(found: AllocationPath, gains: Callable[[str, int, int], float], budget: float) -> dict[str, int]:
    """Widths after the steps that fit into ``budget``: one that does not ends its group's way down.

    ``gains(group id, width before, width after)``: what a step is worth.
    """
    widths = found.widths_after(0)
    removed, closed = 0.0, set()
    for name, width in (one for step in found.steps for one in step):
        if removed >= budget * (1 - 1e-12):
            break
        if name in closed:
            continue
        worth = gains(name, widths[name], width)
        if removed + worth > budget + 1e-9:
            closed.add(name)
            continue
        widths[name] = width
        removed += worth
    return widths
