"""Which activations have the same tokens, and where the graph itself says which of these tokens nobody attends to.

A *stream* is what the tokens of one sequence become on their way through the graph. Values belong to one stream where a
node makes one of the other without mixing tokens: a product with a weight, a pointwise operator between tensors of one
shape, a movement. Attention mixes them: its scores belong to no stream, what it gives is in the stream that it is added
to, and its keys and values are in the stream that it attends to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import is_float
from snpc.graph.union_find import number_components
from snpc.ops import lookup
from snpc.ops.attention import ATTENTION_FORMS
from snpc.ops.spec import SUMMED_OVER
from snpc.passes.grouping.traced import TracedGraph
from snpc.passes.propagation.state import Contraction, LabeledValue

SCORE_KINDS = {"movement", "concat", "pointwise"}  # kinds that lie between a product and its softmax


@dataclass(frozen=True)
class PaddingSource:
    """A value that tells padded keys from others: ``weights`` of attention, [.., queries, keys], or the ``mask`` that a
    fused node takes, keys last. It has ``rank`` axes; ``key_axis`` is that of the keys; ``period``: how many heads the
    first axis holds beside the batch (0: none). ``stream`` is that of the keys."""

    value: ir.Value
    kind: Literal["weights", "mask"]
    rank: int
    key_axis: int
    heads_on_axis: int
    stream: int


@dataclass(frozen=True)
class TokenStreams:
    """``of``: value name -> number of its stream."""

    sources: tuple[PaddingSource, ...]
    stream_of: dict[str, int]


def find_token_streams(traced: TracedGraph) -> TokenStreams:
    """Every source whose mask depends on an input of the graph, in the order in which they are computed."""
    masked, scores = masked_attentions(traced)
    nodes = list(traced.model.graph)
    pairs = [(value, node.outputs[0]) for node in nodes for value in values_with_same_tokens(traced, node, scores)]
    values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
    streams = number_components(values, pairs)
    sources = [source for node, product in masked for source in padding_sources_at(traced, node, product, streams)]
    return TokenStreams(tuple(sources), {str(value.name): stream for value, stream in streams.items()})


# -- attention -------------------------------------------------------------------------------------------------------


def masked_attentions(traced: TracedGraph) -> tuple[list[tuple[ir.Node, Contraction | None]], set[ir.Value]]:
    """(nodes that apply masked attention weights to values, with the product where it is not fused; everything that the
    scores are made of)."""
    products = {c.node: c for c in traced.trace.contractions if not c.has_weight and not c.part}
    masked: list[tuple[ir.Node, Contraction | None]] = []
    scores: set[ir.Value] = set()
    for node in traced.model.graph:
        product = products.get(node)
        if product is not None:
            behind = find_softmax(traced, attention_weights_of(traced, product))
            if behind is None:
                continue
            softmax, between = behind
            made, depends = trace_back_scores(traced, softmax.inputs[0])
            scores |= between | made
        elif (node.domain, node.op_type) in ATTENTION_FORMS:
            depends = any(trace_back_scores(traced, value)[1] for value in mask_inputs(node))
        else:
            continue
        if depends:
            masked.append((node, product))
    return masked, scores


def attention_weights_of(traced: TracedGraph, product: Contraction) -> ir.Value | None:
    """The operand of a product that a softmax made, if one did."""
    for value in product.node.inputs:
        if value is not None and find_softmax(traced, value) is not None:
            return value
    return None


def find_softmax(traced: TracedGraph, value: ir.Value | None) -> tuple[ir.Node, set[ir.Value]] | None:
    """(the softmax that made a value but for movement and masking, everything from there to the value)."""
    seen: set[ir.Value] = set()
    todo = [] if value is None else [value]
    found: ir.Node | None = None
    while todo:
        here = todo.pop()
        node = here.producer()
        if here in seen or node is None or is_constant_value(traced, here):
            continue
        seen.add(here)
        spec = lookup(node.domain, node.op_type)
        if spec.kind == "normalise" and spec.reason == SUMMED_OVER:
            found = node
        elif spec.kind in SCORE_KINDS:
            todo += [v for v in node.inputs if v is not None]
    return None if found is None else (found, seen)


def trace_back_scores(traced: TracedGraph, value: ir.Value | None) -> tuple[set[ir.Value], bool]:
    """(everything that is added to or multiplied with scores on the way to ``value``, does it depend on an input?)."""
    seen: set[ir.Value] = set()
    todo = [] if value is None else [value]
    depends = False
    while todo:
        here = todo.pop()
        if here in seen or is_constant_value(traced, here):
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


def is_constant_value(traced: TracedGraph, value: ir.Value) -> bool:
    carried = traced.trace.values.get(value)
    return value in traced.facts.value or value.is_initializer() or (carried is not None and carried.constant)


def mask_inputs(node: ir.Node) -> list[ir.Value]:
    given = [node.inputs[k] for k in ATTENTION_FORMS[node.domain, node.op_type].masks if k < len(node.inputs)]
    return [v for v in given if v is not None]


def padding_sources_at(
    traced: TracedGraph, node: ir.Node, product: Contraction | None, streams: Mapping[ir.Value, int]
) -> Iterator[PaddingSource]:
    if product is None:
        yield from fused_padding_sources(traced, node, streams)
        return
    weights = attention_weights_of(traced, product)
    values = next(v for v in product.node.inputs if v is not None and v is not weights)
    assert weights is not None
    left = product.left.name == weights.name
    mine, carried = (product.letters.left, product.left) if left else (product.letters.right, product.right)
    summed = [k for k, c in enumerate(mine) if c not in product.letters.out]
    if len(summed) == 1 and len(mine) >= 3 and summed[0] > 0:
        yield PaddingSource(weights, "weights", len(mine), summed[0], heads_on_first_axis(carried), streams[values])


def fused_padding_sources(
    traced: TracedGraph, node: ir.Node, streams: Mapping[ir.Value, int]
) -> Iterator[PaddingSource]:
    shape = ATTENTION_FORMS[node.domain, node.op_type]
    given = node.inputs[shape.value] if shape.value < len(node.inputs) else None
    values = node.inputs[shape.query] if given is None else given  # all three in one input
    for mask in mask_inputs(node):
        rank = len(traced.facts.shape.get(mask) or ())
        dtype = traced.facts.dtype.get(mask)
        per_query = is_float(dtype) or dtype == ir.DataType.BOOL
        batched = rank == 4 if per_query else rank in (2, 3)  # [queries, keys] is the same for all
        if values is not None and batched and not is_constant_value(traced, mask):
            yield PaddingSource(mask, "mask", rank, rank - 1, 0, streams[values])


def heads_on_first_axis(carried: LabeledValue) -> int:
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


def values_with_same_tokens(traced: TracedGraph, node: ir.Node, scores: set[ir.Value]) -> Iterator[ir.Value]:
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
        if not any(c.node is node and c.has_weight for c in traced.trace.contractions):
            return
    elif spec.kind != "concat":
        return
    for value in (*inputs, *node.outputs[1:]):
        if value not in scores and is_float(traced.facts.dtype.get(value)) and not is_constant_value(traced, value):
            yield value
