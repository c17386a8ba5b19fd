"""One factorization of a least-squares system in the order of its units: the loss of every width, and every refit.

With the columns in order of importance, C + ridge = L L' and V = L' W, the squared error of keeping the first k columns
is the sum of the squared rows of V behind them, and the refitted rows solve L_kk' W_k = V_k: a triangular system. The
ridge shrinks the change of the rows, W_k = W_S + (C_SS + ridge)^-1 C_SP W_P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from snpc.runtime.closed_form.algebra import squared_tail_sums
from snpc.runtime.closed_form.dense_algebra import NUMPY_ALGEBRA, current_algebra
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


def factorize(hessian: FloatArray, weight: FloatArray, columns: IntArray, dtype: np.dtype[Any]) -> OrderedFactor:
    """The factor of ``hessian`` = C + ridge [n, n] and ``weight`` [n, D] with the columns in this order, in ``dtype``.

    Raises LinAlgError where the Hessian is not positive definite.
    """
    factor = cholesky_factor(hessian[np.ix_(columns, columns)].astype(dtype, copy=False))
    projected = current_algebra().product(factor.T, weight[columns].astype(dtype, copy=False))
    return OrderedFactor(columns, factor, projected)


def cholesky_factor(matrix: FloatArray) -> FloatArray:
    """L, lower triangular, in the type of ``matrix``, which may be overwritten."""
    if matrix.dtype == np.float64 or current_algebra() is not NUMPY_ALGEBRA:
        return current_algebra().cholesky(matrix).astype(matrix.dtype, copy=False)
    from scipy.linalg import lapack

    # upper in Fortran's order, which is lower in numpy's
    factor, failed = lapack.spotrf(matrix.T, lower=0, clean=1, overwrite_a=1)
    if failed or not np.isfinite(np.trace(factor)):
        raise np.linalg.LinAlgError("Matrix is not positive definite")
    return np.asarray(factor.T)


def inverse_hessian(hessian: FloatArray, dtype: np.dtype[Any]) -> FloatArray:
    """The inverse of a symmetric positive definite matrix, in ``dtype``: float32 takes half the time, and its error is
    far below the ridge where that is large. Raises LinAlgError where the matrix is not positive definite."""
    if dtype == np.float64 or current_algebra() is not NUMPY_ALGEBRA:
        return current_algebra().invert_positive_definite(hessian).astype(dtype, copy=False)
    from scipy.linalg import lapack

    upper, _ = lapack.spotri(cholesky_factor(hessian.astype(dtype)).T, lower=0, overwrite_c=1)  # below it are zeros
    inverse = upper + upper.T
    inverse.flat[:: len(inverse) + 1] /= 2
    return np.ascontiguousarray(inverse)
