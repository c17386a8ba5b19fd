"""The closed forms: what to keep of a group, and what to make of its weights, so that its output moves least.

Plain linear algebra on second moments in float64; nothing here knows a graph. Moments are sums over calibration rows:
``C = sum x x'``. Roots are symmetric and pseudo-inverted, so moments of less than full rank are fine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from snpc.types import AnyArray, FloatArray, IntArray

Entries = TypeVar("Entries", FloatArray, IntArray)

RANK_TOLERANCE = 1e-10  # eigenvalues below this share of the largest count as zero
DEFAULT_RIDGE = 1e-4  # of the mean diagonal, added before a refit is solved
ELIMINATION_STEPS = 48  # in which the units of a group go
BLOCK_ROWS = 256  # rows from which on a product of matrices pays
MAX_RIDGE = 10.0
SMALL_SAMPLE_RIDGE = 0.1  # more of it where rows are few: times units / rows


def relative_ridge(size: int, rows: float) -> float:
    """The ridge, as a share of the mean diagonal, for moments of ``size`` units that ``rows`` rows were summed into:
    few rows say little about what other data will bring (a last layer that only the class token passes sees one row per
    sample)."""
    return max(DEFAULT_RIDGE, SMALL_SAMPLE_RIDGE * size / max(rows, 1.0))


@dataclass(frozen=True)
class LowRankBasis:
    """A change of basis in order of importance: keep the first r columns of ``make`` and rows of ``read``.

    ``make`` [d, d] multiplies what makes the units (W -> W make), ``read`` [d, d] is applied to what reads them
    (W -> read W; for Q and K it makes K: W_k -> W_k read'). ``loss[r]``: squared output error when r are kept.
    """

    encode: FloatArray
    decode: FloatArray
    loss: FloatArray


def symmetric_square_root(moment: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(C^1/2, its pseudo-inverse) of a symmetric positive semi-definite C."""
    values, vectors = np.linalg.eigh((moment + moment.T) / 2)
    values = np.maximum(values, 0.0)
    safe = values > RANK_TOLERANCE * max(float(values[-1]), 1e-300)
    roots = np.sqrt(values)
    inverse = np.where(safe, 1.0 / np.where(safe, roots, 1.0), 0.0)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


def squared_tail_sums(singular: FloatArray) -> FloatArray:
    """``[r]``: sum of the squares from r on; length d + 1."""
    return np.concatenate([np.cumsum((singular**2)[::-1])[::-1], [0.0]])


def balance_norms(make: FloatArray, read: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The same map with columns of ``make`` as long as rows of ``read``: neither side's weights become tiny, which
    matters to whoever trains or quantises them later."""
    columns, rows = np.linalg.norm(make, axis=0), np.linalg.norm(read, axis=1)
    both = (columns > 0) & (rows > 0)
    factor = np.sqrt(np.where(both, rows, 1.0) / np.where(both, columns, 1.0))
    return make * factor, read / factor[:, None]


def solve_low_rank_qk(query: FloatArray, key: FloatArray, ridges: tuple[float, float] = (0.0, 0.0)) -> LowRankBasis:
    """The best rank-r score map for the data, for every r at once.

    ``query`` [d, d] = sum q q', ``key`` [d, d] = sum (k - mean)(k - mean)' with the mean of each sequence (softmax does
    not see what all keys share). With C_q^1/2 C_k^1/2 = U S V': T_q = C_q^-1/2 U S^1/2 and T_k = C_k^-1/2 V S^1/2, and
    q T_q (k T_k)' is the rank-r map with least squared error over all pairs of rows (A3, arXiv 2505.12942, in the
    space of q and k), the moments having been given ``ridges``. ``loss`` is its error without. ``make`` = T_q,
    ``read`` = T_k', ``balance_norms``.
    """
    q_root, q_inverse = symmetric_square_root(add_ridge(query, ridges[0]))
    k_root, k_inverse = symmetric_square_root(add_ridge(key, ridges[1]))
    left, singular, right = np.linalg.svd(q_root @ k_root)
    half = np.sqrt(singular)
    make, read = balance_norms(q_inverse @ (left * half), (k_inverse @ (right.T * half)).T)
    if not any(ridges):
        return LowRankBasis(make, read, squared_tail_sums(singular))
    return LowRankBasis(
        make, read, truncation_errors(symmetric_square_root(query)[0], make, read, symmetric_square_root(key)[0])
    )


def solve_low_rank_vo(context: FloatArray, weight: FloatArray, ridge: float = 0.0) -> LowRankBasis:
    """The best rank-r value/output pair for the data, for every r at once.

    ``context`` [d, d] = sum (c - mean)(c - mean)' of the context c = P V, ``weight`` [d, D] the output projection.
    With C^1/2 W = U S V': V -> V C^-1/2 U_r, W -> U_r' C^1/2 W (A3's OV with the attended input), ``balance_norms``, C
    having been given ``ridge``. ``loss`` is the error without.
    """
    c_root, c_inverse = symmetric_square_root(add_ridge(context, ridge))
    left, singular, _ = np.linalg.svd(c_root @ weight, full_matrices=False)
    basis = np.zeros((len(context), len(context)))
    basis[:, : left.shape[1]] = left
    if left.shape[1] < len(context):
        singular = np.concatenate([singular, np.zeros(len(context) - len(singular))])
    make, read = balance_norms(c_inverse @ basis, basis.T @ c_root)
    return LowRankBasis(
        make,
        read,
        truncation_errors(symmetric_square_root(context)[0], make, read, weight)
        if ridge
        else squared_tail_sums(singular),
    )


def refit_decoder(context: FloatArray, make: FloatArray, weight: FloatArray, ridge: float = 0.0) -> FloatArray:
    """[r, D]: the output projection that makes of the values ``make`` [d, r] leaves what ``weight`` [d, D] made of all.

    ``context`` as in ``solve_low_rank_vo``. Where one head reads the values this is ``read[:r] @ weight`` of its
    rebase;
    query heads that share values share the basis, but each has its own best projection.
    """
    seen = make.T @ add_ridge(context, ridge)
    return np.linalg.solve(seen @ make, seen @ weight).astype(np.float64)


def shared_value_loss(
    contexts: Sequence[FloatArray], weights: Sequence[FloatArray], make: FloatArray, ridge: float
) -> FloatArray:
    """``loss`` of query heads that share values in the basis ``make`` [d, d], each with its own projection."""
    found = np.zeros(len(make) + 1)
    for kept in range(len(make)):
        for context, weight in zip(contexts, weights, strict=True):
            gap = weight - make[:, :kept] @ refit_decoder(context, make[:, :kept], weight, ridge) if kept else weight
            found[kept] += float(np.sum(gap * (context @ gap)))
    return np.maximum.accumulate(found[::-1])[::-1]


def truncation_errors(left: FloatArray, make: FloatArray, read: FloatArray, right: FloatArray) -> FloatArray:
    """``[r]``: | left (1 - make_r read_r) right |^2 with the first r columns and rows."""
    columns, rows, whole = left @ make, read @ right, left @ right
    both = (columns.T @ columns) * (rows @ rows.T)  # of two columns and rows: the product of what they say
    alone = np.einsum("ij,ij->j", columns, whole @ rows.T)
    found = float(np.sum(whole**2)) + np.concatenate([[0.0], np.diag(both.cumsum(0).cumsum(1)) - 2 * np.cumsum(alone)])
    found[-1] = 0.0  # but for rounding
    return np.maximum.accumulate(np.maximum(found, 0.0)[::-1])[::-1]


# -- selection with refit --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EliminationOrder:
    """Units in the order in which they go (first out first) and the loss after each: ``loss[r]`` when r are kept.

    ``fits``: for some numbers of units kept, what ``refit_rows`` gives (per system, [kept, D] in float32).
    """

    order: IntArray
    loss: FloatArray
    refits: Mapping[int, tuple[AnyArray, ...]] = field(default_factory=dict, repr=False)

    def refit_for(self, keep: IntArray) -> tuple[AnyArray, ...] | None:
        """The weights that read just these units (ascending), where they are known."""
        last = np.sort(self.order[len(self.order) - len(keep) :])
        return self.refits.get(len(keep)) if np.array_equal(last, keep) else None


def add_ridge(moment: FloatArray, ridge: float = DEFAULT_RIDGE) -> FloatArray:
    found = moment.copy()
    if ridge:
        found.flat[:: len(found) + 1] += absolute_ridge(moment, ridge)
    return found


def absolute_ridge(moment: FloatArray, ridge: float) -> float:
    return ridge * float(np.trace(moment)) / len(moment) + 1e-12


@dataclass(frozen=True)
class LeastSquaresSystem:
    """What one weight reads of the units: ``moment`` [units * m, units * m] of the centred columns, ``weight``
    [units * m, D], each unit in m columns next to each other (the width of a head, the offsets of a kernel)."""

    moment: FloatArray
    weight: FloatArray
    ridge: float = DEFAULT_RIDGE


def elimination_widths(size: int, steps: int = ELIMINATION_STEPS) -> list[int]:
    """How many of ``size`` units are left after each step of an elimination."""
    batch = max(1, -(-size // steps))
    return [*range(size - batch, 0, -batch), 0]


def eliminate(
    systems: Sequence[LeastSquaresSystem], size: int, steps: int = ELIMINATION_STEPS, fits_at: Collection[int] = ()
) -> EliminationOrder:
    """Structured OBS: repeatedly drop the units whose loss, after all others made up for them, is least.

    The loss of unit i is tr(w_i' ((H^-1)_ii)^-1 w_i), summed over the systems, with w and H^-1 updated after every
    removal (ZipLM, arXiv 2302.04089). Units go one by one from scores that are refreshed ``steps`` times. ``loss`` is
    the error on the moments themselves, the ridge taken off. ``fits_at``: of ``elimination_widths``, where to note
    the ``fits``.
    Moments that their ridge does not make positive definite, by rounding, get more of it.
    """
    try:
        return run_elimination(systems, size, steps, fits_at)
    except np.linalg.LinAlgError:
        if max(s.ridge for s in systems) > MAX_RIDGE:
            raise
        return eliminate([replace(s, ridge=10 * max(s.ridge, DEFAULT_RIDGE)) for s in systems], size, steps, fits_at)


def run_elimination(
    systems: Sequence[LeastSquaresSystem], size: int, steps: int, fits_at: Collection[int]
) -> EliminationOrder:
    remaining = [ObsState(s, size) for s in systems]
    alive = np.arange(size)
    loss = np.zeros(size + 1)
    known, extra = [size], [0.0]
    order: list[int] = []
    fits = {}
    for left in elimination_widths(size, steps):
        going, costs = cheapest_units(remaining, len(alive), len(alive) - left)
        loss[left : len(alive)] = loss[len(alive)] + np.cumsum(costs)[::-1]
        order += alive[going].tolist()
        for s in remaining:
            s.remove(going)
        alive = compact_rows(alive, going)
        if left in fits_at:
            fits[left] = tuple(s.unit_rows(np.argsort(alive)) for s in remaining)
        known.append(left)
        extra.append(sum(s.ridge_loss for s in remaining))
    loss = np.maximum(loss - np.interp(np.arange(size + 1), known[::-1], extra[::-1]), 0.0)
    return EliminationOrder(np.array(order, np.int64), np.maximum.accumulate(loss[::-1])[::-1], fits)


class ObsState:
    """What is left of one system: ``inverse``, and of the rows still there ``current``, refitted, beside ``weight``, as
    they were."""

    def __init__(self, system: LeastSquaresSystem, size: int) -> None:
        self.columns = len(system.moment) // size
        self.ridge = absolute_ridge(system.moment, system.ridge)
        self.inverse = InverseHessian(invert_positive_definite(add_ridge(system.moment, system.ridge)))
        self.current: FloatArray = system.weight.astype(np.float64)
        self.weight = self.current.copy()
        self.removed_norm = 0.0

    def costs(self) -> FloatArray:
        """[units]: tr(w_i' ((H^-1)_ii)^-1 w_i)."""
        pivots = self.inverse.blocks(self.columns)
        rows = self.current.reshape(len(pivots), self.columns, -1)
        return unit_costs(pivots, np.einsum("iaj,ibj->iab", rows, rows))

    def subset(self, units: IntArray) -> ObsSubset:
        rows = unit_columns(units, self.columns)
        return ObsSubset(self.inverse.submatrix(rows), self.current[rows] @ self.current[rows].T, self.columns)

    def remove(self, units: IntArray) -> None:
        """The others make up for these (positions among the units left)."""
        going = unit_columns(units, self.columns)
        self.removed_norm += float(np.sum(self.weight[going] ** 2))
        lost = self.current[going]
        self.current, self.weight = compact_rows(self.current, going), compact_rows(self.weight, going)
        factor, half = self.inverse.remove(going)
        self.current -= factor @ (half @ lost)

    def unit_rows(self, units: IntArray) -> AnyArray:
        return self.current[unit_columns(units, self.columns)].astype(np.float32)

    @property
    def ridge_loss(self) -> float:
        """The ridge's share of the loss."""
        gap = self.weight - self.current
        return self.ridge * (self.removed_norm + float(np.vdot(gap, gap)))


class InverseHessian:
    """H^-1 of the rows still there, as ``base`` - ``taken`` taken': what a few rows take when they go (a Schur
    complement instead of an inverse) is not taken off the base, which is big, until there is much of it."""

    def __init__(self, base: FloatArray) -> None:
        self.base = base
        self.pending_update = np.empty((len(base), 0))

    def submatrix(self, rows: IntArray) -> FloatArray:
        return np.asarray(self.base[np.ix_(rows, rows)] - self.pending_update[rows] @ self.pending_update[rows].T)

    def blocks(self, columns: int) -> FloatArray:
        """[units, columns, columns]: the blocks on the diagonal."""
        taken = self.pending_update.reshape(len(self.pending_update) // columns, columns, self.pending_update.shape[1])
        return np.asarray(diagonal_blocks(self.base, columns) - np.einsum("iak,ibk->iab", taken, taken))

    def remove(self, going: IntArray) -> tuple[FloatArray, FloatArray]:
        """F and L with F L = (H^-1)_rest,going ((H^-1)_going,going)^-1, the rest ``compact_rows``."""
        cross = self.base[going].T - self.pending_update @ self.pending_update[going].T
        half = np.linalg.inv(np.linalg.cholesky(cross[going])).astype(np.float64)
        factor = compact_rows(cross @ half.T, going)
        self.base = compact_rows(compact_rows(self.base, going).T, going).T
        self.pending_update = np.concatenate([compact_rows(self.pending_update, going), factor], axis=1)
        if self.pending_update.shape[1] >= BLOCK_ROWS:
            for start in range(0, len(self.base), BLOCK_ROWS):  # a product that stays in the cache
                self.base[start : start + BLOCK_ROWS] -= (
                    self.pending_update[start : start + BLOCK_ROWS] @ self.pending_update.T
                )
            self.pending_update = self.pending_update[:, :0]
        return factor, half


def invert_positive_definite(matrix: FloatArray) -> FloatArray:
    """The inverse of a symmetric positive definite matrix, by halves: half of the arithmetic of a general one."""
    half = len(matrix) // 2
    if half < BLOCK_ROWS:
        return np.linalg.inv(matrix).astype(np.float64)
    found = np.empty(matrix.shape)
    first, cross = invert_positive_definite(matrix[:half, :half]), matrix[:half, half:]
    solved = first @ cross
    second = invert_positive_definite(matrix[half:, half:] - cross.T @ solved)
    found[half:, half:] = second
    found[:half, half:] = -solved @ second
    found[half:, :half] = found[:half, half:].T
    found[:half, :half] = first - found[:half, half:] @ solved.T
    return found


def unit_columns(units: IntArray, columns: int) -> IntArray:
    """Where the ``columns`` columns of each of these units stand."""
    return (units[:, None] * columns + np.arange(columns)).reshape(-1)


def compact_rows(array: Entries, going: IntArray) -> Entries:
    """Without these entries of the first axis, the last ones moved into the gaps: in place, a view is returned."""
    left = len(array) - len(going)
    array[going[going < left]] = array[np.setdiff1d(np.arange(left, len(array)), going)]
    return array[:left]


def cheapest_units(parts: Sequence[ObsState], units: int, count: int) -> tuple[IntArray, list[float]]:
    """The ``count`` of ``units`` that go next and what each costs, exactly updated between them within the cheapest."""
    score = np.sum([part.costs() for part in parts], axis=0)
    pool = np.argsort(score, kind="stable")[: min(units, 2 * count)]
    small = [part.subset(pool) for part in parts]
    going: list[int] = []
    costs: list[float] = []
    for _ in range(count):
        cost = np.sum([few.costs() for few in small], axis=0)
        cost[going] = np.inf
        going.append(int(np.argmin(cost)))
        costs.append(float(cost[going[-1]]))
        for few in small:
            few.remove(going[-1])
    return pool[going], costs


class ObsSubset:
    """Some units of a system, while others of them go: H^-1, and of the weights only ``gram`` = w w', which is all that
    costs ask for. Rows that went stay, as rows that nothing depends on."""

    def __init__(self, inverse: FloatArray, gram: FloatArray, columns: int) -> None:
        self.inverse, self.gram, self.columns = inverse, gram, columns

    def costs(self) -> FloatArray:
        """[units]: tr(((H^-1)_ii)^-1 w_i w_i')."""
        return unit_costs(diagonal_blocks(self.inverse, self.columns), diagonal_blocks(self.gram, self.columns))

    def remove(self, unit: int) -> None:
        """w -> w - t w_u and H^-1 -> H^-1 - t (H^-1)_u with t = (H^-1)^u ((H^-1)_u^u)^-1, u the unit's rows."""
        rows = slice(unit * self.columns, (unit + 1) * self.columns)
        cross, seen = self.inverse[:, rows], self.gram[:, rows]
        made = cross / cross[rows] if self.columns == 1 else np.linalg.solve(cross[rows], cross.T).T
        half = made @ (seen - made @ (seen[rows] / 2)).T
        self.inverse -= made @ cross.T
        self.gram -= half + half.T
        self.inverse[rows] = self.inverse[:, rows] = self.gram[rows] = self.gram[:, rows] = 0.0
        self.inverse[rows, rows] = np.eye(self.columns)


def unit_costs(pivots: FloatArray, grams: FloatArray) -> FloatArray:
    """[units]: tr(P_i^-1 G_i) of [units, columns, columns] each."""
    if pivots.shape[1] == 1:
        return np.asarray((grams / pivots)[:, 0, 0])
    return np.asarray(np.einsum("iaa->i", np.linalg.solve(pivots, grams)))


def diagonal_blocks(matrix: FloatArray, columns: int) -> FloatArray:
    """[units, columns, columns]: the blocks on the diagonal."""
    units = len(matrix) // columns
    return np.asarray(np.einsum("iaib->iab", matrix.reshape(units, columns, units, columns)))


def refit_rows(moment: FloatArray, weight: FloatArray, keep: IntArray, ridge: float = DEFAULT_RIDGE) -> FloatArray:
    """[kept, D]: the rows that make the kept units say best what all of them said (ridge least squares)."""
    hessian, gone = moment[np.ix_(keep, keep)], weight.copy()
    gone[keep] = 0.0
    if ridge:
        hessian.flat[:: len(keep) + 1] += absolute_ridge(moment, ridge)
    return weight[keep] + np.linalg.solve(hessian, (moment @ gone)[keep]).astype(np.float64)


def solve_ridge(moment: FloatArray, cross: FloatArray, damping: float) -> FloatArray:
    """[kept, D]: ridge least squares with ``damping`` times the mean diagonal of ``moment`` as the ridge."""
    return np.linalg.solve(add_ridge(moment, damping), cross).astype(np.float64)


def refit_loss(moment: FloatArray, weight: FloatArray, keep: IntArray, fitted: FloatArray) -> float:
    """Squared output error of the fitted rows on centred activations."""
    gap = weight.copy()
    gap[keep] -= fitted
    return float(np.sum(gap * (moment @ gap)))


# -- selection without refit -----------------------------------------------------------------------------------------


def eliminate_by_score_loss(losses: FloatArray) -> EliminationOrder:
    """Units of which P lose ``sum_{u, v in P} losses[u, v]`` [size, size] together: greedily, the cheapest next."""
    alive = np.arange(len(losses))
    gone: list[int] = []
    found = [0.0]
    while len(alive):
        costs = np.diag(losses)[alive] + 2 * losses[np.ix_(alive, np.array(gone, np.int64))].sum(axis=1)
        k = int(np.argmin(costs))
        gone.append(int(alive[k]))
        found.append(found[-1] + float(costs[k]))
        alive = np.delete(alive, k)
    return EliminationOrder(np.array(gone, np.int64), np.maximum(np.array(found)[::-1], 0.0))
