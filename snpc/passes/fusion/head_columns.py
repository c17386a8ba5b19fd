"""Finds the columns that heads are made of, by running movement nodes on position numbers.

Whatever nodes an exporter wrote, this shows that ``[batch, heads, length, width]`` is columns of a value
``[batch, length, heads * width]``, or becomes such a value again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph import ShapeFacts, step_upstream
from snpc.ops import Blocked, Labels, lookup
from snpc.types import Shape

MERGE_HEADS_PERM = (0, 2, 1, 3)  # [B,H,N,D] <-> [B,N,H,D]
MAX_POSITIONS = 1 << 24


class NotFusable(Exception):
    """No fused node can compute this softmax and what is around it; the message says why."""


@dataclass(frozen=True)
class HeadColumns:
    """Columns ``start .. start + heads * width`` of ``value`` [B,N,C], times ``factor``; with ``order``, all of
    ``value`` with its four axes in that order, [B,N,H,D], the last two merged."""

    value: ir.Value
    start: int
    heads: int
    width: int
    factor: float = 1.0
    order: tuple[int, ...] = ()

    @property
    def columns(self) -> int:
        return self.heads * self.width


MovementStep = tuple[ir.Node, int]


def movement_sources(value: ir.Value, facts: ShapeFacts) -> Iterator[tuple[ir.Value, tuple[MovementStep, ...], float]]:
    """Values that ``value`` is a movement of, nearest first: (source, movements from there to ``value``, factor)."""
    steps: tuple[MovementStep, ...] = ()
    factor = 1.0
    while True:
        yield value, steps, factor
        node = value.producer()
        if node is None:
            return
        scalar, source = step_upstream(node, facts)
        if source is None:
            return
        if scalar is not None:
            factor *= scalar.factor
        elif lookup(node.domain, node.op_type).kind == "movement":
            steps = ((node, value.index() or 0), *steps)
        else:
            return
        value = source


def apply_movements(labels: Labels, steps: tuple[MovementStep, ...], facts: ShapeFacts, version: int) -> Labels:
    for node, index in steps:
        rule = lookup(node.domain, node.op_type).move
        assert rule is not None
        labels = np.broadcast_to(rule(facts.call(node, version), labels)[index], facts.shape[node.outputs[index]] or ())
    return labels


def number_positions(shape: Shape) -> Labels:
    if int(np.prod(shape, dtype=np.int64)) > MAX_POSITIONS:
        raise NotFusable("too large to number its positions")
    return np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int32).reshape(shape)


def find_head_columns(value: ir.Value, swapped: bool, facts: ShapeFacts, version: int) -> HeadColumns:
    """The columns of a value [B,N,C] that ``value`` is, or else the order of axes that makes it such a value.

    ``value``: [B,H,N,D], or [B,H,D,N] if ``swapped``.
    """
    shape = facts.shape[value]
    assert shape is not None
    match: HeadColumns | None = None
    for source, steps, factor in movement_sources(value, facts):
        source_shape = facts.shape.get(source)
        if source_shape is None or len(source_shape) != 3 or source_shape[0] != shape[0]:
            continue
        try:
            labels = apply_movements(number_positions(source_shape), steps, facts, version)
        except Blocked:
            break
        labels = labels.swapaxes(2, 3) if swapped else labels
        start = first_column(labels, source_shape)
        if start is None:
            continue
        match = HeadColumns(source, start, labels.shape[1], labels.shape[3], factor)
        if match.columns == source_shape[2]:
            return match
    if match is not None:
        return match
    heads, width = shape[1], shape[2] if swapped else shape[3]
    return HeadColumns(value, 0, heads, width, order=(0, 3, 1, 2) if swapped else MERGE_HEADS_PERM)


def first_column(labels: Labels, source: Shape) -> int | None:
    """The column of ``source`` [B,N,C] at which [B,H,N,D] numbers start, if they are consecutive columns of it."""
    batch, heads, length, width = labels.shape
    if length != source[1] or heads * width > source[2]:
        return None
    start = int(labels[0, 0, 0, 0])
    rows = np.arange(batch * length, dtype=np.int32).reshape(batch, 1, length, 1) * source[2]
    columns = np.arange(heads * width, dtype=np.int32).reshape(1, heads, 1, width)
    return start if start + heads * width <= source[2] and bool((labels == rows + columns + start).all()) else None


def find_merged_heads(context: ir.Value, facts: ShapeFacts, version: int) -> ir.Value:
    """The value [B,N,H*D] that the context [B,H,N,D] becomes by movement. Raises NotFusable if there is none."""
    shape = facts.shape[context]
    assert shape is not None
    merged = number_positions(shape).transpose(MERGE_HEADS_PERM).reshape(shape[0], shape[2], shape[1] * shape[3])
    labels, value = number_positions(shape), context
    while True:
        node = require_single_consumer(value)
        rule = lookup(node.domain, node.op_type).move
        if lookup(node.domain, node.op_type).kind != "movement" or rule is None or node.inputs[0] is not value:
            raise NotFusable("the heads are not merged into one axis again")
        value = node.outputs[0]
        try:
            labels = np.broadcast_to(rule(facts.call(node, version), labels)[0], facts.shape[value] or ())
        except Blocked as block:
            raise NotFusable(block.reason) from None
        if labels.shape == merged.shape and bool((labels == merged).all()):
            if value.is_graph_output():
                raise NotFusable("the context is an output of the graph")
            return value


def require_single_consumer(value: ir.Value) -> ir.Node:
    """The one node that reads the contents of ``value``. Raises NotFusable if there are several, or it is an output."""
    users = [u for u in value.consumers() if lookup(u.domain, u.op_type).kind != "shape"]
    if value.is_graph_output() or len(users) != 1:
        raise NotFusable(f"{value.name} has other consumers")
    return users[0]
