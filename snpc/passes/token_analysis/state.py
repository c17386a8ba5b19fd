"""What following tokens through a graph notes down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts, opset_version
from snpc.ops import lookup
from snpc.ops.spec import OpCall, OpSpec


class TokenPin(Exception):
    """The tokens cannot be followed through ``node`` with another number of them."""

    def __init__(self, node: ir.Node | None, tensor: str, reason: str) -> None:
        super().__init__(reason)
        self.node, self.tensor, self.reason = node, tensor, reason

    @property
    def operator(self) -> str:
        return f"{self.node.op_type} {self.node.name}" if self.node is not None else "the model"


class NeedsSideInput(TokenPin):
    """The tokens get no further, unless ``found`` go with them: these values have an entry for each token too."""

    def __init__(self, stuck: TokenPin, found: Mapping[ir.Value, TokenAxes]) -> None:
        super().__init__(stuck.node, stuck.tensor, stuck.reason)
        self.side_inputs = found


@dataclass(frozen=True)
class TokenAxes:
    """The axes of a value that hold the tokens: axis -> how many leading ones are left out. ``weighed``: those of them
    along which the entries are weights already (a softmax made them)."""

    axes: dict[int, int]
    weighted: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TokenReduce:
    """Input ``index`` of ``node`` has tokens along ``axis`` (``leading`` left out) that are weighed or added up there:
    scores before their softmax (inside a fused node, where ``axis`` is -1), or what a mean or a sum is taken of."""

    node: ir.Node
    index: int
    axis: int
    offset: int


@dataclass(frozen=True)
class SideInput:
    """Input ``index`` of ``node``, made without the tokens, has an entry for each of them along ``axes`` (axis -> how
    many leading ones are left out). ``even``: all entries along them are the same, so one serves."""

    node: ir.Node
    index: int
    axes: dict[int, int]
    uniform: bool
    name: str


@dataclass
class TokenFlow:
    """What was met on the way.

    ``stream``: whose tokens get fewer; ``starts``: the values that are followed, it and what else is picked from as its
    tokens are (a mask that a mean leaves padding out by). ``reads``: positions that are read by number; ``weighings``:
    softmaxes over tokens; ``pools``: means over tokens; ``sums``: other sums over tokens, in which none has a weight;
    ``sides``: what has an entry for each of them.
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


@dataclass(frozen=True)
class TokenNodeContext:
    """One node on the way."""

    model: ir.Model
    facts: ShapeFacts
    flow: TokenFlow
    node: ir.Node

    @property
    def spec(self) -> OpSpec:
        return lookup(self.node.domain, self.node.op_type)

    @property
    def call(self) -> OpCall:
        return self.facts.call(self.node, opset_version(self.model, self.node.domain))

    def axes(self, index: int) -> TokenAxes | None:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return self.flow.axes.get(value) if value is not None else None

    def input_name(self, index: int) -> str:
        value = self.node.inputs[index]
        return str(value.name) if value is not None else ""

    def pin(self, index: int, reason: str) -> TokenPin:
        return TokenPin(self.node, self.input_name(index), reason)
