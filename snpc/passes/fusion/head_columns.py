"""Where the positions of a value come from and go to: movement nodes are run on position numbers.

So it is seen, whatever nodes an exporter wrote, that ``[batch, heads, length, width]`` is made of columns of a
``[batch, length, heads * width]`` value, or becomes one again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts
from snpc.graph.traversal import step_upstream
from snpc.ops import lookup
from snpc.ops.spec import Blocked, Labels
from snpc.types import Shape

MERGE_HEADS_PERM = (0, 2, 1, 3)  # [B,H,N,D] <-> [B,N,H,D]
MAX_POSITIONS = 1 << 24


class NotFusable(Exception):
    """This softmax is no attention that one node can stand for; the message says why."""


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
    """Values that ``value`` is a movement of, nearest first: (value, the steps from there, scalar factor)."""
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
    """Where ``value`` [B,H,N,D] (swapped: [B,H,D,N]) lies as columns of a [B,N,C] value, or else how to lay it so."""
    shape = facts.shape[value]
    assert shape is not None
    best: HeadColumns | None = None
    for source, steps, factor in movement_sources(value, facts):
        made = facts.shape.get(source)
        if made is None or len(made) != 3 or made[0] != shape[0]:
            continue
        try:
            labels = apply_movements(number_positions(made), steps, facts, version)
        except Blocked:
            break
        labels = labels.swapaxes(2, 3) if swapped else labels
        start = first_column(labels, made)
        if start is None:
            continue
        best = HeadColumns(source, start, labels.shape[1], labels.shape[3], factor)
        if best.columns == made[2]:
            return best
    if best is not None:
        return best
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
    """The value [B,N,H*D] that the context [B,H,N,D] becomes by movement. Raises Unfit if there is none."""
    shape = facts.shape[context]
    assert shape is not None
    wanted = number_positions(shape).transpose(MERGE_HEADS_PERM).reshape(shape[0], shape[2], shape[1] * shape[3])
    labels, value = number_positions(shape), context
    while True:
        node = require_single_consumer(value)
        rule = lookup(node.domain, node.op_type).move
        if lookup(node.domain, node.op_type).kind != "movement" or rule is None or node.inputs[0] is not value:
            raise NotFusable("the heads are not laid side by side again")
        value = node.outputs[0]
        try:
            labels = np.broadcast_to(rule(facts.call(node, version), labels)[0], facts.shape[value] or ())
        except Blocked as block:
            raise NotFusable(block.reason) from None
        if labels.shape == wanted.shape and bool((labels == wanted).all()):
            if value.is_graph_output():
                raise NotFusable("the context is an output of the graph")
            return value


def require_single_consumer(value: ir.Value) -> ir.Node:
    """The node that reads ``value``, shapes aside. Raises Unfit if there are several, or if it is an output."""
    users = [u for u in value.consumers() if lookup(u.domain, u.op_type).kind != "shape"]
    if value.is_graph_output() or len(users) != 1:
        raise NotFusable(f"{value.name} is read by others too")
    return users[0]
