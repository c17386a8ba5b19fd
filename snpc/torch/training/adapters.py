"""Adapters: instead of every matrix, a low-rank update of it is trained, and merged into the matrix at the end.

Structured pruning adapters (Hedegaard et al. 2022, arXiv 2211.10155): W + A B with A [rows, rank] and B [rank,
columns]. The pruned rows and columns are removed already, so no mask is needed.
"""

from __future__ import annotations

import torch

from snpc.errors import UserError
from snpc.torch.module import GraphModule, WeightTransform

ADAPTERS_NAME = "adapters·"  # ends in a middle dot, so that no initializer has this path


class Adapters(torch.nn.Module):
    """Pairs (A, B) for the matrices of ``module`` with more than ``rank`` rows and columns. ``seed`` draws A. B is
    zero, so that training begins with the weights as they are."""

    def __init__(self, module: GraphModule, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        matrices = {name: w for name, w in module.weights() if w.ndim == 2 and min(w.shape) > rank}
        if not matrices:
            raise UserError(f"adapters of rank {rank}: the model has no matrix that has more rows and columns")
        self.weight_names = tuple(matrices)
        random = (torch.randn(len(w), rank, generator=generator).to(w) / rank**0.5 for w in matrices.values())
        self.left = torch.nn.ParameterList([torch.nn.Parameter(a) for a in random])
        self.right = torch.nn.ParameterList(
            [torch.nn.Parameter(w.detach().new_zeros(rank, w.shape[1])) for w in matrices.values()]
        )

    def weight_transform(self, index: int, transposed: bool) -> WeightTransform:
        """The function that adds the update of matrix ``index``."""

        def add_update(weight: torch.Tensor) -> torch.Tensor:
            update = self.left[index] @ self.right[index]
            return torch.add(weight, update.mT if transposed else update)

        return add_update


def add_adapters(module: GraphModule, rank: int, seed: int) -> Adapters:
    """Put adapters on the matrices of a module, and freeze all of its own weights."""
    adapters = Adapters(module, rank, seed)
    module.requires_grad_(False)
    indices = {name: k for k, name in enumerate(adapters.weight_names)}
    transforms: dict[str, tuple[WeightTransform, ...]] = {}
    for name in module.origins:
        owner, transposed = module.owner(name)
        if owner in indices:
            transforms[name] = (adapters.weight_transform(indices[owner], transposed),)
    module.weight_transforms = transforms
    module.add_module(ADAPTERS_NAME, adapters)
    return adapters


def merge_adapters(module: GraphModule, adapters: Adapters) -> None:
    """Add the learned updates to the weights, remove the adapters, and unfreeze the weights."""
    with torch.no_grad():
        for index, name in enumerate(adapters.weight_names):
            module.weight(name).add_(adapters.left[index] @ adapters.right[index])
    module.weight_transforms = {}
    delattr(module, ADAPTERS_NAME)
    for _, weight in module.weights():
        weight.requires_grad_(True)
