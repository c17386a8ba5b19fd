"""Copies: equal positions along an axis that Expand makes, such as one key head repeated for all query heads.

No weight produces such an axis, and all of its positions say the same, so any of them may go. Their labels are kept
apart from the factors of a value until a product with other labels along the axis says what they stand for: the query
heads that read them. Copies of which nothing says that have no labels in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from snpc.ops import Blocked, Labels
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext, Trace, prepend_axes
from snpc.types import BoolArray

TOLD_APART = "copies of one position along it are used one by one"


def propagate_copies(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """The copies that the outputs of a node have. Those of inputs that the node may tell apart are pinned."""
    kind = context.spec.kind
    if kind == "movement" and inputs[0] is not None:
        return moved_copies(context, inputs[0])
    if kind == "pointwise":
        copies = broadcast_copies(context, inputs)
        return [copies] * len(context.call.out_shapes)
    if kind not in ("contraction", "attention", "shape"):  # products look at their operands' copies themselves
        for operand in (c for c in inputs if c is not None):
            pin_copies(context, operand, operand.copies)
    return []


def moved_copies(context: NodeContext, data: LabeledValue) -> list[Factors]:
    """The copies of an input after movement, and those that the movement makes."""
    assert context.spec.move is not None
    outputs: list[list[Labels]] = [[] for _ in context.call.out_shapes]
    for labels in data.copies:
        try:
            moved = context.spec.move(context.call, labels)
        except Blocked:
            pin_copies(context, data, [labels])
            continue
        for out, part in zip(outputs, moved, strict=False):
            out += [part] if varying_axes(part) else []
    if context.spec.expands:
        outputs[0] += new_copies(context, data)
    return [tuple(out) for out in outputs]


def new_copies(context: NodeContext, data: LabeledValue) -> list[Labels]:
    """Labels of the first axis that Expand repeats, where the value varies behind it only: an axis in front, such as
    that of several key heads, would be repeated as a whole."""
    shape = context.call.out_shapes[0]
    before = (1,) * (len(shape) - len(data.shape)) + data.shape
    repeated = [k for k, (old, new) in enumerate(zip(before, shape, strict=True)) if old == 1 < new]
    varying = {k for f in data.factors for k in varying_axes(prepend_axes(f, len(shape)))}
    return [
        context.trace.table.allocate(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))])
        for axis in repeated[-1:]
        if not data.constant and varying and axis < min(varying)
    ]


def broadcast_copies(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> Factors:
    """The copies of the operands of an element-wise operator along whose axis no other operand has entries."""
    rank = len(context.call.out_shapes[0])
    shapes = [(1,) * (rank - len(c.shape)) + c.shape if c is not None else (1,) * rank for c in inputs]
    kept: list[Labels] = []
    for index, operand in ((k, c) for k, c in enumerate(inputs) if c is not None):
        for labels in operand.copies:
            spread = prepend_axes(labels, rank)
            others = [s for k, s in enumerate(shapes) if k != index]
            if any(s[axis] > 1 for s in others for axis in varying_axes(spread)):
                pin_copies(context, operand, [labels])
            else:
                kept.append(spread)
    return tuple(kept)


def pin_copies(context: NodeContext, operand: LabeledValue, copies: Sequence[Labels]) -> None:
    """Keep copies that are told apart."""
    for labels in copies:
        context.pin(operand, labels, TOLD_APART)


def repeated_head(context: NodeContext, operand: LabeledValue, repeats: int) -> LabeledValue:
    """[batch, 1, tokens, width] -> [batch, repeats, tokens, width]: the one head of a fused node, for every query."""
    copies = context.trace.table.allocate(repeats).reshape(1, repeats, 1, 1)
    return replace(operand, shape=(operand.shape[0], repeats, *operand.shape[2:]), copies=(copies,))


def settle_copies(trace: Trace) -> None:
    """Make factors of the copies that products have given a meaning, and drop the others."""
    known = np.zeros(trace.table.count, bool)
    for pair in trace.table.pairs:
        for labels in pair:
            known[labels] = True
    trace.values.update({value: settled(c, known) for value, c in trace.values.items() if c.copies})
    trace.inner_values.update({at: settled(c, known) for at, c in trace.inner_values.items() if c.copies})


def settled(labeled: LabeledValue, known: BoolArray) -> LabeledValue:
    """``labeled`` with those of its copies as factors whose labels are ``known``."""
    meant = tuple(labels for labels in labeled.copies if known[labels].all())
    return replace(labeled, factors=(*labeled.factors, *meant), copies=())
