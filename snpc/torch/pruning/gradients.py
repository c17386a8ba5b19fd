"""Gradients of each sample's loss by the gates of all units: one pass, whatever a criterion makes of them.

Samples are run one by one, so that a gradient is that of one sample for every layout of axes. (Where a graph's batch
size is fixed, a batch counts as one sample.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snpc.criteria import Criterion
from snpc.passes.analyze import Analysis
from snpc.runtime.calibration.dataset import Calibration
from snpc.torch.module import GraphModule
from snpc.torch.operators.registry import Tensor, to_tensor
from snpc.torch.operators.relevance import relevance_rules
from snpc.torch.pruning.gates import Gate, apply_gates, canonical_module, make_gate
from snpc.torch.training.labels import load_labels
from snpc.torch.training.losses import cross_entropy
from snpc.torch.training.sampling import one_sample_batches, sample_ids
from snpc.types import FloatArray, Group, IntArray

GateObserver = Callable[[str, Mapping[str, FloatArray]], None]


def compute_gate_gradients(
    analysis: Analysis,
    calibration: Calibration,
    groups: Sequence[Group],
    criterion: Criterion,
    observe: GateObserver,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> None:
    """Call ``observe(group id, measured)`` for every sample and group: arrays whose first axis is one sample.

    "gate:loss" [1, blocks, size] is the derivative of the sample's loss by the unit's gate, "gate:weights" the sum over
    the unit's weights of (w dL/dw)^2, "gate:relevance" what layer-wise relevance propagation leaves at the unit;
    "gate:macs" and "gate:memory" [1] what a unit costs. Raises UserError for operators that torch has not.
    """
    wanted = {g.id: [n for n in criterion.probes(g.role) if n.startswith("gate:")] for g in groups}
    asked = {name for names in wanted.values() for name in names}
    source = str(getattr(criterion, "labels", ""))
    labels = load_labels(Path(source), calibration) if source else None
    module = canonical_module(analysis)
    gates = [make_gate(analysis, g) for g in groups]
    costs = {g.id: gate_costs(analysis, g) for g in groups}
    alone = one_sample_batches(calibration)
    for ids, feeds in zip(sample_ids(alone), progress(alone.batches()) if progress else alone.batches(), strict=True):
        given = {name: to_tensor(array) for name, array in feeds.items()}
        found: dict[str, dict[str, FloatArray]] = {g.id: dict(costs[g.id]) for g in groups}
        if asked & {"gate:loss", "gate:weights"}:
            answers = None if labels is None else torch.from_numpy(labels[ids])
            add_loss_gradients(analysis, module, gates, given, ids, answers, "gate:weights" in asked, found)
        if "gate:relevance" in asked:
            add_relevance(analysis, module, gates, given, found)
        for group in groups:
            observe(group.id, {name: found[group.id][name] for name in wanted[group.id]})


def initial_factors(gates: Sequence[Gate]) -> dict[str, Tensor]:
    return {g.group.id: torch.ones(g.group.blocks, g.group.size, requires_grad=True) for g in gates}


def add_loss_gradients(
    analysis: Analysis,
    module: GraphModule,
    gates: Sequence[Gate],
    given: Mapping[str, Tensor],
    ids: IntArray,
    labels: Tensor | None,
    weights: bool,
    found: dict[str, dict[str, FloatArray]],
) -> None:
    factors = initial_factors(gates)
    tensors = dict(module.weights()) if weights else {}
    with apply_gates(module, gates, factors):
        value = sample_loss(analysis, module(given), int(ids[0]), labels)
    slots = [*factors.values(), *tensors.values()]
    gradients = torch.autograd.grad(value, slots, allow_unused=True)
    for gate, gradient in zip(gates, gradients, strict=False):
        found[gate.group.id]["gate:loss"] = per_unit_array(gradient, gate)
    if weights:
        squares = {
            name: torch.zeros_like(w) if g is None else (w.detach() * g).square()
            for (name, w), g in zip(tensors.items(), gradients[len(gates) :], strict=True)
        }
        for gate in gates:
            found[gate.group.id]["gate:weights"] = sum_per_unit(module, gate.group, squares)


def add_relevance(
    analysis: Analysis,
    module: GraphModule,
    gates: Sequence[Gate],
    given: Mapping[str, Tensor],
    found: dict[str, dict[str, FloatArray]],
) -> None:
    factors = initial_factors(gates)
    with apply_gates(module, gates, factors), relevance_rules(module):
        outputs = module(given)
        answer = torch.stack([output_relevance(name, outputs[name].float()) for name in loss_outputs(analysis)]).sum()
    gradients = torch.autograd.grad(answer, list(factors.values()), allow_unused=True)
    for gate, gradient in zip(gates, gradients, strict=True):
        found[gate.group.id]["gate:relevance"] = per_unit_array(gradient, gate)


def per_unit_array(gradient: Tensor | None, gate: Gate) -> FloatArray:
    """[1, blocks, size]."""
    shape = (1, gate.group.blocks, gate.group.size)
    if gradient is None:
        return np.zeros(shape)
    return gradient.detach().double().numpy().reshape(shape) / gate.exponent


def sum_per_unit(module: GraphModule, group: Group, values: Mapping[str, Tensor]) -> FloatArray:
    """[1, blocks, size]: values of weights, summed over those of each unit."""
    total = np.zeros(group.blocks * group.size + 1)
    for site in group.sites:
        owner, turned = module.owner(site.tensor)
        if owner not in values:
            continue
        array = (values[owner].mT if turned else values[owner]).double().numpy()
        rest = tuple(k for k in range(array.ndim) if k != site.axis)
        np.add.at(total, np.asarray(site.units), array.sum(axis=rest))
    return total[:-1].reshape(1, group.blocks, group.size)


# -- the loss --------------------------------------------------------------------------------------------------------


def loss_outputs(analysis: Analysis) -> list[str]:
    """Outputs that the loss looks at: the logits, else every float one."""
    found = [spec.name for spec in analysis.model.outputs if spec.dtype.kind == "f"]
    return [name for name in found if is_logits(name)] or found


def is_logits(name: str) -> bool:
    return "logit" in name.lower()


def sample_loss(analysis: Analysis, outputs: Mapping[str, Tensor], sample: int, labels: Tensor | None) -> Tensor:
    """Of one sample: the cross entropy of its labels, or of the classes that the model itself finds likeliest. Outputs
    that are not called logits are regressed to themselves plus noise that the sample's number seeds, whose expected
    squared gradient is the Fisher information of a Gaussian."""
    parts = []
    for name in loss_outputs(analysis):
        value = outputs[name].float()
        if labels is not None or is_logits(name):
            truth = value.detach().argmax(-1) if labels is None else labels
            parts.append(cross_entropy(value, truth).mean())
        else:
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(sample))
            parts.append((value * noise).sum() / value.numel() ** 0.5)
    return torch.stack(parts).sum()


def output_relevance(name: str, value: Tensor) -> Tensor:
    """What relevance starts from: the likeliest class's logit at every position, or half the squared output."""
    if is_logits(name):
        return value.max(-1).values.sum()
    return (value * value.detach()).sum()


def gate_costs(analysis: Analysis, group: Group) -> dict[str, FloatArray]:
    """What one unit takes of a sample's MACs and activations, at the sizes that MACs are quoted at."""
    shapes = {str(v.name): shape for v, shape in analysis.traced_graph.facts.shape.items()}
    elements = sum(math.prod(shapes.get(p.tensor) or (0,)) for p in group.probes)
    units = group.blocks * group.size
    return {"gate:macs": np.array([group.macs / units]), "gate:memory": np.array([max(elements / units, 1.0)])}
