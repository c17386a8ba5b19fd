"""Reduction points: the blocks after which tokens can be dropped or merged, and why not after the others.

A block adds its attention to the residual stream, [batch, tokens, width]. There the number of tokens can be reduced if
every operator that depends on them works per token or attends to all of them (``token_analysis.propagate``), and the
graph outputs read fixed leading positions (a class token), or a mean or sum over tokens. Where the outputs need all
tokens, these can be merged inside a span (``token_analysis.spans``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import onnx_ir as ir

from snpc.graph import (
    ShapeFacts,
    alternative_dim_sizes,
    dynamic_axes,
    infer_graph,
    opset_version,
)
from snpc.ops import SUMMED_OVER, lookup
from snpc.passes.token_analysis.attention_scores import attention_scores_of
from snpc.passes.token_analysis.constant_tokens import find_constant_tokens
from snpc.passes.token_analysis.points import (
    NO_TOKENS,
    PointSearch,
    TokenFacts,
    TokenPoint,
    find_staying_tokens,
    input_batch_size,
    is_residual_sum,
)
from snpc.passes.token_analysis.propagate import follow_tokens, values_that_end_alike
from snpc.passes.token_analysis.spans import AttentionBlock, find_span_points
from snpc.passes.token_analysis.state import TOKEN_AXIS, TokenGraph, TokenPin
from snpc.types import Pin

MIN_TOKEN_OPSET = 13


class TokenReduction(Protocol):
    """What an analysis needs to know of a token reduction (implemented in ``snpc.tokens.reduction``)."""

    @property
    def spec(self) -> str:
        """The reduction as text."""
        ...

    @property
    def summary(self) -> str:
        """How many tokens are left, and by which steps."""
        ...

    @property
    def decisions(self) -> tuple[str, ...]:
        """Names of the tensors that say which tokens are removed: graph inputs until decisions are embedded."""
        ...

    @property
    def decided_by(self) -> frozenset[str]:
        """Names of the values and nodes of the graph by which it is decided."""
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
    graph = TokenGraph(model, facts)
    fixed = fixed_length_test(model, facts, dim_sizes)
    search = PointSearch(graph, fixed, len(sites), find_constant_tokens(graph))
    blocks = [
        AttentionBlock(number, nodes[start], nodes[start + 1 : end])
        for number, (start, end) in enumerate(zip(sites, [*sites[1:], len(nodes)], strict=True), 1)
    ]
    found = {block.number: find_point_after(search, block) for block in blocks}
    points = [point for point in found.values() if isinstance(point, TokenPoint)]
    pins = {number: pin for number, pin in found.items() if isinstance(pin, TokenPin)}
    if not points:
        points, better = find_span_points(search, blocks)
        spanned = {point.block for point in points}
        pins = {number: better.get(number, pin) for number, pin in pins.items() if number not in spanned}
    return TokenFacts(tuple(points), pins_by_reason(facts, pins.values()), len(sites))


def pins_by_reason(facts: ShapeFacts, pins: Iterable[TokenPin]) -> tuple[Pin, ...]:
    """One pin for each reason."""
    kept: dict[str, Pin] = {}
    for pin in pins:
        count = token_count_of(facts, pin.tensor)
        kept.setdefault(pin.reason, Pin(pin.tensor, TOKEN_AXIS, count, pin.reason, pin.operator))
    return tuple(kept.values())


def find_point_after(search: PointSearch, block: AttentionBlock) -> TokenPoint | TokenPin | None:
    """The first residual sum after the attention of ``block`` where tokens can be reduced, or the pin that says why
    there is none; None where a reduction would save nothing."""
    first_pin: TokenPin | None = None
    site = block.site
    for node in block.nodes:
        if not is_residual_sum(search.graph.facts, search.graph.data_dependent, node):
            continue
        try:
            return reduction_point_at(search, block.number, site, node)
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


def reduction_point_at(search: PointSearch, block: int, site: ir.Node, node: ir.Node) -> TokenPoint:
    """The reduction point at the residual sum ``node``. Raises TokenPin if its tokens cannot be reduced, NothingToSave
    if that would save nothing."""
    graph = search.graph
    model, facts = graph.model, graph.facts
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
    leading, protected = find_staying_tokens(search, value, flow.read_positions)
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
        depth=block / search.blocks,
        protected=protected,
    )
