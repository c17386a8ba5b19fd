"""Torch's dense algebra gives numpy's results: compared by what does not depend on the signs of vectors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from snpc.errors import UserError
from snpc.runtime.closed_form import using_algebra
from snpc.runtime.closed_form.dense_algebra import NUMPY_ALGEBRA
from snpc.torch import TorchAlgebra
from snpc.types import FloatArray

SIZE = 96
TORCH = TorchAlgebra()

OPERATIONS: dict[str, Callable[[FloatArray], object]] = {
    "cholesky": TORCH.cholesky,
    "invert": TORCH.invert_positive_definite,
    "solve": lambda matrix: TORCH.solve_positive_definite(matrix, np.eye(len(matrix))),
    "eigh": TORCH.eigh,
    "svd": TORCH.svd,
}


@pytest.fixture
def matrix() -> FloatArray:
    """With a condition number of about 1e6, as moments with their ridge have."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3 * SIZE, SIZE)) * np.logspace(0, -3, SIZE)
    return rows.T @ rows / len(rows) + 1e-6 * np.eye(SIZE)


@pytest.fixture
def right() -> FloatArray:
    return np.random.default_rng(1).normal(size=(SIZE, 11))


def assert_same(actual: FloatArray, expected: FloatArray, tolerance: float = 1e-8) -> None:
    assert actual.dtype == np.float64 and isinstance(actual, np.ndarray)
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def test_systems(matrix: FloatArray, right: FloatArray) -> None:
    factor = NUMPY_ALGEBRA.cholesky(matrix)
    assert_same(TORCH.cholesky(matrix), factor)
    for transposed in (False, True):
        assert_same(
            TORCH.solve_triangular(factor, right, transposed), NUMPY_ALGEBRA.solve_triangular(factor, right, transposed)
        )
    assert_same(TORCH.solve_positive_definite(matrix, right), NUMPY_ALGEBRA.solve_positive_definite(matrix, right))
    assert_same(TORCH.invert_positive_definite(matrix), NUMPY_ALGEBRA.invert_positive_definite(matrix))
    assert_same(TORCH.product(matrix, right), matrix @ right)


def test_decompositions(matrix: FloatArray, right: FloatArray) -> None:
    values, vectors = TORCH.eigh(matrix)
    assert_same(values, NUMPY_ALGEBRA.eigh(matrix)[0])
    assert_same((vectors * values) @ vectors.T, matrix)
    left, singular, rows = TORCH.svd(right)
    assert left.shape == (SIZE, 11)
    assert_same(singular, NUMPY_ALGEBRA.svd(right)[1])
    assert_same((left * singular) @ rows, right)


def test_views_of_any_strides_are_taken_and_nothing_is_written(matrix: FloatArray, right: FloatArray) -> None:
    matrix.flags.writeable = False
    for view in (right.T[:, ::-1], right[::2].T, np.asfortranarray(right).T):
        assert_same(TORCH.product(view, view.T), view @ view.T)
    before = right.copy()
    assert_same(TORCH.product(matrix[:, ::-1], right), matrix[:, ::-1] @ right)
    assert np.array_equal(right, before)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_cannot_be_solved_is_an_error_of_numpy(operation: str, matrix: FloatArray) -> None:
    matrix[3, 3] = np.nan
    with pytest.raises(np.linalg.LinAlgError):
        OPERATIONS[operation](matrix)


def test_what_is_not_positive_definite_is_an_error_of_numpy(matrix: FloatArray) -> None:
    with pytest.raises(np.linalg.LinAlgError):
        TORCH.cholesky(-matrix)


def test_a_system_that_does_not_fit_names_the_way_out(matrix: FloatArray, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(matrix: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr("torch.linalg.cholesky", overflow)
    with pytest.raises(UserError, match=f"too small for a system of {SIZE} columns: choose --algebra numpy"):
        TORCH.cholesky(matrix)


def test_the_package_registers_it() -> None:
    with using_algebra("torch") as algebra:
        assert isinstance(algebra, TorchAlgebra)
