"""Token streams, and the attention masks that tell padded tokens of a stream from others.

A *stream* is all activations with the same tokens. Two values belong to one stream where a node computes one from the
other per token: a product with a weight, an element-wise operator between tensors of one shape, a movement. Attention
mixes tokens: its scores belong to no stream, its output is in the stream that it is added to, and its keys and values
are in the stream that it attends to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from snpc.graph import is_float, number_components
from snpc.ops import ATTENTION_FORMS, SUMMED_OVER, lookup
from snpc.passes.grouping import TracedGraph
from snpc.passes.propagation import Contraction, LabeledValue

SCORE_KINDS = {"movement", "concat", "pointwise"}  # operator kinds between a product and its softmax


@dataclass(frozen=True)
class PaddingSource:
    """A value that tells padded keys from others.

    ``kind``: "weights" of attention, [.., queries, keys], or the "mask" input of a fused node, keys last. ``rank``:
    number of its axes; ``key_axis``: the axis of the keys; ``heads_on_axis``: number of heads on the first axis beside
    the batch (0: none); ``stream``: the stream of the keys.
    """

    value: ir.Value
    kind: Literal["weights", "mask"]
    rank: int
    key_axis: int
    heads_on_axis: int
    stream: int


@dataclass(frozen=True)
class TokenStreams:
    """Padding sources in the order in which they are computed. ``stream_of``: value name -> number of its stream."""

    sources: tuple[PaddingSource, ...]
    stream_of: dict[str, int]


def find_token_streams(traced_graph: TracedGraph) -> TokenStreams:
    """All streams, and every padding source whose mask depends on a graph input."""
    masked, scores = masked_attentions(traced_graph)
    nodes = list(traced_graph.model.graph)
    pairs = [
        (value, node.outputs[0]) for node in nodes for value in values_with_same_tokens(traced_graph, node, scores)
    ]
    values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
    streams = number_components(values, pairs)
    sources = [
        source for node, product in masked for source in padding_sources_at(traced_graph, node, product, streams)
    ]
    return TokenStreams(tuple(sources), {str(value.name): stream for value, stream in streams.items()})


# -- attention -------------------------------------------------------------------------------------------------------


def masked_attentions(traced_graph: TracedGraph) -> tuple[list[tuple[ir.Node, Contraction | None]], set[ir.Value]]:
    """(nodes that apply masked attention weights to values, with their contraction unless the node is fused; all values
    that the scores are computed from)."""
    products = {c.node: c for c in traced_graph.trace.contractions if not c.has_weight and not c.part}
    masked: list[tuple[ir.Node, Contraction | None]] = []
    scores: set[ir.Value] = set()
    for node in traced_graph.model.graph:
        product = products.get(node)
        if product is not None:
            softmax_path = find_softmax(traced_graph, attention_weights_of(traced_graph, product))
            if softmax_path is None:
                continue
            softmax, between = softmax_path
            score_values, depends_on_input = trace_back_scores(traced_graph, softmax.inputs[0])
            scores |= between | score_values
        elif (node.domain, node.op_type) in ATTENTION_FORMS:
            depends_on_input = any(trace_back_scores(traced_graph, value)[1] for value in mask_inputs(node))
        else:
            continue
        if depends_on_input:
            masked.append((node, product))
    return masked, scores


def attention_weights_of(traced_graph: TracedGraph, product: Contraction) -> ir.Value | None:
    """The operand of a product that is the result of a softmax; None if there is none."""
    for value in product.node.inputs:
        if value is not None and find_softmax(traced_graph, value) is not None:
            return value
    return None


def find_softmax(traced_graph: TracedGraph, value: ir.Value | None) -> tuple[ir.Node, set[ir.Value]] | None:
    """(the softmax that ``value`` is the result of, up to movement and masking; the values in between)."""
    seen: set[ir.Value] = set()
    pending = [] if value is None else [value]
    softmax: ir.Node | None = None
    while pending:
        current = pending.pop()
        node = current.producer()
        if current in seen or node is None or is_constant_value(traced_graph, current):
            continue
        seen.add(current)
        spec = lookup(node.domain, node.op_type)
        if spec.kind == "normalize" and spec.reason == SUMMED_OVER:
            softmax = node
        elif spec.kind in SCORE_KINDS:
            pending += [v for v in node.inputs if v is not None]
    return None if softmax is None else (softmax, seen)


def trace_back_scores(traced_graph: TracedGraph, value: ir.Value | None) -> tuple[set[ir.Value], bool]:
    """(all values that the scores ``value`` are computed from after their product; whether they depend on a graph
    input)."""
    seen: set[ir.Value] = set()
    pending = [] if value is None else [value]
    depends = False
    while pending:
        current = pending.pop()
        if current in seen or is_constant_value(traced_graph, current):
            continue
        seen.add(current)
        node = current.producer()
        if node is None:
            depends = depends or current.is_graph_input()
            continue
        kind = lookup(node.domain, node.op_type).kind
        if kind not in ("contraction", "attention", "shape"):
            pending += [v for v in node.inputs if v is not None]
    return seen, depends


def is_constant_value(traced_graph: TracedGraph, value: ir.Value) -> bool:
    """Whether a value is the same for all inputs."""
    operand = traced_graph.trace.values.get(value)
    return value in traced_graph.facts.value or value.is_initializer() or (operand is not None and operand.constant)


def mask_inputs(node: ir.Node) -> list[ir.Value]:
    """The mask inputs of a fused attention node that are given."""
    masks = [node.inputs[k] for k in ATTENTION_FORMS[node.domain, node.op_type].masks if k < len(node.inputs)]
    return [v for v in masks if v is not None]


def padding_sources_at(
    traced_graph: TracedGraph, node: ir.Node, product: Contraction | None, streams: Mapping[ir.Value, int]
) -> Iterator[PaddingSource]:
    """The padding source at one attention."""
    if product is None:
        yield from fused_padding_sources(traced_graph, node, streams)
        return
    weights = attention_weights_of(traced_graph, product)
    values = next(v for v in product.node.inputs if v is not None and v is not weights)
    assert weights is not None
    left = product.left.name == weights.name
    weight_letters, weights_operand = (
        (product.letters.left, product.left) if left else (product.letters.right, product.right)
    )
    summed = [k for k, c in enumerate(weight_letters) if c not in product.letters.out]
    if len(summed) == 1 and len(weight_letters) >= 3 and summed[0] > 0:
        yield PaddingSource(
            weights, "weights", len(weight_letters), summed[0], heads_on_first_axis(weights_operand), streams[values]
        )


def fused_padding_sources(
    traced_graph: TracedGraph, node: ir.Node, streams: Mapping[ir.Value, int]
) -> Iterator[PaddingSource]:
    """The mask inputs of a fused attention node that tell padded keys of each sample."""
    shape = ATTENTION_FORMS[node.domain, node.op_type]
    value_input = node.inputs[shape.value] if shape.value < len(node.inputs) else None
    keys_source = (
        node.inputs[shape.query] if value_input is None else value_input
    )  # queries, keys and values are packed into one input
    for mask in mask_inputs(node):
        rank = len(traced_graph.facts.shape.get(mask) or ())
        dtype = traced_graph.facts.dtype.get(mask)
        per_query = is_float(dtype) or dtype == ir.DataType.BOOL
        batched = rank == 4 if per_query else rank in (2, 3)  # [queries, keys] is the same for all samples
        if keys_source is not None and batched and not is_constant_value(traced_graph, mask):
            yield PaddingSource(mask, "mask", rank, rank - 1, 0, streams[keys_source])


def heads_on_first_axis(operand: LabeledValue) -> int:
    """Number of heads that repeat along the first axis; 0 where it has none."""
    periods = [shortest_period(f.reshape(f.shape[0], -1).T) for f in operand.factors if f.shape[0] > 1]
    return max(periods, default=0)


def shortest_period(rows: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> int:
    """Number of columns after which ``rows``, [rows, columns], repeats."""
    size = int(rows.shape[1])
    for period in range(1, size):
        if size % period == 0 and bool((rows == np.tile(rows[:, :period], size // period)).all()):
            return period
    return size


# -- streams ---------------------------------------------------------------------------------------------------------


def values_with_same_tokens(traced_graph: TracedGraph, node: ir.Node, scores: set[ir.Value]) -> Iterator[ir.Value]:
    """Values that are in the same stream as the first output of ``node``."""
    spec, shapes = lookup(node.domain, node.op_type), traced_graph.facts.shape
    out = node.outputs[0]
    if out in scores or not is_float(traced_graph.facts.dtype.get(out)):
        return
    inputs = [v for v in node.inputs if v is not None]
    if spec.kind in ("movement", "rotary"):
        inputs = inputs[:1]
    elif spec.kind in ("pointwise", "normalize"):
        inputs = [v for v in inputs if shapes.get(v) == shapes.get(out)]
    elif spec.kind == "attention":
        inputs = inputs[:1]
    elif spec.kind == "contraction":
        if not any(c.node is node and c.has_weight for c in traced_graph.trace.contractions):
            return
    elif spec.kind != "concat":
        return
    for value in (*inputs, *node.outputs[1:]):
        if (
            value not in scores
            and is_float(traced_graph.facts.dtype.get(value))
            and not is_constant_value(traced_graph, value)
        ):
            yield value
