"""Provenance by execution: every axis of every float constant gets labels, and the graph is run on the labels.

What each operator does comes from the table (``snpc.ops``); the algebra of labels is in ``meet`` (pointwise) and
``contract`` (sums of products). No attention pattern is known here: that Q and K belong together is simply what a
contraction of two activations says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from snpc.ops import lookup
from snpc.ops.contraction import letters_of
from snpc.ops.movement import compress, concat_axis
from snpc.ops.opaque import SUBGRAPH
from snpc.ops.spec import Blocked, Labels
from snpc.passes.carried import Carried, Contraction, Factors, Here, Trace, align, cover_rest, independent
from snpc.passes.contract import add_bias, contract, depthwise
from snpc.passes.fused import attention
from snpc.passes.labels import Flag, varying
from snpc.passes.means import stray_reader
from snpc.passes.meet import meet, same_labels
from snpc.passes.shapes import Facts, is_float, opset, subgraphs

__all__ = ["Carried", "Contraction", "Trace", "trace_model"]


def trace_model(model: ir.Model, facts: Facts) -> Trace:
    """Run the labels through the main graph of a canonical model."""
    trace = Trace()
    for value in model.graph.inputs:
        if not value.is_initializer():
            enter_input(trace, value, facts)
    for value in model.graph.initializers.values():
        enter_constant(trace, value, facts)
    for node in model.graph:
        step(trace, model, facts, node)
    for statistic in trace.statistics:
        reader = stray_reader(statistic, trace)
        if reader is not None:
            statistic.here.pin(statistic.data, statistic.labels, f"its mean is read by {reader}")
    for value in model.graph.outputs:
        carried = trace.values.get(value)
        if carried is None:
            continue
        for labels in carried.factors:
            axis = min(varying(labels), default=0)
            trace.book.pin(
                labels,
                str(value.name),
                axis,
                carried.shape[axis],
                "it is a graph output",
                f"output {value.name}",
            )
    return trace


def enter_input(trace: Trace, value: ir.Value, facts: Facts) -> None:
    shape = facts.shape.get(value)
    if shape is not None:
        trace.values[value] = Carried(str(value.name), shape)


def enter_constant(trace: Trace, value: ir.Value, facts: Facts) -> None:
    shape = facts.shape.get(value)
    if shape is None:
        return
    factors: list[Labels] = []
    if is_float(facts.dtype.get(value)) and not value.is_graph_output():
        for axis, size in enumerate(shape):
            if size > 1:
                view = [1] * len(shape)
                view[axis] = size
                factors.append(trace.book.axis_labels(value, axis, size).reshape(view))
    trace.values[value] = Carried(str(value.name), shape, tuple(factors), constant=True)


def step(trace: Trace, model: ir.Model, facts: Facts, node: ir.Node) -> None:
    version = opset(model, node.domain)
    here = Here(node, facts.call(node, version), lookup(node.domain, node.op_type), trace)
    inputs = [None if v is None else trace.values.get(v) for v in node.inputs]
    missing = [v for v, c in zip(node.inputs, inputs, strict=True) if v is not None and c is None]
    known = all(facts.shape.get(v) is not None for v in node.outputs[:1])
    if subgraphs(node):
        captured = [trace.values.get(v) for v in outer_values(node)]
        here.pin_all([*inputs, *captured], SUBGRAPH)
        outputs: list[Factors] = []
    elif missing or not known:
        what = str(missing[0].name) if missing else str(node.outputs[0].name)
        for c in inputs if here.spec.kind == "contraction" else ():
            for labels in c.factors if c is not None and c.constant else ():
                trace.book.flag(labels, Flag.PRODUCED)  # so that the weight is listed, with its pin
        here.pin_all(inputs, here.spec.reason or f"the shape of {what} cannot be worked out")
        outputs = []
    else:
        outputs = RULES[here.spec.kind](here, inputs)
    constant = bool(inputs) and all(
        v is None or v in facts.value or (c is not None and c.constant)
        for v, c in zip(node.inputs, inputs, strict=True)
    )
    projected = constant and (
        here.spec.kind in ("contraction", "attention") or any(c is not None and c.projected for c in inputs)
    )
    for index, value in enumerate(node.outputs):
        shape = facts.shape.get(value)
        if shape is None:
            continue
        factors = outputs[index] if index < len(outputs) else ()
        usable = independent(tuple(f for f in factors if f.ndim == len(shape) and (f >= 0).any()))
        trace.values[value] = Carried(
            str(value.name), shape, usable, constant, because(here, inputs, usable), projected
        )


def because(here: Here, inputs: Sequence[Carried | None], factors: Factors) -> str:
    """Why an unlabelled value is unlabelled, where that is an operator's doing; it moves along with the value."""
    if factors:
        return ""
    if here.spec.kind == "opaque":
        return f"{here.node.op_type}: {here.spec.reason}"
    first = inputs[0] if inputs else None
    return first.because if first is not None and here.spec.kind == "movement" else ""


def outer_values(node: ir.Node) -> list[ir.Value]:
    """Values of the enclosing graph that a node's subgraphs read."""
    graphs = [a.value for a in node.attributes.values() if isinstance(a, ir.Attr) and a.type == ir.AttributeType.GRAPH]
    inner = [n for g in graphs for n in ir.traversal.RecursiveGraphIterator(g)]
    made = {v for n in inner for v in n.outputs} | {v for g in graphs for v in (*g.inputs, *g.initializers.values())}
    read = {v for n in inner for v in n.inputs if v is not None} | {v for g in graphs for v in g.outputs}
    return [v for v in read if v not in made]


# -- one rule per kind -----------------------------------------------------------------------------------------------


def opaque(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    here.pin_all(inputs, here.spec.reason)
    return []


def shape_only(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    return []


def movement(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    data = inputs[0]
    assert data is not None and here.spec.move is not None
    outputs: list[list[Labels]] = [[] for _ in here.call.outs]
    for labels in data.factors:
        try:
            moved = here.spec.move(here.call, labels)
        except Blocked as block:
            here.pin(data, labels, block.reason, block.axis)
            continue
        for out, part, value in zip(outputs, moved, here.node.outputs, strict=False):
            if varying(part) or not varying(labels):
                out.append(part)
            elif not only_shape_is_read(value):
                here.pin(data, part, "one position of it is read alone", min(varying(labels)))
    if data.constant and any(
        c is not None and v is None for c, v in zip(inputs[1:], here.call.values[1:], strict=True)
    ):
        for labels in outputs[0]:
            here.trace.book.flag(labels, Flag.PRODUCED)
    return [tuple(out) for out in outputs]


def only_shape_is_read(value: ir.Value) -> bool:
    kinds = {lookup(user.domain, user.op_type).kind for user in value.consumers()}
    return kinds <= {"shape"} and not value.is_graph_output()


def concat(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    """Lay the parts end to end. On other axes the parts must agree, so what meets there is joined."""
    axis = concat_axis(here.call)
    parts = [c for c in inputs if c is not None and c.shape[axis] > 0]
    along: list[Labels] = []
    across: dict[frozenset[int], Labels] = {}
    patterns = list(dict.fromkeys(varying(f) - {axis} for c in parts for f in c.factors))
    for pattern in patterns:
        mine = [[f for f in c.factors if varying(f) - {axis} == pattern] for c in parts]
        if any(axis in varying(f) for fs in mine for f in fs) or not pattern:
            along += [lay(here, parts, mine, axis, pattern)]
            continue
        for carried, fs in zip(parts, mine, strict=True):
            if not fs and all(carried.shape[k] > 1 for k in pattern):
                finer = [f for f in carried.factors if varying(f) - {axis} > pattern and axis not in varying(f)]
                for other, gs in zip(parts, mine, strict=True):
                    for labels in gs:
                        for fine in finer:
                            here.trace.book.cover(labels, fine, "meet")
                        if not finer:
                            here.pin(other, labels, f"it is laid beside {here.stranger(carried)}")
            for labels in fs:
                if pattern in across:
                    here.trace.book.join(across[pattern], labels)
                else:
                    across[pattern] = labels
    return [tuple(f for f in (*along, *across.values()) if f.size)]


def lay(
    here: Here, parts: Sequence[Carried], mine: Sequence[Sequence[Labels]], axis: int, pattern: frozenset[int]
) -> Labels:
    rows = []
    shape = [
        max((f.shape[k] for fs in mine for f in fs), default=1) if k in pattern else 1
        for k in range(len(parts[0].shape))
    ]
    for carried, fs in zip(parts, mine, strict=True):
        target = [*shape]
        target[axis] = carried.shape[axis]
        if not fs:
            rows.append(np.full(target, -1, np.int32))
            continue
        for extra in fs[1:]:
            here.trace.book.join(fs[0], extra)
        rows.append(np.broadcast_to(fs[0], target))
    return compress(np.concatenate(rows, axis))


def pointwise(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    rank = len(here.call.outs[0])
    parts = [
        Carried(c.name, (1,) * (rank - len(c.shape)) + c.shape, tuple(align(f, rank) for f in c.factors), c.constant)
        for c in inputs
        if c is not None and len(c.shape) <= rank
    ]
    factors = meet(here, parts)
    note_effect(here, parts, factors)
    return [factors] * len(here.call.outs)


def note_effect(here: Here, parts: Sequence[Carried], factors: Factors) -> None:
    book = here.trace.book
    effect = here.spec.effect
    active = [c for c in parts if c.factors and not c.constant]
    flag = Flag(0)
    if effect == "nonlinear":
        flag |= Flag.CURVED
    several = len(active) > 1 and any(not same_labels(active[0], c) for c in active[1:])
    if effect == "add" and several:
        flag |= Flag.ADDED
    if effect == "scale" and several:
        flag |= Flag.GATED
    if effect == "scale" and any(c.constant and c.factors for c in parts):
        flag |= Flag.SCALED
    if flag:
        for labels in factors:
            book.flag(labels, flag)


def normalise(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    data = here.spec.data or (0,)
    first = inputs[data[0]]
    assert first is not None
    rank = len(first.shape)
    per_axis = [(abs(k), k < 0) for k in here.spec.per_axis]
    parts = [inputs[k] for k in data] + [
        channelled(inputs[k], rank, at_channel) for k, at_channel in per_axis if k < len(inputs)
    ]
    present = [
        Carried(c.name, (1,) * (rank - len(c.shape)) + c.shape, tuple(align(f, rank) for f in c.factors), c.constant)
        for c in parts
        if c is not None
    ]
    for c in present[len(data) :]:
        for labels in c.factors:
            here.trace.book.flag(labels, Flag.NORMED)
    factors = meet(here, present)
    axes = here.spec.axes(here.call) if here.spec.axes else ()
    for labels in factors:
        crossed = varying(labels) & set(axes)
        if crossed:
            reason = here.spec.reason or "its statistics are taken over this axis"
            here.pin_statistics(first, labels, crossed, reason)
        here.trace.book.flag(labels, Flag.CURVED)
    return [factors if not k or k in here.spec.sums else () for k in range(len(here.call.outs))]


def channelled(carried: Carried | None, rank: int, at_channel: bool) -> Carried | None:
    """A vector per channel (axis 1) laid out so that it broadcasts."""
    if carried is None or not at_channel:
        return carried
    shape = (1, carried.shape[0]) + (1,) * (rank - 2)
    return Carried(
        carried.name, shape, tuple(f.reshape(shape) for f in carried.factors if f.size > 1), carried.constant
    )


def reduce(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    data = inputs[0]
    assert data is not None and here.spec.axes is not None
    axes = set(here.spec.axes(here.call))
    rank = len(data.shape)
    dropped = axes if len(here.call.outs[0]) < rank else set()
    out: list[Labels] = []
    for labels in data.factors:
        crossed = varying(labels) & axes
        if crossed:
            here.pin_statistics(data, labels, crossed, here.spec.reason)
            rest = varying(labels) - axes
            if not rest:
                continue
            labels = cover_rest(here, labels, rest)
        here.trace.book.flag(labels, Flag.CURVED)
        out.append(labels.reshape([n for k, n in enumerate(labels.shape) if k not in dropped]))
    return [tuple(out)]


def contraction(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    spec = here.spec
    left, right = inputs[spec.operands[0]], inputs[spec.operands[1]]
    assert spec.letters is not None
    if left is None or right is None:
        return here.refuse(inputs, "a product of other than two tensors")
    try:
        letters = letters_of(spec, here.call)
    except Blocked as block:
        return here.refuse(inputs, block.reason)
    for weight, term in ((left, letters.left), (right, letters.right)):
        if weight.constant and weight.because and not weight.factors:
            axis = next((k for k, c in enumerate(term) if c in letters.out), 0)
            here.trace.book.remark(weight.name, axis, weight.shape[axis], weight.because, here.operator)
    if int(here.call.attrs.get("group", 1)) > 1:
        factors = depthwise(here, left, right)
        if factors is None:
            return here.refuse(inputs, "a convolution in groups")
    else:
        factors = contract(here, left, right, letters)
    bias = inputs[spec.bias] if spec.bias is not None and spec.bias < len(inputs) else None
    if bias is not None and spec.bias_letters is not None and bias.factors:
        try:
            factors = add_bias(here, factors, bias, letters.out, spec.bias_letters(here.call))
        except Blocked as block:
            return here.refuse(inputs, block.reason)
    if spec.curved:
        for labels in factors:
            here.trace.book.flag(labels, Flag.CURVED)
    return [factors]


RULES = {
    "movement": movement,
    "concat": concat,
    "pointwise": pointwise,
    "contraction": contraction,
    "normalise": normalise,
    "reduce": reduce,
    "attention": attention,
    "shape": shape_only,
    "opaque": opaque,
}
