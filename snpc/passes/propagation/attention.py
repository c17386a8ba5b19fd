"""Fused attention nodes, spelled out with the same rules as the separate nodes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from snpc.ops.attention import AttentionForm, Geometry, form, geometry
from snpc.ops.contraction import matmul_letters
from snpc.ops.movement import compress
from snpc.ops.rotary import RotaryForm
from snpc.ops.spec import SUMMED, Labels, Letters
from snpc.passes.propagation.concat import lay_out
from snpc.passes.propagation.contraction import contract
from snpc.passes.propagation.head_layout import merge_heads, repeat_heads, split_heads
from snpc.passes.propagation.labels import Flag, varying
from snpc.passes.propagation.pointwise import meet
from snpc.passes.propagation.rotary_embedding import rotate
from snpc.passes.propagation.state import Carried, Factors, Here, align

Three = tuple[Carried, Carried, Carried]


def attention(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    """Scores, softmax, context, spelled out with the same rules as their separate nodes."""
    shape, sizes = form(here.call, here.node.domain), geometry(here.call, here.node.domain)
    extra = [inputs[k] for k in shape.others(here.call) if k < len(inputs)]
    if any(c is not None and c.factors for c in extra):
        here.pin_all(extra, "an input of a fused attention that snpc does not follow")
    if sizes is None:
        return here.refuse(inputs, "a fused attention with packed queries, keys and values")
    if any(o.uses() or o.is_graph_output() for o in here.node.outputs[1 + len(shape.present) :]):
        return here.refuse(inputs, "a fused attention that hands out its scores")
    flat = len(here.call.shape(shape.query)) < 4
    query, key, value = parts_of(here, inputs, shape, sizes)
    tables = [given(inputs, k) for k in shape.rotary]
    query, key = turned(here, query, key, [t for t in tables if t is not None])
    past = [given(inputs, k) for k in shape.past]
    keeps = any(o.uses() or o.is_graph_output() for o in here.node.outputs[1:])
    if shape.equal or (len(shape.past) == 1 and (past[0] is not None or keeps)):
        tie(here, key, value, shape, tables)
    key, value = lengthened(here, key, value, past)
    presents = [key.factors, value.factors] if len(shape.present) == 2 else [stacked(key, value)]
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
    bias = given(inputs, shape.scores)
    context = attend(here, query, key, value, bias)
    return [as_output(here, merge_heads(context)) if flat else context.factors, *presents]


def given(inputs: Sequence[Carried | None], index: int | None) -> Carried | None:
    return inputs[index] if index is not None and index < len(inputs) else None


def as_output(here: Here, merged: Carried) -> Factors:
    """Packed tokens of all samples have no batch axis."""
    rank = len(here.call.outs[0])
    return tuple(f.reshape(f.shape[-rank:]) for f in merged.factors)


def parts_of(here: Here, inputs: Sequence[Carried | None], shape: AttentionForm, sizes: Geometry) -> Three:
    """Q, K and V as [B,H,N,D]."""
    if shape.packed == "weight":
        query, key, value = packed_projection(here, inputs, sizes.columns)
    elif shape.packed == "columns":
        whole = inputs[shape.query]
        assert whole is not None
        query, key, value = columns(here, whole, sizes.columns)
    else:
        query, key, value = (batched(inputs[k]) for k in (shape.query, shape.key, shape.value))
    bias = given(inputs, shape.bias)
    if bias is not None and not shape.packed:
        query, key, value = add_packed_bias(here, [query, key, value], bias, sizes.columns)
    return split_heads(query, sizes.heads), split_heads(key, sizes.kv_heads), split_heads(value, sizes.kv_heads)


def batched(carried: Carried | None) -> Carried:
    """With a batch axis in front, where tokens of all samples lie in one row."""
    assert carried is not None
    if len(carried.shape) > 2:
        return carried
    return Carried(carried.name, (1, *carried.shape), tuple(f[None] for f in carried.factors), carried.constant)


def turned(here: Here, query: Carried, key: Carried, tables: Sequence[Carried]) -> tuple[Carried, Carried]:
    """Rotary positions inside the node."""
    if len(tables) < 2 or not here.call.attrs.get("do_rotary", 0):
        return query, key
    rotary = RotaryForm(0, 0, 0, 2 * tables[0].shape[-1], bool(here.call.attrs.get("rotary_interleaved", 0)))
    return rotate(here, query, tables, rotary), rotate(here, key, tables, rotary)


def tie(here: Here, key: Carried, value: Carried, shape: AttentionForm, tables: Sequence[Carried | None]) -> None:
    """Keys and values share one tensor or one width: their positions go together, in steps that kernels take."""
    for labels in meet(here, [key, value]):
        here.trace.book.flag(labels, Flag.CURVED)
    if shape.multiple == 1:
        return
    width = key.shape[3]
    rotary = 2 * tables[0].shape[-1] if here.call.attrs.get("do_rotary", 0) and tables[0] is not None else 0
    for labels in key.factors:
        if labels.shape[3] > 1:
            steps = step_starts(width, rotary, shape.multiple, bool(here.call.attrs.get("rotary_interleaved", 0)))
            here.trace.book.join(labels, labels[..., steps])


def step_starts(width: int, rotary: int, multiple: int, interleaved: bool) -> list[int]:
    """[width]: the first channel of the step that each belongs to. A step of turned channels holds ``multiple`` pairs,
    which is twice as many channels, and so do the others beside it."""
    wide = multiple * (2 if rotary else 1)
    half = rotary // 2
    return [
        (k % half) // multiple * multiple if k < rotary and not interleaved else k // wide * wide for k in range(width)
    ]


def lengthened(here: Here, key: Carried, value: Carried, past: Sequence[Carried | None]) -> tuple[Carried, Carried]:
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
        longer.append(Carried(now.name, shape, lay_out(here, [before, now], 2), now.constant))
    return longer[0], longer[1]


def stacked(key: Carried, value: Carried) -> Factors:
    """Keys and values in one tensor [2,B,H,N,D]."""
    both = zip(key.factors, value.factors, strict=False)
    return tuple(np.stack([a, b]) for a, b in both if a.shape == b.shape)


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
            here.pin_statistics(scores, labels, frozenset({3}), SUMMED, "sum")
    weights = Carried(f"{here.node.name}.weights", scores_shape, factors)
    context_shape = (*query.shape[:3], value.shape[3])
    for name, carried in (("query", query), ("key", key), ("value", value)):
        here.trace.extra[(here.node, name)] = carried
    return Carried(f"{here.node.name}.context", context_shape, contract(here, weights, value, product, "context"))


def packed_projection(here: Here, inputs: Sequence[Carried | None], sizes: tuple[int, int, int]) -> Three:
    """com.microsoft.Attention projects inside: x @ W + b, then Q, K and V are thirds of the columns."""
    data, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    assert data is not None and weight is not None
    shape = (*data.shape[:2], weight.shape[1])
    factors = contract(here, data, weight, matmul_letters(len(data.shape), 2), "projection")
    parts = [Carried(f"{here.node.name}.qkv", shape, factors)]
    if bias is not None:
        parts.append(Carried(bias.name, (1, 1, *bias.shape), tuple(align(f, 3) for f in bias.factors), bias.constant))
    return columns(here, Carried(parts[0].name, shape, meet(here, parts)), sizes)


def add_packed_bias(here: Here, parts: Sequence[Carried], bias: Carried, sizes: tuple[int, int, int]) -> Three:
    """One vector holds the biases of Q, K and V; what is [B,H,N,D] already was biased where it was made."""
    spread = Carried(bias.name, (1, 1, sum(sizes)), tuple(align(f, 3) for f in bias.factors), True)
    q, k, v = (
        Carried(part.name, c.shape, meet(here, [c, Carried(bias.name, part.shape, part.factors, True)]))
        if len(c.shape) == 3
        else c
        for c, part in zip(parts, columns(here, spread, sizes), strict=True)
    )
    return q, k, v


def columns(here: Here, whole: Carried, sizes: tuple[int, int, int]) -> Three:
    ends = np.cumsum(sizes)[:2]
    q, k, v = (
        Carried(
            f"{here.node.name}.{'qkv'[index]}",
            (*whole.shape[:-1], size),
            tuple(part(f, index, ends) for f in whole.factors),
        )
        for index, size in enumerate(sizes)
    )
    return q, k, v


def part(labels: Labels, index: int, ends: np.typing.NDArray[np.int64]) -> Labels:
    return compress(np.split(labels, ends, -1)[index]) if labels.shape[-1] > 1 else labels
