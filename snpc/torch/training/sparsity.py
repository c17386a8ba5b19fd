"""Unstructured sparsity: decay of weights that the loss does not feel, and the smallest weights set to zero.

LOBSTER (Tartaglione et al. 2020, arXiv 2011.09905): a weight's sensitivity is |dL/dw|, and a step shrinks the weight by
lambda w max(0, 1 - |dL/dw|). Now and then, the largest threshold is found below which weights can be zero while the
held-out loss stays within its limit. What is zero stays zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

BISECTIONS = 8  # of the number of weights to set to zero: one part in 256


def matrices(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The parameters that decay and are sparsified: gains and biases do not count."""
    return [p for p in parameters if p.ndim > 1]


def decay_insensitive(parameters: Sequence[torch.nn.Parameter], strength: float) -> None:
    """Shrink each weight by ``strength`` times itself, less the more sensitive the loss is to it: not at all where the
    size of its gradient reaches one."""
    with torch.no_grad():
        for parameter in matrices(parameters):
            if parameter.grad is not None:
                insensitivity = (1 - parameter.grad.abs()).clamp_(min=0)
                parameter.mul_(1 - strength * insensitivity)


@contextmanager
def kept_zeros(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Weights that are zero when the block begins are zero when it ends."""
    zeros = [(parameter, parameter == 0) for parameter in matrices(parameters)]
    yield
    with torch.no_grad():
        for parameter, zero in zeros:
            parameter.masked_fill_(zero, 0.0)


class Sparsity(NamedTuple):
    """How many weights of the matrices are zero."""

    zeros: int
    weights: int

    @classmethod
    def of(cls, parameters: Iterable[torch.nn.Parameter]) -> Sparsity:
        weights = matrices(parameters)
        return cls(sum(int((p == 0).sum()) for p in weights), sum(p.numel() for p in weights))


@dataclass(frozen=True)
class Sparsifier:
    """Sets as many of the smallest weights of all matrices together to zero as keep ``loss`` within ``limit``."""

    loss: Callable[[torch.nn.Module], float]
    limit: float

    def __call__(self, module: torch.nn.Module) -> float:
        """Change the module's weights. Returns the loss after it."""
        weights = matrices(module.parameters())
        before = [p.detach().clone() for p in weights]
        sizes = torch.cat([p.abs().reshape(-1) for p in before]).sort().values
        low, high = int((sizes == 0).sum()), len(sizes) + 1
        best = self.loss(module)
        for _ in range(BISECTIONS):
            count = (low + high) // 2
            set_small_to_zero(weights, before, float(sizes[count - 1]) if count else 0.0)
            loss = self.loss(module)
            if loss <= self.limit:
                low, best = count, loss
            else:
                high = count
        set_small_to_zero(weights, before, float(sizes[low - 1]) if low else 0.0)
        return best


def set_small_to_zero(weights: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor], threshold: float) -> None:
    """Give ``weights`` their ``values`` where those are larger than ``threshold``, and zero elsewhere."""
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(torch.where(value.abs() > threshold, value, torch.zeros_like(value)))
