"""Normalisations over units that are partly cut: what they are made of, their gain and bias, and what reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.ops import lookup
from snpc.passes.grouping.traced import TracedGraph
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.removal import RemovedUnits, affected_statistics, removed_along
from snpc.passes.propagation.state import NormalizationStatistic
from snpc.passes.propagation.statistics import statistic_paths
from snpc.passes.weights.consumers import ConsumerWeight, single_consumer_weight
from snpc.passes.weights.edits import UnsupportedWeightForm, WeightSlice, is_exclusive_vector
from snpc.types import Group


@dataclass(frozen=True)
class Normalization:
    """``output`` = gain * normalised(...) + bias, over positions along ``axis`` (from the right), of which ``stays``
    [positions] stay. ``nodes`` make it, in order; ``statistics`` are the means among them."""

    nodes: tuple[ir.Node, ...]
    statistics: tuple[NormalizationStatistic, ...]
    output: ir.Value
    axis: int
    stays: npt.NDArray[np.bool_]
    gain: str | None
    bias: str | None


def affected_normalizations(traced: TracedGraph, dead: RemovedUnits) -> list[Normalization]:
    """Every normalisation whose statistics lose something, in the order of the graph."""
    order = {node: k for k, node in enumerate(traced.model.graph)}
    found = []
    for bundle in group_statistics(traced, dead):
        nodes = {node for _, steps, meets in bundle for node in (*steps, *meets)}
        last = max((node for _, _, meets in bundle for node in meets), key=order.__getitem__, default=None)
        if last is None:
            continue
        chain, gain, bias = affine_nodes(last, traced)
        output = chain[-1].outputs[0]
        lost = list(removed_along(traced.trace.values.get(output), bundle[0][0].axes, dead))
        if len(lost) == 1:
            made = tuple(sorted({*nodes, *chain}, key=order.__getitem__))
            found.append(Normalization(made, tuple(s for s, _, _ in bundle), output, *lost[0], gain, bias))
    return sorted(found, key=lambda norm: order[norm.nodes[0]])


StatisticPath = tuple[NormalizationStatistic, tuple[ir.Node, ...], tuple[ir.Node, ...]]
"""A statistic, the nodes up to where it meets its positions again, and the nodes where it does."""


def group_statistics(traced: TracedGraph, dead: RemovedUnits) -> list[list[StatisticPath]]:
    """Statistics by the normalisation they belong to: a variance is of what a mean was subtracted from."""
    parts: list[StatisticPath] = []
    for statistic in affected_statistics(traced.trace, dead):
        paths = statistic_paths(statistic, traced.trace)
        parts.append((statistic, (*square_nodes(statistic, traced), *paths.statistic_nodes), paths.rejoin_nodes))
    found: list[list[StatisticPath]] = []
    for part in parts:
        mine = [
            bundle
            for bundle in found
            if any(feeds_statistic(other, part) or feeds_statistic(part, other) for other in bundle)
        ]
        joined = [*(p for bundle in mine for p in bundle), part]
        found = [bundle for bundle in found if not any(bundle is other for other in mine)] + [joined]
    return found


def square_nodes(statistic: NormalizationStatistic, traced: TracedGraph) -> tuple[ir.Node, ...]:
    """The nodes ahead of a statistic that work on one labelled tensor alone: its square."""
    found: list[ir.Node] = []
    value = statistic.context.node.inputs[0]
    while statistic.context.spec.kind == "reduce" and value is not None and value.producer() is not None:
        node = value.producer()
        assert node is not None
        labelled = {v for v in node.inputs if v is not None and v.producer() is not None}
        if (
            lookup(node.domain, node.op_type).kind != "pointwise"
            or len(labelled) != 1
            or reads_labeled_constant(node, traced)
        ):
            break
        found.append(node)
        (value,) = labelled
    return tuple(reversed(found))


def reads_labeled_constant(node: ir.Node, traced: TracedGraph) -> bool:
    """Does a node bring in labelled constants (a gain or a bias)?"""
    return any(v is not None and v.producer() is None and traced.trace.values[v].factors for v in node.inputs)


def feeds_statistic(first: StatisticPath, second: StatisticPath) -> bool:
    """Does the second statistic, or what it normalises, come right from where the first met its positions?"""
    if "normalize" in (first[0].context.spec.kind, second[0].context.spec.kind):
        return first[0].context.node is second[0].context.node
    made = {value for node in first[2] for value in node.outputs}
    read = {value for node in (*second[1], *second[2]) for value in node.inputs}
    return not made.isdisjoint(read)


def affine_nodes(last: ir.Node, traced: TracedGraph) -> tuple[list[ir.Node], str | None, str | None]:
    """The nodes from ``last`` on that apply gain and bias, and the constants: inside one node, or behind it."""
    spec = lookup(last.domain, last.op_type)
    if spec.affine:
        given = [last.inputs[k] if k < len(last.inputs) else None for k in spec.affine]
        names = [exclusive_vector_name(value, last, traced) for value in given] + [None]
        return [last], names[0], names[1]
    chain, names = [last], [None, None]
    for step, effect in enumerate(("scale", "add")):
        ahead: list[ir.Node] = []
        node = sole_consumer(chain[-1])
        while node is not None and lookup(node.domain, node.op_type).effect == "same":
            ahead.append(node)
            node = sole_consumer(node)
        spec = lookup(node.domain, node.op_type) if node is not None else spec
        if node is None or spec.kind != "pointwise" or spec.effect != effect or spec.divides or spec.subtracts:
            break
        names[step] = next((name for v in node.inputs if (name := exclusive_vector_name(v, node, traced))), None)
        if names[step] is None:
            break
        chain += [*ahead, node]
    return chain, names[0], names[1]


def sole_consumer(node: ir.Node) -> ir.Node | None:
    users = list(node.outputs[0].consumers())
    return users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def exclusive_vector_name(value: ir.Value | None, node: ir.Node, traced: TracedGraph) -> str | None:
    """The name of a constant that has an entry per position and no other use."""
    shape = traced.facts.shape.get(node.outputs[0])
    if value is None or not shape or not is_exclusive_vector(value, shape[-1]):
        return None
    return str(value.name)


# -- what reads a normalisation --------------------------------------------------------------------------------------


def normalization_consumers(traced: TracedGraph, norm: Normalization, groups: Sequence[Group]) -> list[ConsumerWeight]:
    """Matrices that multiply every row of the norm's output, position by position."""
    same = rearranged_values(norm.output, traced)
    found = []
    for group in groups:
        for site in group.sites:
            try:
                reader = single_consumer_weight(traced, replace(group, sites=(site,)))
            except UnsupportedWeightForm:
                continue
            if (
                len(reader.nodes) > 1
                or norm.axis != -1
                or same.isdisjoint(reader.node.inputs)
                or not has_single_use(traced, site.tensor)
            ):
                continue
            if (normalized_units(traced, norm) == units_of_constant(traced, site.tensor, site.axis)).all():
                every = np.arange(len(norm.stays))[None]
                found.append(replace(reader, place=WeightSlice(site.tensor, site.axis, (every,))))
    return found


def rearranged_values(value: ir.Value, traced: TracedGraph) -> set[ir.Value]:
    """The values that hold the rows of ``value``, all of them and as they are, in whatever order."""
    found = {value}
    todo = [value]
    while todo:
        before = todo.pop()
        old = traced.facts.shape.get(before)
        for node in before.consumers():
            spec = lookup(node.domain, node.op_type)
            new = traced.facts.shape.get(node.outputs[0])
            moved = spec.effect == "same" or (spec.kind == "movement" and node.inputs[0] is before)
            if moved and old and new and old[-1] == new[-1] and math.prod(old) == math.prod(new):
                found.add(node.outputs[0])
                todo.append(node.outputs[0])
    return found


def has_single_use(traced: TracedGraph, tensor: str) -> bool:
    """Has a constant one use, directly or through movement? A table that is also the last layer has two."""
    value = traced.model.graph.initializers[tensor]
    while len(value.uses()) == 1 and not value.is_graph_output():
        (node,) = value.consumers()
        if lookup(node.domain, node.op_type).kind != "movement":
            return True
        value = node.outputs[0]
    return False


def normalized_units(traced: TracedGraph, norm: Normalization) -> npt.NDArray[np.int64]:
    carried = traced.trace.values[norm.output]
    labels = next(f for f in carried.factors if varying_axes(f) == {f.ndim + norm.axis})
    return traced.units.unit_of_label[labels.reshape(-1)]


def units_of_constant(traced: TracedGraph, tensor: str, axis: int) -> npt.NDArray[np.int64]:
    found = next(a for a in traced.trace.table.axes if a.constant.name == tensor and a.axis == axis)
    return traced.units.unit_of_label[found.first_label : found.first_label + found.size]
