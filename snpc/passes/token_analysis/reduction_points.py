"""Where tokens can be dropped or merged: after which blocks, and why not after the others.

A block ends its attention with a sum into the residual stream, [batch, tokens, width]. There the tokens can get fewer
if everything that is made of them works per token or attends to all of them, and what leaves is read at fixed leading
positions (a class token), is a mean or a sum over tokens, or nothing (``passes.flow``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import onnx_ir as ir

from snpc.graph.binding import alternative_dim_sizes, dynamic_axes
from snpc.graph.shapes import ShapeFacts, infer_graph, is_float, opset_version
from snpc.graph.traversal import data_dependent_values
from snpc.ops import lookup
from snpc.ops.attention import attention_form, head_counts
from snpc.ops.spec import SUMMED_OVER
from snpc.passes.token_analysis.propagate import follow_tokens
from snpc.passes.token_analysis.state import TokenFlow, TokenPin
from snpc.types import Pin

MIN_TOKEN_OPSET = 13
MAX_LEADING_SHARE = 0.25  # of the tokens: more that are read by number are no class tokens
TOKEN_AXIS = 1


@dataclass(frozen=True)
class AttentionScores:
    """Attention weights of the block in front of a point: ``tensor``, with queries along this axis (-1 or -2) and keys
    along the other one. Of a fused node (``fused`` names it) they are inside; its heads are ``width`` wide, and
    it may have a mask that is true where keys count ("tells") or that is added ("added"). ``apart``: heads have an axis
    of their own, the second one; ``masked``: tokens meet a mask in front of them."""

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
    """A value of the residual stream, [batch, ``count``, width], whose tokens can get fewer.

    ``block``: number of the attention in front of it, from 1. ``leading``: class, register and other tokens in front
    that always stay. ``reads``: how many of these are read in the end; ``pooled``: a mean is taken over tokens.
    ``fixed``: there are as many for all inputs (else ``count`` is what the facts' binding makes it).
    ``sided``: what tokens meet behind it that has an entry for each of them (a mask), "" if nothing.
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
    """What is known about the tokens of a model. ``blocks``: how many attentions there are."""

    points: tuple[TokenPoint, ...]
    pins: tuple[Pin, ...]
    blocks: int

    def at(self, block: int) -> TokenPoint | None:
        return next((p for p in self.points if p.block == block), None)


NO_TOKENS = TokenFacts((), (), 0)


class TokenReduction(Protocol):
    """What an analysis needs to know of a reduction (``snpc.tokens.reduction`` makes them)."""

    @property
    def spec(self) -> str:
        """The reduction as text."""
        ...

    @property
    def decisions(self) -> tuple[str, ...]:
        """Names of the tensors that say which tokens go: inputs of the open graph, values of the closed one."""
        ...

    def embed_decisions(self, model: ir.Model) -> None:
        """Make this open graph, in place, decide itself."""
        ...

    def finalize(self, model: ir.Model) -> None:
        """As ``embed_decisions``, for what is written or timed."""
        ...

    def name_decision_sizes(self, model: ir.Model) -> None:
        """Give the decisions of a closed graph their shapes, with names for the sizes that are computed."""
        ...

    def to_json(self) -> dict[str, Any]: ...


def find_reduction_points(model: ir.Model, facts: ShapeFacts, sizes: Mapping[str, int]) -> TokenFacts:
    """Every point, and of every block that has none the reason. ``sizes``: the binding of ``facts``."""
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
    search = PointSearch(model, facts, data_dependent_values(model), fixed_length_test(model, sizes))
    points: list[TokenPoint] = []
    pins: dict[str, Pin] = {}
    for block, (start, end) in enumerate(zip(sites, [*sites[1:], len(nodes)], strict=True), 1):
        found = find_point_after(search, block, nodes[start], nodes[start + 1 : end])
        if isinstance(found, TokenPin):
            count = token_count_of(facts, found.tensor)
            pins.setdefault(found.reason, Pin(found.tensor, TOKEN_AXIS, count, found.reason, found.operator))
        elif found is not None:
            points.append(found)
    return TokenFacts(tuple(points), tuple(pins.values()), len(sites))


@dataclass(frozen=True)
class PointSearch:
    """What is looked at for every block. ``made``: values made from the contents of inputs; ``fixed`` says whether the
    number of tokens of a value is the same for all inputs."""

    model: ir.Model
    facts: ShapeFacts
    made: frozenset[ir.Value]
    fixed: Callable[[ir.Value], bool]


def find_point_after(
    search: PointSearch, block: int, site: ir.Node, after: Sequence[ir.Node]
) -> TokenPoint | TokenPin | None:
    """The first sum behind attention ``site`` where tokens can get fewer, or why there is none; None where that would
    be no use."""
    first: TokenPin | None = None
    for node in after:
        if not is_residual_sum(search.facts, search.made, node):
            continue
        try:
            return reduction_point_at(search, block, site, node)
        except TokenPin as stuck:
            first = first or stuck
        except NothingToSave:
            return None
    return first or TokenPin(
        site, str(site.outputs[0].name), "behind it no two streams [batch, tokens, width] are added"
    )


def token_count_of(facts: ShapeFacts, tensor: str) -> int:
    shape = next((s for v, s in facts.shape.items() if v.name == tensor and s is not None), ())
    return shape[TOKEN_AXIS] if len(shape) == 3 else 0


def fixed_length_test(model: ir.Model, sizes: Mapping[str, int]) -> Callable[[ir.Value], bool]:
    """Whether a value has as many tokens however the dynamic axes (but for the batch) are bound."""
    if all(axis == 0 for _, _, axis, _ in dynamic_axes(model.graph)):
        return lambda value: True
    here, there = infer_graph(model, sizes), infer_graph(model, alternative_dim_sizes(sizes))

    def fixed(value: ir.Value) -> bool:
        a, b = here.shape.get(value), there.shape.get(value)
        return a is not None and b is not None and a[TOKEN_AXIS] == b[TOKEN_AXIS]

    return fixed


class NothingToSave(Exception):
    """No attention, no mean and no sum follows: fewer tokens would spare nothing that dead rows do not."""


def is_attention_site(facts: ShapeFacts, node: ir.Node) -> bool:
    """A softmax over the last of at least three axes, or a fused node."""
    spec = lookup(node.domain, node.op_type)
    shape = facts.shape.get(node.outputs[0]) or ()
    if spec.kind == "attention":
        return True
    return spec.kind == "normalise" and spec.reason == SUMMED_OVER and len(shape) >= 3


def is_residual_sum(facts: ShapeFacts, made: frozenset[ir.Value], node: ir.Node) -> bool:
    """Two activations of one shape [batch, tokens, width] added."""
    spec = lookup(node.domain, node.op_type)
    out = node.outputs[0]
    shape = facts.shape.get(out)
    if spec.effect != "add" or spec.kind != "pointwise" or spec.subtracts or shape is None or len(shape) != 3:
        return False
    same = [v for v in node.inputs if v is not None and facts.shape.get(v) == shape and v in made]
    return len(same) > 1 and is_float(facts.dtype.get(out))


def reduction_point_at(search: PointSearch, block: int, site: ir.Node, node: ir.Node) -> TokenPoint:
    """Raises Stuck where the tokens behind cannot get fewer, NothingBehind where that is no use."""
    model, facts, made = search.model, search.facts, search.made
    value = node.outputs[0]
    shape = facts.shape[value]
    assert shape is not None
    flow = follow_tokens(model, facts, value, TOKEN_AXIS)
    if flow.pin is not None:
        raise flow.pin
    if not flow.softmaxes and not flow.means and not flow.sums:
        raise NothingToSave
    if shape[0] != input_batch_size(model, facts):
        raise TokenPin(node, str(value.name), "its first axis is not the batch of the inputs")
    leading = max([count_constant_tokens(facts, made, model, shape[TOKEN_AXIS]), *(k + 1 for k in flow.read_positions)])
    if leading > max(1, MAX_LEADING_SHARE * shape[TOKEN_AXIS]):
        raise TokenPin(node, str(value.name), f"token {leading - 1} is read by number")
    return TokenPoint(
        block,
        str(value.name),
        shape[TOKEN_AXIS],
        leading,
        len(flow.read_positions),
        bool(flow.means),
        search.fixed(value),
        next((side.name for side in flow.side_inputs if not side.uniform), ""),
        attention_scores_of(model, facts, site, node),
        value,
        flow,
    )


def input_batch_size(model: ir.Model, facts: ShapeFacts) -> int | None:
    """The first axis of the first input."""
    shapes = [facts.shape.get(value) for value in model.graph.inputs if not value.is_initializer()]
    return shapes[0][0] if shapes and shapes[0] else None


def count_constant_tokens(facts: ShapeFacts, made: frozenset[ir.Value], model: ir.Model, count: int) -> int:
    """How many leading tokens are no data: class and register tokens laid before the others."""
    most = 0
    for node in model.graph:
        shape = facts.shape.get(node.outputs[0]) or ()
        if lookup(node.domain, node.op_type).kind != "concat" or len(shape) != 3 or shape[TOKEN_AXIS] != count:
            continue
        axis = int(node.attributes["axis"].value) % 3
        if axis == TOKEN_AXIS and is_float(facts.dtype.get(node.outputs[0])):
            most = max(most, sum(leading_constant_lengths(facts, made, node)))
    return most


def leading_constant_lengths(facts: ShapeFacts, made: frozenset[ir.Value], node: ir.Node) -> Iterator[int]:
    for value in node.inputs:
        if value is None or value in made:
            return
        yield (facts.shape.get(value) or (0, 0))[TOKEN_AXIS]


def attention_scores_of(model: ir.Model, facts: ShapeFacts, site: ir.Node, node: ir.Node) -> AttentionScores | None:
    """The weights of attention ``site``, if they are over the same tokens that the sum ``node`` gives."""
    out = node.outputs[0]
    for before in node.inputs:
        if before is None or facts.shape.get(before) != facts.shape.get(out):
            continue
        flow = follow_tokens(model, facts, before, TOKEN_AXIS)
        if out in flow.axes:
            batch = (facts.shape[out] or (1,))[0]
            fused = lookup(site.domain, site.op_type).kind == "attention"
            found = (
                fused_attention_scores(facts, flow, site, opset_version(model))
                if fused
                else unfused_attention_scores(facts, flow, site, batch)
            )
            if found is not None:
                return found
    return None


def unfused_attention_scores(facts: ShapeFacts, flow: TokenFlow, site: ir.Node, batch: int) -> AttentionScores | None:
    """[batch, heads, queries, keys], with batch and heads in one axis or more."""
    out = site.outputs[0]
    marks, shape = flow.axes.get(out), facts.shape.get(out) or ()
    keys = {w.axis for w in flow.softmaxes if w.node is site}
    last = len(shape) - 1
    if marks is None or set(marks.axes) != {last - 1, last} or any(marks.axes.values()) or len(keys) != 1:
        return None
    heads = math.prod(shape[:-2])
    if heads % batch:
        return None
    apart = last == 3 and shape[0] == batch
    masked = any(not side.uniform for side in flow.side_inputs)
    return AttentionScores(
        str(out.name),
        (marks.axes.keys() - keys).pop() - len(shape),
        heads // batch,
        heads_on_own_axis=apart,
        masked=masked,
    )


def fused_attention_scores(facts: ShapeFacts, flow: TokenFlow, site: ir.Node, version: int) -> AttentionScores | None:
    call = facts.call(site, version)
    shape = attention_form(call, site.domain)
    if shape.packed or any(site.inputs[k] not in flow.axes for k in (shape.query, shape.key)):
        return None
    if call.has(shape.bias) if shape.bias is not None else False:
        return None  # it is added inside
    mask: Literal["", "tells", "added"] = ""
    given = site.inputs[shape.scores] if shape.scores is not None and call.has(shape.scores) else None
    if given is not None:
        mask = "tells" if facts.dtype.get(given) == ir.DataType.BOOL else "added"
    heads, others = head_counts(call)
    sizes, keys = call.shape(shape.query), call.shape(shape.key)
    by_head = not heads
    if by_head:
        heads, others = sizes[1], keys[1]
    if heads != others or not (by_head or len(sizes) == 3):
        return None
    width = sizes[-1] if by_head else sizes[-1] // heads
    return AttentionScores("", -2, heads, width, str(site.name), mask, heads_on_own_axis=True, masked=bool(mask))
