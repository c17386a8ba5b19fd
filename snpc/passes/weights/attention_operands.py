"""The products of query and key, of attention weights and value, and of hidden units and what reads them, with the
constants that produce their operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph import opset_version, static_shape
from snpc.ops import attention_form, lookup, qkv_widths
from snpc.passes.grouping import TracedGraph
from snpc.passes.propagation import Contraction, LabeledValue, varying_axes
from snpc.passes.weights.edits import UnsupportedWeightForm, WeightSlice, unit_positions
from snpc.passes.weights.linear_path import (
    LinearPath,
    NotLinear,
    constant_behind_movement,
    label_set,
    mark_constant,
    trace_linear_path,
)
from snpc.types import BoolArray, Group, IntArray


@dataclass(frozen=True)
class AttentionOperand:
    """One side of a product. ``part``: 0, 1 or 2 for query, key or value of a fused node."""

    product: Contraction
    side: LabeledValue
    part: int

    @property
    def value(self) -> ir.Value:
        """The input of a node that does one product only."""
        return next(v for v in self.product.node.inputs if v is not None and v.name == self.side.name)


def score_products(traced_graph: TracedGraph, group: Group) -> list[Contraction]:
    """The score products of a qk group: one, or several where layers share their weights."""
    tensors = {p.tensor for p in group.probes}
    products = [
        c
        for c in traced_graph.trace.contractions
        if not c.has_weight and c.part in ("", "scores") and c.left.name in tensors and c.right.name in tensors
    ]
    if not products:
        raise UnsupportedWeightForm("its query and key meet in no product that can be measured")
    return products


def operand_weights(traced_graph: TracedGraph, group: Group, side: int) -> list[WeightSlice]:
    """Constants that produce one operand (0: left, 1: right) of a qk group's score products."""
    products = score_products(traced_graph, group)
    return producer_weights(traced_graph, [AttentionOperand(c, (c.left, c.right)[side], side) for c in products], group)


def shared_operand_weights(traced_graph: TracedGraph, group: Group) -> list[WeightSlice]:
    """Constants that produce both operands of a qk group's score products: queries and keys are projected by one
    weight, as where two streams attend to each other by the same scores."""
    operands = [
        AttentionOperand(c, (c.left, c.right)[side], side)
        for c in score_products(traced_graph, group)
        for side in (0, 1)
    ]
    return producer_weights(traced_graph, operands, group)


@dataclass(frozen=True)
class ScoreAxes:
    """Axes of both operands of a score product, in the order batch axes, tokens, width."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    units: IntArray
    """[batch axes.., width]: the unit at each position of the query; size 1 on axes along which that does not vary."""
    split_inside: bool = False
    """Both operands are flat, and a fused node splits them into heads: axes are those inside."""


def score_axes(product: Contraction, group: Group) -> ScoreAxes:
    """Raises UnsupportedWeightForm where an operand does not have one axis of tokens and one of width."""
    probe = next((p for p in group.probes if p.tensor == product.left.name), None)
    if probe is None or not any(p.tensor == product.right.name for p in group.probes):
        raise UnsupportedWeightForm("its activations cannot be measured")
    left, right, out = product.letters.left, product.letters.right, product.letters.out
    if product.part and probe.units.ndim == 3:  # heads are split inside the node
        heads, width_of_head = product.left.shape[1], product.left.shape[3]
        return ScoreAxes((0, 1, 2, 3), (0, 1, 2, 3), probe.units.reshape(1, heads, width_of_head), True)
    width = [c for c in left if c in right and c not in out]
    batch = [c for c in left if c in right and c in out]
    tokens = [[c for c in side if c not in batch + width] for side in (left, right)]
    if len(width) != 1 or [len(t) for t in tokens] != [1, 1] or probe.units.ndim != len(left):
        raise UnsupportedWeightForm("its query and key are not rows of one width")
    orders = [
        tuple(side.index(c) for c in (*batch, *labels, *width))
        for side, labels in zip((left, right), tokens, strict=True)
    ]
    units = np.transpose(probe.units, orders[0])
    if units.shape[-2] != 1 or (probe.units.shape[0] > 1):
        raise UnsupportedWeightForm("its heads stand on the axis of the samples")
    return ScoreAxes(orders[0], orders[1], units[..., 0, :])


def value_operands(traced_graph: TracedGraph, group: Group) -> list[AttentionOperand]:
    """The value operands of a vo group: one, or several where layers share their weights."""
    tensors = {p.tensor for p in group.probes if p.kind == "value"}
    operands = [
        AttentionOperand(c, side, 2)
        for c in traced_graph.trace.contractions
        if not c.has_weight and c.part in ("", "context")
        for side in (c.left, c.right)
        if side.name in tensors and any(len(varying_axes(f)) for f in side.factors)
    ]
    if not operands:
        raise UnsupportedWeightForm("its values enter no product that can be measured")
    return operands


def value_weights(traced_graph: TracedGraph, group: Group) -> list[WeightSlice]:
    """Constants that produce a vo group's values."""
    return producer_weights(traced_graph, value_operands(traced_graph, group), group)


def linear_producers(traced_graph: TracedGraph, group: Group) -> list[WeightSlice]:
    """Constants that produce hidden units, where nothing but linear operators lies between them and their reader."""
    tensors = {probe.tensor for probe in group.probes if probe.kind == "hidden"}
    operands = [
        AttentionOperand(c, side, 0)
        for c in traced_graph.trace.contractions
        if c.has_weight and not c.part
        for side in (c.left, c.right)
        if side.name in tensors and not side.constant
    ]
    return producer_weights(traced_graph, operands, group)


def group_labels(traced_graph: TracedGraph, group: Group) -> frozenset[int]:
    """The labels of a group on the axes of constants, and of the KV caches in which its units lie."""
    trace, unit = traced_graph.trace, traced_graph.units.unit_of_label
    first = {(str(axis.constant.name), axis.axis): axis.first_label for axis in trace.table.axes}
    labels = [first[site.tensor, site.axis] + np.flatnonzero(site.units >= 0) for site in group.sites]
    own = np.concatenate(labels)
    cached = [of_cache[np.isin(unit[of_cache], unit[own])] for of_cache in trace.caches.values() if group.cached]
    return frozenset(np.concatenate([own, *cached]).tolist())


def producer_weights(
    traced_graph: TracedGraph, operands: Sequence[AttentionOperand], group: Group
) -> list[WeightSlice]:
    """The constants that these operands are linear in, with the group's positions in them.

    Raises UnsupportedWeightForm where an operand is not linear in constants, or a value on the way has other consumers.
    """
    paths = []
    own_labels = group_labels(traced_graph, group)
    used_labels: set[int] = set()
    for operand in operands:
        labels = label_set(operand.side) & own_labels
        path = LinearPath(operand.product.node, 0, 1.0)
        try:
            if operand.product.part:
                trace_fused_operand(path, operand, labels, traced_graph)
            else:
                trace_linear_path(
                    path, operand.value, labels, traced_graph.trace, traced_graph.facts, traced_graph.model
                )
        except NotLinear:
            raise UnsupportedWeightForm("a nonlinear operator lies between its weights and the product") from None
        paths.append(path)
        used_labels |= labels
    allowed = frozenset(node for path in paths for node in (*path.nodes, path.node))
    group_values = {out for node in allowed for out in node.outputs if carries_labels(traced_graph, out, used_labels)}
    group_values -= {out for path in paths for out in path.node.outputs}
    constants: dict[tuple[ir.Value, int], BoolArray] = {}
    for key, hit in (item for path in paths for item in path.constants.items()):
        constants[key] = constants[key] | hit if key in constants else hit
    for value in {v for path in paths for v in path.values} | {value for value, _ in constants} | group_values:
        if has_other_consumers(traced_graph, value, used_labels, allowed):
            raise UnsupportedWeightForm(f"{value.name} has other consumers")
    sites = {(s.tensor, s.axis): s for s in group.sites}
    weights = []
    for (constant, axis), hit in constants.items():
        site = sites.get((str(constant.name), axis))
        if site is None:
            raise UnsupportedWeightForm(f"{constant.name} is not a site of the group")
        units = np.where(hit, site.units, -1)
        weights.append(WeightSlice(str(constant.name), axis, unit_positions(units, group)))
    return weights


def trace_fused_operand(
    path: LinearPath, operand: AttentionOperand, group_labels: frozenset[int], traced_graph: TracedGraph
) -> None:
    """As ``trace_linear_path``, of the query, key or value of a fused node: through its input or the weight that the
    node holds, and through its bias."""
    node = operand.product.node
    form = attention_form(traced_graph.facts.call(node, opset_version(traced_graph.model, node.domain)), node.domain)
    for index in (1 if form.packed == "weight" else None, form.bias):
        value = node.inputs[index] if index is not None and index < len(node.inputs) else None
        if value is None:
            continue
        first, last = fused_operand_columns(traced_graph, node, operand.part)
        root = constant_behind_movement(path, value)
        if root is not value:  # after a movement its columns would have to be followed
            raise NotLinear
        assert root.const_value is not None
        shape = static_shape(root.const_value)
        where = np.arange(shape[-1])
        mark_constant(path, root, (len(shape) - 1, (where >= first) & (where < last)))
    if form.packed != "weight":
        input_value = node.inputs[form.query if form.packed else (form.query, form.key, form.value)[operand.part]]
        assert input_value is not None
        columns = slice(*fused_operand_columns(traced_graph, node, operand.part)) if form.packed else slice(None)
        parts = [f[..., columns] for f in traced_graph.trace.values[input_value].factors if f.shape[-1] > 1]
        labels = group_labels.union(*(set(part[part >= 0].reshape(-1).tolist()) for part in parts))
        trace_linear_path(path, input_value, labels, traced_graph.trace, traced_graph.facts, traced_graph.model)


def fused_operand_columns(traced_graph: TracedGraph, node: ir.Node, part: int) -> tuple[int, int]:
    """(first, end) columns of query, key or value in the packed weight or bias of a fused node."""
    sizes = (0, *qkv_widths(traced_graph.facts.call(node, opset_version(traced_graph.model, node.domain)), node.domain))
    ends = np.cumsum(sizes)
    return int(ends[part]), int(ends[part + 1])


def carries_labels(traced_graph: TracedGraph, value: ir.Value, group_labels: set[int]) -> bool:
    labeled = traced_graph.trace.values.get(value)
    return labeled is not None and not label_set(labeled).isdisjoint(group_labels)


def has_other_consumers(
    traced_graph: TracedGraph, value: ir.Value, group_labels: set[int], allowed: frozenset[ir.Node]
) -> bool:
    """Does a node that is not ``allowed`` use positions of the group?

    Nodes that read only the shape do not count, nor movements of other positions (K and V of a packed QKV).
    """
    for user in value.consumers():
        kind = lookup(user.domain, user.op_type).kind
        if user in allowed or kind == "shape":
            continue
        if kind != "movement" or not carries_labels(traced_graph, value, group_labels):
            return True
        moved = [
            out
            for out in user.outputs
            if carries_labels(traced_graph, out, group_labels) or out not in traced_graph.trace.values
        ]
        if any(has_other_consumers(traced_graph, out, group_labels, frozenset()) for out in moved):
            return True
    return False
