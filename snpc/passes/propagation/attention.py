"""Fused attention nodes, spelled out with the same rules as the separate nodes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from snpc.ops.attention import AttentionForm, AttentionGeometry, attention_form, attention_geometry
from snpc.ops.contraction import matmul_letters
from snpc.ops.movement import collapse_constant_axes
from snpc.ops.rotary import RotaryForm
from snpc.ops.spec import SUMMED_OVER, Labels, Letters
from snpc.passes.propagation.concat import concat_labels
from snpc.passes.propagation.contraction import contract_labels
from snpc.passes.propagation.head_layout import merge_head_labels, repeat_head_labels, split_head_labels
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.pointwise import unify_factors
from snpc.passes.propagation.rotary_embedding import unify_rotated_pairs
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext, prepend_axes

QueryKeyValue = tuple[LabeledValue, LabeledValue, LabeledValue]


def propagate_attention(here: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Scores, softmax, context, spelled out with the same rules as their separate nodes."""
    shape, sizes = attention_form(here.call, here.node.domain), attention_geometry(here.call, here.node.domain)
    extra = [inputs[k] for k in shape.others(here.call) if k < len(inputs)]
    if any(c is not None and c.factors for c in extra):
        here.pin_all(extra, "an input of a fused attention that snpc does not follow")
    if sizes is None:
        return here.refuse(inputs, "a fused attention with packed queries, keys and values")
    if any(o.uses() or o.is_graph_output() for o in here.node.outputs[1 + len(shape.present) :]):
        return here.refuse(inputs, "a fused attention that hands out its scores")
    flat = len(here.call.shape(shape.query)) < 4
    query, key, value = query_key_value(here, inputs, shape, sizes)
    tables = [optional_input(inputs, k) for k in shape.rotary]
    query, key = propagate_inner_rotary(here, query, key, [t for t in tables if t is not None])
    past = [optional_input(inputs, k) for k in shape.past]
    keeps = any(o.uses() or o.is_graph_output() for o in here.node.outputs[1:])
    if shape.equal or (len(shape.past) == 1 and (past[0] is not None or keeps)):
        unify_keys_and_values(here, key, value, shape, tables)
    key, value = prepend_past(here, key, value, past)
    presents = [key.factors, value.factors] if len(shape.present) == 2 else [stack_present(key, value)]
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = repeat_head_labels(key, repeats), repeat_head_labels(value, repeats)
    bias = optional_input(inputs, shape.scores)
    context = propagate_scores_and_context(here, query, key, value, bias)
    return [drop_batch_axis(here, merge_head_labels(context)) if flat else context.factors, *presents]


def optional_input(inputs: Sequence[LabeledValue | None], index: int | None) -> LabeledValue | None:
    return inputs[index] if index is not None and index < len(inputs) else None


def drop_batch_axis(here: NodeContext, merged: LabeledValue) -> Factors:
    """Packed tokens of all samples have no batch axis."""
    rank = len(here.call.out_shapes[0])
    return tuple(f.reshape(f.shape[-rank:]) for f in merged.factors)


def query_key_value(
    here: NodeContext, inputs: Sequence[LabeledValue | None], shape: AttentionForm, sizes: AttentionGeometry
) -> QueryKeyValue:
    """Q, K and V as [B,H,N,D]."""
    if shape.packed == "weight":
        query, key, value = propagate_packed_projection(here, inputs, sizes.columns)
    elif shape.packed == "columns":
        whole = inputs[shape.query]
        assert whole is not None
        query, key, value = split_packed_columns(here, whole, sizes.columns)
    else:
        query, key, value = (add_batch_axis(inputs[k]) for k in (shape.query, shape.key, shape.value))
    bias = optional_input(inputs, shape.bias)
    if bias is not None and not shape.packed:
        query, key, value = unify_with_packed_bias(here, [query, key, value], bias, sizes.columns)
    return (
        split_head_labels(query, sizes.heads),
        split_head_labels(key, sizes.kv_heads),
        split_head_labels(value, sizes.kv_heads),
    )


def add_batch_axis(carried: LabeledValue | None) -> LabeledValue:
    """With a batch axis in front, where tokens of all samples lie in one row."""
    assert carried is not None
    if len(carried.shape) > 2:
        return carried
    return LabeledValue(carried.name, (1, *carried.shape), tuple(f[None] for f in carried.factors), carried.constant)


def propagate_inner_rotary(
    here: NodeContext, query: LabeledValue, key: LabeledValue, tables: Sequence[LabeledValue]
) -> tuple[LabeledValue, LabeledValue]:
    """Rotary positions inside the node."""
    if len(tables) < 2 or not here.call.attrs.get("do_rotary", 0):
        return query, key
    rotary = RotaryForm(0, 0, 0, 2 * tables[0].shape[-1], bool(here.call.attrs.get("rotary_interleaved", 0)))
    return unify_rotated_pairs(here, query, tables, rotary), unify_rotated_pairs(here, key, tables, rotary)


def unify_keys_and_values(
    here: NodeContext,
    key: LabeledValue,
    value: LabeledValue,
    shape: AttentionForm,
    tables: Sequence[LabeledValue | None],
) -> None:
    """Keys and values share one tensor or one width: their positions go together, in steps that kernels take."""
    for labels in unify_factors(here, [key, value]):
        here.trace.table.flag(labels, LabelFlag.NONLINEAR)
    if shape.multiple == 1:
        return
    width = key.shape[3]
    rotary = 2 * tables[0].shape[-1] if here.call.attrs.get("do_rotary", 0) and tables[0] is not None else 0
    for labels in key.factors:
        if labels.shape[3] > 1:
            steps = kernel_step_starts(
                width, rotary, shape.multiple, bool(here.call.attrs.get("rotary_interleaved", 0))
            )
            here.trace.table.unify(labels, labels[..., steps])


def kernel_step_starts(width: int, rotary: int, multiple: int, interleaved: bool) -> list[int]:
    """[width]: the first channel of the step that each belongs to. A step of turned channels holds ``multiple`` pairs,
    which is twice as many channels, and so do the others beside it."""
    wide = multiple * (2 if rotary else 1)
    half = rotary // 2
    return [
        (k % half) // multiple * multiple if k < rotary and not interleaved else k // wide * wide for k in range(width)
    ]


def prepend_past(
    here: NodeContext, key: LabeledValue, value: LabeledValue, past: Sequence[LabeledValue | None]
) -> tuple[LabeledValue, LabeledValue]:
    """Keys and values with those of earlier steps in front."""
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
        longer.append(LabeledValue(now.name, shape, concat_labels(here, [before, now], 2), now.constant))
    return longer[0], longer[1]


def stack_present(key: LabeledValue, value: LabeledValue) -> Factors:
    """Keys and values in one tensor [2,B,H,N,D]."""
    both = zip(key.factors, value.factors, strict=False)
    return tuple(np.stack([a, b]) for a, b in both if a.shape == b.shape)


def propagate_scores_and_context(
    here: NodeContext, query: LabeledValue, key: LabeledValue, value: LabeledValue, bias: LabeledValue | None
) -> LabeledValue:
    product = matmul_letters(4, 4)
    flipped = Letters(product.left, product.right[:-2] + product.right[-1] + product.right[-2], product.out)
    scores_shape = (*query.shape[:3], key.shape[2])
    scores = LabeledValue(
        f"{here.node.name}.scores", scores_shape, contract_labels(here, query, key, flipped, "scores")
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
    factors = unify_factors(here, parts)
    for labels in factors:
        if 3 in varying_axes(labels):
            here.pin_statistics(scores, labels, frozenset({3}), SUMMED_OVER, "sum")
    weights = LabeledValue(f"{here.node.name}.weights", scores_shape, factors)
    context_shape = (*query.shape[:3], value.shape[3])
    for name, carried in (("query", query), ("key", key), ("value", value)):
        here.trace.inner_values[(here.node, name)] = carried
    return LabeledValue(
        f"{here.node.name}.context", context_shape, contract_labels(here, weights, value, product, "context")
    )


def propagate_packed_projection(
    here: NodeContext, inputs: Sequence[LabeledValue | None], sizes: tuple[int, int, int]
) -> QueryKeyValue:
    """com.microsoft.Attention projects inside: x @ W + b, then Q, K and V are thirds of the columns."""
    data, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    assert data is not None and weight is not None
    shape = (*data.shape[:2], weight.shape[1])
    factors = contract_labels(here, data, weight, matmul_letters(len(data.shape), 2), "projection")
    parts = [LabeledValue(f"{here.node.name}.qkv", shape, factors)]
    if bias is not None:
        parts.append(
            LabeledValue(bias.name, (1, 1, *bias.shape), tuple(prepend_axes(f, 3) for f in bias.factors), bias.constant)
        )
    return split_packed_columns(here, LabeledValue(parts[0].name, shape, unify_factors(here, parts)), sizes)


def unify_with_packed_bias(
    here: NodeContext, parts: Sequence[LabeledValue], bias: LabeledValue, sizes: tuple[int, int, int]
) -> QueryKeyValue:
    """One vector holds the biases of Q, K and V; what is [B,H,N,D] already was biased where it was made."""
    spread = LabeledValue(bias.name, (1, 1, sum(sizes)), tuple(prepend_axes(f, 3) for f in bias.factors), True)
    q, k, v = (
        LabeledValue(
            part.name, c.shape, unify_factors(here, [c, LabeledValue(bias.name, part.shape, part.factors, True)])
        )
        if len(c.shape) == 3
        else c
        for c, part in zip(parts, split_packed_columns(here, spread, sizes), strict=True)
    )
    return q, k, v


def split_packed_columns(here: NodeContext, whole: LabeledValue, sizes: tuple[int, int, int]) -> QueryKeyValue:
    ends = np.cumsum(sizes)[:2]
    q, k, v = (
        LabeledValue(
            f"{here.node.name}.{'qkv'[index]}",
            (*whole.shape[:-1], size),
            tuple(select_columns(f, index, ends) for f in whole.factors),
        )
        for index, size in enumerate(sizes)
    )
    return q, k, v


def select_columns(labels: Labels, index: int, ends: np.typing.NDArray[np.int64]) -> Labels:
    return collapse_constant_axes(np.split(labels, ends, -1)[index]) if labels.shape[-1] > 1 else labels
