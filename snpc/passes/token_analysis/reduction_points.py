"""Reduction points: the blocks after which tokens can be dropped or merged, and why not after the others.

A block adds its attention to the residual stream, [batch, tokens, width]. There the number of tokens can be reduced if
every operator that depends on them works per token or attends to all of them (``token_analysis.propagate``), and the
graph outputs read fixed leading positions (a class token), or a mean or sum over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import onnx_ir as ir

from snpc.graph import (
    ShapeFacts,
    alternative_dim_sizes,
    dynamic_axes,
    infer_graph,
    is_float,
    opset_version,
)
from snpc.ops import SUMMED_OVER, attention_form, head_counts, lookup
from snpc.passes.token_analysis.propagate import follow_tokens, values_that_end_alike
from snpc.passes.token_analysis.state import TokenFlow, TokenGraph, TokenPin
from snpc.types import Pin

MIN_TOKEN_OPSET = 13
MAX_LEADING_SHARE = 0.25  # of all tokens; if more are read at fixed positions, they are no class tokens
TOKEN_AXIS = 1


@dataclass(frozen=True)
class AttentionScores:
    """Attention weights of the block in front of a reduction point.

    ``tensor``: the value that holds them, with queries along ``query_axis`` (-1 or -2) and keys along the other of the
    two axes. In a fused node (``fused`` is its name) they are computed inside, with heads of ``head_width`` channels;
    its ``mask`` is boolean ("tells") or added to the scores ("added"). ``heads_on_own_axis``: heads are the second
    axis. ``masked``: a mask applies to the scores.
    """

    tensor: str
    query_axis: int
    heads: int
    head_width: int = 0
    fused: str = ""
    mask: Literal["", "tells", "added"] = ""
    heads_on_own_axis: bool = False
    masked: bool = False


@dataclass(frozen=True)
class TokenPoint:
    """A value of the residual stream, [batch, ``count``, width], whose tokens can be reduced.

    ``block``: number of the attention in front of it, from 1. ``leading``: number of class, register and other tokens
    in front that always stay; ``leading_reads``: how many of these the outputs read. ``pooled``: a mean is taken over
    tokens. ``fixed_length``: all inputs have ``count`` tokens (otherwise ``count`` is for the sizes of the analysis).
    ``side_input``: name of a tensor with an entry per token that later nodes read (a mask), "" if there is none.
    """

    block: int
    value: str
    count: int
    leading: int
    leading_reads: int
    pooled: bool
    fixed_length: bool
    side_input: str
    scores: AttentionScores | None
    stream: ir.Value = field(repr=False, compare=False)
    flow: TokenFlow = field(repr=False, compare=False)


@dataclass(frozen=True)
class TokenFacts:
    """Reduction points of a model, and pins of the blocks that have none. ``blocks``: number of attentions."""

    points: tuple[TokenPoint, ...]
    pins: tuple[Pin, ...]
    blocks: int

    def at(self, block: int) -> TokenPoint | None:
        """The reduction point after attention number ``block``; None if there is none."""
        return next((p for p in self.points if p.block == block), None)


NO_TOKENS = TokenFacts((), (), 0)


class TokenReduction(Protocol):
    """What an analysis needs to know of a token reduction (implemented in ``snpc.tokens.reduction``)."""

    @property
    def spec(self) -> str:
        """The reduction as text."""
        ...

    @property
    def decisions(self) -> tuple[str, ...]:
        """Names of the tensors that say which tokens are removed: graph inputs until decisions are embedded."""
        ...

    def embed_decisions(self, model: ir.Model) -> None:
        """Add the nodes that compute the decisions, in place of graph inputs."""
        ...

    def finalize(self, model: ir.Model) -> None:
        """As ``embed_decisions``, for a model that is written or timed."""
        ...

    def name_decision_sizes(self, model: ir.Model) -> None:
        """Set the shapes of embedded decisions, with names for the sizes that are computed."""
        ...

    def to_json(self) -> dict[str, Any]: ...


def find_reduction_points(model: ir.Model, facts: ShapeFacts, dim_sizes: Mapping[str, int]) -> TokenFacts:
    """All reduction points, and the reason for each block without one. ``dim_sizes``: those of ``facts``."""
    nodes = list(model.graph)
    sites = [k for k, node in enumerate(nodes) if is_attention_site(facts, node)]
    if not sites:
        return NO_TOKENS
    if opset_version(model) < MIN_TOKEN_OPSET:
        reason = (
            f"opset {opset_version(model)}: token reduction writes operators of opset {MIN_TOKEN_OPSET}; "
            "convert the model"
        )
        return TokenFacts((), (Pin("", TOKEN_AXIS, 0, reason, "the model"),), len(sites))
    search = PointSearch(TokenGraph(model, facts), fixed_length_test(model, facts, dim_sizes))
    points: list[TokenPoint] = []
    pins: dict[str, Pin] = {}
    for block, (start, end) in enumerate(zip(sites, [*sites[1:], len(nodes)], strict=True), 1):
        point = find_point_after(search, block, nodes[start], nodes[start + 1 : end])
        if isinstance(point, TokenPin):
            count = token_count_of(facts, point.tensor)
            pins.setdefault(point.reason, Pin(point.tensor, TOKEN_AXIS, count, point.reason, point.operator))
        elif point is not None:
            points.append(point)
    return TokenFacts(tuple(points), tuple(pins.values()), len(sites))


@dataclass(frozen=True)
class PointSearch:
    """What the search for points reads. ``fixed``: whether a value has the same number of tokens for all inputs."""

    graph: TokenGraph
    fixed: Callable[[ir.Value], bool]
    doomed: dict[ir.Value, TokenPin] = field(default_factory=dict)
    """Values whose tokens an earlier search found to end in a graph output, with its pin."""


def find_point_after(
    search: PointSearch, block: int, site: ir.Node, after: Sequence[ir.Node]
) -> TokenPoint | TokenPin | None:
    """The first residual sum after attention ``site`` where tokens can be reduced, or the pin that says why there is
    none; None where a reduction would save nothing."""
    first_pin: TokenPin | None = None
    for node in after:
        if not is_residual_sum(search.graph.facts, search.graph.data_dependent, node):
            continue
        try:
            return reduction_point_at(search, block, site, node)
        except TokenPin as pin:
            first_pin = first_pin or pin
        except NothingToSave:
            return None
    return first_pin or TokenPin(site, str(site.outputs[0].name), "no residual sum [batch, tokens, width] follows it")


def token_count_of(facts: ShapeFacts, tensor: str) -> int:
    """Number of tokens of a tensor [batch, tokens, width], 0 for others."""
    shape = next((s for v, s in facts.shape.items() if v.name == tensor and s is not None), ())
    return shape[TOKEN_AXIS] if len(shape) == 3 else 0


def fixed_length_test(model: ir.Model, facts: ShapeFacts, dim_sizes: Mapping[str, int]) -> Callable[[ir.Value], bool]:
    """A test whether a value has the same number of tokens for all sizes of dynamic axes other than the batch."""
    if all(axis == 0 for _, _, axis, _ in dynamic_axes(model.graph)):
        return lambda value: True
    elsewhere = infer_graph(model, alternative_dim_sizes(dim_sizes))

    def fixed(value: ir.Value) -> bool:
        a, b = facts.shape.get(value), elsewhere.shape.get(value)
        return a is not None and b is not None and a[TOKEN_AXIS] == b[TOKEN_AXIS]

    return fixed


class NothingToSave(Exception):
    """No attention, mean or sum over tokens follows: a reduction would save nothing that dead-row elimination does
    not."""


def is_attention_site(facts: ShapeFacts, node: ir.Node) -> bool:
    """Whether ``node`` is a softmax over a tensor of at least three axes, or a fused attention node."""
    spec = lookup(node.domain, node.op_type)
    shape = facts.shape.get(node.outputs[0]) or ()
    if spec.kind == "attention":
        return True
    return spec.kind == "normalize" and spec.reason == SUMMED_OVER and len(shape) >= 3


def is_residual_sum(facts: ShapeFacts, data_dependent: frozenset[ir.Value], node: ir.Node) -> bool:
    """Whether ``node`` adds two activations of one shape [batch, tokens, width]."""
    spec = lookup(node.domain, node.op_type)
    out = node.outputs[0]
    shape = facts.shape.get(out)
    if spec.effect != "add" or spec.kind != "pointwise" or spec.subtracts or shape is None or len(shape) != 3:
        return False
    same = [v for v in node.inputs if v is not None and facts.shape.get(v) == shape and v in data_dependent]
    return len(same) > 1 and is_float(facts.dtype.get(out))


def reduction_point_at(search: PointSearch, block: int, site: ir.Node, node: ir.Node) -> TokenPoint:
    """The reduction point at the residual sum ``node``. Raises TokenPin if its tokens cannot be reduced, NothingToSave
    if that would save nothing."""
    graph = search.graph
    model, facts, data_dependent = graph.model, graph.facts, graph.data_dependent
    value = node.outputs[0]
    shape = facts.shape[value]
    assert shape is not None
    if value in search.doomed:
        raise search.doomed[value]
    flow = follow_tokens(graph, value, TOKEN_AXIS)
    if flow.pin is not None:
        alike = (v for v in values_that_end_alike(flow) if list(flow.axes[v].axes) == [TOKEN_AXIS])
        search.doomed.update(dict.fromkeys(alike, flow.pin))
        raise flow.pin
    if not flow.softmaxes and not flow.means and not flow.sums:
        raise NothingToSave
    if shape[0] != input_batch_size(model, facts):
        raise TokenPin(node, str(value.name), "its first axis is not the batch axis of the inputs")
    leading = max(
        [count_constant_tokens(facts, data_dependent, model, shape[TOKEN_AXIS]), *(k + 1 for k in flow.read_positions)]
    )
    if leading > max(1, MAX_LEADING_SHARE * shape[TOKEN_AXIS]):
        raise TokenPin(node, str(value.name), f"token {leading - 1} is read at a fixed position")
    return TokenPoint(
        block,
        str(value.name),
        shape[TOKEN_AXIS],
        leading,
        len(flow.read_positions),
        bool(flow.means),
        search.fixed(value),
        next((side.name for side in flow.side_inputs if not side.uniform), ""),
        attention_scores_of(graph, site, node),
        value,
        flow,
    )


def input_batch_size(model: ir.Model, facts: ShapeFacts) -> int | None:
    """Size of the first axis of the first input."""
    shapes = [facts.shape.get(value) for value in model.graph.inputs if not value.is_initializer()]
    return shapes[0][0] if shapes and shapes[0] else None


def count_constant_tokens(facts: ShapeFacts, data_dependent: frozenset[ir.Value], model: ir.Model, count: int) -> int:
    """Number of leading tokens that do not depend on the input: class and register tokens concatenated in front."""
    most = 0
    for node in model.graph:
        shape = facts.shape.get(node.outputs[0]) or ()
        if lookup(node.domain, node.op_type).kind != "concat" or len(shape) != 3 or shape[TOKEN_AXIS] != count:
            continue
        axis = int(node.attributes["axis"].value) % 3
        if axis == TOKEN_AXIS and is_float(facts.dtype.get(node.outputs[0])):
            most = max(most, sum(leading_constant_lengths(facts, data_dependent, node)))
    return most


def leading_constant_lengths(facts: ShapeFacts, data_dependent: frozenset[ir.Value], node: ir.Node) -> Iterator[int]:
    """Lengths along the token axis of the leading inputs that do not depend on data."""
    for value in node.inputs:
        if value is None or value in data_dependent:
            return
        yield (facts.shape.get(value) or (0, 0))[TOKEN_AXIS]


def attention_scores_of(graph: TokenGraph, site: ir.Node, node: ir.Node) -> AttentionScores | None:
    """The weights of attention ``site``, if they are over the tokens of the residual sum ``node``; None otherwise."""
    out, facts = node.outputs[0], graph.facts
    for operand in node.inputs:
        if operand is None or facts.shape.get(operand) != facts.shape.get(out):
            continue
        flow = follow_tokens(graph, operand, TOKEN_AXIS)
        if out in flow.axes:
            batch = (facts.shape[out] or (1,))[0]
            fused = lookup(site.domain, site.op_type).kind == "attention"
            scores = (
                fused_attention_scores(facts, flow, site, opset_version(graph.model))
                if fused
                else unfused_attention_scores(facts, flow, site, batch)
            )
            if scores is not None:
                return scores
    return None


def unfused_attention_scores(facts: ShapeFacts, flow: TokenFlow, site: ir.Node, batch: int) -> AttentionScores | None:
    """Attention weights of a softmax node: [batch, heads, queries, keys], with batch and heads on one axis or more."""
    out = site.outputs[0]
    marks, shape = flow.axes.get(out), facts.shape.get(out) or ()
    keys = {w.axis for w in flow.softmaxes if w.node is site}
    last = len(shape) - 1
    if marks is None or set(marks.axes) != {last - 1, last} or any(marks.axes.values()) or len(keys) != 1:
        return None
    heads = math.prod(shape[:-2])
    if heads % batch:
        return None
    heads_on_own_axis = last == 3 and shape[0] == batch
    masked = any(not side.uniform for side in flow.side_inputs)
    return AttentionScores(
        str(out.name),
        (marks.axes.keys() - keys).pop() - len(shape),
        heads // batch,
        heads_on_own_axis=heads_on_own_axis,
        masked=masked,
    )


def fused_attention_scores(facts: ShapeFacts, flow: TokenFlow, site: ir.Node, version: int) -> AttentionScores | None:
    """The scores inside a fused attention node; None where they cannot be computed outside."""
    call = facts.call(site, version)
    shape = attention_form(call, site.domain)
    if shape.packed or any(site.inputs[k] not in flow.axes for k in (shape.query, shape.key)):
        return None
    if call.has(shape.bias) if shape.bias is not None else False:
        return None  # the bias of the projection is added inside the node
    mask: Literal["", "tells", "added"] = ""
    mask_value = site.inputs[shape.scores] if shape.scores is not None and call.has(shape.scores) else None
    if mask_value is not None:
        mask = "tells" if facts.dtype.get(mask_value) == ir.DataType.BOOL else "added"
    heads, kv_heads = head_counts(call)
    query_shape, key_shape = call.shape(shape.query), call.shape(shape.key)
    split_into_heads = not heads
    if split_into_heads:
        heads, kv_heads = query_shape[1], key_shape[1]
    if heads != kv_heads or not (split_into_heads or len(query_shape) == 3):
        return None
    width = query_shape[-1] if split_into_heads else query_shape[-1] // heads
    return AttentionScores("", -2, heads, width, str(site.name), mask, heads_on_own_axis=True, masked=bool(mask))
