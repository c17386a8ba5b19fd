"""Token points: values of the residual stream where tokens can get fewer, and where all of them are back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from snpc.graph import ShapeFacts, is_float
from snpc.ops import lookup
from snpc.passes.token_analysis.attention_scores import AttentionScores
from snpc.passes.token_analysis.constant_tokens import TokenRange, split_constant_tokens
from snpc.passes.token_analysis.state import TOKEN_AXIS, TokenFlow, TokenGraph, TokenPin
from snpc.types import Pin

MAX_LEADING_SHARE = 0.25  # of all tokens; if more are read at fixed positions, they are no class tokens


@dataclass(frozen=True)
class TokenExit:
    """The end of ``block``, a value of the residual stream that has all tokens again. ``segments``: the tokens from a
    reduction point to here, one stretch after the other."""

    block: int
    stream: ir.Value = field(repr=False, compare=False)
    segments: tuple[TokenFlow, ...] = field(repr=False, compare=False)

    @cached_property
    def flow(self) -> TokenFlow:
        """The tokens from the reduction point to here."""
        return join_flows(self.segments)

    @property
    def value(self) -> str:
        """Name of the residual stream there."""
        return str(self.stream.name)


@dataclass(frozen=True)
class TokenPoint:
    """A value of the residual stream, [batch, ``count``, width], whose tokens can be reduced.

    ``block``: number of the attention in front of it, from 1. ``leading``: number of class, register and other tokens
    in front that always stay; ``leading_reads``: how many of these the outputs read. ``pooled``: a mean is taken over
    tokens. ``fixed_length``: all inputs have ``count`` tokens (otherwise ``count`` is for the sizes of the analysis).
    ``side_input``: name of a tensor with an entry per token that later nodes read (a mask), "" if there is none.
    ``exits``: where all tokens have to be back, one of them; empty where the outputs need no token back.
    ``protected``: ranges of tokens behind the leading ones that always stay too (learned ones, of a detector).
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
    exits: tuple[TokenExit, ...] = ()
    depth: float = 0.0
    """Share of the model's attentions that lie in front."""
    protected: tuple[TokenRange, ...] = ()

    @property
    def staying(self) -> int:
        """Number of tokens that always stay."""
        return self.leading + sum(stop - start for start, stop in self.protected)

    def exit_at(self, block: int) -> TokenExit | None:
        """The exit behind ``block``; None if there is none."""
        return next((e for e in self.exits if e.block == block), None)


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


def join_flows(flows: Sequence[TokenFlow]) -> TokenFlow:
    """The flow through a chain of segments."""
    joined = TokenFlow(flows[0].stream, flows[0].origins, {}, end=flows[-1].end)
    for flow in flows:
        joined.axes.update(flow.axes)
        joined.nodes += flow.nodes
        joined.read_positions |= flow.read_positions
        joined.softmaxes += flow.softmaxes
        joined.means += flow.means
        joined.sums += flow.sums
        joined.side_inputs += flow.side_inputs
    return joined


@dataclass(frozen=True)
class PointSearch:
    """What the search for points reads. ``fixed``: whether a value has the same number of tokens for all inputs.
    ``blocks``: number of attentions. ``constant``: number of tokens -> positions of those that are learned."""

    graph: TokenGraph
    fixed: Callable[[ir.Value], bool]
    blocks: int
    constant: Mapping[int, frozenset[int]]
    doomed: dict[ir.Value, TokenPin] = field(default_factory=dict)
    """Values whose tokens an earlier search found to end in a graph output, with its pin."""


def is_residual_sum(facts: ShapeFacts, data_dependent: frozenset[ir.Value], node: ir.Node) -> bool:
    """Whether ``node`` adds two activations of one shape [batch, tokens, width]."""
    spec = lookup(node.domain, node.op_type)
    out = node.outputs[0]
    shape = facts.shape.get(out)
    if spec.effect != "add" or spec.kind != "pointwise" or spec.subtracts or shape is None or len(shape) != 3:
        return False
    same = [v for v in node.inputs if v is not None and facts.shape.get(v) == shape and v in data_dependent]
    return len(same) > 1 and is_float(facts.dtype.get(out))


def input_batch_size(model: ir.Model, facts: ShapeFacts) -> int | None:
    """Size of the first axis of the first input."""
    shapes = [facts.shape.get(value) for value in model.graph.inputs if not value.is_initializer()]
    return shapes[0][0] if shapes and shapes[0] else None


def find_staying_tokens(search: PointSearch, value: ir.Value, read: set[int]) -> tuple[int, tuple[TokenRange, ...]]:
    """(number of tokens of ``value`` in front that always stay; ranges of further ones). Raises TokenPin where they
    leave too few others, or where they are depends on the input."""
    count = (search.graph.facts.shape[value] or (0, 0))[TOKEN_AXIS]
    staying = split_constant_tokens(search.constant.get(count, frozenset()), read, count, search.fixed(value))
    if staying is None:
        reason = "learned tokens stand between tokens whose number differs from input to input"
        raise TokenPin(value.producer(), str(value.name), reason)
    if staying[0] > max(1, MAX_LEADING_SHARE * count):
        raise TokenPin(value.producer(), str(value.name), f"token {staying[0] - 1} is read at a fixed position")
    return staying
