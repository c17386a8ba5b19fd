"""Edits of weights that keep every shape: a change of basis, refitted rows, and vectors that are added to a bias.

A closed form is an edit of constants followed by an ordinary cut: rotate so that the units are in order of importance,
and slice off the last ones. So the rewrite, its oracle and the report do not depend on closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph import (
    add_constant,
    is_stored_constant,
    make_node,
    movement_root,
    redirect_uses,
    replace_graph_output,
    static_shape,
)
from snpc.ops import ADD, lookup
from snpc.passes.grouping import TracedGraph
from snpc.types import AnyArray, FloatArray, Group, IntArray


@dataclass(frozen=True)
class WeightSlice:
    """The positions of a group on one axis of a constant: ``index[repeat][block, unit]``, as shared units repeat."""

    tensor: str
    axis: int
    index: tuple[IntArray, ...]


def keep_in_memory(array: AnyArray) -> AnyArray:
    """The array itself."""
    return array


@dataclass
class WeightEdits:
    """Changes to constants by name, in order, and vectors to add to the outputs of nodes (by node name).

    ``keep``: where new rows and edited weights lie, which are as large as the model: it gives an array back, or a copy
    in a file.
    """

    changes: dict[str, list[Callable[[FloatArray], FloatArray]]] = field(default_factory=dict)
    biases: dict[str, FloatArray] = field(default_factory=dict)
    keep: Callable[[AnyArray], AnyArray] = keep_in_memory

    def mix(self, weight_slice: WeightSlice, block: int, matrix: FloatArray) -> None:
        """Change the basis of a block: of its slices x_i along the axis, new_j = sum_i x_i matrix[i, j]."""
        for index in weight_slice.index:
            rows = index[block]

            def change(array: FloatArray, rows: IntArray = rows, axis: int = weight_slice.axis) -> FloatArray:
                moved = np.moveaxis(array, axis, -1)
                moved[..., rows] = moved[..., rows] @ matrix
                return array

            self.changes.setdefault(weight_slice.tensor, []).append(change)

    def add(self, weight_slice: WeightSlice, block: int, units: IntArray, rows: FloatArray) -> None:
        """Add ``rows`` [units, fan] at the positions of these units."""
        where = weight_slice.index[0][block][units]

        def change(array: FloatArray, axis: int = weight_slice.axis) -> FloatArray:
            moved = np.moveaxis(array, axis, 0)
            moved[where] += rows.reshape(len(where), *moved.shape[1:])
            return array

        self.changes.setdefault(weight_slice.tensor, []).append(change)

    def put(self, weight_slice: WeightSlice, block: int, units: IntArray, rows: FloatArray) -> None:
        """Write ``rows`` [units, fan] to the positions of these units."""
        where, rows = weight_slice.index[0][block][units], self.keep(rows)

        def change(array: FloatArray, axis: int = weight_slice.axis) -> FloatArray:
            moved = np.moveaxis(array, axis, 0)
            moved[where] = rows.reshape(len(where), *moved.shape[1:])
            return array

        self.changes.setdefault(weight_slice.tensor, []).append(change)

    def add_bias(self, node: str, vector: FloatArray) -> None:
        self.biases[node] = self.biases.get(node, 0.0) + vector


class UnsupportedWeightForm(Exception):
    """A group's weights do not have the form that a closed form needs; the message says why."""


def unit_positions(units: IntArray, group: Group) -> tuple[IntArray, ...]:
    """For each repeat: [blocks, size], the position of each unit on the axis."""
    count = group.blocks * group.size
    weight_slice = np.flatnonzero(units >= 0)
    weight_slice = weight_slice[np.argsort(units[weight_slice], kind="stable")]
    owner = units[weight_slice]
    repeat = np.arange(len(owner)) - np.searchsorted(owner, owner)
    repeats = []
    for k in range(int(repeat.max(initial=-1)) + 1):
        in_repeat = repeat == k
        if in_repeat.sum() != count:
            raise UnsupportedWeightForm("its units occur different numbers of times")
        repeats.append(weight_slice[in_repeat].reshape(group.blocks, group.size))
    if not repeats:
        raise UnsupportedWeightForm("its units do not occur")
    return tuple(repeats)


# -- applying --------------------------------------------------------------------------------------------------------


def apply_edits(traced_graph: TracedGraph, edits: WeightEdits) -> ir.Model:
    """A copy of the model with the edits. Weights are computed in float64 when they are read, and keep their type."""
    copy = traced_graph.model.clone()
    for node_name, vector in edits.biases.items():
        write_bias(copy, node_name, vector, edits)
    for name, changes in edits.changes.items():
        value = copy.graph.initializers[name]
        if value.const_value is not None:
            value.const_value = lazy_edit(value.const_value, changes, name, edits.keep)
    return copy


def lazy_edit(
    tensor: ir.TensorProtocol,
    changes: Sequence[Callable[[FloatArray], FloatArray]],
    name: str,
    keep: Callable[[AnyArray], AnyArray],
) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        array = tensor.numpy().astype(np.float64)
        for change in changes:
            array = change(array)
        contents = keep(np.ascontiguousarray(array.astype(tensor.numpy().dtype)))
        return ir.Tensor(contents, dtype=tensor.dtype, name=name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(static_shape(tensor)), name=name, cache=True)


def write_bias(model: ir.Model, node_name: str, vector: FloatArray, edits: WeightEdits) -> None:
    """Add ``vector`` to the last axis of a node's output: into the bias that is added there, or with a new Add."""
    node = next(n for n in model.graph if n.name == node_name)
    existing = existing_bias(node, len(vector))
    if existing is not None:
        edits.changes.setdefault(str(existing.name), []).append(lambda array: array + vector.reshape(array.shape))
        return
    output, spec = node.outputs[0], lookup(node.domain, node.op_type)
    name = f"{output.name}__bias"
    dtype = next(d for d in (weight_dtype(v) for v in node.inputs) if d is not None)
    if (
        spec.windowed and spec.bias is not None and len(node.inputs) > spec.bias
    ):  # its bias input is a constant that others use too
        vector = vector.reshape(-1, *[1] * (weight_rank(node) - 2))
    value = add_constant(model.graph, vector.astype(dtype.numpy()), name, dtype)
    if spec.windowed and spec.bias is not None and len(node.inputs) == spec.bias:
        node.resize_inputs(spec.bias + 1)
        node.replace_input_with(spec.bias, value)
        return
    users = list(output.uses())
    add = make_node(ADD, [output, value], name=f"{node_name}__bias", outputs=[f"{output.name}__biased"])
    biased = add.outputs[0]
    biased.type, biased.shape = output.type, output.shape
    node.append(add)
    redirect_uses(users, biased)
    if output.is_graph_output():
        replace_graph_output(model.graph, output, biased, f"{output.name}__unbiased")


def weight_rank(node: ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return len(weight.shape)


def weight_dtype(value: ir.Value | None) -> ir.DataType | None:
    """The type of a constant, read directly or through movement."""
    root = None if value is None else movement_root(value)
    return None if root is None or root.const_value is None else root.dtype


def existing_bias(node: ir.Node, width: int) -> ir.Value | None:
    """The constant vector that is added to a node's output and has no other consumer."""
    spec = lookup(node.domain, node.op_type)
    if spec.bias is not None and spec.bias < len(node.inputs):
        return node.inputs[spec.bias] if is_exclusive_vector(node.inputs[spec.bias], width) else None
    if spec.windowed:
        return None
    users = list(node.outputs[0].consumers())
    if len(users) != 1 or node.outputs[0].is_graph_output():
        return None
    added = lookup(users[0].domain, users[0].op_type)
    if added.effect != "add" or added.subtracts:
        return None
    return next((value for value in users[0].inputs if is_exclusive_vector(value, width)), None)


def is_exclusive_vector(value: ir.Value | None, width: int) -> bool:
    """Is it a constant vector of ``width`` entries along its last axis, with one consumer?"""
    if value is None or value.const_value is None or not is_stored_constant(value) or len(value.uses()) != 1:
        return False
    shape = static_shape(value.const_value)
    return bool(shape) and shape[-1] == width and int(np.prod(shape)) == width
