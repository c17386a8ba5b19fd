"""New nodes of token reduction: standard operators of opset 13 on [B, N, D] streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, make_node
from snpc.ops import (
    CAST,
    CONCAT,
    CONSTANT_OF_SHAPE,
    EXPAND,
    GATHER,
    GATHER_ND,
    MATMUL,
    RANGE,
    REDUCE_MAX,
    REDUCE_SUM,
    REDUCTION_AXES_INPUT_SINCE,
    RESHAPE,
    SHAPE,
    SLICE,
    SPLIT,
    TRANSPOSE,
    UNSQUEEZE,
)
from snpc.types import AnyArray

END_OF_AXIS = np.iinfo(np.int64).max


class TokenGraphBuilder:
    """Adds nodes to ``graph``, named ``prefix_1``, ``prefix_2``, ...; ``dtype`` is that of the stream."""

    def __init__(self, graph: ir.Graph, prefix: str, dtype: ir.DataType) -> None:
        self.graph, self.prefix, self.dtype = graph, prefix, dtype
        self.count = 0
        self.nodes: list[ir.Node] = []

    def name(self) -> str:
        self.count += 1
        return f"{self.prefix}_{self.count}"

    def op(self, op: str, *inputs: ir.Value, outputs: int = 1, **attributes: int | Sequence[int]) -> ir.Value:
        """The first output of a new node."""
        return self.ops(op, *inputs, outputs=outputs, **attributes)[0]

    def ops(self, op: str, *inputs: ir.Value, outputs: int = 1, **attributes: int | Sequence[int]) -> list[ir.Value]:
        name = self.name()
        names = [f"{name}_out" + (f"_{index}" if index else "") for index in range(outputs)]
        return self.append(make_node(op, inputs, attributes, name=name, outputs=names))

    def append(self, node: ir.Node) -> list[ir.Value]:
        self.graph.append(node)
        self.nodes.append(node)
        return list(node.outputs)

    def constant(self, array: AnyArray) -> ir.Value:
        return add_constant(self.graph, array, f"{self.name()}_constant")

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(np.asarray(numbers, np.int64))

    def integer(self, number: int) -> ir.Value:
        return self.constant(np.asarray(number, np.int64))

    def integers(self, start: ir.Value, stop: ir.Value) -> ir.Value:
        """start, start + 1, ... below ``stop``; all three are of no axis."""
        return self.op(RANGE, start, stop, self.integer(1))

    def scalar(self, number: float) -> ir.Value:
        """A number of the stream's type, [1]."""
        return self.constant(np.asarray([number], self.dtype.numpy()))

    # -- what is needed more than once -----------------------------------------------------------------------------

    def slice(self, value: ir.Value, axis: int, start: int, end: int = END_OF_AXIS, step: int = 1) -> ir.Value:
        return self.op(SLICE, value, self.ints(start), self.ints(end), self.ints(axis), self.ints(step))

    def slice_to(self, value: ir.Value, axis: int, end: ir.Value) -> ir.Value:
        """``value`` up to the position that ``end`` [1] computes."""
        return self.op(SLICE, value, self.ints(0), end, self.ints(axis), self.ints(1))

    def concat(self, axis: int, *parts: ir.Value) -> ir.Value:
        return self.op(CONCAT, *parts, axis=axis) if len(parts) > 1 else parts[0]

    def unsqueeze(self, value: ir.Value, *axes: int) -> ir.Value:
        return self.op(UNSQUEEZE, value, self.ints(*axes))

    def gather_rows(self, value: ir.Value, index: ir.Value) -> ir.Value:
        """[B, N, ...] and [B, k] -> [B, k, ...]: of every sample, its own rows."""
        return self.op(GATHER_ND, value, self.unsqueeze(index, -1), batch_dims=1)

    def gather_positions(self, value: ir.Value, positions: Iterable[int]) -> ir.Value:
        """[B, N, ...] -> [B, k, ...]: the same rows of every sample. (A slice with steps runs on one thread.)"""
        return self.op(GATHER, value, self.ints(*positions), axis=1)

    def reduce_sum(self, value: ir.Value, *axes: int, keep: bool = False) -> ir.Value:
        return self.op(REDUCE_SUM, value, self.ints(*axes), keepdims=int(keep))

    def reduce_max(self, value: ir.Value, axis: int) -> ir.Value:
        """The maximum along ``axis``, which goes."""
        if self.graph.opset_imports.get("", 1) >= REDUCTION_AXES_INPUT_SINCE[REDUCE_MAX]:
            return self.op(REDUCE_MAX, value, self.ints(axis), keepdims=0)
        return self.op(REDUCE_MAX, value, axes=[axis], keepdims=0)

    def split(self, value: ir.Value, axis: int, *sizes: int) -> list[ir.Value]:
        """Parts of these sizes, without those of none at the end."""
        many = [size for size in sizes if size]
        return self.ops(SPLIT, value, self.ints(*many), outputs=len(many), axis=axis) if len(many) > 1 else [value]

    def cast(self, value: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        return self.op(CAST, value, to=int(dtype or self.dtype))

    def matmul(self, left: ir.Value, right: ir.Value) -> ir.Value:
        return self.op(MATMUL, left, right)

    def swap_last_axes(self, value: ir.Value) -> ir.Value:
        """[B, M, N] -> [B, N, M]."""
        return self.op(TRANSPOSE, value, perm=[0, 2, 1])

    def gather_one(self, value: ir.Value, axis: int, position: int) -> ir.Value:
        return self.op(GATHER, value, self.integer(position), axis=axis)

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.op(RESHAPE, value, self.ints(*shape))

    def expand(self, value: ir.Value, shape: ir.Value) -> ir.Value:
        return self.op(EXPAND, value, shape)

    def sizes(self, value: ir.Value, *axes: int) -> ir.Value:
        """The sizes of these axes, [len(axes)]."""
        return self.op(GATHER, self.op(SHAPE, value), self.ints(*axes), axis=0)

    def ones(self, value: ir.Value) -> ir.Value:
        """[B, N, D] -> ones [B, N, 1]."""
        shape = self.concat(0, self.sizes(value, 0, 1), self.ints(1))
        one = ir.Tensor(np.ones(1, self.dtype.numpy()))
        return self.append(make_node(CONSTANT_OF_SHAPE, [shape], {"value": one}, name=self.name()))[0]
