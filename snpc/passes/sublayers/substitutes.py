"""What stands for a sublayer that is gone: a constant, or an affine map of what the sublayer read.

Early attention is nearly linear in its tokens, in their mean and in the first of them (the class token). A map of these
with few columns in the middle costs a small part of the attention, and gives back most of what its removal loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, make_node, unused_name
from snpc.ops import names as op
from snpc.types import AnyArray, FloatArray, Shape, Sublayer


@dataclass(frozen=True)
class TokenMap:
    """A linear map of tokens x [batch, tokens, n]: (x reduce + mean(x) pooled[0] + first(x) pooled[1]) expand, with the
    mean over the tokens and the first of them.

    ``read``: the value x. ``reduce`` [n, r], ``expand`` [r, D]. ``pooled`` [2, n, r]; None: every token by itself."""

    read: str
    reduce: AnyArray
    expand: AnyArray
    pooled: AnyArray | None = None

    def fits(self, read: int, added: int) -> bool:
        """Does it map this width to that one?"""
        rank = self.expand.shape[0]
        pooled = self.pooled is None or self.pooled.shape == (2, read, rank)
        return pooled and self.reduce.shape == (read, rank) and self.expand.shape == (rank, added)

    @property
    def params(self) -> int:
        return self.reduce.size + self.expand.size + (0 if self.pooled is None else self.pooled.size)

    def macs(self, batch: int, tokens: int) -> int:
        pooled = 0 if self.pooled is None else self.pooled.size
        return batch * (tokens * (self.reduce.size + self.expand.size) + pooled)


@dataclass(frozen=True)
class Substitute:
    """What is added in place of a sublayer: the ``constant`` [D], and what a map gives where there is one."""

    constant: FloatArray
    map: TokenMap | None = None

    def numbers(self) -> list[Any]:
        """All its numbers, as nested lists."""
        if self.map is None:
            return self.constant.tolist()  # type: ignore[no-any-return]
        parts = (self.constant, self.map.reduce, self.map.expand, self.map.pooled)
        return [part.tolist() for part in parts if part is not None]

    def describe(self) -> str:
        """What stands there, in words."""
        if self.map is None:
            return "its mean stays"
        pooled = "" if self.map.pooled is None else ", of their mean and of the first"
        return f"a map of its tokens{pooled} in its place, rank {len(self.map.expand)}"


Substitutes = Mapping[str, Substitute]
NO_SUBSTITUTES: Substitutes = MappingProxyType({})


def maps_tokens(read: Shape, added: Shape) -> bool:
    """Can a map of tokens stand for a layer that reads and adds values of these shapes? [batch, tokens, width] both."""
    return len(read) == len(added) == 3 and read[:2] == added[:2]


@dataclass(frozen=True)
class SubstituteWriter:
    """Writes what stands for sublayers into a copy of the graph. ``types``: of the values that they add; ``version``:
    opset of the graph."""

    graph: ir.Graph
    types: Mapping[str, ir.DataType]
    version: int

    def add(self, before: ir.Node, sublayer: Sublayer, substitute: Substitute) -> ir.Value:
        """The value that stands for a sublayer, in the type of what it adds; its nodes are inserted in front of
        ``before``."""
        if substitute.map is None:
            return self.constant(substitute.constant, sublayer, "mean")
        added: list[ir.Node] = []
        mapped = self.add_map(substitute.map, substitute.constant, sublayer, added)
        self.graph.insert_before(before, added)
        return mapped

    def add_map(self, found: TokenMap, bias: FloatArray, sublayer: Sublayer, added: list[ir.Node]) -> ir.Value:
        taken = {str(node.name) for node in self.graph}

        def node(name: str, kind: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
            added.append(make_node(kind, inputs, attributes, name=unused_name(f"{sublayer.name}.{name}", taken)))
            return added[-1].outputs[0]

        x = self.value(found.read)
        inner = node("reduce", op.MATMUL, x, self.constant(found.reduce, sublayer, "reduce.weight"))
        if found.pooled is not None:
            axis = {"axes": [1]} if self.version < op.REDUCTION_AXES_INPUT_SINCE[op.REDUCE_MEAN] else {}
            axes = () if axis else (self.integers([1], sublayer, "tokens"),)
            mean = node("mean", op.REDUCE_MEAN, x, *axes, keepdims=1, **axis)
            first = node("first", op.GATHER, x, self.integers([0], sublayer, "first"), axis=1)
            for name, value, weight in zip(("mean", "first"), (mean, first), found.pooled, strict=True):
                part = node(f"{name}_reduce", op.MATMUL, value, self.constant(weight, sublayer, f"{name}.weight"))
                inner = node(f"{name}_add", op.ADD, inner, part)
        mapped = node("expand", op.MATMUL, inner, self.constant(found.expand, sublayer, "expand.weight"))
        return node("bias_add", op.ADD, mapped, self.constant(bias, sublayer, "bias"))

    def value(self, name: str) -> ir.Value:
        made = (value for node in self.graph for value in node.outputs)
        return next(value for value in (*self.graph.inputs, *made) if value.name == name)

    def constant(self, contents: AnyArray, sublayer: Sublayer, name: str) -> ir.Value:
        name = unused_name(f"{sublayer.name}.{name}", self.graph.initializers)
        return add_constant(self.graph, contents.astype(self.types[sublayer.branch].numpy()), name)

    def integers(self, numbers: list[int], sublayer: Sublayer, name: str) -> ir.Value:
        return add_constant(
            self.graph, np.array(numbers), unused_name(f"{sublayer.name}.{name}", self.graph.initializers)
        )
