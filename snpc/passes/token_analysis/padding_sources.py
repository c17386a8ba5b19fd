"""Which activations have the same tokens, and where the graph itself says which of these tokens nobody attends to.

A *stream* is what the tokens of one sequence become on their way through the graph. Values belong to one stream where a
node makes one of the other without mixing tokens: a product with a weight, a pointwise operator between tensors of one
shape, a movement. Attention mixes them: its scores belong to no stream, what it gives is in the stream that it is added
to, and its keys and values are in the stream that it attends to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import is_float
from snpc.graph.union_find import Groups
from snpc.ops import lookup
from snpc.ops.attention import FORMS
from snpc.ops.spec import SUMMED
from snpc.passes.grouping.traced import Traced
from snpc.passes.propagation.state import Carried, Contraction

PLAIN = {"movement", "concat", "pointwise"}  # kinds that lie between a product and its softmax


@dataclass(frozen=True)
class Source:
    """A value that tells padded keys from others: ``weights`` of attention, [.., queries, keys], or the ``mask`` that a
    fused node takes, keys last. It has ``rank`` axes; ``key_axis`` is that of the keys; ``period``: how many heads the
    first axis holds beside the batch (0: none). ``stream`` is that of the keys."""

    value: ir.Value
    kind: Literal["weights", "mask"]
    rank: int
    key_axis: int
    period: int
    stream: int


@dataclass(frozen=True)
class Streams:
    """``of``: value name -> number of its stream."""

    sources: tuple[Source, ...]
    of: dict[str, int]


def streams_of(traced: Traced) -> Streams:
    """Every source whose mask depends on an input of the graph, in the order in which they are computed."""
    masked, scores = attentions(traced)
    groups = Groups()
    for node in traced.model.graph:
        for value in same_tokens(traced, node, scores):
            groups.join(value, node.outputs[0])
    sources = [found for node, product in masked for found in sources_at(traced, node, product, groups)]
    return Streams(tuple(sources), {str(v.name): groups.number(v) for v in groups.parent})


# -- attention -------------------------------------------------------------------------------------------------------


def attentions(traced: Traced) -> tuple[list[tuple[ir.Node, Contraction | None]], set[ir.Value]]:
    """(nodes that apply masked attention weights to values, with the product where it is not fused; everything that the
    scores are made of)."""
    products = {c.node: c for c in traced.trace.contractions if not c.constant and not c.part}
    masked: list[tuple[ir.Node, Contraction | None]] = []
    scores: set[ir.Value] = set()
    for node in traced.model.graph:
        product = products.get(node)
        if product is not None:
            behind = softmax_behind(traced, weights_side(traced, product))
            if behind is None:
                continue
            softmax, between = behind
            made, depends = behind_scores(traced, softmax.inputs[0])
            scores |= between | made
        elif (node.domain, node.op_type) in FORMS:
            depends = any(behind_scores(traced, value)[1] for value in mask_inputs(node))
        else:
            continue
        if depends:
            masked.append((node, product))
    return masked, scores


def weights_side(traced: Traced, product: Contraction) -> ir.Value | None:
    """The operand of a product that a softmax made, if one did."""
    for value in product.node.inputs:
        if value is not None and softmax_behind(traced, value) is not None:
            return value
    return None


def softmax_behind(traced: Traced, value: ir.Value | None) -> tuple[ir.Node, set[ir.Value]] | None:
    """(the softmax that made a value but for movement and masking, everything from there to the value)."""
    seen: set[ir.Value] = set()
    todo = [] if value is None else [value]
    found: ir.Node | None = None
    while todo:
        here = todo.pop()
        node = here.producer()
        if here in seen or node is None or is_constant(traced, here):
            continue
        seen.add(here)
        spec = lookup(node.domain, node.op_type)
        if spec.kind == "normalise" and spec.reason == SUMMED:
            found = node
        elif spec.kind in PLAIN:
            todo += [v for v in node.inputs if v is not None]
    return None if found is None else (found, seen)


def behind_scores(traced: Traced, value: ir.Value | None) -> tuple[set[ir.Value], bool]:
    """(everything that is added to or multiplied with scores on the way to ``value``, does it depend on an input?)."""
    seen: set[ir.Value] = set()
    todo = [] if value is None else [value]
    depends = False
    while todo:
        here = todo.pop()
        if here in seen or is_constant(traced, here):
            continue
        seen.add(here)
        node = here.producer()
        if node is None:
            depends = depends or here.is_graph_input()
            continue
        kind = lookup(node.domain, node.op_type).kind
        if kind not in ("contraction", "attention", "shape"):
            todo += [v for v in node.inputs if v is not None]
    return seen, depends


def is_constant(traced: Traced, value: ir.Value) -> bool:
    carried = traced.trace.values.get(value)
    return value in traced.facts.value or value.is_initializer() or (carried is not None and carried.constant)


def mask_inputs(node: ir.Node) -> list[ir.Value]:
    given = [node.inputs[k] for k in FORMS[node.domain, node.op_type].masks if k < len(node.inputs)]
    return [v for v in given if v is not None]


def sources_at(traced: Traced, node: ir.Node, product: Contraction | None, groups: Groups) -> Iterator[Source]:
    if product is None:
        yield from fused_sources(traced, node, groups)
        return
    weights = weights_side(traced, product)
    values = next(v for v in product.node.inputs if v is not None and v is not weights)
    assert weights is not None
    left = product.left.name == weights.name
    mine, carried = (product.letters.left, product.left) if left else (product.letters.right, product.right)
    summed = [k for k, c in enumerate(mine) if c not in product.letters.out]
    if len(summed) == 1 and len(mine) >= 3 and summed[0] > 0:
        yield Source(weights, "weights", len(mine), summed[0], merged_heads(carried), groups.number(values))


def fused_sources(traced: Traced, node: ir.Node, groups: Groups) -> Iterator[Source]:
    shape = FORMS[node.domain, node.op_type]
    given = node.inputs[shape.value] if shape.value < len(node.inputs) else None
    values = node.inputs[shape.query] if given is None else given  # all three in one input
    for mask in mask_inputs(node):
        rank = len(traced.facts.shape.get(mask) or ())
        dtype = traced.facts.dtype.get(mask)
        per_query = is_float(dtype) or dtype == ir.DataType.BOOL
        batched = rank == 4 if per_query else rank in (2, 3)  # [queries, keys] is the same for all
        if values is not None and batched and not is_constant(traced, mask):
            yield Source(mask, "mask", rank, rank - 1, 0, groups.number(values))


def merged_heads(carried: Carried) -> int:
    """How many heads the first axis holds in turn; 0 where there are none on it."""
    periods = [shortest_period(f.reshape(f.shape[0], -1).T) for f in carried.factors if f.shape[0] > 1]
    return max(periods, default=0)


def shortest_period(rows: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> int:
    """After how many columns [rows, columns] repeats."""
    size = int(rows.shape[1])
    for period in range(1, size):
        if size % period == 0 and bool((rows == np.tile(rows[:, :period], size // period)).all()):
            return period
    return size


# -- streams ---------------------------------------------------------------------------------------------------------


def same_tokens(traced: Traced, node: ir.Node, scores: set[ir.Value]) -> Iterator[ir.Value]:
    """Values that are in the same stream as the first output of a node."""
    spec, shapes = lookup(node.domain, node.op_type), traced.facts.shape
    out = node.outputs[0]
    if out in scores or not is_float(traced.facts.dtype.get(out)):
        return
    inputs = [v for v in node.inputs if v is not None]
    if spec.kind in ("movement", "rotary"):
        inputs = inputs[:1]
    elif spec.kind in ("pointwise", "normalise"):
        inputs = [v for v in inputs if shapes.get(v) == shapes.get(out)]
    elif spec.kind == "attention":
        inputs = inputs[:1]
    elif spec.kind == "contraction":
        if not any(c.node is node and c.constant for c in traced.trace.contractions):
            return
    elif spec.kind != "concat":
        return
    for value in (*inputs, *node.outputs[1:]):
        if value not in scores and is_float(traced.facts.dtype.get(value)) and not is_constant(traced, value):
            yield value
