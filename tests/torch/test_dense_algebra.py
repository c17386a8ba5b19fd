"""Torch's dense algebra gives numpy's results: compared by what does not depend on the signs of vectors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from snpc.errors import UserError
from snpc.runtime.closed_form import using_algebra
from snpc.runtime.closed_form.dense_algebra import NUMPY_ALGEBRA
from snpc.runtime.closed_form.elimination import LeastSquaresSystem, eliminate
from snpc.torch import TorchAlgebra
from snpc.types import FloatArray
from tests.command_line import CALIB, VIT, arrays, invoke, process_environment

SIZE = 96
TORCH = TorchAlgebra()

OPERATIONS: dict[str, Callable[[FloatArray], object]] = {
    "cholesky": TORCH.cholesky,
    "invert": TORCH.invert_positive_definite,
    "solve": lambda matrix: TORCH.solve_positive_definite(matrix, np.eye(len(matrix))),
    "eigh": TORCH.eigh,
    "svd": TORCH.svd,
}


@pytest.fixture(autouse=True)
def on_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems of any size."""
    monkeypatch.setattr("snpc.torch.dense_algebra.SMALL_SYSTEM", 1)


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


def test_small_systems_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    algebra = TorchAlgebra("meta")  # a device that holds shapes only
    monkeypatch.setattr("snpc.torch.dense_algebra.SMALL_SYSTEM", SIZE)
    assert algebra.device_for(SIZE, SIZE).type == "meta"
    assert algebra.device_for(SIZE, SIZE - 1).type == "cpu"


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


# -- in a whole run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "tolerance"), [("parallel", 1e-6), pytest.param("auto", 1e-4, marks=pytest.mark.slow)]
)
def test_a_pruned_model_is_that_of_numpy(method: str, tolerance: float, tmp_path: Path) -> None:
    """The same plan, and weights that agree up to a millionth of each tensor. Layer by layer, activations in float32
    stand between one solution and the next, and regressions on them enlarge their rounding."""
    for algebra in ("numpy", "torch"):
        files = ("--plan", tmp_path / f"{algebra}.json", "-o", tmp_path / f"{algebra}.onnx")
        chosen = ("--tokens", "none", "--method", method, "--algebra", algebra)
        invoke("prune", VIT, "--calib", CALIB, "--target", "macs=0.6", *chosen, *files)
    expected, actual = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("numpy", "torch"))
    assert actual == expected
    expected_weights, weights = arrays(tmp_path / "numpy.onnx"), arrays(tmp_path / "torch.onnx")
    assert weights.keys() == expected_weights.keys()
    for name, array in expected_weights.items():
        if array.dtype == np.float32:
            assert np.linalg.norm(weights[name] - array) <= tolerance * np.linalg.norm(array), name


def test_the_option_reaches_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr("torch.linalg.eigh", lambda tensor: (shapes.append(tuple(tensor.shape)), eigh(tensor))[1])
    run = ("prune", VIT, "--calib", CALIB, "--ratio", "0.5", "--uniform", "--roles", "qk", "--method", "parallel", "-o",
           tmp_path / "out.onnx")  # fmt: skip
    invoke(*run)
    assert not shapes
    invoke(*run, "--algebra", "torch")
    assert shapes


def test_without_torch_the_option_is_refused_in_one_line(tmp_path: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from snpc.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "prune", VIT, "--calib", CALIB, "--ratio", "0.5", "--algebra", "torch"],
        capture_output=True, text=True, cwd=tmp_path, env=process_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "--algebra torch needs torch, which is not installed: pip install 'snpc[torch]'" in done.stderr


def test_an_elimination_is_that_of_numpy() -> None:
    """Of more units than are collected before the inverse is updated, down to none."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(900, 300)) @ rng.normal(size=(300, 300))
    system = LeastSquaresSystem(rows.T @ rows, rng.normal(size=(300, 5)))
    expected = eliminate([system], 300)
    with using_algebra("torch"):
        order = eliminate([system], 300)
    assert np.array_equal(order.order, expected.order)
    assert_same(order.loss, expected.loss)
