"""Adapters: a low-rank update of every matrix is trained in place of the matrix, and added to it in the end.

Structured pruning adapters (Hedegaard et al. 2022, arXiv 2211.10155): W + A B with A [rows, rank] and B [rank,
columns]; the pruned rows and columns are gone already, so that no mask is needed.
"""

from __future__ import annotations

import torch

from snpc.errors import UserError
from snpc.torch.module import GraphModule, WeightTransform

ADAPTERS_NAME = "adapters·"  # no initializer's path, as it ends in a middle dot


class Adapters(torch.nn.Module):
    """Pairs for the matrices of ``module`` that are larger than ``rank`` both ways. A is drawn by ``seed``, B is zero,
    so that training begins at the weights as they are; everything else in the module is frozen."""

    def __init__(self, module: GraphModule, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        matrices = {name: w for name, w in module.weights() if w.ndim == 2 and min(w.shape) > rank}
        if not matrices:
            raise UserError(f"adapters of rank {rank}: the model has no matrix that is larger both ways")
        self.weight_names = tuple(matrices)
        drawn = (torch.randn(len(w), rank, generator=generator).to(w) / rank**0.5 for w in matrices.values())
        self.left = torch.nn.ParameterList([torch.nn.Parameter(a) for a in drawn])
        self.right = torch.nn.ParameterList(
            [torch.nn.Parameter(w.detach().new_zeros(rank, w.shape[1])) for w in matrices.values()]
        )

    def weight_transform(self, number: int, turned: bool) -> WeightTransform:
        def changed(weight: torch.Tensor) -> torch.Tensor:
            product = self.left[number] @ self.right[number]
            return torch.add(weight, product.mT if turned else product)

        return changed


def add_adapters(module: GraphModule, rank: int, seed: int) -> Adapters:
    """Put adapters on the module."""
    found = Adapters(module, rank, seed)
    module.requires_grad_(False)
    numbers = {name: k for k, name in enumerate(found.weight_names)}
    changes: dict[str, tuple[WeightTransform, ...]] = {}
    for name in module.origins:
        owner, turned = module.owner(name)
        if owner in numbers:
            changes[name] = (found.weight_transform(numbers[owner], turned),)
    module.weight_transforms = changes
    module.add_module(ADAPTERS_NAME, found)
    return found


def merge_adapters(module: GraphModule, adapters: Adapters) -> None:
    """Add what the adapters have learnt to the weights, and take them off."""
    with torch.no_grad():
        for number, name in enumerate(adapters.weight_names):
            module.weight(name).add_(adapters.left[number] @ adapters.right[number])
    module.weight_transforms = {}
    delattr(module, ADAPTERS_NAME)
    for _, weight in module.weights():
        weight.requires_grad_(True)
