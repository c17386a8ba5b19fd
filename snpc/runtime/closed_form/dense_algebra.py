"""The dense algebra that closed forms are solved with: numpy's, or another implementation that registers itself.

Arrays go in and come out as numpy's, wherever the arithmetic runs, and keep their type: float64, or float32 where that
is enough. All implementations agree but for rounding and for the signs of eigenvectors and singular vectors.

With ``overwrite`` an operation may destroy the matrix that it is given, to save the memory of a copy.

``using_algebra`` chooses the implementation for a block of code, in its thread or task; a worker enters it anew, with
``Execution.algebra``. ``snpc.torch`` registers "torch" when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import numpy as np

from snpc.errors import UserError
from snpc.types import FloatArray

MIRROR_ROWS = 256  # rows that are transposed at once, within the cache


class DenseAlgebra(Protocol):
    """The operations. Each raises numpy's LinAlgError where it does not converge or a matrix is singular, not positive
    definite, or not finite."""

    def product(self, left: FloatArray, right: FloatArray) -> FloatArray:
        """[n, m] x [m, k] -> [n, k]."""
        ...

    def cholesky(self, matrix: FloatArray, overwrite: bool = False) -> FloatArray:
        """L, lower triangular, with L L' = ``matrix``, symmetric positive definite."""
        ...

    def solve_triangular(self, factor: FloatArray, right: FloatArray, transposed: bool = False) -> FloatArray:
        """X with L X = ``right`` [n, k], or L' X = ``right`` if ``transposed``; ``factor``: L, lower triangular."""
        ...

    def solve_positive_definite(self, matrix: FloatArray, right: FloatArray, overwrite: bool = False) -> FloatArray:
        """X with ``matrix`` X = ``right`` [n, k]; ``matrix`` is symmetric positive definite."""
        ...

    def invert_positive_definite(self, matrix: FloatArray, overwrite: bool = False) -> FloatArray:
        """The inverse, symmetric, of a symmetric positive definite matrix."""
        ...

    def eigh(self, matrix: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(values [n], ascending; vectors [n, n], in columns) of a symmetric matrix."""
        ...

    def svd(self, matrix: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(U [n, r], singular values [r], descending, V' [r, m]) of ``matrix`` [n, m]; r is the smaller of both."""
        ...


class NumpyAlgebra:
    """LAPACK on the CPU, through numpy and scipy."""

    def product(self, left: FloatArray, right: FloatArray) -> FloatArray:
        return np.asarray(left @ right)

    def cholesky(self, matrix: FloatArray, overwrite: bool = False) -> FloatArray:
        return upper_factor(matrix, overwrite).T

    def solve_triangular(self, factor: FloatArray, right: FloatArray, transposed: bool = False) -> FloatArray:
        from scipy.linalg import solve_triangular

        return np.asarray(solve_triangular(factor, right, trans=int(transposed), lower=True, check_finite=False))

    def solve_positive_definite(self, matrix: FloatArray, right: FloatArray, overwrite: bool = False) -> FloatArray:
        from scipy.linalg import cho_solve

        return np.asarray(cho_solve((upper_factor(matrix, overwrite), False), right, check_finite=False))

    def invert_positive_definite(self, matrix: FloatArray, overwrite: bool = False) -> FloatArray:
        from scipy.linalg import get_lapack_funcs

        upper = upper_factor(matrix, overwrite)
        (potri,) = get_lapack_funcs(("potri",), (upper,))
        upper, _ = potri(upper, lower=0, overwrite_c=1)
        inverse: FloatArray = upper.T
        mirror_lower(inverse)
        return inverse

    def eigh(self, matrix: FloatArray) -> tuple[FloatArray, FloatArray]:
        values, vectors = np.linalg.eigh(matrix)
        return np.asarray(values), np.asarray(vectors)

    def svd(self, matrix: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return np.asarray(left), np.asarray(values), np.asarray(right)


def mirror_lower(matrix: FloatArray) -> None:
    """Make a matrix symmetric, in place, by what is below its diagonal."""
    for start in range(0, len(matrix), MIRROR_ROWS):
        rows = slice(start, start + MIRROR_ROWS)
        matrix[:start, rows] = matrix[rows, :start].T
        block = np.tril(matrix[rows, rows])
        matrix[rows, rows] = block + np.tril(block, -1).T


def upper_factor(matrix: FloatArray, overwrite: bool = False) -> FloatArray:
    """U, upper triangular and in Fortran's order, with U' U = ``matrix``. Raises LinAlgError where the matrix is not
    positive definite, also where NaN was carried through, as some LAPACKs do."""
    from scipy.linalg import get_lapack_funcs

    # the matrix is symmetric: transposed it is in the order that LAPACK takes, and copied as it lies
    (potrf,) = get_lapack_funcs(("potrf",), (matrix,))
    upper, failed = potrf(matrix.T, lower=0, clean=1, overwrite_a=int(overwrite))
    if failed or not np.isfinite(np.trace(upper)):
        raise np.linalg.LinAlgError("the matrix is not positive definite, or not finite")
    return np.asarray(upper)


NUMPY_ALGEBRA = NumpyAlgebra()

_chosen: ContextVar[DenseAlgebra] = ContextVar("dense_algebra", default=NUMPY_ALGEBRA)
_makers: dict[str, Callable[[], DenseAlgebra]] = {"numpy": lambda: NUMPY_ALGEBRA}


def register_algebra(name: str, make: Callable[[], DenseAlgebra]) -> None:
    """``using_algebra(name)`` takes what ``make`` returns, from now on."""
    _makers[name] = make


@contextmanager
def using_algebra(name: str) -> Iterator[DenseAlgebra]:
    """Closed forms inside the block are solved by this implementation. Raises UserError where none has the name."""
    if name not in _makers:
        hint = ": import snpc.torch first (pip install 'snpc[torch]'), or choose numpy" if name == "torch" else ""
        raise UserError(f"algebra {name!r} is not there; there is {', '.join(_makers)}{hint}")
    algebra = _makers[name]()
    token = _chosen.set(algebra)
    try:
        yield algebra
    finally:
        _chosen.reset(token)


def current_algebra() -> DenseAlgebra:
    """The implementation that ``using_algebra`` chose, else numpy's."""
    return _chosen.get()
