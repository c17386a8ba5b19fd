"""Fused attention nodes, spelled out with the same rules as the separate nodes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.ops.attention import form, head_counts, packed_sizes
from snpc.ops.contraction import matmul_letters
from snpc.ops.movement import compress, regroup
from snpc.ops.pointwise import SUMMED
from snpc.ops.spec import Letters, Shape
from snpc.passes.carried import Carried, Factors, Here, align
from snpc.passes.contract import contract
from snpc.passes.labels import varying
from snpc.passes.meet import meet


def attention(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    """Scores, softmax, context, spelled out with the same rules as their separate nodes."""
    shape = form(here.node.domain, here.node.op_type)
    extra = [inputs[k] for k in shape.other_inputs if k < len(inputs)]
    if any(c is not None and c.factors for c in extra):
        here.pin_all(extra, "an input of a fused attention that snpc does not follow")
    past = [c for c in extra if c is not None and c.shape and len(c.shape) >= 3]
    if len([o for o in here.node.outputs if o.name and o.uses()]) > 1 or past:
        return here.refuse(inputs, "a fused attention that keeps keys and values of earlier steps")
    if shape.packed_weight is not None:
        query, key, value = packed_projection(here, inputs)
    else:
        given = [inputs[k] if k < len(inputs) else None for k in (shape.query, shape.key, shape.value)]
        if any(c is None for c in given):
            return here.refuse(inputs, "a fused attention with packed keys and values")
        query, key, value = given  # type: ignore[assignment]
        if shape.bias is not None and shape.bias < len(inputs) and inputs[shape.bias] is not None:
            query, key, value = add_packed_bias(here, [query, key, value], inputs[shape.bias])  # type: ignore[arg-type]
    heads, kv_heads = head_counts(here.call)
    if heads:
        query, key, value = (split_heads(c, n) for c, n in ((query, heads), (key, kv_heads), (value, kv_heads)))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
    bias = inputs[shape.score_inputs[0]] if shape.score_inputs[0] < len(inputs) else None
    context = attend(here, query, key, value, bias)
    if heads:
        batch, _, length, width = context.shape
        merged = (batch, length, heads * width)
        moved = (batch, length, heads, width)
        return [tuple(regroup(f.transpose(0, 2, 1, 3), moved, merged) for f in context.factors)]
    return [context.factors]


def attend(here: Here, query: Carried, key: Carried, value: Carried, bias: Carried | None) -> Carried:
    product = matmul_letters(4, 4)
    flipped = Letters(product.left, product.right[:-2] + product.right[-1] + product.right[-2], product.out)
    scores_shape = (*query.shape[:3], key.shape[2])
    scores = Carried(f"{here.node.name}.scores", scores_shape, contract(here, query, key, flipped, "scores"))
    parts = [scores]
    if bias is not None:
        rank = 4
        parts.append(
            Carried(
                bias.name,
                (1,) * (rank - len(bias.shape)) + bias.shape,
                tuple(align(f, rank) for f in bias.factors),
                bias.constant,
            )
        )
    factors = meet(here, parts)
    for labels in factors:
        if 3 in varying(labels):
            here.pin(scores, labels, SUMMED, 3)
    weights = Carried(f"{here.node.name}.weights", scores_shape, factors)
    context_shape = (*query.shape[:3], value.shape[3])
    for name, carried in (("query", query), ("key", key), ("value", value)):
        here.trace.extra[(here.node, name)] = carried
    return Carried(f"{here.node.name}.context", context_shape, contract(here, weights, value, product, "context"))


def split_heads(carried: Carried, heads: int) -> Carried:
    """[B,N,H*D] -> [B,H,N,D]."""
    if len(carried.shape) != 3:
        return carried
    batch, length, width = carried.shape
    shape = (batch, length, heads, width // heads)
    factors = tuple(regroup(f, carried.shape, shape).transpose(0, 2, 1, 3) for f in carried.factors)
    return Carried(carried.name, (batch, heads, length, width // heads), factors, carried.constant)


def repeat_heads(carried: Carried, times: int) -> Carried:
    shape = (carried.shape[0], carried.shape[1] * times, *carried.shape[2:])
    factors = tuple(f.repeat(times, 1) if f.shape[1] > 1 else f for f in carried.factors)
    return Carried(carried.name, shape, factors, carried.constant)


def packed_projection(here: Here, inputs: Sequence[Carried | None]) -> tuple[Carried, Carried, Carried]:
    """com.microsoft.Attention projects inside: x @ W + b, then Q, K and V are thirds of the columns."""
    data, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    assert data is not None and weight is not None
    shape = (*data.shape[:2], weight.shape[1])
    factors = contract(here, data, weight, matmul_letters(len(data.shape), 2), "projection")
    parts = [Carried(f"{here.node.name}.qkv", shape, factors)]
    if bias is not None:
        parts.append(Carried(bias.name, (1, 1, *bias.shape), tuple(align(f, 3) for f in bias.factors), bias.constant))
    return columns(here, meet(here, parts), shape, packed_sizes(here.call))


def add_packed_bias(here: Here, given: Sequence[Carried], bias: Carried) -> tuple[Carried, Carried, Carried]:
    sizes = tuple(c.shape[-1] for c in given)
    parts = columns(here, tuple(align(f, 3) for f in bias.factors), (1, 1, sum(sizes)), sizes)  # type: ignore[arg-type]
    q, k, v = (
        Carried(part.name, c.shape, meet(here, [c, Carried(bias.name, (1, 1, part.shape[-1]), part.factors, True)]))
        for c, part in zip(given, parts, strict=True)
    )
    return q, k, v


def columns(
    here: Here, factors: Factors, shape: Shape, sizes: tuple[int, int, int]
) -> tuple[Carried, Carried, Carried]:
    ends = np.cumsum(sizes)[:2]
    parts = []
    for index, size in enumerate(sizes):
        mine = tuple(compress(np.split(f, ends, -1)[index]) if f.shape[-1] > 1 else f for f in factors)
        parts.append(Carried(f"{here.node.name}.{'qkv'[index]}", (*shape[:-1], size), mine))
    return parts[0], parts[1], parts[2]
