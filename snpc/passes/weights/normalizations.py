"""Normalizations over units that are partly cut: their nodes, gain, bias and consumers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.graph import is_stored_constant, static_shape
from snpc.ops import lookup
from snpc.passes.grouping import TracedGraph
from snpc.passes.propagation import (
    Contraction,
    NormalizationStatistic,
    RemovedUnits,
    affected_statistics,
    removed_along,
    statistic_paths,
    varying_axes,
)
from snpc.passes.weights.consumers import ConsumerWeight, single_consumer_weight
from snpc.passes.weights.edits import UnsupportedWeightForm, WeightSlice
from snpc.types import Group, IntArray, Probe


@dataclass(frozen=True)
class Normalization:
    """``output`` = gain * normalized(...) + bias, over positions along ``axis`` (from the right), of which ``stays``
    [positions] stay. ``nodes`` make it, in order; ``statistics`` are the means among them. ``centered``: a mean is
    subtracted."""

    nodes: tuple[ir.Node, ...]
    statistics: tuple[NormalizationStatistic, ...]
    output: ir.Value
    axis: int
    stays: npt.NDArray[np.bool_]
    gain: str | None
    bias: str | None
    centered: bool = True


def affected_normalizations(traced_graph: TracedGraph, removed: RemovedUnits) -> list[Normalization]:
    """Every normalization from whose statistics units are removed, in graph order."""
    order = {node: k for k, node in enumerate(traced_graph.model.graph)}
    normalizations = []
    for bundle in group_statistics(traced_graph, removed):
        nodes = {node for _, steps, meets in bundle for node in (*steps, *meets)}
        last = max((node for _, _, meets in bundle for node in meets), key=order.__getitem__, default=None)
        if last is None:
            continue
        chain, gain, bias = affine_nodes(last, bundle[0][0], traced_graph)
        output = chain[-1].outputs[0]
        own = own_axis(output, bundle[0][0], traced_graph)
        lost = [] if own is None else list(removed_along(traced_graph.trace.values.get(output), [own], removed))
        if len(lost) == 1:
            all_nodes = tuple(sorted({*nodes, *chain}, key=order.__getitem__))
            statistics = tuple(s for s, _, _ in bundle)
            centered = len(statistics) > 1 or statistics[0].context.spec.centered
            normalizations.append(Normalization(all_nodes, statistics, output, *lost[0], gain, bias, centered))
    return sorted(normalizations, key=lambda normalization: order[normalization.nodes[0]])


def with_own_parameters(traced_graph: TracedGraph, normalization: Normalization) -> Normalization:
    """The same without a gain or bias that others use too, which then cannot be fitted to this one."""
    names = [
        None if name is None or len(traced_graph.model.graph.initializers[name].uses()) > 1 else name
        for name in (normalization.gain, normalization.bias)
    ]
    return replace(normalization, gain=names[0], bias=names[1])


@dataclass(frozen=True)
class HiddenNormalization:
    """Gain and bias behind the normalizations of a hidden layer, or of queries or keys, with a probe of the output of
    each of these.

    ``bias`` is None where nothing is added. ``centered``: a mean is subtracted. ``positions``: over how many positions
    of each channel a statistic is taken (all of a picture's, or one token's). A unit may have several channels, two of
    a rotary pair. ``products``: numbers of the products of query and key whose scores this gain is fitted to.
    """

    gain: str
    bias: str | None
    centered: bool
    probes: tuple[Probe, ...]
    positions: int = 1
    products: tuple[int, ...] = ()

    @property
    def channels(self) -> IntArray:
        """[channels]: the position of each in gain and bias, unit by unit."""
        return np.argsort(self.probes[0].units.reshape(-1), kind="stable")


def hidden_normalizations(
    traced_graph: TracedGraph, group: Group, products: Sequence[Contraction] = ()
) -> tuple[HiddenNormalization, ...]:
    """The normalizations inside a hidden layer, or of queries and keys that meet in ``products``, whose gain can be
    fitted: it applies to all units of ``group``, equally often to each, and to nothing else."""
    removed = np.zeros(traced_graph.trace.table.count, bool)
    first = next(site for site in group.sites if (site.units == 0).any())
    unit = units_of_constant(traced_graph, first.tensor, first.axis)
    numbers = dict(zip(unit[first.units >= 0].tolist(), first.units[first.units >= 0].tolist(), strict=True))
    removed[unit[first.units == 0]] = True
    cut = traced_graph.units.removal(removed)
    found: dict[tuple[str, str | None, bool], list[Normalization]] = defaultdict(list)
    for norm in affected_normalizations(traced_graph, cut):
        members, counts = np.unique(normalized_units(traced_graph, norm), return_counts=True)
        if norm.gain is not None and set(members.tolist()) == set(numbers) and (counts == counts[0]).all():
            found[norm.gain, norm.bias, norm.centered].append(norm)
    fitted = {
        key: norms
        for key, norms in found.items()
        if all(has_no_other_user(traced_graph, name, norms) for name in key[:2] if name is not None)
    }
    fitted_products = products_by_gain({gain: norms for (gain, *_), norms in fitted.items()}, products)
    return tuple(
        HiddenNormalization(
            gain,
            bias,
            centered,
            tuple(normalized_probe(traced_graph, norm, numbers) for norm in norms),
            max(1, statistic_size(norms[0].statistics[0]) // len(norms[0].stays)),
            fitted_products[gain],
        )
        for (gain, bias, centered), norms in fitted.items()
    )


def products_by_gain(
    normalizations: Mapping[str, Sequence[Normalization]], products: Sequence[Contraction]
) -> dict[str, tuple[int, ...]]:
    """Gain -> the numbers of the products whose scores it is fitted to: those whose queries it makes, or whose keys
    where no gain makes the queries."""
    made: dict[int, list[tuple[bool, str]]] = defaultdict(list)
    for gain, norms in normalizations.items():
        for number, is_key in {pair for norm in norms for pair in products_behind(norm.output, products)}:
            made[number].append((is_key, gain))
    chosen = sorted((number, min(gains)[1]) for number, gains in made.items())
    return {gain: tuple(number for number, of_gain in chosen if of_gain == gain) for gain in normalizations}


def products_behind(value: ir.Value, products: Sequence[Contraction]) -> set[tuple[int, bool]]:
    """(number, is it the key?) of each product that reads ``value`` with no product in between."""
    found: set[tuple[int, bool]] = set()
    todo, seen = [value], {value}
    while todo:
        for node, index in todo.pop().uses():
            spec = lookup(node.domain, node.op_type)
            query = 0 if spec.kind == "attention" else spec.operands[0] if spec.operands else 0
            found |= {(number, index != query) for number, p in enumerate(products) if p.node is node}
            outputs = [] if spec.kind in ("contraction", "attention") else [v for v in node.outputs if v not in seen]
            seen.update(outputs)
            todo += outputs
    return found


def statistic_size(statistic: NormalizationStatistic) -> int:
    """Over how many entries each mean is taken."""
    call, rule = statistic.context.call, statistic.context.spec.axes
    return 0 if rule is None else math.prod(call.shape(0)[axis] for axis in rule(call))


def normalized_probe(traced_graph: TracedGraph, norm: Normalization, numbers: Mapping[int, int]) -> Probe:
    """The output of a normalization, with the number of each unit in its group."""
    rank = len(traced_graph.trace.values[norm.output].shape)
    shape = [1] * rank
    shape[norm.axis] = -1
    units = np.array([numbers[unit] for unit in normalized_units(traced_graph, norm).tolist()], np.int64)
    return Probe("normalized", str(norm.output.name), units.reshape(shape))


def has_no_other_user(traced_graph: TracedGraph, name: str, norms: Sequence[Normalization]) -> bool:
    users = {node for norm in norms for node in norm.nodes}
    return users.issuperset(traced_graph.model.graph.initializers[name].consumers())


StatisticPath = tuple[NormalizationStatistic, tuple[ir.Node, ...], tuple[ir.Node, ...]]
"""A statistic, the nodes up to where it is combined with its positions again, and the nodes that combine them."""


def group_statistics(traced_graph: TracedGraph, removed: RemovedUnits) -> list[list[StatisticPath]]:
    """Statistics grouped by normalization: a variance is taken of what a mean was subtracted from."""
    parts: list[StatisticPath] = []
    for statistic in affected_statistics(traced_graph.trace, removed):
        paths = statistic_paths(statistic, traced_graph.trace)
        parts.append((statistic, (*square_nodes(statistic, traced_graph), *paths.statistic_nodes), paths.rejoin_nodes))
    bundles: list[list[StatisticPath]] = []
    for part in parts:
        joined_bundles = [
            bundle
            for bundle in bundles
            if any(feeds_statistic(other, part) or feeds_statistic(part, other) for other in bundle)
        ]
        joined = [*(p for bundle in joined_bundles for p in bundle), part]
        bundles = [bundle for bundle in bundles if not any(bundle is other for other in joined_bundles)] + [joined]
    return bundles


def square_nodes(statistic: NormalizationStatistic, traced_graph: TracedGraph) -> tuple[ir.Node, ...]:
    """The pointwise nodes before a statistic that read one labeled tensor: its square."""
    squares: list[ir.Node] = []
    value = statistic.context.node.inputs[0]
    while statistic.context.spec.kind == "reduce" and value is not None and value.producer() is not None:
        node = value.producer()
        assert node is not None
        labeled = {v for v in node.inputs if v is not None and v.producer() is not None}
        if (
            lookup(node.domain, node.op_type).kind != "pointwise"
            or len(labeled) != 1
            or reads_labeled_constant(node, traced_graph)
        ):
            break
        squares.append(node)
        (value,) = labeled
    return tuple(reversed(squares))


def reads_labeled_constant(node: ir.Node, traced_graph: TracedGraph) -> bool:
    """Does a node read labeled constants (a gain or a bias)?"""
    return any(v is not None and v.producer() is None and traced_graph.trace.values[v].factors for v in node.inputs)


def feeds_statistic(first: StatisticPath, second: StatisticPath) -> bool:
    """Is the second statistic, or what it normalizes, computed from the output of the first normalization step?"""
    if "normalize" in (first[0].context.spec.kind, second[0].context.spec.kind):
        return first[0].context.node is second[0].context.node
    written = {value for node in first[2] for value in node.outputs}
    used = {value for node in (*second[1], *second[2]) for value in node.inputs}
    return not written.isdisjoint(used)


def own_axis(value: ir.Value, statistic: NormalizationStatistic, traced_graph: TracedGraph) -> int | None:
    """The axis of ``value`` (from the right) on which each unit of a statistic has one position; None where there is
    none, as where channels are folded into one axis with the positions of a picture."""
    units = np.unique(traced_graph.units.unit_of_label[statistic.labels[statistic.labels >= 0]])
    labeled = traced_graph.trace.values.get(value)
    for labels in labeled.factors if labeled is not None else ():
        axes = varying_axes(labels)
        if len(axes) == 1 and np.isin(traced_graph.units.unit_of_label[labels[labels >= 0]], units).any():
            (axis,) = axes
            same_size = labels.size == traced_graph.trace.values[value].shape[axis] <= statistic.labels.size
            return axis - labels.ndim if same_size and len(np.unique(labels)) == labels.size else None
    return None


def affine_nodes(
    last: ir.Node, statistic: NormalizationStatistic, traced_graph: TracedGraph
) -> tuple[list[ir.Node], str | None, str | None]:
    """(nodes from ``last`` on that apply gain and bias, gain, bias): inside one node, or in nodes behind it."""
    spec = lookup(last.domain, last.op_type)
    if spec.affine:
        given = [last.inputs[k] if k < len(last.inputs) else None for k in spec.affine]
        names = [vector_name(value, last, statistic, traced_graph) for value in given] + [None]
        return [last], names[0], names[1]
    folded = own_axis(last.outputs[0], statistic, traced_graph) is None
    chain, names = [last], [None, None]
    for step, effect in enumerate(("scale", "add")):
        ahead: list[ir.Node] = []
        node = sole_consumer(chain[-1])
        while node is not None and (
            lookup(node.domain, node.op_type).effect == "same"
            or (folded and lookup(node.domain, node.op_type).kind == "movement")
        ):
            ahead.append(node)
            node = sole_consumer(node)
        spec = lookup(node.domain, node.op_type) if node is not None else spec
        if node is None or spec.kind != "pointwise" or spec.effect != effect or spec.divides or spec.subtracts:
            break
        found = (vector_name(v, node, statistic, traced_graph) for v in node.inputs)
        names[step] = next((name for name in found if name), None)
        if names[step] is None:
            break
        chain += [*ahead, node]
    return chain, names[0], names[1]


def sole_consumer(node: ir.Node) -> ir.Node | None:
    users = list(node.outputs[0].consumers())
    return users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def vector_name(
    value: ir.Value | None, node: ir.Node, statistic: NormalizationStatistic, traced_graph: TracedGraph
) -> str | None:
    """The name of a constant that has an entry per position."""
    shape, axis = traced_graph.facts.shape.get(node.outputs[0]), own_axis(node.outputs[0], statistic, traced_graph)
    if value is None or value.const_value is None or not is_stored_constant(value) or not shape or axis is None:
        return None
    own, width = static_shape(value.const_value), shape[axis]
    at = -1 if any(k < 0 for k in lookup(node.domain, node.op_type).per_axis) else axis  # a vector per channel, or so
    if len(own) < -at or own[at] != width or math.prod(own) != width:
        return None
    return str(value.name)


# -- consumers of a normalization --------------------------------------------------------------------------------------


def normalization_consumers(
    traced_graph: TracedGraph, normalization: Normalization, groups: Sequence[Group]
) -> list[ConsumerWeight]:
    """Matrices that multiply every row of the normalization's output."""
    same = rearranged_values(normalization.output, traced_graph)
    consumers = []
    for group in groups:
        for site in group.sites:
            try:
                reader = single_consumer_weight(traced_graph, replace(group, sites=(site,)))
            except UnsupportedWeightForm:
                continue
            if (
                len(reader.nodes) > 1
                or normalization.axis != -1
                or same.isdisjoint(reader.node.inputs)
                or not has_single_use(traced_graph, site.tensor)
            ):
                continue
            if (
                normalized_units(traced_graph, normalization) == units_of_constant(traced_graph, site.tensor, site.axis)
            ).all():
                every = np.arange(len(normalization.stays))[None]
                consumers.append(replace(reader, weight_slice=WeightSlice(site.tensor, site.axis, (every,))))
    return consumers


def rearranged_values(value: ir.Value, traced_graph: TracedGraph) -> set[ir.Value]:
    """The values that hold all rows of ``value`` unchanged, in any order."""
    values = {value}
    todo = [value]
    while todo:
        before = todo.pop()
        old = traced_graph.facts.shape.get(before)
        for node in before.consumers():
            spec = lookup(node.domain, node.op_type)
            new = traced_graph.facts.shape.get(node.outputs[0])
            moved = spec.effect == "same" or (spec.kind == "movement" and node.inputs[0] is before)
            if moved and old and new and old[-1] == new[-1] and math.prod(old) == math.prod(new):
                values.add(node.outputs[0])
                todo.append(node.outputs[0])
    return values


def has_single_use(traced_graph: TracedGraph, tensor: str) -> bool:
    """Does a constant have one consumer, directly or through movement? An embedding tied to the last layer has two."""
    value = traced_graph.model.graph.initializers[tensor]
    while len(value.uses()) == 1 and not value.is_graph_output():
        (node,) = value.consumers()
        if lookup(node.domain, node.op_type).kind != "movement":
            return True
        value = node.outputs[0]
    return False


def normalized_units(traced_graph: TracedGraph, normalization: Normalization) -> npt.NDArray[np.int64]:
    labeled = traced_graph.trace.values[normalization.output]
    labels = next(f for f in labeled.factors if varying_axes(f) == {f.ndim + normalization.axis})
    return traced_graph.units.unit_of_label[labels.reshape(-1)]


def units_of_constant(traced_graph: TracedGraph, tensor: str, axis: int) -> npt.NDArray[np.int64]:
    labeled_axis = next(a for a in traced_graph.trace.table.axes if a.constant.name == tensor and a.axis == axis)
    return traced_graph.units.unit_of_label[labeled_axis.first_label : labeled_axis.first_label + labeled_axis.size]
