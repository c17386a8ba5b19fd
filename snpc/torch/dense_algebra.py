"""The dense algebra of closed forms on torch: on a GPU where there is one, else on torch's CPU kernels.

Arrays keep their type, so that results are those of numpy but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from snpc.errors import UserError
from snpc.types import FloatArray

SMALL_SYSTEM = 512  # rows and columns, in the geometric mean, below which a GPU's start takes longer than a CPU's work


class TorchAlgebra:
    """``snpc.runtime.closed_form.DenseAlgebra`` on one device; None: the current GPU, else the CPU. Small systems, such
    as those of a head, always stay on the CPU.

    Raises UserError where a system does not fit into the device's memory.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def product(self, left: FloatArray, right: FloatArray) -> FloatArray:
        with self.numpy_errors(left):
            device = self.device_for(left.shape[0], right.shape[0], right.shape[1])
            return to_array(tensor_on(device, left) @ tensor_on(device, right))

    def cholesky(self, matrix: FloatArray, overwrite: bool = False) -> FloatArray:
        with self.numpy_errors(matrix):
            return to_array(self.factor(matrix))

    def solve_triangular(self, factor: FloatArray, right: FloatArray, transposed: bool = False) -> FloatArray:
        with self.numpy_errors(factor):
            lower = tensor_on(self.device_for(*factor.shape), factor)
            columns, matrix = tensor_on(lower.device, right), lower.mT if transposed else lower
            return to_array(torch.linalg.solve_triangular(matrix, columns, upper=transposed))

    def solve_positive_definite(self, matrix: FloatArray, right: FloatArray, overwrite: bool = False) -> FloatArray:
        with self.numpy_errors(matrix):
            factor = self.factor(matrix)
            return to_array(torch.cholesky_solve(tensor_on(factor.device, right), factor))

    def invert_positive_definite(self, matrix: FloatArray, overwrite: bool = False) -> FloatArray:
        with self.numpy_errors(matrix):
            return to_array(torch.cholesky_inverse(self.factor(matrix)))

    def eigh(self, matrix: FloatArray) -> tuple[FloatArray, FloatArray]:
        with self.numpy_errors(matrix):
            values, vectors = torch.linalg.eigh(self.finite(matrix))
            return to_array(values), to_array(vectors)

    def svd(self, matrix: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        with self.numpy_errors(matrix):
            left, values, right = torch.linalg.svd(self.finite(matrix), full_matrices=False)
            return to_array(left), to_array(values), to_array(right)

    def factor(self, matrix: FloatArray) -> Tensor:
        factor: Tensor = torch.linalg.cholesky(self.finite(matrix))
        return factor

    def finite(self, matrix: FloatArray) -> Tensor:
        """The matrix on the device. CUDA's solvers return NaN where LAPACK reports an error."""
        tensor = tensor_on(self.device_for(*matrix.shape), matrix)
        if not bool(torch.isfinite(tensor).all()):
            raise np.linalg.LinAlgError("the matrix holds NaN or infinity")
        return tensor

    def device_for(self, *sizes: int) -> torch.device:
        """Where an operation on arrays of these sizes runs."""
        return self.device if math.prod(sizes) >= SMALL_SYSTEM ** len(sizes) else torch.device("cpu")

    @contextmanager
    def numpy_errors(self, matrix: FloatArray) -> Iterator[None]:
        """Torch's errors as those that the closed forms know."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"{self.device}: its memory is too small for a system of {len(matrix)} columns: choose --algebra numpy"
            ) from error
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise np.linalg.LinAlgError(str(error)) from error


def tensor_on(device: torch.device, array: FloatArray) -> Tensor:
    """The array on the device; on the CPU without a copy, where torch can share its memory."""
    shared = array.flags.writeable and all(stride > 0 for stride in array.strides)
    return torch.from_numpy(array if shared else array.copy()).to(device)


def to_array(tensor: Tensor) -> FloatArray:
    return np.asarray(tensor.cpu().numpy())
