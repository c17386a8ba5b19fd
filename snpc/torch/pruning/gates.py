"""Gates: a factor for every unit of a group, multiplied with the weights that consume or produce the unit.

With a gate at zero the model is the one without that unit; with all at one it is the model itself, whatever operators
surround the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from snpc.ops import lookup
from snpc.passes import Analysis
from snpc.passes.sublayers import layer_scale_name, with_layer_scales
from snpc.torch.module import GraphModule, WeightTransform
from snpc.torch.operators import Tensor
from snpc.types import LAYER_ROLE, Group, Model, Site, Sublayer


@dataclass(frozen=True)
class Gate:
    """The sites of a group that its units' factors are multiplied with.

    ``exponent`` is 2 where every unit has two such sites in a product (query and key): the output then depends on the
    factor's square, and the derivative with respect to the gate is the gradient divided by the exponent."""

    group: Group
    sites: tuple[Site, ...]
    exponent: float

    def scaling(self, site: Site, factors: Tensor) -> WeightTransform:
        """The function that scales the weight at ``site``; ``factors`` [blocks, size]."""
        units = torch.as_tensor(site.units, device=factors.device)
        by_position = torch.cat([factors.reshape(-1), factors.new_ones(1)])[units]  # unit -1, of no group: factor 1

        def scale(weight: Tensor) -> Tensor:
            shape = [-1 if k == site.axis else 1 for k in range(weight.ndim)]
            return weight * by_position.reshape(shape).to(weight.dtype)  # else half precision becomes single

        return scale


def make_gate(analysis: Analysis, group: Group) -> Gate:
    """Scaling the weights that consume a unit is enough to remove it. Without such weights, those that produce it are
    scaled, together with their biases."""
    consumers = tuple(site for site in group.sites if site.kind == "consume")
    if consumers:
        return Gate(group, consumers, 1.0)
    producers = tuple(s for s in group.sites if s.kind == "produce" or (s.kind == "pointwise" and is_bias(analysis, s)))
    return Gate(group, producers, 2.0 if group.role == "qk" else 1.0)


def layer_gates(analysis: Analysis, sublayers: Sequence[Sublayer]) -> tuple[Gate, ...]:
    """A gate on what each of these layers adds to the stream, in the graph that ``with_layer_scales`` makes: a group of
    one unit."""
    shapes = analysis.traced_graph.facts.shapes_by_name
    gates = []
    for number, layer in enumerate(sublayers):
        site = Site(layer_scale_name(layer.name), 0, "consume", np.zeros(shapes[layer.branch][-1], np.int64))
        group = Group(
            id=layer.name, role=LAYER_ROLE, layer=number, blocks=1, size=1, sites=(site,), probes=(), freedom="select",
            freedom_reason="a whole layer", macs=layer.macs, params=layer.params,
        )  # fmt: skip
        gates.append(Gate(group, (site,), 1.0))
    return tuple(gates)


def is_bias(analysis: Analysis, site: Site) -> bool:
    """Is the constant at a site added to an activation, and nothing else?"""
    users = analysis.traced_graph.model.graph.initializers[site.tensor].uses()
    specs = [lookup(node.domain, node.op_type) for node, _ in users]
    return all(spec.effect == "add" or spec.kind in ("contraction", "attention") for spec in specs)


def canonical_module(
    analysis: Analysis, watch: Sequence[str] = (), gated_layers: Sequence[Sublayer] = ()
) -> GraphModule:
    """The canonicalized graph as a module: sites name its constants. ``gated_layers``: those that ``layer_gates`` is to
    scale."""
    graph = with_layer_scales(analysis.traced_graph, gated_layers) if gated_layers else analysis.traced_graph.model
    model: Model = replace(analysis.model, graph=graph)
    return GraphModule(model, watch=watch)


@contextmanager
def apply_gates(module: GraphModule, gates: Sequence[Gate], factors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with its weights scaled by ``factors`` (group id -> [blocks, size]), while the block runs."""
    before = module.weight_transforms
    transforms: dict[str, tuple[WeightTransform, ...]] = dict(before)
    for gate in gates:
        for site in gate.sites:
            transforms[site.tensor] = (*transforms.get(site.tensor, ()), gate.scaling(site, factors[gate.group.id]))
    module.weight_transforms = transforms
    try:
        yield
    finally:
        module.weight_transforms = before
