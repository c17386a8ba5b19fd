"""The order in which units are removed: structured optimal brain surgeon (OBS), and greedy selection by score loss.

OBS removes, again and again, the unit whose removal costs least after all others are refitted (ZipLM,
arXiv 2302.04089). One pass gives the order of the units and the loss of every width, and one factorization in this
order (``factorization.py``) the refitted weights of every width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from snpc.runtime.closed_form.algebra import DEFAULT_RIDGE, absolute_ridge, unit_columns
from snpc.runtime.closed_form.dense_algebra import NUMPY_ALGEBRA, current_algebra
from snpc.runtime.closed_form.factorization import OrderedFactor, factorize
from snpc.types import FloatArray, IntArray

Entries = TypeVar("Entries", FloatArray, IntArray)
Solution = TypeVar("Solution")

ELIMINATION_STEPS = 48  # times that the costs of all remaining units are computed
LARGE_STEPS = 24  # the same in large systems
LARGE_ROWS = 1024  # rows from which on a system is large
UPDATES_PER_STEP = 8  # in large systems: times that the costs of the cheapest units are updated within a step
SINGLE_PRECISION_RIDGE = 1e-3  # share of the mean diagonal from which on a large system is solved in float32
BLOCK_ROWS = 256  # rows from which on matrix products pay
MAX_RIDGE = 10.0  # share of the mean diagonal above which no larger ridge is tried


@dataclass(frozen=True)
class EliminationOrder:
    """``order``: units in the order of their removal. ``loss`` [units + 1]: squared output error by units kept.

    ``factors``: one per system, in the reverse order; none where no refits are asked for.
    """

    order: IntArray
    loss: FloatArray
    factors: tuple[OrderedFactor, ...] = field(default=(), repr=False)

    def refit_for(self, keep: IntArray) -> tuple[FloatArray, ...] | None:
        """The refitted weights (per system, [columns of the kept units, D]) for these units, ascending; None where they
        are not the last of the order."""
        last = np.sort(self.order[len(self.order) - len(keep) :])
        if not self.factors or not np.array_equal(last, keep):
            return None
        return tuple(factor.refit(len(keep) * len(factor.columns) // len(self.order)) for factor in self.factors)


@dataclass(frozen=True)
class LeastSquaresSystem:
    """What one consumer weight reads. ``moment`` [units * m, units * m]: second moment of the centered columns;
    ``weight`` [units * m, D]. A unit has m adjacent columns (the width of a head, the offsets of a kernel).
    ``means``: [units * m] at each node that uses the weight."""

    moment: FloatArray
    weight: FloatArray
    ridge: float = DEFAULT_RIDGE
    means: tuple[FloatArray, ...] = ()

    def hessian(self, dtype: np.dtype[Any]) -> FloatArray:
        """The moment with its ridge, a copy."""
        matrix = self.moment.astype(dtype)
        matrix.flat[:: len(matrix) + 1] += absolute_ridge(self.moment, self.ridge)
        return matrix


def elimination_widths(size: int, steps: int = ELIMINATION_STEPS) -> list[int]:
    """How many of ``size`` units are left after each step of an elimination."""
    batch = max(1, -(-size // steps))
    return [*range(size - batch, 0, -batch), 0]


def eliminate(systems: Sequence[LeastSquaresSystem], size: int, steps: int | None = None) -> EliminationOrder:
    """Structured OBS over all consumer weights of a group.

    Removing unit i costs tr(w_i' ((H^-1)_ii)^-1 w_i), summed over the systems; w and H^-1 are updated after every
    removal. The costs of all units are computed ``steps`` times, in between those of the cheapest are updated exactly;
    in large systems after every few units, so that units that stand for each other do not go together unseen.
    ``loss`` is the error on the moments themselves, without the ridge, which is as large as it has to be
    (``with_enough_ridge``).
    """
    steps = steps or (LARGE_STEPS if is_large(systems) else ELIMINATION_STEPS)
    return with_enough_ridge(systems, lambda systems, dtype: run_elimination(systems, size, steps, dtype))


def with_factors(order: EliminationOrder, systems: Sequence[LeastSquaresSystem]) -> EliminationOrder:
    """The same with a factor per system, which gives the refitted weights of every width."""
    columns = order.order[::-1]
    factors = with_enough_ridge(
        systems, lambda systems, dtype: tuple(factorize_in_order(system, columns, dtype) for system in systems)
    )
    return replace(order, factors=factors)


def with_enough_ridge(
    systems: Sequence[LeastSquaresSystem], solve: Callable[[Sequence[LeastSquaresSystem], np.dtype[Any]], Solution]
) -> Solution:
    """What ``solve`` finds in single precision where that is enough for large systems, else in double precision. Where
    rounding leaves a moment with its ridge not positive definite, a ten times larger ridge is tried; above
    ``MAX_RIDGE``, LinAlgError is raised."""
    if is_large(systems) and all(system.ridge >= SINGLE_PRECISION_RIDGE for system in systems):
        with suppress(np.linalg.LinAlgError):
            return solve(systems, np.dtype(np.float32))
    try:
        return solve(systems, np.dtype(np.float64))
    except np.linalg.LinAlgError:
        if max(system.ridge for system in systems) > MAX_RIDGE:
            raise
    larger = [replace(system, ridge=10 * max(system.ridge, DEFAULT_RIDGE)) for system in systems]
    return with_enough_ridge(larger, solve)


def is_large(systems: Sequence[LeastSquaresSystem]) -> bool:
    """Is one of the systems so large that its order is found in fewer, coarser steps?"""
    return max(len(system.moment) for system in systems) >= LARGE_ROWS


def run_elimination(
    systems: Sequence[LeastSquaresSystem], size: int, steps: int, dtype: np.dtype[Any]
) -> EliminationOrder:
    """``eliminate`` with the ridges as they are. Raises LinAlgError where a moment is not positive definite."""
    states = [ObsState(system, size, dtype) for system in systems]
    large = is_large(systems)
    kept = np.arange(size)
    widths, ridge_losses = [size], [0.0]
    order: list[int] = []
    losses = [np.zeros(1)]
    for width in elimination_widths(size, steps):
        count = len(kept) - width
        removed = cheapest_units(states, len(kept), count, -(-count // UPDATES_PER_STEP) if large else 1)
        order += kept[removed].tolist()
        losses.append(np.sum([state.remove(removed) for state in states], axis=0))
        kept = compact_rows(kept, removed)
        widths.append(width)
        ridge_losses.append(sum(state.ridge_loss for state in states))
    loss = np.cumsum(np.concatenate(losses))[::-1]
    loss = np.maximum(loss - np.interp(np.arange(size + 1), widths[::-1], ridge_losses[::-1]), 0.0)
    loss[size] = 0.0
    return EliminationOrder(np.array(order, np.int64), np.maximum.accumulate(loss[::-1])[::-1])


def factorize_in_order(system: LeastSquaresSystem, units: IntArray, dtype: np.dtype[Any]) -> OrderedFactor:
    """The factor of a system with its ``units`` in this order."""
    columns = unit_columns(units, len(system.moment) // len(units))
    factor = factorize(system.hessian(dtype), system.weight.astype(dtype, copy=False), columns)
    return replace(factor, means=system.means)


class ObsState:
    """One system during an elimination: the inverse Hessian of the remaining rows, their refitted weights ``current``,
    and their weights before, ``weight``."""

    def __init__(self, system: LeastSquaresSystem, size: int, dtype: np.dtype[Any]) -> None:
        self.columns = len(system.moment) // size
        self.ridge = absolute_ridge(system.moment, system.ridge)
        self.inverse = InverseHessian(current_algebra().invert_positive_definite(system.hessian(dtype), overwrite=True))
        self.current: FloatArray = system.weight.astype(dtype)
        self.weight = self.current.copy()
        self.removed_norm = 0.0

    def costs(self) -> FloatArray:
        """[units]: tr(w_i' ((H^-1)_ii)^-1 w_i)."""
        pivots = self.inverse.blocks(self.columns)
        rows = self.current.reshape(len(pivots), self.columns, -1)
        return unit_costs(pivots, np.einsum("iaj,ibj->iab", rows, rows))

    def subset(self, units: IntArray) -> ObsSubset:
        """The state of these units (positions among the remaining ones)."""
        rows = unit_columns(units, self.columns)
        return ObsSubset(self.inverse.submatrix(rows), self.current[rows] @ self.current[rows].T, self.columns)

    def remove(self, units: IntArray) -> FloatArray:
        """Remove these units (positions among the remaining ones) and refit the others. Returns [units]: the squared
        error that each adds to that of those before it, the ridge's share included."""
        removed = unit_columns(units, self.columns)
        self.removed_norm += float(np.sum(self.weight[removed] ** 2))
        lost = self.current[removed]
        self.current, self.weight = compact_rows(self.current, removed), compact_rows(self.weight, removed)
        factor, half = self.inverse.remove(removed)
        change = half @ lost
        for rows in row_blocks(len(self.current)):  # the whole product would be as large as the weight
            self.current[rows] -= factor[rows] @ change
        return np.asarray(np.sum(change.astype(np.float64).reshape(len(units), -1) ** 2, axis=1))

    @property
    def ridge_loss(self) -> float:
        """The part of the loss that is due to the ridge."""
        changes = (self.weight[rows] - self.current[rows] for rows in row_blocks(len(self.current)))
        return self.ridge * (self.removed_norm + sum(float(np.vdot(change, change)) for change in changes))


class InverseHessian:
    """H^-1 of the remaining rows, as ``base`` - ``update`` update'.

    Removing rows subtracts a product of low rank (a Schur complement). Products are collected in ``update`` and
    subtracted from the large base when there are ``BLOCK_ROWS`` columns of them.
    """

    def __init__(self, base: FloatArray) -> None:
        self.base = base
        self.update = np.empty((len(base), 0), base.dtype)

    def submatrix(self, rows: IntArray) -> FloatArray:
        """[rows, rows] of H^-1."""
        return np.asarray(self.base[np.ix_(rows, rows)] - self.update[rows] @ self.update[rows].T)

    def blocks(self, columns: int) -> FloatArray:
        """[units, columns, columns]: the blocks on the diagonal."""
        update = self.update.reshape(len(self.update) // columns, columns, self.update.shape[1])
        return np.asarray(diagonal_blocks(self.base, columns) - np.einsum("iak,ibk->iab", update, update))

    def remove(self, removed: IntArray) -> tuple[FloatArray, FloatArray]:
        """Remove rows. Returns F and L with F L = (H^-1)_rest,removed ((H^-1)_removed,removed)^-1, the rest in the
        order of ``compact_rows``."""
        cross = self.base[removed].T - self.update @ self.update[removed].T
        half = np.linalg.inv(np.linalg.cholesky(cross[removed])).astype(cross.dtype)
        factor = compact_rows(cross @ half.T, removed)
        self.base = compact_rows(compact_rows(self.base, removed).T, removed).T
        self.update = np.concatenate([compact_rows(self.update, removed), factor], axis=1)
        if self.update.shape[1] >= BLOCK_ROWS:
            algebra = current_algebra()
            # on the CPU in blocks that stay in its cache
            for rows in row_blocks(len(self.base)) if algebra is NUMPY_ALGEBRA else [slice(None)]:
                self.base[rows] -= algebra.product(self.update[rows], self.update.T)
            self.update = self.update[:, :0]
        return factor, half


def row_blocks(length: int) -> Iterator[slice]:
    """Slices of ``BLOCK_ROWS`` rows each."""
    return (slice(start, start + BLOCK_ROWS) for start in range(0, length, BLOCK_ROWS))


def compact_rows(array: Entries, removed: IntArray) -> Entries:
    """Remove entries of the first axis, in place: the last entries move into the gaps, and a view is returned."""
    remaining = len(array) - len(removed)
    array[removed[removed < remaining]] = array[np.setdiff1d(np.arange(remaining, len(array)), removed)]
    return array[:remaining]


def cheapest_units(states: Sequence[ObsState], units: int, count: int, at_once: int = 1) -> IntArray:
    """The next ``count`` of ``units`` to remove. The costs of the cheapest ``2 * count`` are updated exactly after
    every ``at_once`` of them."""
    score = np.sum([state.costs() for state in states], axis=0)
    candidates = np.argsort(score, kind="stable")[: min(units, 2 * count)]
    subsets = [state.subset(candidates) for state in states]
    removed = np.empty(0, np.int64)
    while len(removed) < count:
        cost = np.sum([subset.costs() for subset in subsets], axis=0)
        cost[removed] = np.inf
        next_ones = np.argsort(cost, kind="stable")[: min(at_once, count - len(removed))]
        removed = np.concatenate([removed, next_ones])
        for subset in subsets:
            subset.remove(next_ones)
    return np.asarray(candidates[removed])


class ObsSubset:
    """Some units of a system while others of them are removed: their H^-1, and ``gram`` = w w' of their weights, which
    is all that costs depend on. Removed rows stay, decoupled from the others."""

    def __init__(self, inverse: FloatArray, gram: FloatArray, columns: int) -> None:
        self.inverse, self.gram, self.columns = inverse, gram, columns

    def costs(self) -> FloatArray:
        """[units]: tr(((H^-1)_ii)^-1 w_i w_i')."""
        return unit_costs(diagonal_blocks(self.inverse, self.columns), diagonal_blocks(self.gram, self.columns))

    def remove(self, units: IntArray) -> None:
        """w -> w - t w_u and H^-1 -> H^-1 - t (H^-1)_u with t = (H^-1)^u ((H^-1)_u^u)^-1, u the rows of the units."""
        rows = unit_columns(units, self.columns)
        cross, cross_gram = self.inverse[:, rows], self.gram[:, rows]
        factor = cross / cross[rows] if len(rows) == 1 else np.linalg.solve(cross[rows], cross.T).T
        half = factor @ (cross_gram - factor @ (cross_gram[rows] / 2)).T
        self.inverse -= factor @ cross.T
        self.gram -= half + half.T
        self.inverse[rows] = self.gram[rows] = 0.0
        self.inverse[:, rows] = self.gram[:, rows] = 0.0
        self.inverse[rows, rows] = 1.0


def unit_costs(pivots: FloatArray, grams: FloatArray) -> FloatArray:
    """[units]: tr(P_i^-1 G_i) of [units, columns, columns] each."""
    if pivots.shape[1] == 1:
        return np.asarray((grams / pivots)[:, 0, 0])
    return np.asarray(np.einsum("iaa->i", np.linalg.solve(pivots, grams)))


def diagonal_blocks(matrix: FloatArray, columns: int) -> FloatArray:
    """[units, columns, columns]: the blocks on the diagonal."""
    units = len(matrix) // columns
    return np.asarray(np.einsum("iaib->iab", matrix.reshape(units, columns, units, columns)))


def eliminate_by_score_loss(losses: FloatArray) -> EliminationOrder:
    """Greedy order of units where removing a set P costs ``sum_{u, v in P} losses[u, v]`` [size, size], without a
    refit."""
    kept = np.arange(len(losses))
    order: list[int] = []
    totals = [0.0]
    while len(kept):
        costs = np.diag(losses)[kept] + 2 * losses[np.ix_(kept, np.array(order, np.int64))].sum(axis=1)
        cheapest = int(np.argmin(costs))
        order.append(int(kept[cheapest]))
        totals.append(totals[-1] + float(costs[cheapest]))
        kept = np.delete(kept, cheapest)
    return EliminationOrder(np.array(order, np.int64), np.maximum(np.array(totals)[::-1], 0.0))
