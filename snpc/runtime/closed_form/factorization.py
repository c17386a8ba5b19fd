"""One factorization of a least-squares system in the order of its units: the loss of every width, and every refit.

With the columns in order of importance, C + ridge = L L' and V = L' W, the squared error of keeping the first k columns
is the sum of the squared rows of V behind them, and the refitted rows solve L_kk' W_k = V_k: a triangular system. The
ridge shrinks the change of the rows, W_k = W_S + (C_SS + ridge)^-1 C_SP W_P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.runtime.closed_form.algebra import squared_tail_sums
from snpc.runtime.closed_form.dense_algebra import current_algebra
from snpc.types import AnyArray, FloatArray, IntArray


@dataclass(frozen=True)
class OrderedFactor:
    """``columns`` [n]: the system's columns, the most important first. ``factor`` [n, n]: L, lower triangular.
    ``projected`` [n, D]: V. ``means``: [n] of the columns, at each node that uses the weight."""

    columns: IntArray
    factor: FloatArray = field(repr=False)
    projected: FloatArray = field(repr=False)
    means: tuple[FloatArray, ...] = field(default=(), repr=False)

    @property
    def losses(self) -> FloatArray:
        """[n + 1]: the squared error, the ridge's share included, by how many columns are kept."""
        return squared_tail_sums(np.linalg.norm(self.projected, axis=1).astype(np.float64))

    def refit(self, count: int) -> FloatArray:
        """[count, D]: the refitted rows of the first ``count`` columns, ascending by column."""
        kept = np.asarray(self.factor[:count, :count])
        rows = current_algebra().solve_triangular(kept, np.asarray(self.projected[:count]), transposed=True)
        return np.asarray(rows[np.argsort(self.columns[:count])])

    def stored(self, keep: Callable[[AnyArray], AnyArray]) -> OrderedFactor:
        """The same with its arrays where ``keep`` puts them."""
        return replace(self, factor=keep(self.factor), projected=keep(self.projected))


def factorize(hessian: FloatArray, weight: FloatArray, columns: IntArray) -> OrderedFactor:
    """The factor of ``hessian`` = C + ridge [n, n] and ``weight`` [n, D], of one type, with the columns in this order.

    Raises LinAlgError where the Hessian is not positive definite.
    """
    factor = current_algebra().cholesky(hessian[np.ix_(columns, columns)], overwrite=True)
    projected = current_algebra().product(factor.T, weight[columns])
    return OrderedFactor(columns, factor, projected)
