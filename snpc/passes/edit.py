"""Exact edits of weights that leave every shape alone: change of basis, refitted rows, and what goes into a bias.

A closed form is two edits of constants and then an ordinary cut: rotate so that the units stand in order of importance,
and slice off the last ones. So the rewriter, its oracle and the report need to know nothing of closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.ops import lookup
from snpc.ops.writing import ADD
from snpc.passes.carried import Carried, Contraction
from snpc.passes.fold import CannotFold, Fold, side_labels, v_is_constant, walk
from snpc.passes.labels import varying
from snpc.passes.rewrite import Traced
from snpc.passes.shapes import attributes, static_shape
from snpc.types import FloatArray, Group, IntArray

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """Positions of one axis of a constant that belong to a group: ``index[block, unit]``, repeated where shared."""

    tensor: str
    axis: int
    index: tuple[Index, ...]


@dataclass
class Edits:
    """Changes to constants by name, in order, and vectors to add to the outputs of nodes (by node name)."""

    changes: dict[str, list[Callable[[FloatArray], FloatArray]]] = field(default_factory=dict)
    biases: dict[str, FloatArray] = field(default_factory=dict)

    def mix(self, place: Place, block: int, matrix: FloatArray) -> None:
        """Replace the block's slices x_0..x_d along the axis by their combinations: new_j = sum_i x_i matrix[i, j]."""
        for index in place.index:
            rows = index[block]

            def change(array: FloatArray, rows: Index = rows, axis: int = place.axis) -> FloatArray:
                moved = np.moveaxis(array, axis, -1)
                moved[..., rows] = moved[..., rows] @ matrix
                return array

            self.changes.setdefault(place.tensor, []).append(change)

    def add(self, place: Place, block: int, units: IntArray, rows: FloatArray) -> None:
        """Add ``rows`` [units, fan] where those units are read."""
        where = place.index[0][block][units]

        def change(array: FloatArray, axis: int = place.axis) -> FloatArray:
            moved = np.moveaxis(array, axis, 0)
            moved[where] += rows.reshape(len(where), *moved.shape[1:])
            return array

        self.changes.setdefault(place.tensor, []).append(change)

    def put(self, place: Place, block: int, units: IntArray, rows: FloatArray) -> None:
        """Write ``rows`` [units, fan] where those units are read."""
        where = place.index[0][block][units]

        def change(array: FloatArray, axis: int = place.axis) -> FloatArray:
            moved = np.moveaxis(array, axis, 0)
            moved[where] = rows.reshape(len(where), *moved.shape[1:])
            return array

        self.changes.setdefault(place.tensor, []).append(change)

    def add_bias(self, node: str, vector: FloatArray) -> None:
        self.biases[node] = self.biases.get(node, 0.0) + vector


def joined(first: Edits, then: Edits) -> Edits:
    """Both, ``first`` first."""
    both = Edits({name: list(todo) for name, todo in first.changes.items()}, dict(first.biases))
    for name, todo in then.changes.items():
        both.changes.setdefault(name, []).extend(todo)
    for node, vector in then.biases.items():
        both.add_bias(node, vector)
    return both


class NoPlace(Exception):
    """A group's weights do not have the form that a closed form needs; the reason is the message."""


def places(traced: Traced, contraction: Contraction, side: Carried, value: ir.Value, group: Group) -> list[Place]:
    """Constants that make one operand of a contraction, linearly, with the group's positions in them."""
    wanted: set[int] = set()
    for labels in side.factors:
        wanted |= set(labels[labels >= 0].reshape(-1).tolist())
    fold = Fold(contraction.node, 0, 1.0)
    try:
        walk(fold, value, frozenset(wanted), traced.trace, traced.facts, traced.model)
    except CannotFold:
        raise NoPlace("what makes it is not linear all the way") from None
    allowed = frozenset({*fold.nodes, contraction.node})
    made = {out for node in fold.nodes for out in node.outputs if carries(traced, out, wanted)}
    for seen in fold.values | {value for value, _ in fold.constants} | made:
        if read_elsewhere(traced, seen, wanted, allowed):
            raise NoPlace(f"{seen.name} is read elsewhere as well")
    sites = {(s.tensor, s.axis): s for s in group.sites}
    found = []
    for (constant, axis), hit in fold.constants.items():
        site = sites.get((str(constant.name), axis))
        if site is None:
            raise NoPlace(f"{constant.name} is not a site of the group")
        units = np.where(hit, site.units, -1)
        found.append(Place(str(constant.name), axis, positions_of(units, group)))
    return found


def carries(traced: Traced, value: ir.Value, wanted: set[int]) -> bool:
    found = traced.trace.values.get(value)
    return found is not None and not side_labels(found).isdisjoint(wanted)


def read_elsewhere(traced: Traced, value: ir.Value, wanted: set[int], allowed: frozenset[ir.Node]) -> bool:
    """Does a node that is not ``allowed`` use the wanted positions? Not one that reads the shape, or moves others out
    (K and V of a packed QKV)."""
    for user in value.consumers():
        kind = lookup(user.domain, user.op_type).kind
        if user in allowed or kind == "shape":
            continue
        if kind != "movement" or not carries(traced, value, wanted):
            return True
        moved = [out for out in user.outputs if carries(traced, out, wanted) or out not in traced.trace.values]
        if any(read_elsewhere(traced, out, wanted, frozenset()) for out in moved):
            return True
    return False


def positions_of(units: IntArray, group: Group) -> tuple[Index, ...]:
    """For each repeat [blocks, size]: where each unit stands on the axis."""
    count = group.blocks * group.size
    place = np.flatnonzero(units >= 0)
    place = place[np.argsort(units[place], kind="stable")]
    owner = units[place]
    turn = np.arange(len(owner)) - np.searchsorted(owner, owner)
    repeats = []
    for k in range(int(turn.max(initial=-1)) + 1):
        mine = turn == k
        if mine.sum() != count:
            raise NoPlace("its units occur different numbers of times")
        repeats.append(place[mine].reshape(group.blocks, group.size))
    if not repeats:
        raise NoPlace("its units do not occur")
    return tuple(repeats)


@dataclass(frozen=True)
class Reader:
    """The one weight that reads a group: ``rows`` [blocks, repeats * ..., D] can be gathered with ``place``."""

    place: Place
    node: ir.Node
    width: int

    def rows(self, traced: Traced, block: int) -> FloatArray:
        """[repeats, size, D] in float64."""
        tensor = traced.model.graph.initializers[self.place.tensor].const_value
        assert tensor is not None
        moved = np.moveaxis(tensor.numpy(), self.place.axis, 0)
        return np.stack(
            [moved[index[block]].astype(np.float64).reshape(index.shape[1], -1) for index in self.place.index]
        )


def reader_of(traced: Traced, group: Group) -> Reader:
    """The matrix that consumes a group's units. Raises NoPlace where there is none, or more than one."""
    sites = [s for s in group.sites if s.kind == "consume"]
    if len(sites) != 1:
        raise NoPlace(f"{len(sites)} weights read it")
    site = sites[0]
    constant = traced.model.graph.initializers[site.tensor]
    tensor = constant.const_value
    users = [
        (c, side)
        for c in traced.trace.contractions
        for side in (c.left, c.right)
        if c.constant and side.constant and reads(c, side, constant)
    ]
    if tensor is None or len(tensor.shape) != 2 or len(users) != 1 or users[0][0].letters.windowed:
        raise NoPlace("what reads it is not one matrix")
    node = users[0][0].node
    if lookup(node.domain, node.op_type).curved:
        raise NoPlace("its reader applies an activation")
    if any(attributes(node).get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        raise NoPlace("its reader scales the sum")
    width = int(tensor.shape[1 - site.axis])  # type: ignore[arg-type]
    letters = users[0][0].letters
    spelled = letters.left if users[0][1] is users[0][0].left else letters.right
    shape = traced.facts.shape.get(node.outputs[0])
    if letters.out[-1:] not in spelled or not shape or shape[-1] != width:
        raise NoPlace("its reader's outputs do not lie along the last axis")
    return Reader(Place(site.tensor, site.axis, positions_of(site.units, group)), node, width)


def reads(contraction: Contraction, side: Carried, constant: ir.Value) -> bool:
    """Is ``side`` this constant, directly or through movement?"""
    for value in contraction.node.inputs:
        if value is not None and value.name == side.name:
            root = value
            while root.producer() is not None and root.producer().inputs:  # type: ignore[union-attr]
                producer = root.producer()
                assert producer is not None
                if lookup(producer.domain, producer.op_type).kind != "movement" or producer.inputs[0] is None:
                    return False
                root = producer.inputs[0]
            return root is constant
    return False


# -- applying --------------------------------------------------------------------------------------------------------


def edited(traced: Traced, edits: Edits) -> ir.Model:
    """A copy of the model with the edits; weights are computed when they are read, in float64, and keep their type."""
    copy = traced.model.clone()
    for node_name, vector in edits.biases.items():
        put_bias(copy, node_name, vector, edits)
    for name, changes in edits.changes.items():
        value = copy.graph.initializers[name]
        if value.const_value is not None:
            value.const_value = changed(value.const_value, changes, name)
    return copy


def changed(
    tensor: ir.TensorProtocol, changes: Sequence[Callable[[FloatArray], FloatArray]], name: str
) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        array = tensor.numpy().astype(np.float64)
        for change in changes:
            array = change(array)
        return ir.Tensor(np.ascontiguousarray(array.astype(tensor.numpy().dtype)), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(static_shape(tensor)), name=name, cache=True)


def put_bias(model: ir.Model, node_name: str, vector: FloatArray, edits: Edits) -> None:
    """Add ``vector`` to the last axis of a node's output: into the bias that is added there, or with a new Add."""
    node = next(n for n in model.graph if n.name == node_name)
    existing = existing_bias(node, len(vector))
    if existing is not None:
        edits.changes.setdefault(str(existing.name), []).append(lambda array: array + vector.reshape(array.shape))
        return
    output = node.outputs[0]
    name = f"{output.name}__bias"
    dtype = next(d for d in (weight_type(v) for v in node.inputs) if d is not None)
    tensor = ir.Tensor(vector.astype(dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape([len(vector)]), type=ir.TensorType(dtype))
    model.graph.register_initializer(value)
    users = list(output.uses())
    made = ir.Node("", ADD, [output, value], num_outputs=1, name=f"{node_name}__bias")
    made.outputs[0].name = f"{output.name}__biased"
    made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
    node.append(made)
    for user, index in users:
        user.replace_input_with(index, made.outputs[0])
    if output.is_graph_output():
        model.graph.outputs[model.graph.outputs.index(output)] = made.outputs[0]
        made.outputs[0].name, output.name = output.name, f"{output.name}__unbiased"


def weight_type(value: ir.Value | None) -> ir.DataType | None:
    """The type of a constant, seen directly or through movement."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or lookup(node.domain, node.op_type).kind != "movement":
            return None
        value = node.inputs[0]
    return None if value is None else value.dtype


def existing_bias(node: ir.Node, width: int) -> ir.Value | None:
    """The constant vector, used here only, that is added to a node's output."""
    spec = lookup(node.domain, node.op_type)
    if spec.bias is not None and spec.bias < len(node.inputs):
        return node.inputs[spec.bias] if is_own_vector(node.inputs[spec.bias], width) else None
    users = list(node.outputs[0].consumers())
    if len(users) != 1 or node.outputs[0].is_graph_output():
        return None
    added = lookup(users[0].domain, users[0].op_type)
    if added.effect != "add" or added.subtracts:
        return None
    return next((value for value in users[0].inputs if is_own_vector(value, width)), None)


def is_own_vector(value: ir.Value | None, width: int) -> bool:
    """A constant of ``width`` entries along its last axis that nothing else uses."""
    if value is None or value.const_value is None or not v_is_constant(value) or len(value.uses()) != 1:
        return False
    shape = static_shape(value.const_value)
    return bool(shape) and shape[-1] == width and int(np.prod(shape)) == width


def contraction_at(traced: Traced, group: Group) -> Contraction:
    """The product of activations that a qk group closes in."""
    tensors = {p.tensor for p in group.probes}
    found = [
        c
        for c in traced.trace.contractions
        if not c.constant and not c.part and c.left.name in tensors and c.right.name in tensors
    ]
    if len(found) != 1:
        raise NoPlace(f"it takes part in {len(found)} score products")
    return found[0]


def value_product(traced: Traced, group: Group) -> tuple[Contraction, Carried, ir.Value]:
    """(P V, its V side, the value) of a vo group."""
    tensors = {p.tensor for p in group.probes if p.kind == "value"}
    found = []
    for c in traced.trace.contractions:
        if c.constant or c.part:
            continue
        for side in (c.left, c.right):
            if side.name in tensors and any(len(varying(f)) for f in side.factors):
                value = next(v for v in c.node.inputs if v is not None and v.name == side.name)
                found.append((c, side, value))
    if len(found) != 1:
        raise NoPlace(f"its values enter {len(found)} products")
    return found[0]


def operand_places(traced: Traced, group: Group, side: int) -> list[Place]:
    """Constants that make one operand (0: left, 1: right) of a qk group's score product."""
    contraction = contraction_at(traced, group)
    carried = (contraction.left, contraction.right)[side]
    value = contraction.node.inputs[lookup(contraction.node.domain, contraction.node.op_type).operands[side]]
    assert value is not None
    return places(traced, contraction, carried, value, group)


def value_places(traced: Traced, group: Group) -> list[Place]:
    """Constants that make a vo group's values."""
    contraction, carried, value = value_product(traced, group)
    return places(traced, contraction, carried, value, group)
