"""The products in which query and key, or value and attention weights, meet; and the constants that make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import opset_version, static_shape
from snpc.ops import lookup
from snpc.ops.attention import attention_form, qkv_widths
from snpc.passes.grouping.traced import TracedGraph
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import Contraction, LabeledValue
from snpc.passes.weights.edits import UnsupportedWeightForm, WeightSlice, unit_positions
from snpc.passes.weights.linear_path import (
    LinearPath,
    NotLinear,
    constant_behind_movement,
    label_set,
    mark_constant,
    trace_linear_path,
)
from snpc.types import Group, IntArray


@dataclass(frozen=True)
class AttentionOperand:
    """One side of a product of activations. ``part``: 0, 1 or 2 for query, key or value of a fused node."""

    product: Contraction
    side: LabeledValue
    part: int

    @property
    def value(self) -> ir.Value:
        """The input of a node that does one product only."""
        return next(v for v in self.product.node.inputs if v is not None and v.name == self.side.name)


def score_products(traced: TracedGraph, group: Group) -> list[Contraction]:
    """The products of activations that a qk group closes in: one, or several where layers share their weights."""
    tensors = {p.tensor for p in group.probes}
    found = [
        c
        for c in traced.trace.contractions
        if not c.has_weight and c.part in ("", "scores") and c.left.name in tensors and c.right.name in tensors
    ]
    if not found:
        raise UnsupportedWeightForm("its query and key meet in no product that can be watched")
    return found


def single_score_product(traced: TracedGraph, group: Group) -> Contraction:
    """The one product of activations that a qk group closes in."""
    found = score_products(traced, group)
    if len(found) != 1:
        raise UnsupportedWeightForm(f"it takes part in {len(found)} score products")
    return found[0]


def operand_weights(traced: TracedGraph, group: Group, side: int) -> list[WeightSlice]:
    """Constants that make one operand (0: left, 1: right) of a qk group's score products."""
    products = score_products(traced, group)
    return producer_weights(traced, [AttentionOperand(c, (c.left, c.right)[side], side) for c in products], group)


@dataclass(frozen=True)
class ScoreAxes:
    """Axes of both operands: those that the product is done once for, the tokens, the width."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    units: IntArray
    """[batch axes.., width] of the query: which unit stands where; 1 on axes on which that does not vary."""


def score_axes(product: Contraction, group: Group) -> ScoreAxes:
    """Raises NoPlace where an operand has not one axis of tokens and one of width."""
    probe = next((p for p in group.probes if p.tensor == product.left.name), None)
    if probe is None or not any(p.tensor == product.right.name for p in group.probes):
        raise UnsupportedWeightForm("its activations cannot be watched")
    left, right, out = product.letters.left, product.letters.right, product.letters.out
    width = [c for c in left if c in right and c not in out]
    batch = [c for c in left if c in right and c in out]
    tokens = [[c for c in side if c not in batch + width] for side in (left, right)]
    if len(width) != 1 or [len(t) for t in tokens] != [1, 1] or probe.units.ndim != len(left):
        raise UnsupportedWeightForm("its query and key are not rows of one width")
    orders = [
        tuple(side.index(c) for c in (*batch, *mine, *width)) for side, mine in zip((left, right), tokens, strict=True)
    ]
    units = np.transpose(probe.units, orders[0])
    if units.shape[-2] != 1 or (probe.units.shape[0] > 1):
        raise UnsupportedWeightForm("its heads stand on the axis of the samples")
    return ScoreAxes(orders[0], orders[1], units[..., 0, :])


def value_operands(traced: TracedGraph, group: Group) -> list[AttentionOperand]:
    """(P V, its V side, the value) of a vo group: one, or several where layers share their weights."""
    tensors = {p.tensor for p in group.probes if p.kind == "value"}
    found = [
        AttentionOperand(c, side, 2)
        for c in traced.trace.contractions
        if not c.has_weight and c.part in ("", "context")
        for side in (c.left, c.right)
        if side.name in tensors and any(len(varying_axes(f)) for f in side.factors)
    ]
    if not found:
        raise UnsupportedWeightForm("its values enter no product that can be watched")
    return found


def value_weights(traced: TracedGraph, group: Group) -> list[WeightSlice]:
    """Constants that make a vo group's values."""
    return producer_weights(traced, value_operands(traced, group), group)


def producer_weights(traced: TracedGraph, operands: Sequence[AttentionOperand], group: Group) -> list[WeightSlice]:
    """Constants that make these operands, linearly, with the group's positions in them."""
    folds = []
    wanted: set[int] = set()
    for operand in operands:
        mine = label_set(operand.side)
        fold = LinearPath(operand.product.node, 0, 1.0)
        try:
            if operand.product.part:
                trace_fused_operand(fold, operand, mine, traced)
            else:
                trace_linear_path(fold, operand.value, mine, traced.trace, traced.facts, traced.model)
        except NotLinear:
            raise UnsupportedWeightForm("what makes it is not linear all the way") from None
        folds.append(fold)
        wanted |= mine
    allowed = frozenset(node for fold in folds for node in (*fold.nodes, fold.node))
    made = {out for node in allowed for out in node.outputs if carries_labels(traced, out, wanted)}
    made -= {out for fold in folds for out in fold.node.outputs}
    constants = {key: hit for fold in folds for key, hit in fold.constants.items()}
    for seen in {v for fold in folds for v in fold.values} | {value for value, _ in constants} | made:
        if has_other_consumers(traced, seen, wanted, allowed):
            raise UnsupportedWeightForm(f"{seen.name} is read elsewhere as well")
    sites = {(s.tensor, s.axis): s for s in group.sites}
    found = []
    for (constant, axis), hit in constants.items():
        site = sites.get((str(constant.name), axis))
        if site is None:
            raise UnsupportedWeightForm(f"{constant.name} is not a site of the group")
        units = np.where(hit, site.units, -1)
        found.append(WeightSlice(str(constant.name), axis, unit_positions(units, group)))
    return found


def trace_fused_operand(
    fold: LinearPath, operand: AttentionOperand, wanted: frozenset[int], traced: TracedGraph
) -> None:
    """As ``trace_linear_path``, of the query, key or value of a fused node: through its input, or the weight inside
    it, and its own
    bias."""
    node = operand.product.node
    fused = attention_form(traced.facts.call(node, opset_version(traced.model, node.domain)), node.domain)
    for index in (1 if fused.packed == "weight" else None, fused.bias):
        value = node.inputs[index] if index is not None and index < len(node.inputs) else None
        if value is None:
            continue
        first, last = fused_operand_columns(traced, node, operand.part)
        root = constant_behind_movement(fold, value)
        if root is not value:  # which of its positions are which is not known
            raise NotLinear
        assert root.const_value is not None
        shape = static_shape(root.const_value)
        where = np.arange(shape[-1])
        mark_constant(fold, root, (len(shape) - 1, (where >= first) & (where < last)))
    if fused.packed != "weight":
        given = node.inputs[fused.query if fused.packed else (fused.query, fused.key, fused.value)[operand.part]]
        assert given is not None
        wanted = wanted if fused.packed else wanted | label_set(traced.trace.values[given])
        trace_linear_path(fold, given, wanted, traced.trace, traced.facts, traced.model)


def fused_operand_columns(traced: TracedGraph, node: ir.Node, part: int) -> tuple[int, int]:
    """Where query, key or value stand in what a fused node holds of all three."""
    sizes = (0, *qkv_widths(traced.facts.call(node, opset_version(traced.model, node.domain)), node.domain))
    ends = np.cumsum(sizes)
    return int(ends[part]), int(ends[part + 1])


def carries_labels(traced: TracedGraph, value: ir.Value, wanted: set[int]) -> bool:
    found = traced.trace.values.get(value)
    return found is not None and not label_set(found).isdisjoint(wanted)


def has_other_consumers(traced: TracedGraph, value: ir.Value, wanted: set[int], allowed: frozenset[ir.Node]) -> bool:
    """Does a node that is not ``allowed`` use the wanted positions? Not one that reads the shape, or moves others out
    (K and V of a packed QKV)."""
    for user in value.consumers():
        kind = lookup(user.domain, user.op_type).kind
        if user in allowed or kind == "shape":
            continue
        if kind != "movement" or not carries_labels(traced, value, wanted):
            return True
        moved = [out for out in user.outputs if carries_labels(traced, out, wanted) or out not in traced.trace.values]
        if any(has_other_consumers(traced, out, wanted, frozenset()) for out in moved):
            return True
    return False
