"""The registry of torch implementations: one function per operator, under its domain and name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch

Tensor = torch.Tensor
Result = Tensor | tuple[Tensor, ...]
Integers = tuple[int, ...]
OperatorFunction = TypeVar("OperatorFunction", bound="Callable[..., Result]")


@dataclass(frozen=True)
class OperatorCall:
    """A node without its inputs: operator, opset version, attributes, and number of outputs."""

    op: str
    version: int
    attrs: Mapping[str, Any]
    outputs: int = 1

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default where the node does not have it."""
        value = self.attrs.get(name)
        return default if value is None else value


@dataclass(frozen=True)
class Implementation:
    """``run(call, *inputs)`` computes an operator. At the positions ``integer_inputs`` it takes a tuple of integers (or
    None), elsewhere tensors.

    ``data_dependent_shape``: the output's shape depends on values. ``reads``: "shape" where the output depends on the
    input's shape only, else "values"."""

    run: Callable[..., Result]
    integer_inputs: frozenset[int]
    data_dependent_shape: bool = False
    reads: Literal["shape", "values"] = "values"


REGISTRY: dict[tuple[str, str], Implementation] = {}


def implements(
    *names: str,
    domain: str = "",
    integer_inputs: Sequence[int] = (),
    data_dependent_shape: bool = False,
    reads: Literal["shape", "values"] = "values",
) -> Callable[[OperatorFunction], OperatorFunction]:
    """Register a function as the implementation of these operators; see ``Implementation``."""

    def register(run: OperatorFunction) -> OperatorFunction:
        for name in names:
            assert (domain, name) not in REGISTRY, name
            REGISTRY[domain, name] = Implementation(run, frozenset(integer_inputs), data_dependent_shape, reads)
        return run

    return register


TORCH_DTYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""ONNX element type -> torch dtype."""


def axis_list(call: OperatorCall, axes_input: Integers | None, rank: int) -> list[int]:
    """Non-negative axes, from an input or, in earlier opsets, an attribute; an empty list where there is neither."""
    axes = axes_input if axes_input is not None else call.get("axes")
    return [] if axes is None else [int(k) % rank for k in axes]


def to_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A torch tensor with memory of its own, which torch aligns: where memory is not aligned as in another run, matrix
    products may round otherwise. bfloat16, which torch does not take from numpy, is passed as its bits."""
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.tensor(contiguous.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(contiguous)
