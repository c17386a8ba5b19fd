"""Label propagation where tokens are routed to experts: a choice along an axis, and what its indices then name.

The indices that TopK returns name positions of its axis, the experts. A stack of weights that they address has these
experts along that axis, and so has the axis that OneHot adds. What is read there is the weight of one expert per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.ops import (
    EXPERTS_FORM,
    ExpertsGeometry,
    Labels,
    Letters,
    experts_geometry,
    lookup,
    most_chosen,
    one_hot_axis,
)
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.state import (
    NOT_ROUTED,
    Contraction,
    Factors,
    LabeledValue,
    NodeContext,
    Routing,
    RoutingComparison,
)

EXPERT_LAYERS = {2: "inner", 4: "outer", 6: "gate"}  # input -> name of its product


def propagate_choice(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Record which positions are compared. What is chosen has no labels along the axis."""
    data = inputs[0]
    assert data is not None and context.spec.axes is not None
    axes = frozenset(context.spec.axes(context.call))
    most = most_chosen(context.call)
    for labels in data.factors:
        if varying_axes(labels) == axes and most is not None:
            compare_positions(context, data, labels, most)
        else:
            context.pin(data, labels, context.spec.reason)
    return []


def compare_positions(
    context: NodeContext, data: LabeledValue, labels: Labels, most: int = 0, operand: int = 0
) -> None:
    """Record that positions with ``labels``, which vary on one axis, are compared with each other. Experts can go
    nevertheless: in the masked model they lose every comparison."""
    (axis,) = varying_axes(labels)
    context.trace.comparisons.append(
        RoutingComparison(context.node, labels, axis - labels.ndim, context.dtype, most, operand)
    )
    context.pin(data, labels, context.spec.reason, axis, "choice")


def propagate_one_hot(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """The axis that is added has the labels of the positions that the indices name."""
    chosen = inputs[0].routing.chosen if inputs[0] is not None else None
    axis, shape = one_hot_axis(context.call), context.call.out_shapes[0]
    if chosen is None or len(chosen) != shape[axis]:
        return [()]
    context.trace.table.flag(chosen, LabelFlag.ROUTED)
    return [(chosen.reshape([-1 if k == axis else 1 for k in range(len(shape))]),)]


def reads_experts(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> bool:
    """Whether the indices of a Gather or GatherElements name experts, which lie along the axis that it reads."""
    indices = inputs[1] if len(inputs) > 1 else None
    data = inputs[0]
    if context.spec.index_axis is None or indices is None or data is None or indices.routing.chosen is None:
        return False
    axis = context.spec.index_axis(context.call)
    return axis is not None and data.shape[axis] == len(indices.routing.chosen)


def propagate_expert_reading(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Labels along the axis of experts are those of the router; all others pass as if one expert were read."""
    data, indices = inputs[0], inputs[1]
    assert data is not None and indices is not None and indices.routing.chosen is not None
    assert context.spec.move is not None and context.spec.index_axis is not None
    axis = context.spec.index_axis(context.call)
    assert axis is not None
    if data.constant:
        context.trace.expert_reads[context.node] = indices.routing.chosen
    table = context.trace.table
    out: list[Labels] = []
    for labels in data.factors:
        if varying_axes(labels) == {axis}:
            table.unify(labels.reshape(-1), indices.routing.chosen)
            flags = LabelFlag.ROUTED | (LabelFlag.WEIGHT_INPUT if data.constant else LabelFlag(0))
            table.flag(labels, flags)
        elif axis in varying_axes(labels):
            context.pin(data, labels, "experts are read along one of its axes", axis)
        else:
            out += context.spec.move(context.call, labels)
    return [tuple(out)]


def routing_of(context: NodeContext, inputs: Sequence[LabeledValue | None], index: int) -> Routing:
    """``LabeledValue.routing`` of output ``index`` of a node."""
    kind, first = context.spec.kind, inputs[0] if inputs else None
    if first is None:
        return NOT_ROUTED
    if kind == "choose":
        compared = [c.labels for c in context.trace.comparisons if c.node is context.node] if index else []
        return Routing(compared[0].reshape(-1)) if compared else NOT_ROUTED
    if kind == "one_hot":
        return Routing(one_hot=first.routing.chosen is not None)
    if selects_expert(context, first):
        return Routing(expert=int(selected_labels(context, first).reshape(-1)[0]))
    passes = kind == "movement" or (kind == "pointwise" and context.spec.effect == "same")
    if passes or (context.spec.counts_data and first.routing.expert >= 0):
        return first.routing
    return NOT_ROUTED


def selects_expert(context: NodeContext, data: LabeledValue) -> bool:
    """Whether a node reads the row of one expert from one-hot rows: which tokens it is given."""
    return context.spec.selects and data.routing.one_hot and selected_labels(context, data).size == 1


def selected_labels(context: NodeContext, data: LabeledValue) -> Labels:
    """The labels of what a Gather reads along the axis of experts."""
    assert context.spec.index_axis is not None
    axis, indices = context.spec.index_axis(context.call), context.call.value(1)
    for labels in data.factors:
        if varying_axes(labels) == {axis} and indices is not None:
            return labels.reshape(-1).take(np.asarray(indices).reshape(-1))
    return np.zeros(0, np.int32)


def record_expert_output(context: NodeContext, indices: LabeledValue | None) -> None:
    """Record that a scatter adds what one expert made of its tokens, where its indices name them."""
    if indices is not None and indices.routing.expert >= 0:
        context.trace.expert_outputs[context.node] = indices.routing.expert


def repeats_rows(value: ir.Value | None, axis: int, trace_values: dict[ir.Value, LabeledValue]) -> bool:
    """Whether indices are the same at all positions but along ``axis``, since an Expand made them of one column."""
    node = value.producer() if value is not None else None
    if node is None or not lookup(node.domain, node.op_type).expands or node.inputs[0] is None:
        return False
    column = trace_values.get(node.inputs[0])
    return column is not None and all(size == 1 for k, size in enumerate(column.shape) if k != axis)


def propagate_experts(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """All experts in one node: their axis is that of the router, hidden units are those of the weights, and the width
    is that of the data on one side and of the result on the other. Raises Blocked where shapes do not fit."""
    sizes, form = experts_geometry(context.call), EXPERTS_FORM
    operands = [*inputs, *[None] * 8]
    data, router, outer = operands[0], operands[form.router], operands[form.outer[0]]
    assert data is not None and router is not None and outer is not None
    join_experts(context, router, [c for c in operands[2:8] if c is not None], sizes)
    table, hidden = context.trace.table, labels_along(outer, 2)
    for (weight, bias), fused in zip(form.inner, (sizes.fused, 1), strict=True):
        for operand in (operands[weight], operands[bias]):
            for labels in labels_along(operand, 1):
                folded = labels.reshape((-1, fused) if sizes.interleaved else (fused, -1))
                for part in folded.T if sizes.interleaved else folded:
                    for own in hidden:
                        table.unify(part, own)
                flag = LabelFlag.PRODUCED | LabelFlag.NONLINEAR if operand is operands[weight] else LabelFlag.NONLINEAR
                table.flag(labels, flag)
        join_width(context, data, operands[weight])
    for labels in hidden:
        table.flag(labels, LabelFlag.CONSUMED | LabelFlag.WEIGHT_INPUT)
    record_layers(context, data, operands, sizes)
    rank = len(data.shape)
    made = [labels for operand in (outer, operands[form.outer[1]]) for labels in labels_along(operand, 1)]
    read = labels_along(operands[form.inner[0][0]], 2)
    for labels in made:
        for own in (*made[:1], *read):  # the kernel takes one width for both sides
            table.unify(labels, own)
        table.flag(labels, LabelFlag.PRODUCED)
    return [(made[0].reshape([1] * (rank - 1) + [-1]),) if made else ()]


def labels_along(operand: LabeledValue | None, axis: int) -> list[Labels]:
    """[size]: the labels of an operand that vary along this axis alone."""
    factors = operand.factors if operand is not None else ()
    return [labels.reshape(-1) for labels in factors if varying_axes(labels) == {axis}]


def join_experts(
    context: NodeContext, router: LabeledValue, weights: Sequence[LabeledValue], sizes: ExpertsGeometry
) -> None:
    """The first axis of all weights is that of what the router compares."""
    axis = len(router.shape) - 1
    rows = labels_along(router, axis)
    for labels in router.factors:
        if varying_axes(labels) == {axis}:
            compare_positions(context, router, labels, sizes.chosen, EXPERTS_FORM.router)
        else:
            context.pin(router, labels, context.spec.reason)
    for operand in weights:
        for labels in labels_along(operand, 0):
            context.trace.table.flag(labels, LabelFlag.WEIGHT_INPUT)
            if not rows:
                context.pin(operand, labels, f"chosen by {context.describe_unlabeled(router)}", 0)
            for row in rows:
                context.trace.table.unify(labels, row)
                context.trace.table.flag(labels, LabelFlag.ROUTED)


def join_width(context: NodeContext, data: LabeledValue, weight: LabeledValue | None) -> None:
    """The last axis of an inner weight is summed with that of the data."""
    summed, axis = labels_along(weight, 2), len(data.shape) - 1
    for labels in summed:
        context.trace.table.flag(labels, LabelFlag.CONSUMED | LabelFlag.WEIGHT_INPUT)
        if not labels_along(data, axis) and weight is not None:
            context.pin(weight, labels, f"contracted with {context.describe_unlabeled(data)}", 2)
    for factor in data.factors:
        if varying_axes(factor) != {axis}:
            context.pin(data, factor, context.spec.reason)
            continue
        context.trace.table.flag(factor, LabelFlag.CONSUMED)
        for labels in summed:
            context.trace.table.unify(factor.reshape(-1), labels)


def record_layers(
    context: NodeContext, data: LabeledValue, operands: Sequence[LabeledValue | None], sizes: ExpertsGeometry
) -> None:
    """Record the products inside the node, with the labels that they sum or make; the experts are a batch."""
    rows = replace(data, shape=(sizes.tokens * sizes.chosen, sizes.width), factors=())
    for index, part in EXPERT_LAYERS.items():
        weight = operands[index]
        if weight is not None:
            own = tuple(labels for labels in weight.factors if 0 not in varying_axes(labels))
            side = replace(weight, factors=own)
            letters = Letters("MK", "ENK", "MN")
            context.trace.contractions.append(Contraction(context.node, letters, rows, side, True, part))
