"""Gates: a factor for every unit of a group, put on the weights that read or make it.

With a gate at zero the model is the one with that unit silenced, at one the model as it is, for any operators around.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from snpc.ops import lookup
from snpc.passes.analyze import Analysis
from snpc.torch.module import GraphModule, WeightTransform
from snpc.torch.operators.registry import Tensor
from snpc.types import Group, Model, Site


@dataclass(frozen=True)
class Gate:
    """``sites`` are multiplied with the units' factors. Where only what makes the units can be (query and key), both
    sides are, so each takes the factor to ``power``; its gradient and value stay those of one factor."""

    group: Group
    sites: tuple[Site, ...]
    exponent: float

    def scaling(self, site: Site, factors: Tensor) -> WeightTransform:
        """A function of the constant at ``site``; ``factors`` [blocks, size]."""
        index = torch.as_tensor(site.units, device=factors.device)
        spread = torch.cat([factors.reshape(-1), factors.new_ones(1)])[index]  # -1: one

        def scaled(tensor: Tensor) -> Tensor:
            shape = [-1 if k == site.axis else 1 for k in range(tensor.ndim)]
            return tensor * spread.reshape(shape)

        return scaled


def make_gate(analysis: Analysis, group: Group) -> Gate:
    """Weights that read a unit silence it alone; where there are none, those that make it do, with their biases."""
    reads = tuple(site for site in group.sites if site.kind == "consume")
    if reads:
        return Gate(group, reads, 1.0)
    makes = tuple(s for s in group.sites if s.kind == "produce" or (s.kind == "pointwise" and is_bias(analysis, s)))
    return Gate(group, makes, 2.0 if group.role == "qk" else 1.0)


def is_bias(analysis: Analysis, site: Site) -> bool:
    """Is it a bias?"""
    users = analysis.traced_graph.model.graph.initializers[site.tensor].uses()
    specs = [lookup(node.domain, node.op_type) for node, _ in users]
    return all(spec.effect == "add" or spec.kind in ("contraction", "attention") for spec in specs)


def canonical_module(analysis: Analysis, watch: Sequence[str] = ()) -> GraphModule:
    """The model as it was analysed, so that sites have their names."""
    model: Model = replace(analysis.model, graph=analysis.traced_graph.model)
    return GraphModule(model, watch=watch)


@contextmanager
def apply_gates(module: GraphModule, gates: Sequence[Gate], factors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with ``factors`` (group id -> [blocks, size]) on, while the block runs."""
    before = module.weight_transforms
    changes: dict[str, tuple[WeightTransform, ...]] = dict(before)
    for gate in gates:
        for site in gate.sites:
            changes[site.tensor] = (*changes.get(site.tensor, ()), gate.scaling(site, factors[gate.group.id]))
    module.weight_transforms = changes
    try:
        yield
    finally:
        module.weight_transforms = before
