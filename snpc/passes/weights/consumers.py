"""The weights that consume a group's units, with the columns of each unit (several by repeats and kernel size)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph import attribute_values, movement_root
from snpc.ops import lookup
from snpc.passes.grouping import TracedGraph
from snpc.passes.propagation import Contraction, LabeledValue, varying_axes
from snpc.passes.weights.edits import UnsupportedWeightForm, WeightEdits, WeightSlice, unit_positions
from snpc.types import FloatArray, Group, IntArray, Probe, Site


@dataclass(frozen=True)
class ConsumerWeight:
    """A weight that consumes a group: the positions of its units, the nodes that use the weight (several where layers
    share it), the number of its outputs, and of the offsets at which a kernel reads each position."""

    weight_slice: WeightSlice
    nodes: tuple[ir.Node, ...]
    width: int
    taps: int = 1

    @property
    def node(self) -> ir.Node:
        return self.nodes[0]

    @property
    def columns(self) -> int:
        """How many columns belong to one unit: repeats times offsets."""
        return len(self.weight_slice.index) * self.taps

    def array(self, traced_graph: TracedGraph, edits: WeightEdits | None = None) -> FloatArray:
        """[positions, D, offsets] in float64, after the edits so far."""
        tensor = traced_graph.model.graph.initializers[self.weight_slice.tensor].const_value
        assert tensor is not None
        array = tensor.numpy().astype(np.float64)
        for change in edits.changes.get(self.weight_slice.tensor, ()) if edits is not None else ():
            array = change(array)
        moved = np.moveaxis(array, self.weight_slice.axis, 0)
        return moved.reshape(len(moved), -1, self.taps)

    def rows(self, traced_graph: TracedGraph, block: int, edits: WeightEdits | None = None) -> FloatArray:
        """[repeats, size, D] of one block."""
        array = self.array(traced_graph, edits)[..., 0]
        return np.stack([array[index[block]] for index in self.weight_slice.index])

    def matrix(self, traced_graph: TracedGraph, edits: WeightEdits | None = None) -> FloatArray:
        """[units * columns, D]: the columns of a unit next to each other."""
        picked = self.array(traced_graph, edits)[self.positions()]  # [units, repeats, D, offsets]
        return np.moveaxis(picked, 2, 3).reshape(-1, self.width)

    def positions(self) -> IntArray:
        """[units, repeats]: the positions of each unit along the axis."""
        return np.stack([index.reshape(-1) for index in self.weight_slice.index], axis=1)

    def put(self, edits: WeightEdits, units: IntArray, rows: FloatArray) -> None:
        """Write ``rows`` [units * columns, D] to the positions of these units, and zero to those of the others."""
        where, taps, width = self.positions(), self.taps, self.width
        rows = edits.keep(rows)
        laid = np.moveaxis(rows.reshape(len(units), -1, taps, width), 3, 2)  # [units, repeats, D, offsets]

        def change(array: FloatArray, axis: int = self.weight_slice.axis) -> FloatArray:
            moved = np.moveaxis(array, axis, 0)
            moved[where] = 0.0
            moved[where[units]] = laid.reshape(*where[units].shape, *moved.shape[1:])
            return array

        edits.changes.setdefault(self.weight_slice.tensor, []).append(change)


@dataclass(frozen=True)
class ConsumerUse:
    """One node that consumes a group through ``consumer``: the probe of its input, with the units along ``axis``."""

    consumer: ConsumerWeight
    node: ir.Node
    probe: Probe
    axis: int


def consumer_weights(traced_graph: TracedGraph, group: Group) -> list[ConsumerWeight]:
    """Every weight that consumes the group. Raises UnsupportedWeightForm where one cannot be refitted."""
    sites = [s for s in group.sites if s.kind == "consume"]
    if not sites:
        raise UnsupportedWeightForm("no weight reads it")
    return [consumer_weight_at(traced_graph, group, site) for site in sites]


def single_consumer_weight(traced_graph: TracedGraph, group: Group) -> ConsumerWeight:
    """The one matrix that consumes a group's units. Raises UnsupportedWeightForm where there is none, or several."""
    consumers = consumer_weights(traced_graph, group)
    if len(consumers) != 1:
        raise UnsupportedWeightForm(f"{len(consumers)} weights read it")
    if consumers[0].taps != 1:
        raise UnsupportedWeightForm("its consumer is a kernel")
    return consumers[0]


def consumer_weight_at(traced_graph: TracedGraph, group: Group, site: Site) -> ConsumerWeight:
    users = list(consuming_products(traced_graph, site.tensor))
    tensor = traced_graph.model.graph.initializers[site.tensor].const_value
    windowed = {bool(c.letters.windowed) for c, _ in users}
    if tensor is None or not users or len(windowed) != 1:
        raise UnsupportedWeightForm("what reads it is not one matrix")
    sizes = [int(n) for n in tensor.shape]  # type: ignore[arg-type]
    if windowed == {True}:
        if site.axis != 1:
            raise UnsupportedWeightForm("its consumer is a transposed convolution")
    elif len(sizes) != 2:
        raise UnsupportedWeightForm("what reads it is not one matrix")
    width = sizes[0] if windowed == {True} else sizes[1 - site.axis]
    for contraction, side in users:
        check_consumer_form(traced_graph, contraction, side, width)
    weight_slice = WeightSlice(site.tensor, site.axis, unit_positions(site.units, group))
    return ConsumerWeight(weight_slice, tuple(c.node for c, _ in users), width, int(np.prod(sizes[2:], dtype=np.int64)))


def check_consumer_form(traced_graph: TracedGraph, contraction: Contraction, side: LabeledValue, width: int) -> None:
    node, letters = contraction.node, contraction.letters
    if lookup(node.domain, node.op_type).has_activation:
        raise UnsupportedWeightForm("its consumer applies an activation")
    if any(attribute_values(node).get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        raise UnsupportedWeightForm("its consumer scales the sum")
    if letters.windowed:
        return
    letters_of_side = letters.left if side is contraction.left else letters.right
    shape = traced_graph.facts.shape.get(node.outputs[0])
    if letters.out[-1:] not in letters_of_side or not shape or shape[-1] != width:
        raise UnsupportedWeightForm("its consumer's outputs do not lie along the last axis")


def consuming_products(traced_graph: TracedGraph, tensor: str) -> Iterator[tuple[Contraction, LabeledValue]]:
    """(product, its constant side) of every product that a constant enters, directly or through movement."""
    constant = traced_graph.model.graph.initializers[tensor]
    for contraction in traced_graph.trace.contractions:
        for side in (contraction.left, contraction.right):
            if contraction.has_weight and side.constant and is_moved_constant(contraction, side, constant):
                yield contraction, side


def is_moved_constant(contraction: Contraction, side: LabeledValue, constant: ir.Value) -> bool:
    """Is ``side`` this constant, directly or through movement?"""
    for value in contraction.node.inputs:
        if value is not None and value.name == side.name:
            return movement_root(value) is constant
    return False


def consumer_uses(traced_graph: TracedGraph, group: Group) -> list[list[ConsumerUse]]:
    """Per consumer weight, the nodes that use it with their probes. Raises UnsupportedWeightForm where an input cannot
    be measured column by column."""
    probes = {p.tensor: p for p in group.probes if p.kind in ("hidden", "context")}
    uses_by_consumer = []
    for consumer in consumer_weights(traced_graph, group):
        uses = [
            consumer_use_at(traced_graph, consumer, c, side, probes)
            for c, side in consuming_products(traced_graph, consumer.weight_slice.tensor)
        ]
        uses_by_consumer.append(uses)
    return uses_by_consumer


def consumer_use_at(
    traced_graph: TracedGraph,
    consumer: ConsumerWeight,
    contraction: Contraction,
    weight: LabeledValue,
    probes: dict[str, Probe],
) -> ConsumerUse:
    letters = contraction.letters
    data, letters_of_side, other = (
        (contraction.right, letters.right, letters.left)
        if weight is contraction.left
        else (contraction.left, letters.left, letters.right)
    )
    probe = probes.get(data.name)
    summed = [k for k, c in enumerate(letters_of_side) if c in other and c not in letters.out]
    if probe is None or len(summed) != 1 or probe.units.ndim != len(letters_of_side):
        raise UnsupportedWeightForm("its activations cannot be measured")
    axis = summed[0]
    if not axis:
        raise UnsupportedWeightForm("its activations cannot be measured")
    seen = probe.units.reshape(-1)
    order = summation_order(traced_graph, consumer, weight)
    if probe.units.size != probe.units.shape[axis] or order is None or len(seen) != len(order):
        raise UnsupportedWeightForm("its activations cannot be measured")
    owners = np.full(len(seen), -1, np.int64)
    owners[consumer.positions()] = np.arange(len(consumer.positions()))[:, None]
    if not np.array_equal(seen, owners[order]) or (np.diff(order) <= 0).any():
        raise UnsupportedWeightForm("its consumer takes its positions in another order")
    return ConsumerUse(consumer, contraction.node, probe, axis)


def summation_order(traced_graph: TracedGraph, consumer: ConsumerWeight, weight: LabeledValue) -> IntArray | None:
    """[summed positions]: the position along the weight's axis that each is multiplied with."""
    axis = next(
        a
        for a in traced_graph.trace.table.axes
        if str(a.constant.name) == consumer.weight_slice.tensor and a.axis == consumer.weight_slice.axis
    )
    for labels in weight.factors:
        if len(varying_axes(labels)) == 1 and labels.size == axis.size:
            offsets = labels.reshape(-1).astype(np.int64) - axis.first_label
            if offsets.min() >= 0 and offsets.max() < axis.size:
                return offsets
    return np.zeros(1, np.int64) if axis.size == 1 else None
