"""Curves through a few noisy measurements: how much more the outputs mind a group's width than its closed form says.

That factor, as a logarithm, is a parabola over the width. Groups of a role have much of it in common, so each group's
is drawn towards that of its role, and what the samples that were measured on do to all groups is taken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.types import FloatArray, Group, IntArray

GROUP_RIDGE = (
    0.3  # ridge on what a group's parabola has beyond its role's; chosen on ViT-Tiny, see docs/design-notes.md
)
COMMON_RIDGE = 1e-2  # ridge on what is common to many measurements: it only says which of equal solutions
MAX_LOG_RESIDUAL = 0.7  # as a logarithm: half as much again is noise, twice as much is shape


@dataclass(frozen=True)
class OutputChange:
    """Relative squared change of the outputs, with ``group`` at ``width``, on the samples of a pool."""

    group: Group
    width: int
    pool: int
    value: float


def fit_curves(shapes: Mapping[str, FloatArray], found: Sequence[OutputChange]) -> dict[str, FloatArray]:
    """Group id -> [size + 1]: each shape scaled to what was measured. Where the parabola misses a point by more than
    ``MAX_LOG_RESIDUAL``, the line goes through all of them instead, straight in between."""
    points: dict[str, list[OutputChange]] = {name: [] for name in shapes}
    for change in found:
        points[change.group.id].append(change)
    smooth = [name for name, mine in points.items() if mine and all(c.value > 0 for c in mine)]
    for _ in range(2):  # the second time without those that no parabola fits, which would bend the others
        common = SharedParabolas.of([c for name in smooth for c in points[name]], shapes)
        smooth = [name for name in smooth if common.max_residual(points[name], shapes[name]) <= MAX_LOG_RESIDUAL]
    curves = {}
    for name, mine in points.items():
        line = common.parabola(mine) if name in smooth else common.interpolate(mine, shapes[name])
        scaled = shapes[name] * np.exp(line)
        curves[name] = np.maximum.accumulate(scaled[::-1])[::-1]
    return curves


@dataclass(frozen=True)
class SharedParabolas:
    """``parabolas``: group id -> its three coefficients over ``normalized_width``; ``effects`` [pools], as
    logarithms."""

    parabolas: Mapping[str, FloatArray]
    pool_effects: FloatArray

    @classmethod
    def of(cls, found: Sequence[OutputChange], shapes: Mapping[str, FloatArray]) -> SharedParabolas:
        """Ridge least squares over all measurements at once."""
        names, roles = number_keys(c.group.id for c in found), number_keys(c.group.role for c in found)
        pools = 1 + max((c.pool for c in found), default=0)
        values = np.array([log_ratio(shapes[c.group.id], c) for c in found])
        at = np.array([normalized_width(c.group, np.array(c.width)) for c in found]).reshape(-1, 1)
        group = one_hot_rows([names[c.group.id] for c in found], len(names))
        role = one_hot_rows([roles[c.group.role] for c in found], len(roles))
        pool = one_hot_rows([c.pool for c in found], pools)
        system = np.concatenate([group, group * at, group * at**2, role * at, role * at**2, pool], axis=1)
        ridge = np.repeat([1e-6, GROUP_RIDGE, COMMON_RIDGE], [len(names), 2 * len(names), 2 * len(roles) + pools])
        solved = np.linalg.solve(system.T @ system + np.diag(ridge), system.T @ values)
        own = solved[: 3 * len(names)].reshape(3, -1)
        shared = solved[3 * len(names) : -pools].reshape(2, -1)
        parabolas = {}
        for change in found:
            name = change.group.id
            bend = np.concatenate([[0.0], shared[:, roles[change.group.role]]])
            parabolas[name] = own[:, names[name]] + bend
        return cls(parabolas, solved[-pools:])

    def parabola(self, mine: Sequence[OutputChange]) -> FloatArray:
        """[size + 1]: the group's parabola, level beyond the widths that were measured."""
        group, widths = mine[0].group, [c.width for c in mine]
        at = normalized_width(group, np.clip(np.arange(group.size + 1), min(widths), max(widths)))
        return np.asarray(np.stack([at**0, at, at**2], axis=1) @ self.parabolas[group.id])

    def max_residual(self, mine: Sequence[OutputChange], shape: FloatArray) -> float:
        line = self.parabola(mine)
        return max(abs(float(line[c.width]) - self.adjusted_log_ratio(c, shape)) for c in mine)

    def adjusted_log_ratio(self, change: OutputChange, shape: FloatArray) -> float:
        """What was measured, less what its samples do to all groups."""
        return log_ratio(shape, change) - float(
            self.pool_effects[change.pool] if change.pool < len(self.pool_effects) else 0.0
        )

    def interpolate(self, mine: Sequence[OutputChange], shape: FloatArray) -> FloatArray:
        """[size + 1]: a line through every point."""
        if not mine:
            return np.zeros(len(shape))
        points = sorted((c.width, self.adjusted_log_ratio(c, shape)) for c in mine)
        widths, values = np.array(points).T
        return np.asarray(np.interp(np.arange(len(shape)), widths, values))


def normalized_width(group: Group, width: IntArray) -> FloatArray:
    """Of a width, between -1 (nothing kept) and 1 (everything)."""
    return np.asarray(2 * width / group.size - 1)


def log_ratio(shape: FloatArray, change: OutputChange) -> float:
    """How much more was measured than the shape says, as a logarithm."""
    floor = 1e-12 * max(float(shape[0]), 1e-300)
    return float(np.log(max(change.value / max(float(shape[change.width]), floor), 1e-300)))


def number_keys(keys: Iterable[str]) -> dict[str, int]:
    return {key: k for k, key in enumerate(dict.fromkeys(keys))}


def one_hot_rows(index: Sequence[int], count: int) -> FloatArray:
    """[len(index), count]: a one in each row."""
    return np.eye(count)[np.array(index, np.int64)]
