"""The ridge of a regression, chosen by two halves of the calibration samples.

A regression that is fitted to one half of the samples is judged on the other, and the other way round. Moments of the
halves are sums, so no pass over the data is needed. Rows of one sample are alike and samples are not, which is why a
rule by the number of rows (``relative_ridge``) cannot know how well a fit carries over to other samples. The same
comparison finds out where a regression is worth nothing: then the mean of the targets is as good a prediction
(``math.inf``, mean fill).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from snpc.runtime.closed_form.dense_algebra import current_algebra
from snpc.types import FloatArray, IntArray

RIDGES = tuple(10.0**power for power in range(-4, 3))
"""Shares of the mean diagonal that are tried; between the best and its neighbors a parabola is followed. Where the last
is best, what it leaves of the coefficients is noise: mean fill."""

START = 0.1  # where the search begins
HALF_TO_WHOLE = 0.4  # twice the rows ask for half the ridge, and a little less: measured, docs/rows-and-ridge.md
BOTH_WAYS = 1024  # regressors up to which either half judges the other: beyond, one way costs enough and says the same
REFIT_SHARE = 1 / 3  # of the ridge with the least squared error: see ``choose_refit_ridge``
SINGLE: np.dtype[Any] = np.dtype(np.float32)
PROBES = 64  # random combinations of the targets that stand for all of them


@dataclass(frozen=True)
class Regression:
    """The normal equations of targets on k regressors over some rows, both about the mean of all rows.

    ``moment`` [k, k]: sum of x x'. ``cross`` [k, D]: sum of x y'. Those over parts of the rows add up.
    """

    moment: FloatArray
    cross: FloatArray

    def __add__(self, other: Regression) -> Regression:
        return Regression(self.moment + other.moment, self.cross + other.cross)

    def __sub__(self, other: Regression) -> Regression:
        return Regression(self.moment - other.moment, self.cross - other.cross)

    def solve(self, ridge: float, overwrite: bool = False) -> FloatArray:
        """[k, D]: ridge least squares; ``ridge`` is a share of the mean diagonal, nil coefficients are for infinity.
        With ``overwrite`` the moment is destroyed, which saves a copy. Raises LinAlgError where the moment with its
        ridge is not positive definite."""
        if math.isinf(ridge) or not len(self.moment):
            return np.zeros(self.cross.shape)
        matrix = self.moment if overwrite else self.moment.copy()
        matrix.flat[:: len(matrix) + 1] += ridge * self.mean_diagonal + 1e-12
        return current_algebra().solve_positive_definite(matrix, self.cross, overwrite=True)

    def for_search(self) -> Regression:
        """What a search of the ridge needs of it: half of the memory, and few targets (``combine_targets``)."""
        targets = combine_targets(self.cross)
        return Regression(*(part.astype(SINGLE, copy=False) for part in (self.moment, targets)))

    @property
    def mean_diagonal(self) -> float:
        return float(np.trace(self.moment, dtype=np.float64)) / max(len(self.moment), 1)

    def excess_error(self, coefficients: FloatArray) -> float:
        """The squared error of a prediction by these coefficients, less that of the mean."""
        return float(np.vdot(coefficients, self.moment @ coefficients - 2 * self.cross))


@dataclass(frozen=True)
class RidgeChoice:
    """``ridge``: the share of the mean diagonal of the moment over all rows, infinite where the mean predicts as well.

    ``excess`` (ridge on one half -> error on the other half less that of the mean, for each ridge that was tried).
    """

    ridge: float
    excess: dict[float, float]

    @property
    def beats_mean(self) -> bool:
        """Does a regression predict other samples better than the mean of the targets?"""
        return not math.isinf(self.ridge)


def refit_regression(moment: FloatArray, weight: FloatArray, keep: IntArray) -> Regression:
    """The regression of what the removed units contribute to the output on the kept columns: its coefficients are added
    to the kept rows of ``weight``.

    ``moment`` [n, n]: the second moment of the centered columns. ``weight`` [n, D]. ``keep``: indices of kept columns.
    """
    removed = np.setdiff1d(np.arange(len(moment)), keep)
    cross = moment[np.ix_(keep, removed)] @ weight[removed]  # first: its columns are another large copy
    return Regression(moment[np.ix_(keep, keep)], cross)


def choose_refit_ridge(moment: FloatArray, odd: FloatArray, weight: FloatArray, keep: IntArray) -> RidgeChoice:
    """As ``choose_ridge``, for ``refit_regression``; ``odd``: the part of ``moment`` of one half of the samples.

    The ridge is ``REFIT_SHARE`` of what has the least squared error, which is flat there: what a ridge takes away is
    the same for all rows and all layers, and the outputs of the model feel it more than they feel noise.
    """
    targets = combine_targets(weight)
    half, rest = refit_regression(odd, targets, keep), refit_regression(moment, targets, keep)
    for of_rest, of_half in ((rest.moment, half.moment), (rest.cross, half.cross)):
        of_rest -= of_half  # in place: each is as large as all else together
    halves = rest.for_search(), half.for_search()
    del half, rest
    choice = choose_ridge(halves)
    return replace(choice, ridge=choice.ridge * REFIT_SHARE)


def choose_ridge(halves: Sequence[Regression], ridges: Sequence[float] = RIDGES, start: float = START) -> RidgeChoice:
    """The ridge whose fit on either half has the least error on the other.

    The search walks down the error from ``start``, one of the ascending ``ridges``, which are a decade apart. It takes
    one Cholesky factor in float32 per ridge and half, three or four ridges in all; an eigendecomposition takes as long
    as forty. Up to ``PROBES`` random combinations of the targets stand for all of them, the same for every ridge. With
    more than ``BOTH_WAYS`` regressors, only the first half is fitted, and the second judges.
    """
    first, second = (half.for_search() for half in halves)

    both = len(first.moment) <= BOTH_WAYS

    @cache
    def excess(index: int) -> float:
        try:
            error = second.excess_error(first.solve(ridges[index]))
            return error + (first.excess_error(second.solve(ridges[index])) if both else 0.0)
        except np.linalg.LinAlgError:
            return math.inf  # fewer rows than regressors, and a ridge below rounding

    best = walk_downhill(excess, len(ridges), ridges.index(start))
    if excess(best) >= 0 or best == len(ridges) - 1:
        return RidgeChoice(math.inf, {ridges[best]: excess(best)})
    tried = {ridges[k]: excess(k) for k in range(max(best - 1, 0), min(best + 2, len(ridges)))}
    return RidgeChoice(snap(parabola_minimum(tried, ridges[best]) * HALF_TO_WHOLE), tried)


def snap(ridge: float) -> float:
    """The nearest eighth of a decade: moments that differ by rounding, as those of other workers do, choose alike."""
    return float(10.0 ** (round(8 * math.log10(ridge)) / 8))


def combine_targets(cross: FloatArray) -> FloatArray:
    """[k, at most PROBES]: random combinations of the columns, whose squares add up to those of all on average."""
    width = cross.shape[1]
    if width <= PROBES:
        return cross
    mixing = np.random.default_rng(0).standard_normal((width, PROBES)) / math.sqrt(PROBES)
    return np.asarray(cross @ mixing)


def walk_downhill(error: Callable[[int], float], count: int, start: int) -> int:
    """The index of a local minimum among ``count``, from ``start`` on."""
    here = start
    for step in (1, -1):
        while 0 <= here + step < count and error(here + step) < error(here):
            here += step
        if here != start:
            break
    return here


def parabola_minimum(errors: Mapping[float, float], best: float) -> float:
    """The ridge at the minimum of the parabola through three errors over the logarithm of the ridge; ``best`` where it
    is at an end, or where a neighbor has no finite error."""
    if len(errors) < 3 or not all(map(math.isfinite, errors.values())):
        return best
    (low, _, _), (before, here, after) = errors, errors.values()
    curvature = before + after - 2 * here
    shift = (before - after) / (2 * curvature) if curvature > 0 else 0.0
    return best * math.exp(shift * math.log(best / low))
