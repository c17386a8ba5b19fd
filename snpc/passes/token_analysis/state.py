"""State of token analysis: token axes of values, and what was recorded while the tokens were followed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from snpc.graph import (
    ShapeFacts,
    ancestor_nodes,
    data_dependent_values,
    opset_version,
    selected_table,
    used_values,
)
from snpc.ops import OpCall, OpSpec, lookup

TOKEN_AXIS = 1


class TokenPin(Exception):
    """Tokens cannot be removed in front of ``node`` (None: the model as a whole): ``tensor`` is its input that says
    so."""

    def __init__(self, node: ir.Node | None, tensor: str, reason: str) -> None:
        super().__init__(reason)
        self.node, self.tensor, self.reason = node, tensor, reason

    @property
    def operator(self) -> str:
        return f"{self.node.op_type} {self.node.name}" if self.node is not None else "the model"


class NeedsSideInput(TokenPin):
    """Tokens can be followed further only if ``side_inputs``, which have an entry per token, are reduced with them."""

    def __init__(self, pin: TokenPin, side_inputs: Mapping[ir.Value, TokenAxes]) -> None:
        super().__init__(pin.node, pin.tensor, pin.reason)
        self.side_inputs = side_inputs


@dataclass(frozen=True)
class TokenAxes:
    """The token axes of a value: axis -> number of leading tokens that it leaves out. ``weighted``: the axes along
    which its entries are results of a softmax."""

    axes: dict[int, int]
    weighted: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TokenReduce:
    """A softmax, mean or sum over tokens: input ``index`` of ``node``, along ``axis``.

    ``offset``: number of leading tokens that are left out. ``axis`` is -1 for the scores inside a fused node.
    """

    node: ir.Node
    index: int
    axis: int
    offset: int


@dataclass(frozen=True)
class SideInput:
    """Input ``index`` of ``node`` has an entry per token along ``axes``, but is not computed from the token stream.

    ``axes``: axis -> number of leading tokens that are left out. ``uniform``: all entries along them are equal.
    """

    node: ir.Node
    index: int
    axes: dict[int, int]
    uniform: bool
    name: str


@dataclass
class TokenFlow:
    """The tokens of one value, followed through the graph.

    ``stream``: the value whose tokens are reduced. ``origins``: all values that are followed: the stream, and side
    inputs that are gathered as its tokens are (the mask of a mean over unpadded tokens). ``axes``: token axes of every
    value that was reached; ``nodes``: the nodes that were passed. ``read_positions``: fixed positions that are read;
    ``softmaxes``, ``means``, ``sums``: reductions over tokens (``sums``: all that are unweighted). ``pin``: what
    stopped the flow, None if it reached the outputs. ``end``: where all tokens are back: what reads it is not followed.
    """

    stream: ir.Value
    origins: frozenset[ir.Value]
    axes: dict[ir.Value, TokenAxes]
    nodes: list[ir.Node] = field(default_factory=list)
    read_positions: set[int] = field(default_factory=set)
    softmaxes: list[TokenReduce] = field(default_factory=list)
    means: list[TokenReduce] = field(default_factory=list)
    sums: list[TokenReduce] = field(default_factory=list)
    side_inputs: list[SideInput] = field(default_factory=list)
    pin: TokenPin | None = None
    end: ir.Value | None = None

    @cached_property
    def stream_ancestors(self) -> set[ir.Node]:
        """All nodes upstream of the stream."""
        return ancestor_nodes(self.stream)


@dataclass(frozen=True)
class TokenGraph:
    """A graph in which tokens are followed from many values, with what is the same for all of them."""

    model: ir.Model
    facts: ShapeFacts
    _calls: dict[ir.Node, OpCall] = field(default_factory=dict, repr=False)

    def call(self, node: ir.Node) -> OpCall:
        """The call of a node, made once: facts do not change any more."""
        if node not in self._calls:
            self._calls[node] = self.facts.call(node, opset_version(self.model, node.domain))
        return self._calls[node]

    def spec(self, node: ir.Node) -> OpSpec:
        return lookup(node.domain, node.op_type)

    @cached_property
    def positions(self) -> Mapping[ir.Node, int]:
        """Every node's position in the topological order."""
        return {node: k for k, node in enumerate(self.model.graph)}

    @cached_property
    def readers(self) -> Mapping[ir.Value, Sequence[ir.Node]]:
        """The nodes that use a value, also those whose subgraphs do."""
        readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in self.model.graph:
            for value in used_values(node):
                readers[value].append(node)
        return readers

    @cached_property
    def data_dependent(self) -> frozenset[ir.Value]:
        """Values that depend on the contents of inputs."""
        return data_dependent_values(self.model)


@dataclass(frozen=True)
class TokenNodeContext:
    """The node that is being visited while tokens are followed."""

    graph: TokenGraph
    flow: TokenFlow
    node: ir.Node

    @property
    def model(self) -> ir.Model:
        return self.graph.model

    @property
    def facts(self) -> ShapeFacts:
        return self.graph.facts

    @property
    def spec(self) -> OpSpec:
        return self.graph.spec(self.node)

    @property
    def call(self) -> OpCall:
        return self.graph.call(self.node)

    def axes(self, index: int) -> TokenAxes | None:
        """Token axes of an input; None if it has none."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return self.flow.axes.get(value) if value is not None else None

    def input_name(self, index: int) -> str:
        """The name of an input in the file: of a rotary table, not that of the selection in front of its use."""
        value = self.node.inputs[index]
        return str(selected_table(value).name) if value is not None else ""

    def pin(self, index: int, reason: str) -> TokenPin:
        """The exception to raise because of an input."""
        return TokenPin(self.node, self.input_name(index), reason)
