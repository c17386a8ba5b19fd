"""The dense algebra of closed forms: each operation against its definition, and the choice between implementations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from snpc.errors import UserError
from snpc.runtime.closed_form import current_algebra, register_algebra, using_algebra
from snpc.runtime.closed_form.dense_algebra import NUMPY_ALGEBRA, NumpyAlgebra
from snpc.types import FloatArray

SIZE = 40
REFUSALS: dict[str, Callable[[FloatArray], object]] = {
    "cholesky": NUMPY_ALGEBRA.cholesky,
    "invert": NUMPY_ALGEBRA.invert_positive_definite,
    "solve": lambda matrix: NUMPY_ALGEBRA.solve_positive_definite(matrix, np.eye(len(matrix))),
}


@pytest.fixture
def matrix() -> FloatArray:
    rows = np.random.default_rng(0).normal(size=(3 * SIZE, SIZE))
    return rows.T @ rows / len(rows) + 1e-3 * np.eye(SIZE)


@pytest.fixture
def right() -> FloatArray:
    return np.random.default_rng(1).normal(size=(SIZE, 7))


def test_factor_and_its_triangular_systems(matrix: FloatArray, right: FloatArray) -> None:
    factor = NUMPY_ALGEBRA.cholesky(matrix)
    assert np.array_equal(factor, np.tril(factor))
    np.testing.assert_allclose(factor @ factor.T, matrix, atol=1e-12)
    np.testing.assert_allclose(factor @ NUMPY_ALGEBRA.solve_triangular(factor, right), right, atol=1e-12)
    np.testing.assert_allclose(factor.T @ NUMPY_ALGEBRA.solve_triangular(factor, right, True), right, atol=1e-12)


def test_positive_definite_systems(matrix: FloatArray, right: FloatArray) -> None:
    before = matrix.copy()
    np.testing.assert_allclose(matrix @ NUMPY_ALGEBRA.solve_positive_definite(matrix, right), right, atol=1e-10)
    inverse = NUMPY_ALGEBRA.invert_positive_definite(matrix)
    np.testing.assert_allclose(matrix @ inverse, np.eye(SIZE), atol=1e-10)
    assert np.array_equal(inverse, inverse.T)
    assert np.array_equal(matrix, before)
    for operation in ("cholesky", "invert_positive_definite"):
        solve = getattr(NUMPY_ALGEBRA, operation)
        assert np.array_equal(solve(matrix.copy(), overwrite=True), solve(matrix))
    overwritten = NUMPY_ALGEBRA.solve_positive_definite(matrix.copy(), right, overwrite=True)
    assert np.array_equal(overwritten, NUMPY_ALGEBRA.solve_positive_definite(matrix, right))
    single = NUMPY_ALGEBRA.invert_positive_definite(matrix.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, inverse, atol=1e-2 * np.abs(inverse).max())


def test_decompositions(matrix: FloatArray, right: FloatArray) -> None:
    values, vectors = NUMPY_ALGEBRA.eigh(matrix)
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose((vectors * values) @ vectors.T, matrix, atol=1e-12)
    left, singular, rows = NUMPY_ALGEBRA.svd(right)
    assert left.shape == (SIZE, 7) and rows.shape == (7, 7) and (np.diff(singular) <= 0).all()
    np.testing.assert_allclose((left * singular) @ rows, right, atol=1e-12)
    np.testing.assert_allclose(NUMPY_ALGEBRA.product(matrix, right), matrix @ right)


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("entry", [-1.0, np.nan])
def test_what_is_not_positive_definite_is_refused(name: str, entry: float, matrix: FloatArray) -> None:
    matrix[3, 3] = entry
    with pytest.raises(np.linalg.LinAlgError):
        REFUSALS[name](matrix)


def test_the_chosen_algebra_serves_inside_the_block_only() -> None:
    class Other(NumpyAlgebra):
        pass

    register_algebra("other", Other)
    assert current_algebra() is NUMPY_ALGEBRA
    with pytest.raises(ZeroDivisionError), using_algebra("other") as algebra:
        assert current_algebra() is algebra and isinstance(algebra, Other)
        with using_algebra("numpy"):
            assert current_algebra() is NUMPY_ALGEBRA
        assert current_algebra() is algebra
        raise ZeroDivisionError
    assert current_algebra() is NUMPY_ALGEBRA


def test_an_unknown_algebra_is_refused() -> None:
    with pytest.raises(UserError, match=r"algebra 'abacus' is not there; there is numpy"), using_algebra("abacus"):
        pass
