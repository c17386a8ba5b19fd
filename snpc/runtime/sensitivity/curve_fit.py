"""Fits loss curves to a few noisy trials: the closed-form loss times a factor that varies with the width.

The logarithm of the factor is a parabola over the width. Groups of one role resemble each other, so each group's
parabola is pulled towards that of its role (ridge regression). The effect that a pool of samples has on all groups is
estimated along with them and removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.errors import UserError
from snpc.types import FloatArray, Group, IntArray

# ridge on the difference between a group's parabola and its role's; chosen on ViT-Tiny, see docs/design-notes.md
GROUP_RIDGE = 0.3
COMMON_RIDGE = 1e-2  # ridge on what many trials determine together: it only makes the solution unique
LEVEL_RIDGE = 1e-6  # ridge on the level of a group's curve, which its own trials determine
UNUSABLE_CHANGE = 1e6  # of an output that is not finite any more; 1 is that of an output of zeros
MAX_LOG_RESIDUAL = 0.7  # a factor of 1.5 between trial and parabola is noise, a factor of 2 is shape


@dataclass(frozen=True)
class OutputChange:
    """One trial: the change of the outputs with ``group`` at ``width``, on the samples of ``pool``: like a squared
    error, and infinite where an output is infinite or NaN."""

    group: Group
    width: int
    pool: int
    value: float


def fit_curves(priors: Mapping[str, FloatArray], changes: Sequence[OutputChange]) -> dict[str, FloatArray]:
    """Group id -> [size + 1]: its prior curve scaled to the trials. Where a trial is more than ``MAX_LOG_RESIDUAL``
    from the parabola, the logarithm of the factor is interpolated linearly between all trials instead. From an infinite
    change on, the curve is at ``UNUSABLE_CHANGE``. Raises UserError for a curve that holds no numbers."""
    trials: dict[str, list[OutputChange]] = {group_id: [] for group_id in priors}
    widest_unusable: dict[str, int] = {}
    for change in changes:
        if math.isfinite(change.value):
            trials[change.group.id].append(change)
        else:
            widest_unusable[change.group.id] = max(change.width, widest_unusable.get(change.group.id, 0))
    smooth = [group_id for group_id, own in trials.items() if own and all(change.value > 0 for change in own)]
    for _ in range(2):  # the second time without the groups that no parabola fits, which would distort the others
        fit = SharedParabolas.of([change for group_id in smooth for change in trials[group_id]], priors)
        smooth = [g for g in smooth if fit.max_residual(trials[g], priors[g]) <= MAX_LOG_RESIDUAL]
    curves = {}
    for group_id, own in trials.items():
        log_factor = fit.parabola(own) if group_id in smooth else fit.interpolate(own, priors[group_id])
        scaled = priors[group_id] * np.exp(log_factor)
        scaled[: widest_unusable.get(group_id, -1) + 1] = UNUSABLE_CHANGE
        curves[group_id] = np.maximum.accumulate(scaled[::-1])[::-1]
        if not np.isfinite(scaled).all():
            raise UserError(
                f"{group_id}: its loss curve holds NaN or infinity: is there any in the weights or the data?"
            )
    return curves


@dataclass(frozen=True)
class SharedParabolas:
    """``parabolas``: group id -> its three coefficients over ``normalized_width``. ``pool_effects`` [pools]: logarithms
    of the factors that a pool of samples applies to all groups."""

    parabolas: Mapping[str, FloatArray]
    pool_effects: FloatArray

    @classmethod
    def of(cls, changes: Sequence[OutputChange], priors: Mapping[str, FloatArray]) -> SharedParabolas:
        """Ridge least squares over all trials at once."""
        groups, roles = number_keys(c.group.id for c in changes), number_keys(c.group.role for c in changes)
        pools = 1 + max((c.pool for c in changes), default=0)
        targets = np.array([log_ratio(priors[c.group.id], c) for c in changes])
        width = np.array([normalized_width(c.group, np.array(c.width)) for c in changes]).reshape(-1, 1)
        group = one_hot_rows([groups[c.group.id] for c in changes], len(groups))
        role = one_hot_rows([roles[c.group.role] for c in changes], len(roles))
        pool = one_hot_rows([c.pool for c in changes], pools)
        system = np.concatenate([group, group * width, group * width**2, role * width, role * width**2, pool], axis=1)
        ridge = np.repeat(
            [LEVEL_RIDGE, GROUP_RIDGE, COMMON_RIDGE], [len(groups), 2 * len(groups), 2 * len(roles) + pools]
        )
        solution = np.linalg.solve(system.T @ system + np.diag(ridge), system.T @ targets)
        of_groups = solution[: 3 * len(groups)].reshape(3, -1)
        of_roles = solution[3 * len(groups) : -pools].reshape(2, -1)
        parabolas = {}
        for change in changes:
            shared = np.concatenate([[0.0], of_roles[:, roles[change.group.role]]])
            parabolas[change.group.id] = of_groups[:, groups[change.group.id]] + shared
        return cls(parabolas, solution[-pools:])

    def parabola(self, changes: Sequence[OutputChange]) -> FloatArray:
        """[size + 1]: the parabola of the group of these trials, constant outside the widths that were tried."""
        group, widths = changes[0].group, [change.width for change in changes]
        at = normalized_width(group, np.clip(np.arange(group.size + 1), min(widths), max(widths)))
        return np.asarray(np.stack([at**0, at, at**2], axis=1) @ self.parabolas[group.id])

    def max_residual(self, changes: Sequence[OutputChange], prior: FloatArray) -> float:
        """The largest distance between one group's trials and its parabola, as a logarithm."""
        parabola = self.parabola(changes)
        return max(abs(float(parabola[c.width]) - self.adjusted_log_ratio(c, prior)) for c in changes)

    def adjusted_log_ratio(self, change: OutputChange, prior: FloatArray) -> float:
        """``log_ratio`` without the effect of the pool."""
        effect = float(self.pool_effects[change.pool]) if change.pool < len(self.pool_effects) else 0.0
        return log_ratio(prior, change) - effect

    def interpolate(self, changes: Sequence[OutputChange], prior: FloatArray) -> FloatArray:
        """[size + 1]: straight lines between one group's trials."""
        if not changes:
            return np.zeros(len(prior))
        points = sorted((change.width, self.adjusted_log_ratio(change, prior)) for change in changes)
        widths, values = np.array(points).T
        return np.asarray(np.interp(np.arange(len(prior)), widths, values))


def normalized_width(group: Group, width: IntArray) -> FloatArray:
    """A width between -1 (nothing kept) and 1 (everything)."""
    return np.asarray(2 * width / group.size - 1)


def log_ratio(prior: FloatArray, change: OutputChange) -> float:
    """Logarithm of the measured change over the prior's."""
    floor = 1e-12 * max(float(prior[0]), 1e-300)
    return float(np.log(max(change.value / max(float(prior[change.width]), floor), 1e-300)))


def number_keys(keys: Iterable[str]) -> dict[str, int]:
    """Each key numbered in the order of its first occurrence."""
    return {key: k for k, key in enumerate(dict.fromkeys(keys))}


def one_hot_rows(index: Sequence[int], count: int) -> FloatArray:
    """[len(index), count]: a one in each row."""
    return np.eye(count)[np.array(index, np.int64)]
