"""Label propagation: every axis of every float constant gets labels, and the graph is executed on label arrays.

The operator table (``snpc.ops``) says what kind each operator is, and one rule per kind says what becomes of labels. No
attention pattern is known here: queries and keys belong together because a contraction of two activations unifies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.graph import (
    ShapeFacts,
    has_subgraphs,
    is_float,
    opset_version,
    selects_columns,
    shape_source,
    unknown_shape_reason,
)
from snpc.ops import SHAPE_MISMATCH, SUBGRAPH, Blocked, Labels, concat_axis, letters_of, lookup, rotary_tables
from snpc.passes.propagation.attention import propagate_attention
from snpc.passes.propagation.concat import concat_labels
from snpc.passes.propagation.contraction import contract_labels, propagate_grouped_convolution, unify_with_bias
from snpc.passes.propagation.copies import propagate_copies, settle_copies
from snpc.passes.propagation.kv_cache import (
    KV_CACHE_ADVICE,
    find_kv_caches,
    is_shared_cache,
    label_kv_cache,
    present_outputs,
)
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.pointwise import have_labels_in_common, unify_factors
from snpc.passes.propagation.rotary_embedding import propagate_column_selection, propagate_rotary
from snpc.passes.propagation.routing import (
    compare_positions,
    propagate_choice,
    propagate_expert_reading,
    propagate_experts,
    propagate_one_hot,
    reads_experts,
    record_expert_output,
    repeats_rows,
    routing_of,
    selects_expert,
)
from snpc.passes.propagation.state import (
    NOT_ROUTED,
    Contraction,
    Factors,
    LabeledValue,
    NodeContext,
    Trace,
    cover_remaining_axes,
    drop_determined_factors,
    prepend_axes,
)
from snpc.passes.propagation.statistics import moves_from_own_axis, non_normalizing_consumer
from snpc.types import Shape

__all__ = ["Contraction", "LabeledValue", "Trace", "propagate_labels"]


def propagate_labels(model: ir.Model, facts: ShapeFacts, kv_cache: bool = False) -> Trace:
    """Labels of every value in the main graph of a canonical model.

    ``kv_cache``: KV cache inputs get labels too, so that they can be narrowed.
    """
    trace = Trace()
    caches = find_kv_caches(model, facts)
    for value in model.graph.inputs:
        if kv_cache and value in caches:
            trace.values[value] = label_kv_cache(trace, value, facts, caches[value])
        elif not value.is_initializer():
            register_input(trace, value, facts, KV_CACHE_ADVICE if value in caches else "")
    for value in model.graph.initializers.values():
        label_constant(trace, value, facts)
    for node in model.graph:
        propagate_node(trace, model, facts, node)
    for statistic in trace.statistics:
        reader = non_normalizing_consumer(statistic, trace)
        if reader is not None:
            statistic.context.pin(
                statistic.data, statistic.labels, f"its mean is used outside the normalization, by {reader}"
            )
    presents = set(present_outputs(trace, list(model.graph.outputs))) if kv_cache else set()
    for value in model.graph.outputs:
        operand = trace.values.get(value)
        if operand is None or value in presents:
            continue
        for labels in (*operand.factors, *operand.copies):
            axis = min(varying_axes(labels), default=0)
            trace.table.pin(
                labels,
                str(value.name),
                axis,
                operand.shape[axis],
                KV_CACHE_ADVICE if is_shared_cache(value) else "it is a graph output",
                f"output {value.name}",
            )
    settle_copies(trace)
    return trace


def register_input(trace: Trace, value: ir.Value, facts: ShapeFacts, because: str) -> None:
    """Record a graph input, which has no labels. ``because``: what to tell users about it."""
    shape = facts.shape.get(value)
    if shape is not None:
        trace.values[value] = LabeledValue(str(value.name), shape, unlabeled_reason=because)


def label_constant(trace: Trace, value: ir.Value, facts: ShapeFacts) -> None:
    """Label every axis of a float constant that has more than one entry. Of rotary tables the columns alone: there may
    be a hundred thousand rows, which positions address."""
    shape = facts.shape.get(value)
    if shape is None:
        return
    if selects_columns(value):
        trace.values[value] = LabeledValue(
            str(value.name), shape, (trace.table.label_selection(shape[0]),), constant=True
        )
        return
    factors: list[Labels] = []
    is_table = bool(value.uses()) and all(k in rotary_tables(n.domain, n.op_type) for n, k in value.uses())
    if is_float(facts.dtype.get(value)) and not value.is_graph_output():
        for axis, size in enumerate(shape):
            if size > 1 and (axis == len(shape) - 1 or not is_table):
                view = [1] * len(shape)
                view[axis] = size
                factors.append(trace.table.label_axis(value, axis, size).reshape(view))
    trace.values[value] = LabeledValue(str(value.name), shape, tuple(factors), constant=True)


def propagate_node(trace: Trace, model: ir.Model, facts: ShapeFacts, node: ir.Node) -> None:
    """Factors of the outputs of one node, by the rule of its kind. Unknown shapes and subgraphs pin the inputs."""
    version = opset_version(model, node.domain)
    first = node.inputs[0] if node.inputs else None
    dtype = (facts.dtype.get(first) if first is not None else None) or ir.DataType.FLOAT
    context = NodeContext(node, facts.call(node, version), lookup(node.domain, node.op_type), trace, dtype)
    inputs = [None if v is None else trace.values.get(v) for v in node.inputs]
    missing = [v for v, operand in zip(node.inputs, inputs, strict=True) if v is not None and operand is None]
    shape_is_known = all(facts.shape.get(v) is not None for v in node.outputs[:1])
    copies: list[Factors] = []
    if has_subgraphs(node):
        captured = [trace.values.get(v) for v in captured_values(node)]
        context.pin_all([*inputs, *captured], SUBGRAPH)
        outputs: list[Factors] = []
    elif missing or not shape_is_known:
        unknown = missing[0] if missing else node.outputs[0]
        for operand in inputs if context.spec.kind == "contraction" else ():
            for labels in operand.factors if operand is not None and operand.constant else ():
                trace.table.flag(labels, LabelFlag.PRODUCED)  # lists the weight together with its pin
        is_opaque = context.spec.kind == "opaque"
        context.pin_all(inputs, context.spec.reason if is_opaque else unknown_shape_reason(facts, unknown))
        outputs = []
    else:
        copies = propagate_copies(context, inputs)
        try:
            outputs = PROPAGATION_RULES[context.spec.kind](context, inputs)
        except Blocked as block:  # labels cannot be laid out as the operator lays out its operands
            outputs = context.refuse(inputs, block.reason)
    constant = bool(inputs) and all(
        v is None or v in facts.value or (operand is not None and operand.constant)
        for v, operand in zip(node.inputs, inputs, strict=True)
    )
    if not missing and reads_experts(context, inputs):  # the weights of an expert, although data choose which
        constant = inputs[0] is not None and inputs[0].constant
    products, is_sum = products_of(context, inputs)
    projected = constant and (
        context.spec.kind in ("contraction", "attention", "experts")
        or any(operand is not None and operand.projected for operand in inputs)
    )
    for index, value in enumerate(node.outputs):
        shape = facts.shape.get(value)
        if shape is None:
            continue
        factors = outputs[index] if index < len(outputs) else ()
        usable = drop_determined_factors(tuple(f for f in factors if describes(context, value, f, shape)))
        reason = why_unlabeled(context, inputs, usable)
        routing = NOT_ROUTED if missing else routing_of(context, inputs, index)
        own_copies = copies[index] if index < len(copies) else ()
        trace.values[value] = LabeledValue(
            str(value.name), shape, usable, constant, reason, projected, products, is_sum, routing, own_copies
        )


def products_of(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> tuple[frozenset[str], bool]:
    """``LabeledValue.products`` and ``is_sum`` of the node's outputs."""
    if context.spec.kind in ("contraction", "attention", "experts"):
        return frozenset({str(context.node.outputs[0].name)}), False
    active = [operand for operand in inputs if operand is not None and operand.factors and not operand.constant]
    sets = {operand.products for operand in active}
    added = (context.spec.effect == "add" or context.spec.kind == "normalize") and len(sets) > 1
    products = next(iter(sets)) if len(sets) == 1 else frozenset[str]().union(*sets)
    return products, added or any(operand.is_sum for operand in active)


def describes(context: NodeContext, value: ir.Value, labels: Labels, shape: Shape) -> bool:
    """Whether ``labels`` label a value of this shape. Labels that fit no position of it are pinned."""
    if not (labels >= 0).any():
        return False
    fits = labels.ndim == len(shape) and all(n in (1, size) for n, size in zip(labels.shape, shape, strict=True))
    if not fits:
        operand = LabeledValue(str(value.name), shape)
        context.pin(operand, labels, f"its {list(labels.shape)} labels do not fit a result of shape {list(shape)}", 0)
    return fits


def why_unlabeled(context: NodeContext, inputs: Sequence[LabeledValue | None], factors: Factors) -> str:
    """Why a value has no labels, where an operator is the reason. Movement operators pass the reason on."""
    if factors:
        return ""
    if context.spec.kind == "opaque":
        return f"{context.node.op_type}: {context.spec.reason}"
    first = inputs[0] if inputs else None
    moved = context.spec.kind == "movement" or (context.spec.kind == "concat" and len(context.node.inputs) == 1)
    return first.unlabeled_reason if first is not None and moved else ""


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Values of the enclosing graph that a node's subgraphs read."""
    graphs = [a.value for a in node.attributes.values() if isinstance(a, ir.Attr) and a.type == ir.AttributeType.GRAPH]
    nodes = [n for g in graphs for n in ir.traversal.RecursiveGraphIterator(g)]
    defined = {v for n in nodes for v in n.outputs} | {v for g in graphs for v in (*g.inputs, *g.initializers.values())}
    used = {v for n in nodes for v in n.inputs if v is not None} | {v for g in graphs for v in g.outputs}
    return [v for v in used if v not in defined]


# -- one rule per kind -----------------------------------------------------------------------------------------------


def propagate_opaque(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Pin all inputs, with the operator's reason."""
    context.pin_all(inputs, context.spec.reason)
    return []


def propagate_shape_only(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Outputs that depend on shapes only have no labels."""
    return []


def propagate_movement(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Run the operator on the label arrays: it only moves positions."""
    data = inputs[0]
    assert data is not None and context.spec.move is not None
    if reads_experts(context, inputs):
        return propagate_expert_reading(context, inputs)
    if len(inputs) > 1 and inputs[1] is not None and inputs[1].factors:
        return [propagate_column_selection(context, data, inputs[1])]
    outputs: list[list[Labels]] = [[] for _ in context.call.out_shapes]
    for labels in data.factors:
        try:
            moved = context.spec.move(context.call, labels)
        except Blocked as block:
            context.pin(data, labels, block.reason, block.axis)
            continue
        for out, moved_labels, value in zip(outputs, moved, context.node.outputs, strict=False):
            if varying_axes(moved_labels) or not varying_axes(labels):
                out.append(moved_labels)
            elif not is_only_shape_read(value) and not selects_expert(context, data):
                context.pin(data, moved_labels, "a single index of it is selected", min(varying_axes(labels)))
    if data.constant and any(
        c is not None and v is None for c, v in zip(inputs[1:], context.call.values[1:], strict=True)
    ):
        for labels in outputs[0]:
            context.trace.table.flag(labels, LabelFlag.PRODUCED)
    if context.spec.expands:
        outputs[0] += labels_of_expanded_axes(context, data)
    return [tuple(out) for out in outputs]


def labels_of_expanded_axes(context: NodeContext, data: LabeledValue) -> list[Labels]:
    """Factors of Expand along the axes that it repeats to the size of another tensor: those of that tensor."""
    other = context.trace.values.get(shape_source(context.node.inputs[1]))  # type: ignore[arg-type]
    if other is None or other.shape != context.call.out_shapes[0]:
        return []
    shape = (1,) * (len(other.shape) - len(data.shape)) + data.shape
    expanded_axes = {k for k, size in enumerate(shape) if size == 1 < other.shape[k]}
    return [labels for labels in other.factors if varying_axes(labels) & expanded_axes]


def is_only_shape_read(value: ir.Value) -> bool:
    """Whether all consumers of ``value`` read its shape only."""
    kinds = {lookup(user.domain, user.op_type).kind for user in value.consumers()}
    return kinds <= {"shape"} and not value.is_graph_output()


def propagate_concat(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Concatenate label arrays."""
    return [concat_labels(context, [c for c in inputs if c is not None], concat_axis(context.call))]


def propagate_pointwise(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Unify the factors of all inputs at the same positions."""
    rank = len(context.call.out_shapes[0])
    parts = [
        replace(
            c, shape=(1,) * (rank - len(c.shape)) + c.shape, factors=tuple(prepend_axes(f, rank) for f in c.factors)
        )
        for c in inputs
        if c is not None and len(c.shape) <= rank
    ]
    factors = unify_factors(context, parts)
    flag_effect(context, parts, factors)
    return [factors] * len(context.call.out_shapes)


def flag_effect(context: NodeContext, parts: Sequence[LabeledValue], factors: Factors) -> None:
    """Flag labels that were added, multiplied, scaled or passed through a nonlinear operator."""
    table = context.trace.table
    effect = context.spec.effect
    active = [c for c in parts if c.factors and not c.constant]
    flag = LabelFlag(0)
    if effect == "nonlinear":
        flag |= LabelFlag.NONLINEAR
    # Two results of products are two, even where a bias that both share gives them the same labels.
    several = any(c.products != active[0].products or not have_labels_in_common(active[0], c) for c in active[1:])
    if effect == "add" and several:
        flag |= LabelFlag.ADDED
    if effect == "scale" and several:
        flag |= LabelFlag.GATED
    if effect == "scale" and any(c.constant and c.factors for c in parts):
        flag |= LabelFlag.SCALED
    if flag:
        for labels in factors:
            table.flag(labels, flag)


def propagate_normalization(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Element-wise in data and parameters; the axes that statistics are taken over are pinned."""
    spec = context.spec
    rank = len(context.call.out_shapes[0]) if spec.tables else len(context.call.shape((spec.data or (0,))[0]))
    data = [
        propagate_table_lookup(context, inputs[k], rank) if k in spec.tables else inputs[k]
        for k in spec.data or (0,)
        if k < len(inputs)
    ]
    channels = context.call.out_shapes[0][1] if rank > 1 else 1
    per_axis = [
        broadcast_per_channel(inputs[abs(k)], rank, channels) if k < 0 else inputs[k]
        for k in spec.per_axis
        if abs(k) < len(inputs)
    ]
    operands = [
        LabeledValue(
            c.name, (1,) * (rank - len(c.shape)) + c.shape, tuple(prepend_axes(f, rank) for f in c.factors), c.constant
        )
        for c in (*data, *per_axis)
        if c is not None
    ]
    first = operands[0]
    for c in per_axis:
        for labels in c.factors if c is not None else ():
            context.trace.table.flag(labels, LabelFlag.NORM_PARAMETER)
    factors = unify_factors(context, operands)
    if sum(bool(c is not None and c.factors and not c.constant) for c in data) > 1:
        for labels in factors:
            context.trace.table.flag(labels, LabelFlag.ADDED)
    axes = set(spec.axes(context.call)) if spec.axes else set()
    normalized = [f for c in operands[: sum(c is not None for c in data)] for f in c.factors]
    for labels in factors:
        crossed = varying_axes(labels) & axes
        if spec.makes_shares and len(crossed) == len(varying_axes(labels)) == 1:
            compare_positions(context, first, labels)
        elif crossed and not (is_shared_parameter(labels, normalized) or unify_statistic_parts(context, labels, axes)):
            reason = spec.reason or "its statistics are taken over this axis"
            folded = len(np.unique(labels)) < labels.size
            lost = folded and moves_from_own_axis(context.node.inputs[0], labels, context.trace) is None
            context.pin_statistics(first, labels, crossed, reason, "sum" if lost else None)
        context.trace.table.flag(labels, LabelFlag.NONLINEAR)
    kept = tuple(f for labels in factors for f in labels_of_kept_axes(context, labels))
    return [kept if not k or k in spec.sum_outputs else () for k in range(len(context.call.out_shapes))]


def is_shared_parameter(labels: Labels, normalized: Sequence[Labels]) -> bool:
    """Are these the labels of a gain or bias that the parts of finer labels share, of which the statistics are taken
    (one vector for all heads)?"""
    return all(labels is not finer for finer in normalized) and any(
        varying_axes(labels) < varying_axes(finer) for finer in normalized
    )


def labels_of_kept_axes(context: NodeContext, labels: Labels) -> Factors:
    """Labels behind a window: an axis that gets another size has none; what lies on the other axes stays."""
    resized = {k for k, size in enumerate(context.call.out_shapes[0]) if labels.shape[k] not in (1, size)}
    if not resized:
        return (labels,)
    rest = varying_axes(labels) - resized
    return (cover_remaining_axes(context, labels, rest),) if rest else ()


def unify_statistic_parts(context: NodeContext, labels: Labels, axes: set[int]) -> bool:
    """Unify each part of the channels that a statistic of its own is taken over, if the operator allows to remove a
    part as a whole. Returns whether it does."""
    parts = context.spec.statistic_parts(context.call) if context.spec.statistic_parts is not None else 1
    if parts == 1 or labels.shape[0] > 1 or labels.shape[1] == 1 or (1 in axes and varying_axes(labels) != {1}):
        return False
    rows = labels.reshape(parts, -1)
    context.trace.table.unify(rows, rows[:, :1])
    return True


def propagate_table_lookup(context: NodeContext, table: LabeledValue | None, rank: int) -> LabeledValue | None:
    """Rows of a table that are looked up by index: labels of the table's columns, on the last axis."""
    if table is None:
        return None
    factors = []
    for labels in table.factors:
        if varying_axes(labels) == {1}:
            context.trace.table.flag(labels, LabelFlag.PRODUCED)
            factors.append(prepend_axes(labels, rank))
        else:
            context.pin(table, labels, "which entries are read depends on the data")
    return LabeledValue(str(context.node.outputs[0].name), (1,) * (rank - 1) + table.shape[1:], tuple(factors))


def broadcast_per_channel(operand: LabeledValue | None, rank: int, channels: int) -> LabeledValue | None:
    """A vector with an entry per channel (axis 1) or per group of channels, reshaped so that it broadcasts. Raises
    Blocked where its length does not divide that of the channels."""
    if operand is None or len(operand.shape) != 1 or rank < 2:
        return operand
    if operand.shape[0] == 0 or channels % operand.shape[0]:
        raise Blocked(0, SHAPE_MISMATCH)
    shape = (1, channels) + (1,) * (rank - 2)
    repeats = channels // operand.shape[0]
    factors = tuple(f.repeat(repeats).reshape(shape) for f in operand.factors if f.size > 1)
    return LabeledValue(operand.name, shape, factors, operand.constant)


def propagate_reduction(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Pin the reduced axes; the other axes keep their labels."""
    data = inputs[0]
    assert data is not None and context.spec.axes is not None
    axes = set(context.spec.axes(context.call))
    rank = len(data.shape)
    dropped = axes if len(context.call.out_shapes[0]) < rank else set()
    out: list[Labels] = []
    for labels in data.factors:
        crossed = varying_axes(labels) & axes
        if crossed:
            context.pin_statistics(data, labels, crossed, context.spec.reason)
            rest = varying_axes(labels) - axes
            if not rest:
                continue
            labels = cover_remaining_axes(context, labels, rest)
        context.trace.table.flag(labels, LabelFlag.NONLINEAR)
        out.append(labels.reshape([n for k, n in enumerate(labels.shape) if k not in dropped]))
    return [tuple(out)]


def propagate_contraction(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Contract the two operands, then add bias and residual input, if there are any."""
    spec = context.spec
    left, right = (inputs[k] if k < len(inputs) else None for k in spec.operands)
    assert spec.letters is not None
    if left is None or right is None:
        return context.refuse(inputs, "a product of other than two tensors")
    try:
        letters = letters_of(spec, context.call)
    except Blocked as block:
        return context.refuse(inputs, block.reason)
    for weight, term in ((left, letters.left), (right, letters.right)):
        if weight.constant and weight.unlabeled_reason and not weight.factors:
            axis = next((k for k, c in enumerate(term) if c in letters.out), 0)
            context.trace.table.pin_unlabeled(
                weight.name, axis, weight.shape[axis], weight.unlabeled_reason, context.operator
            )
    groups = int(context.call.attrs.get("group", 1)) if letters.windowed else 1
    if groups < 1 or (groups > 1 and any(n % groups for n in (*left.shape[1:2], *right.shape[:1]))):
        return context.refuse(inputs, "the number of groups does not divide the number of channels")
    factors = (
        contract_labels(context, left, right, letters)
        if groups == 1
        else propagate_grouped_convolution(context, left, right, letters, groups)
    )
    bias = inputs[spec.bias] if spec.bias is not None and spec.bias < len(inputs) else None
    if bias is not None and spec.bias_letters is not None and bias.factors:
        try:
            factors = unify_with_bias(context, factors, bias, letters.out, spec.bias_letters(context.call))
        except Blocked as block:
            return context.refuse(inputs, block.reason)
    added = inputs[spec.summand] if spec.summand is not None and spec.summand < len(inputs) else None
    if added is not None:
        product = LabeledValue(str(context.node.outputs[0].name), context.call.out_shapes[0], factors)
        factors = unify_factors(context, [product, added])
        for labels in factors:
            context.trace.table.flag(labels, LabelFlag.ADDED)
    if spec.has_activation:
        for labels in factors:
            context.trace.table.flag(labels, LabelFlag.NONLINEAR)
    return [factors]


def propagate_scatter(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Factors of a tensor with some entries overwritten. Indexed axes are pinned; later axes are unified with the
    updates."""
    data, updates = (inputs[k] for k in context.spec.data or (0, 2))
    assert data is not None and updates is not None and context.spec.axes is not None
    rank = len(data.shape)
    addressed = addressed_axes(context, inputs)
    record_expert_output(context, inputs[1])
    behind = max(addressed, default=-1) + 1
    parts = []
    for operand in (data, updates):
        front = len(operand.shape) - (rank - behind)
        kept = []
        for labels in operand.factors:
            if any(k < front for k in varying_axes(labels)):
                context.pin(operand, labels, context.spec.reason, min(varying_axes(labels)))
            else:
                kept.append(labels.reshape((1,) * behind + labels.shape[front:]))
        shape = (1,) * behind + operand.shape[front:]
        parts.append(LabeledValue(operand.name, shape, tuple(kept), operand.constant))
    return [unify_factors(context, parts)]


def addressed_axes(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> set[int]:
    """Axes that stay at a scatter. Where its indices repeat one column, it is the axis that they name alone."""
    call = context.call
    assert context.spec.axes is not None
    if context.spec.index_axis is not None:
        axis = context.spec.index_axis(call)
        if axis == 0 and repeats_rows(context.node.inputs[1], axis, context.trace.values):
            return {axis}
    return set(context.spec.axes(call))


def propagate_sampling(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Channels keep their labels, positions are pinned. Where heads lie on the axis of samples, the channels of each
    are a block, and whole heads stay: the positions have this axis too."""
    data = inputs[0]
    assert data is not None and context.spec.axes is not None
    context.pin_all(inputs[1:], context.spec.reason)
    fixed = set(context.spec.axes(context.call))
    factors = []
    for labels in data.factors:
        varying = varying_axes(labels)
        if varying & fixed or 1 not in varying:
            context.pin(data, labels, context.spec.reason, min(varying & fixed or varying))
            continue
        context.trace.table.flag(labels, LabelFlag.NONLINEAR)
        if 0 in varying:
            heads = cover_remaining_axes(context, labels, frozenset({0}))
            context.pin(data, heads, "the positions that are read have this axis as well", 0)
            context.trace.table.flag(labels, LabelFlag.PASSED_THROUGH)
        factors.append(labels)
    return [tuple(factors)]


PROPAGATION_RULES = {
    "movement": propagate_movement,
    "concat": propagate_concat,
    "pointwise": propagate_pointwise,
    "contraction": propagate_contraction,
    "normalize": propagate_normalization,
    "reduce": propagate_reduction,
    "attention": propagate_attention,
    "rotary": propagate_rotary,
    "sample": propagate_sampling,
    "scatter": propagate_scatter,
    "choose": propagate_choice,
    "one_hot": propagate_one_hot,
    "experts": propagate_experts,
    "shape": propagate_shape_only,
    "opaque": propagate_opaque,
}
