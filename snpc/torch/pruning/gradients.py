"""Gradients of each sample's loss with respect to unit gates. ``snpc.torch`` registers them for criteria.

Samples run one by one, so a gradient belongs to one sample whatever the layout of axes is. Where the graph fixes its
batch size, a batch counts as one sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from snpc.criteria import Criterion
from snpc.passes import Analysis
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.statistics import GATE_PREFIX, GateObserver, infer_probe_layout
from snpc.torch.module import GraphModule
from snpc.torch.operators import Tensor, relevance_rules, to_tensor
from snpc.torch.pruning.gates import Gate, apply_gates, canonical_module, make_gate
from snpc.torch.training import cross_entropy, load_labels, one_sample_batches, sample_ids
from snpc.types import FloatArray, Group, Probe

GateArrays = dict[str, dict[str, FloatArray]]
"""Group id -> probe -> array."""


def compute_gate_gradients(
    analysis: Analysis,
    calibration: Calibration,
    groups: Sequence[Group],
    criterion: Criterion,
    observe: GateObserver,
    execution: Execution = DEFAULT_EXECUTION,
) -> None:
    """Call ``observe(group id, arrays)`` for every sample and group. The first axis of each array is one sample.

    "gate:loss" [1, blocks, size] is the derivative of the sample's loss with respect to the unit's gate.
    "gate:weights" [1, blocks, size] is the sum of (w dL/dw)^2 over the unit's weights. "gate:relevance" [1, blocks,
    size] is what layer-wise relevance propagation leaves at the unit. "gate:sensitivity" [1, blocks, size] is the mean
    of |dy/dp| over outputs y, summed over the values p that the unit has in the activations that show it.
    "gate:macs" and "gate:memory" [1] are the costs of a unit. Raises UserError for operators that have no torch
    implementation.
    """
    probes = {g.id: [n for n in criterion.probes(g.role) if n.startswith(GATE_PREFIX)] for g in groups}
    kinds = {name for names in probes.values() for name in names}
    label_file = str(getattr(criterion, "labels", ""))
    labels = load_labels(Path(label_file), calibration) if label_file else None
    shown = dict.fromkeys(p.tensor for g in groups for p in sensitive_probes(g)) if "gate:sensitivity" in kinds else ()
    module = canonical_module(analysis, watch=tuple(shown))
    model = GatedModel(analysis, module, tuple(make_gate(analysis, g) for g in groups))
    costs = {g.id: gate_costs(analysis, g) for g in groups}
    data = one_sample_batches(calibration)
    batches = execution.track("gradients", data.batches(), len(data.batch_plan))
    for ids, feeds in zip(sample_ids(data), batches, strict=True):
        tensors = {name: to_tensor(array) for name, array in feeds.items()}
        measured: GateArrays = {g.id: dict(costs[g.id]) for g in groups}
        if kinds & {"gate:loss", "gate:weights"}:
            sample_labels = None if labels is None else torch.from_numpy(labels[ids])
            model.add_loss_gradients(measured, tensors, int(ids[0]), sample_labels, "gate:weights" in kinds)
        if "gate:relevance" in kinds:
            model.add_relevance(measured, tensors)
        if "gate:sensitivity" in kinds:
            model.add_sensitivities(measured, tensors, count=int(getattr(criterion, "outputs", 0)))
        for group in groups:
            observe(group.id, {name: measured[group.id][name] for name in probes[group.id]})


@dataclass(frozen=True)
class GatedModel:
    """A module and the gates that are put on it, all at one."""

    analysis: Analysis
    module: GraphModule
    gates: tuple[Gate, ...]

    def add_loss_gradients(
        self, measured: GateArrays, feeds: Mapping[str, Tensor], sample: int, labels: Tensor | None, with_weights: bool
    ) -> None:
        """Add "gate:loss", and "gate:weights" if asked, of one sample: one backward pass for both."""
        factors = initial_factors(self.gates)
        weights = dict(self.module.weights()) if with_weights else {}
        with apply_gates(self.module, self.gates, factors):
            loss = sample_loss(self.analysis, self.module(feeds), sample, labels)
        gradients = torch.autograd.grad(loss, [*factors.values(), *weights.values()], allow_unused=True)
        for gate, gradient in zip(self.gates, gradients, strict=False):
            measured[gate.group.id]["gate:loss"] = per_unit_array(gradient, gate)
        if not with_weights:
            return
        squares = {
            name: torch.zeros_like(w) if gradient is None else (w.detach() * gradient).square()
            for (name, w), gradient in zip(weights.items(), gradients[len(self.gates) :], strict=True)
        }
        for gate in self.gates:
            measured[gate.group.id]["gate:weights"] = sum_per_unit(self.module, gate.group, squares)

    def add_relevance(self, measured: GateArrays, feeds: Mapping[str, Tensor]) -> None:
        """Add "gate:relevance" of one sample."""
        factors = initial_factors(self.gates)
        with apply_gates(self.module, self.gates, factors), relevance_rules(self.module):
            outputs = self.module(feeds)
            starts = [output_relevance(name, outputs[name].float()) for name in loss_outputs(self.analysis)]
        gradients = torch.autograd.grad(torch.stack(starts).sum(), list(factors.values()), allow_unused=True)
        for gate, gradient in zip(self.gates, gradients, strict=True):
            measured[gate.group.id]["gate:relevance"] = per_unit_array(gradient, gate)

    def add_sensitivities(self, measured: GateArrays, feeds: Mapping[str, Tensor], count: int) -> None:
        """Add "gate:sensitivity" of one sample: a backward pass for each of ``count`` outputs, or one for their sum."""
        values = self.module(feeds)
        groups = [gate.group for gate in self.gates]
        shown = {p.tensor: values[p.tensor] for group in groups for p in sensitive_probes(group)}
        shown = {name: value for name, value in shown.items() if value.requires_grad}
        outputs = [y for name in loss_outputs(self.analysis) for y in single_outputs(name, values[name].float(), count)]
        totals = {name: torch.zeros_like(value) for name, value in shown.items()}
        for output in outputs:
            gradients = torch.autograd.grad(output, [*shown.values()], retain_graph=True, allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.abs() / len(outputs)
        for group in groups:
            parts = [sum_over_rows(totals[p.tensor], p, group) for p in sensitive_probes(group) if p.tensor in totals]
            measured[group.id]["gate:sensitivity"] = sum(parts, np.zeros((1, group.blocks, group.size)))


def sensitive_probes(group: Group) -> list[Probe]:
    """The activations in which a unit speaks: of values, behind the attention weights."""
    return [p for p in group.probes if p.kind != "value"] or list(group.probes)


def sum_over_rows(values: Tensor, probe: Probe, group: Group) -> FloatArray:
    """[1, blocks, size]: ``values`` of a probed tensor, summed over all that belongs to a unit."""
    layout = infer_probe_layout(probe, group.blocks * group.size)
    if layout.period:
        values = values.reshape(-1, layout.period, *values.shape[1:])
    rows = values.permute(0, *layout.row_axes, *layout.unit_axes).reshape(-1, layout.width)
    by_column = np.append(rows.double().sum(0).numpy(), 0.0)  # the last stands for units that are not seen
    by_unit = by_column[layout.columns].reshape(layout.repeats, -1).sum(axis=0)
    return np.asarray(by_unit.reshape(1, group.blocks, group.size))


def initial_factors(gates: Sequence[Gate]) -> dict[str, Tensor]:
    """Group id -> ones [blocks, size]."""
    return {g.group.id: torch.ones(g.group.blocks, g.group.size, requires_grad=True) for g in gates}


def per_unit_array(gradient: Tensor | None, gate: Gate) -> FloatArray:
    """[1, blocks, size]; zeros where the loss does not depend on the gate."""
    shape = (1, gate.group.blocks, gate.group.size)
    if gradient is None:
        return np.zeros(shape)
    return gradient.detach().double().numpy().reshape(shape) / gate.exponent


def sum_per_unit(module: GraphModule, group: Group, values: Mapping[str, Tensor]) -> FloatArray:
    """[1, blocks, size]: ``values`` (by weight, in the weight's shape), summed over each unit's entries."""
    total = np.zeros(group.blocks * group.size + 1)
    for site in group.sites:
        owner, transposed = module.owner(site.tensor)
        if owner not in values:
            continue
        array = (values[owner].mT if transposed else values[owner]).double().numpy()
        other_axes = tuple(k for k in range(array.ndim) if k != site.axis)
        np.add.at(total, np.asarray(site.units), array.sum(axis=other_axes))
    return total[:-1].reshape(1, group.blocks, group.size)


# -- the loss --------------------------------------------------------------------------------------------------------


def loss_outputs(analysis: Analysis) -> list[str]:
    """The outputs that the loss is computed from: the logits; every float output where none is called logits."""
    floats = [spec.name for spec in analysis.model.outputs if spec.dtype.kind == "f"]
    return [name for name in floats if is_logits(name)] or floats


def is_logits(name: str) -> bool:
    return "logit" in name.lower()


def sample_loss(analysis: Analysis, outputs: Mapping[str, Tensor], sample: int, labels: Tensor | None) -> Tensor:
    """The loss of one sample: the cross entropy of its labels; without labels, of the model's own likeliest classes.

    An output that is not called logits is regressed to itself plus noise, which the sample's number seeds. The expected
    squared gradient of that loss is the Fisher information of a Gaussian.
    """
    terms = []
    for name in loss_outputs(analysis):
        value = outputs[name].float()
        if labels is not None or is_logits(name):
            classes = value.detach().argmax(-1) if labels is None else labels
            terms.append(cross_entropy(value, classes).mean())
        else:
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(sample))
            terms.append((value * noise).sum() / value.numel() ** 0.5)
    return torch.stack(terms).sum()


def output_relevance(name: str, value: Tensor) -> Tensor:
    """Where relevance starts: the likeliest class's logit at every position; of other outputs, the output itself."""
    if is_logits(name):
        return value.max(-1).values.sum()
    return (value * value.detach()).sum()


def single_outputs(name: str, value: Tensor, count: int) -> Tensor:
    """[count]: the likeliest class, the second, and so on, summed over positions; of other outputs the largest values.
    With ``count`` 0 their mean: [1]."""
    if count == 0 or value.ndim == 0:
        return value.sum().reshape(1) / (value.shape[-1] if value.ndim else 1)
    order = value.detach() if is_logits(name) else value.detach().abs()
    largest = order.topk(min(count, value.shape[-1]), dim=-1).indices
    return value.gather(-1, largest).reshape(-1, largest.shape[-1]).sum(0)


def gate_costs(analysis: Analysis, group: Group) -> dict[str, FloatArray]:
    """A unit's share of one sample's MACs and activations, at the dimension sizes that MACs are quoted at."""
    shapes = analysis.traced_graph.facts.shapes_by_name
    elements = sum(math.prod(shapes.get(p.tensor) or (0,)) for p in group.probes)
    units = group.blocks * group.size
    return {"gate:macs": np.array([group.macs / units]), "gate:memory": np.array([max(elements / units, 1.0)])}
