"""Whole experts as units: what pins them, how many must stay, what is theirs alone, and where they are observed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from snpc.graph import is_float
from snpc.ops import lookup
from snpc.passes.grouping.units import Units
from snpc.passes.propagation import LabelFlag, LabelPin, Trace
from snpc.types import BoolArray, IntArray, Probe


def routed_units(trace: Trace, units: Units) -> BoolArray:
    """[labels]: which units are experts that data choose."""
    routed = np.zeros(trace.table.count, bool)
    flags = trace.table.flags[: trace.table.count]
    routed[units.unit_of_label[(flags & int(LabelFlag.ROUTED)) > 0]] = True
    return routed


def pins_that_hold(trace: Trace, units: Units) -> list[LabelPin]:
    """The pins of all labels, without those of experts for being compared: those that go lose every comparison."""
    routed = routed_units(trace, units)
    return [
        pin for pin in trace.table.pins if pin.kind != "choice" or not routed[units.unit_of_label[pin.labels]].all()
    ]


def least_experts(trace: Trace, units: Units, grid: IntArray) -> int:
    """Of a group with the units ``grid`` [blocks, size]: as many as the router chooses must stay, at least 1."""
    members = np.unique(grid)
    counts = [c.most for c in trace.comparisons if np.isin(units.unit_of_label[np.unique(c.labels)], members).all()]
    return max(counts, default=1) or 1


def owned_constants(trace: Trace, units: Units, numbers: Mapping[int, int]) -> tuple[tuple[str, ...], ...]:
    """[units] names of the float constants that nothing reads but the nodes of one expert; () where experts have no
    nodes of their own. ``numbers``: cell -> index of its unit within the group."""
    owned: dict[int, list[str]] = defaultdict(list)
    for node, label in trace.expert_outputs.items():
        unit = numbers.get(int(units.cell_of_label[label]))
        if unit is not None:
            owned[unit] += sorted(str(v.name) for v in constants_behind(node))
    return tuple(tuple(owned[k]) for k in range(max(numbers.values()) + 1)) if owned else ()


def constants_behind(node: ir.Node) -> set[ir.Value]:
    """The float constants that are read only to compute what ``node`` adds to its first input."""
    dead, constants = {node}, set[ir.Value]()
    waiting = [v for v in node.inputs[1:] if v is not None]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output() or any(user not in dead for user in value.consumers()):
            continue
        producer = value.producer()
        if producer is not None and producer not in dead:
            if all(user in dead for out in producer.outputs for user in out.consumers()):
                dead.add(producer)
                waiting += [v for v in producer.inputs if v is not None]
        elif producer is None and value.const_value is not None and is_float(value.const_value.dtype):
            constants.add(value)
    return constants


def expert_probes(trace: Trace, units: Units, numbers: Mapping[int, int]) -> tuple[Probe, ...]:
    """What the experts of a group add to their tokens: a value of each expert, or one of all for each layer."""
    probes = []
    for node, label in trace.expert_outputs.items():
        unit, updates = numbers.get(int(units.cell_of_label[label])), node.inputs[2]
        if unit is not None and updates is not None:
            probes.append(Probe("expert", str(updates.name), np.array([[unit]])))
    by_indices: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in trace.expert_reads:
        if node.inputs[1] is not None:
            by_indices[node.inputs[1]].append(node)
    for indices, nodes in by_indices.items():
        own = units.cell_of_label[trace.expert_reads[nodes[0]]]
        if all(int(unit) in numbers for unit in own):
            translated = np.array([numbers[int(unit)] for unit in own])
            outputs = weighted_outputs(trace, nodes, indices)
            probes += [Probe("expert", str(v.name), translated, str(indices.name)) for v in outputs]
    return tuple(probes)


def weighted_outputs(trace: Trace, nodes: list[ir.Node], indices: ir.Value) -> Iterator[ir.Value]:
    """Results of products with weights that ``nodes`` read, times the gate of each token: one row for each of
    ``indices``."""
    read = {str(v.name) for v in moved_from([node.outputs[0] for node in nodes])}
    products = {
        str(c.node.outputs[0].name) for c in trace.contractions if {c.left.name, c.right.name} & read and c.has_weight
    }
    rows = np.prod(trace.values[indices].shape, dtype=np.int64)
    for value, labeled in trace.values.items():
        node = value.producer()
        spec = lookup(node.domain, node.op_type) if node is not None else None
        if node is None or spec is None or spec.effect != "scale" or spec.divides or len(node.inputs) != 2:
            continue
        if not labeled.products & products or np.prod(labeled.shape[:-1], dtype=np.int64) != rows:
            continue
        sides = [trace.values.get(v) for v in node.inputs if v is not None]
        if any(side is not None and not side.factors and not side.constant and side.shape[-1] == 1 for side in sides):
            yield value


def moved_from(values: list[ir.Value]) -> Iterator[ir.Value]:
    """``values``, and all that movement makes of them."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        yield value
        for user in value.consumers():
            if lookup(user.domain, user.op_type).kind == "movement" and user.inputs[0] is value:
                waiting += user.outputs
