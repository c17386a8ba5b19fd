"""Label propagation through fused attention nodes, by the rules of the separate nodes that they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from snpc.ops import (
    SUMMED_OVER,
    AttentionForm,
    AttentionGeometry,
    Labels,
    Letters,
    RotaryForm,
    attention_form,
    attention_geometry,
    collapse_constant_axes,
    matmul_letters,
)
from snpc.passes.propagation.concat import concat_labels
from snpc.passes.propagation.contraction import contract_labels
from snpc.passes.propagation.copies import repeated_head
from snpc.passes.propagation.head_layout import merge_head_labels, repeat_head_labels, split_head_labels
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.pointwise import unify_factors
from snpc.passes.propagation.rotary_embedding import unify_rotated_pairs
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext, WidthTie, prepend_axes

QueryKeyValue = tuple[LabeledValue, LabeledValue, LabeledValue]


def propagate_attention(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Factors of the output and of the present keys and values: projection, scores, softmax, context."""
    form, head_geometry = (
        attention_form(context.call, context.node.domain),
        attention_geometry(context.call, context.node.domain),
    )
    extra = [inputs[k] for k in form.others(context.call) if k < len(inputs)]
    if any(c is not None and c.factors for c in extra):
        context.pin_all(extra, "an unsupported input of a fused attention node")
    if head_geometry is None:
        return context.refuse(inputs, "a fused attention node with an unsupported packed layout")
    if any(optional_input(inputs, k) is not None for k in form.norms):
        return context.refuse(
            inputs, "a fused attention node that normalizes queries and keys by a gain that is computed"
        )
    if any(o.uses() or o.is_graph_output() for o in context.node.outputs[1 + len(form.present) :]):
        return context.refuse(inputs, "a fused attention node that outputs its scores")
    flat = len(context.call.shape(form.query)) < 4
    query, key, value = query_key_value(context, inputs, form, head_geometry)
    tables = [optional_input(inputs, k) for k in form.rotary]
    query, key = propagate_inner_rotary(context, query, key, [t for t in tables if t is not None])
    past = [optional_input(inputs, k) for k in form.past]
    present_is_used = any(o.uses() or o.is_graph_output() for o in context.node.outputs[1:])
    if form.equal or (len(form.past) == 1 and (past[0] is not None or present_is_used)):
        tie = width_tie(context, key, value, form, tables)
        if len(form.past) == 1:  # one tensor holds both
            unify_keys_and_values(tie)
        else:
            context.trace.width_ties.append(tie)
    key, value = prepend_past(context, key, value, past)
    presents = [key.factors, value.factors] if len(form.present) == 2 else [stack_present(key, value)]
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (repeat_heads(context, part, repeats) for part in (key, value))
    bias = optional_input(inputs, form.scores)
    attended = propagate_scores_and_context(context, query, key, value, bias)
    return [drop_batch_axis(context, merge_head_labels(attended)) if flat else attended.factors, *presents]


def repeat_heads(context: NodeContext, part: LabeledValue, repeats: int) -> LabeledValue:
    """Keys or values, each head as often as query heads read it."""
    one_head = part.shape[1] == 1
    return repeated_head(context, part, repeats) if one_head else repeat_head_labels(part, repeats)


def optional_input(inputs: Sequence[LabeledValue | None], index: int | None) -> LabeledValue | None:
    """The input at ``index``; None where it is not given."""
    return inputs[index] if index is not None and index < len(inputs) else None


def drop_batch_axis(context: NodeContext, merged: LabeledValue) -> Factors:
    """Factors of the output, which has no batch axis where the tokens of all samples are packed into one row."""
    rank = len(context.call.out_shapes[0])
    return tuple(f.reshape(f.shape[-rank:]) for f in merged.factors)


def query_key_value(
    context: NodeContext, inputs: Sequence[LabeledValue | None], form: AttentionForm, head_geometry: AttentionGeometry
) -> QueryKeyValue:
    """Queries, keys and values, each [batch, heads, tokens, head width]."""
    if form.packed == "weight":
        query, key, value = propagate_packed_projection(context, inputs, head_geometry.columns)
    elif form.packed == "columns":
        whole = inputs[form.query]
        assert whole is not None
        query, key, value = split_packed_columns(context, whole, head_geometry.columns)
    else:
        query, key, value = (add_batch_axis(inputs[k]) for k in (form.query, form.key, form.value))
    bias = optional_input(inputs, form.bias)
    if bias is not None and not form.packed:
        query, key, value = unify_with_packed_bias(context, [query, key, value], bias, head_geometry.columns)
    return (
        split_head_labels(query, head_geometry.heads),
        split_head_labels(key, head_geometry.kv_heads),
        split_head_labels(value, head_geometry.kv_heads),
    )


def add_batch_axis(operand: LabeledValue | None) -> LabeledValue:
    """``operand`` with a batch axis in front, where the tokens of all samples are packed into one row."""
    assert operand is not None
    if len(operand.shape) > 2:
        return operand
    return LabeledValue(operand.name, (1, *operand.shape), tuple(f[None] for f in operand.factors), operand.constant)


def propagate_inner_rotary(
    context: NodeContext, query: LabeledValue, key: LabeledValue, tables: Sequence[LabeledValue]
) -> tuple[LabeledValue, LabeledValue]:
    """Queries and keys after the rotary position embedding inside the node."""
    if len(tables) < 2 or not context.call.attrs.get("do_rotary", 0):
        return query, key
    rotary = RotaryForm(0, 0, 0, 2 * tables[0].shape[-1], bool(context.call.attrs.get("rotary_interleaved", 0)))
    return unify_rotated_pairs(context, query, tables, rotary), unify_rotated_pairs(context, key, tables, rotary)


def width_tie(
    context: NodeContext,
    key: LabeledValue,
    value: LabeledValue,
    form: AttentionForm,
    tables: Sequence[LabeledValue | None],
) -> WidthTie:
    """Keys and values that share one tensor or one width, in steps that kernels support."""
    do_rotary = bool(context.call.attrs.get("do_rotary", 0)) and tables[0] is not None
    rotary_width = 2 * tables[0].shape[-1] if do_rotary and tables[0] is not None else 0
    interleaved = bool(context.call.attrs.get("rotary_interleaved", 0))
    steps = kernel_step_starts(key.shape[3], rotary_width, form.multiple, interleaved)
    multiple = form.multiple * (2 if rotary_width else 1)
    cached = any(context.node.outputs[k].is_graph_output() for k in form.present if k < len(context.node.outputs))
    return WidthTie(context, key, value, multiple, tuple(steps), form.one_head_size and cached)


def unify_keys_and_values(tie: WidthTie) -> None:
    """Unify channels of keys and values position by position, in steps that kernels support."""
    table = tie.context.trace.table
    for labels in unify_factors(tie.context, [tie.key, tie.value]):
        table.flag(labels, LabelFlag.NONLINEAR)
    for labels in tie.key.factors if tie.multiple > 1 else ():
        if labels.shape[3] > 1:
            table.unify(labels, labels[..., list(tie.steps)])


def kernel_step_starts(width: int, rotary: int, multiple: int, interleaved: bool) -> list[int]:
    """[width]: the first channel of the step that each channel belongs to.

    A step of rotated channels holds ``multiple`` pairs, which is twice as many channels. Beside rotated channels, the
    steps of other channels are as wide.
    """
    wide = multiple * (2 if rotary else 1)
    half = rotary // 2
    return [
        (k % half) // multiple * multiple if k < rotary and not interleaved else k // wide * wide for k in range(width)
    ]


def prepend_past(
    context: NodeContext, key: LabeledValue, value: LabeledValue, past: Sequence[LabeledValue | None]
) -> tuple[LabeledValue, LabeledValue]:
    """Keys and values with the past ones concatenated in front."""
    if not past or past[0] is None:
        return key, value
    if len(past) == 1:
        whole = past[0]
        earlier = [
            replace(whole, shape=whole.shape[1:], factors=tuple(f[min(k, len(f) - 1)] for f in whole.factors))
            for k in range(2)
        ]
    else:
        earlier = [c for c in past if c is not None]
    longer = []
    for before, now in zip(earlier, (key, value), strict=True):
        shape = (*now.shape[:2], before.shape[2] + now.shape[2], now.shape[3])
        longer.append(LabeledValue(now.name, shape, concat_labels(context, [before, now], 2), now.constant))
    return longer[0], longer[1]


def stack_present(key: LabeledValue, value: LabeledValue) -> Factors:
    """Factors of keys and values stacked into one tensor [2, batch, heads, tokens, head width]."""
    both = zip(key.factors, value.factors, strict=False)
    return tuple(np.stack([a, b]) for a, b in both if a.shape == b.shape)


def propagate_scores_and_context(
    context: NodeContext, query: LabeledValue, key: LabeledValue, value: LabeledValue, bias: LabeledValue | None
) -> LabeledValue:
    """Context of attention [batch, heads, tokens, width]: scores, bias or mask, softmax, product with values."""
    product = matmul_letters(4, 4)
    flipped = Letters(product.left, product.right[:-2] + product.right[-1] + product.right[-2], product.out)
    scores_shape = (*query.shape[:3], key.shape[2])
    scores = LabeledValue(
        f"{context.node.name}.scores", scores_shape, contract_labels(context, query, key, flipped, "scores")
    )
    parts = [scores]
    if bias is not None:
        rank = 4
        parts.append(
            LabeledValue(
                bias.name,
                (1,) * (rank - len(bias.shape)) + bias.shape,
                tuple(prepend_axes(f, rank) for f in bias.factors),
                bias.constant,
            )
        )
    factors = unify_factors(context, parts)
    for labels in factors:
        if 3 in varying_axes(labels):
            context.pin_statistics(scores, labels, frozenset({3}), SUMMED_OVER, "sum")
    weights = LabeledValue(f"{context.node.name}.weights", scores_shape, factors)
    context_shape = (*query.shape[:3], value.shape[3])
    for name, operand in (("query", query), ("key", key), ("value", value)):
        context.trace.inner_values[(context.node, name)] = operand
    return LabeledValue(
        f"{context.node.name}.context", context_shape, contract_labels(context, weights, value, product, "context")
    )


def propagate_packed_projection(
    context: NodeContext, inputs: Sequence[LabeledValue | None], widths: tuple[int, int, int]
) -> QueryKeyValue:
    """Queries, keys and values of com.microsoft.Attention, which projects inside: column ranges of x @ W + b."""
    data, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    assert data is not None and weight is not None
    shape = (*data.shape[:2], weight.shape[1])
    factors = contract_labels(context, data, weight, matmul_letters(len(data.shape), 2), "projection")
    parts = [LabeledValue(f"{context.node.name}.qkv", shape, factors)]
    if bias is not None:
        parts.append(
            LabeledValue(bias.name, (1, 1, *bias.shape), tuple(prepend_axes(f, 3) for f in bias.factors), bias.constant)
        )
    return split_packed_columns(context, LabeledValue(parts[0].name, shape, unify_factors(context, parts)), widths)


def unify_with_packed_bias(
    context: NodeContext, parts: Sequence[LabeledValue], bias: LabeledValue, widths: tuple[int, int, int]
) -> QueryKeyValue:
    """Add the packed bias of queries, keys and values; operands that are split into heads already have theirs."""
    spread = LabeledValue(bias.name, (1, 1, sum(widths)), tuple(prepend_axes(f, 3) for f in bias.factors), True)
    q, k, v = (
        LabeledValue(
            part.name, c.shape, unify_factors(context, [c, LabeledValue(bias.name, part.shape, part.factors, True)])
        )
        if len(c.shape) == 3
        else c
        for c, part in zip(parts, split_packed_columns(context, spread, widths), strict=True)
    )
    return q, k, v


def split_packed_columns(context: NodeContext, whole: LabeledValue, widths: tuple[int, int, int]) -> QueryKeyValue:
    """Queries, keys and values, whose widths are ``widths``, from one packed operand."""
    ends = np.cumsum(widths)[:2]
    q, k, v = (
        LabeledValue(
            f"{context.node.name}.{'qkv'[index]}",
            (*whole.shape[:-1], width),
            tuple(select_columns(f, index, ends) for f in whole.factors),
        )
        for index, width in enumerate(widths)
    )
    return q, k, v


def select_columns(labels: Labels, index: int, ends: np.typing.NDArray[np.int64]) -> Labels:
    """The columns of part ``index``; an array that does not vary on columns is unchanged."""
    return collapse_constant_axes(np.split(labels, ends, -1)[index]) if labels.shape[-1] > 1 else labels
