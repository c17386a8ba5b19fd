"""graph -> graph: give Q, K and V their own reshape where they share one.

``x W -> [B,N,3,H,D] -> transpose -> split`` ties the widths of Q, K and V: a box has one width. Before they are cut
differently, the flat projection is split into its parts first, and each part gets its own copy of the movement that
followed, shrunk to that part by the same machinery that shrinks the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from snpc.errors import CheckFailed
from snpc.graph.builder import Attribute, copy_node, make_node
from snpc.graph.shapes import ShapeFacts, infer_node, opset_version
from snpc.ops import lookup
from snpc.ops.names import GATHER, SPLIT, SQUEEZE
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.removal import NotRectangular, RemovedUnits, SlicedShape, slice_shape, to_cut
from snpc.passes.propagation.state import LabeledValue, Trace
from snpc.passes.slicing.shape_parameters import ShapeParameterEditor
from snpc.types import IntArray


@dataclass(frozen=True)
class PackedPart:
    """A value that only moves positions of the packed one; ``channels`` are those it holds, ``path`` the nodes."""

    value: ir.Value
    path: tuple[tuple[ir.Node, int], ...]
    channels: IntArray


def non_rectangular_values(trace: Trace, dead: RemovedUnits) -> list[ir.Value]:
    """Values that stop being a box when ``dead`` goes."""
    found = []
    for value, carried in trace.values.items():
        try:
            slice_shape(carried.shape, carried.factors, dead)
        except NotRectangular:
            found.append(value)
    return found


def split_packed(
    model: ir.Model, facts: ShapeFacts, trace: Trace, ragged: list[ir.Value], sizes: Mapping[str, int]
) -> ir.Model:
    """A copy of ``model`` in which the ragged values are gone. Raises CheckFailed where that is not possible."""
    copy = model.clone()
    twins = {n.name: n for n in copy.graph}
    after = copy_facts(facts, model, copy)
    repairs = ShapeParameterEditor(copy, model, facts, after, sizes)
    tangled = set(ragged)
    for root in dict.fromkeys(packed_root(v, tangled) for v in ragged):
        split_packed_root(SplitContext(model, copy, facts, after, trace, repairs, sizes, twins), root, tangled)
    common.RemoveUnusedNodesPass()(copy)
    copy.graph.sort()
    return copy


def copy_facts(facts: ShapeFacts, model: ir.Model, copy: ir.Model) -> ShapeFacts:
    """The same facts, of the copy's values."""
    values = {v.name: v for node in copy.graph for v in node.outputs} | dict(copy.graph.initializers)
    values |= {v.name: v for v in copy.graph.inputs}
    twins = {v: values[v.name] for v in facts.shape if v.name in values}
    return ShapeFacts(
        {twins[v]: x for v, x in facts.shape.items() if v in twins},
        {twins[v]: x for v, x in facts.dtype.items() if v in twins},
        {twins[v]: x for v, x in facts.value.items() if v in twins},
    )


@dataclass(frozen=True)
class SplitContext:
    model: ir.Model
    copy: ir.Model
    before: ShapeFacts
    after: ShapeFacts
    trace: Trace
    repairs: ShapeParameterEditor
    sizes: Mapping[str, int]
    twins: Mapping[str | None, ir.Node]

    def twin(self, value: ir.Value) -> ir.Value:
        producer = value.producer()
        assert producer is not None
        return self.twins[producer.name].outputs[value.index() or 0]


def packed_root(value: ir.Value, ragged: set[ir.Value]) -> ir.Value:
    """The flat value that the ragged one is a movement of."""
    while value in ragged:
        node = value.producer()
        if node is None or lookup(node.domain, node.op_type).kind != "movement" or node.inputs[0] is None:
            raise CheckFailed(
                f"{value.name}: its blocks would keep different widths and it cannot be split; "
                "use --uniform, or --exclude one of its groups"
            )
        value = node.inputs[0]
    return value


def find_packed_parts(work: SplitContext, root: ir.Value, ragged: set[ir.Value]) -> list[PackedPart]:
    carried = work.trace.values[root]
    _axis, labels = flat_axis(carried)
    place = {int(label): k for k, label in enumerate(labels)}
    found: list[PackedPart] = []
    stack: list[tuple[ir.Value, tuple[tuple[ir.Node, int], ...]]] = [(root, ())]
    while stack:
        value, path = stack.pop()
        if value not in ragged and value is not root:
            held = {place[int(x)] for f in work.trace.values[value].factors for x in np.unique(f) if int(x) in place}
            found.append(PackedPart(value, path, np.array(sorted(held), np.int64)))
            continue
        for node in value.consumers():
            kind = lookup(node.domain, node.op_type).kind
            if kind == "shape":
                continue
            if kind != "movement" or node.inputs[0] is not value:
                if value is root:
                    raise CheckFailed(f"{root.name} is read by {node.op_type} {node.name} as well; use --uniform")
                raise CheckFailed(f"{node.op_type} {node.name} reads parts of different widths; use --uniform")
            for index, out in enumerate(node.outputs):
                stack.append((out, (*path, (node, index))))
    return [leaf for leaf in found if leaf.value.uses()]


def flat_axis(carried: LabeledValue) -> tuple[int, IntArray]:
    for labels in sorted(carried.factors, key=lambda f: -f.size):
        axes = varying_axes(labels)
        if len(axes) == 1 and len(np.unique(labels)) == labels.size:
            return next(iter(axes)), labels.reshape(-1).astype(np.int64)
    raise CheckFailed(f"{carried.name}: its channels do not lie along one axis; use --uniform")


def split_packed_root(work: SplitContext, root: ir.Value, ragged: set[ir.Value]) -> None:
    carried = work.trace.values[root]
    axis, labels = flat_axis(carried)
    leaves = find_packed_parts(work, root, ragged)
    parts = list(dict.fromkeys(tuple(leaf.channels.tolist()) for leaf in leaves))
    held = [c for part in parts for c in part]
    if len(held) != len(set(held)):
        raise CheckFailed(f"{root.name}: its parts overlap; use --uniform")
    made = dict(zip(parts, split_flat_projection(work, root, axis, parts, len(labels)), strict=True))
    for leaf in leaves:
        part = made[tuple(leaf.channels.tolist())]
        gone = np.zeros(work.trace.table.count, bool)
        gone[np.delete(labels, leaf.channels)] = True
        only = RemovedUnits(np.arange(work.trace.table.count), np.full(work.trace.table.count, -1), gone)
        work.twin(leaf.value).replace_all_uses_with(replay_movements(work, leaf, part, only))


def split_flat_projection(
    work: SplitContext, root: ir.Value, axis: int, parts: list[tuple[int, ...]], total: int
) -> list[ir.Value]:
    """One value per part, taken from the flat projection: a Split where the parts are runs, Gathers where not."""
    source = work.twin(root)
    producer = source.producer()
    assert producer is not None
    order = sorted(parts, key=lambda p: p[0])
    runs = [c for part in order for c in part] == list(range(total))
    name = f"{root.name}__parts"
    if runs:
        sizes = [len(part) for part in order]
        inputs = [source]
        attributes: dict[str, Attribute] = {"axis": axis}
        if opset_version(work.copy) >= 13:
            inputs.append(work.repairs.constant(np.asarray(sizes, np.int64), name))
        else:
            attributes["split"] = sizes
        split = make_split_node(work, SPLIT, inputs, attributes, name, len(order))
        producer.append(split)
        values = dict(zip(order, split.outputs, strict=True))
    else:
        values = {}
        for k, part in enumerate(parts):
            index = work.repairs.constant(np.asarray(part, np.int64), f"{name}_{k}")
            gather = make_split_node(work, GATHER, [source, index], {"axis": axis}, f"{name}_{k}")
            producer.append(gather)
            values[part] = gather.outputs[0]
    for part in parts:
        shape = list(work.before.shape[root] or ())
        shape[axis] = len(part)
        work.after.shape[values[part]] = tuple(shape)
        work.after.dtype[values[part]] = work.before.dtype[root]
    return [values[part] for part in parts]


def make_split_node(
    work: SplitContext,
    op: str,
    inputs: list[ir.Value],
    attributes: Mapping[str, Attribute],
    name: str,
    outputs: int = 1,
) -> ir.Node:
    name = work.repairs.unused_node_name(name)
    return make_node(op, inputs, attributes, name=name, outputs=[f"{name}_out{k}" for k in range(outputs)])


def replay_movements(work: SplitContext, leaf: PackedPart, value: ir.Value, only: RemovedUnits) -> ir.Value:
    """The leaf's path again, on its own part."""
    anchor = work.twins[leaf.path[-1][0].name]
    for old, index in leaf.path:
        packed_in = sliced_part(work, old.inputs[0], only)
        packed_out = sliced_part(work, old.outputs[index], only)
        if packed_in.new_shape == packed_out.new_shape and selects_nothing_more(
            work, old, index, packed_in, packed_out
        ):
            continue  # the part is all that this Split or Slice would select
        value = clone_movement(work, old, index, value, packed_in, packed_out, anchor, f"{leaf.value.name}__own")
    return value


def sliced_part(work: SplitContext, value: ir.Value | None, only: RemovedUnits) -> SlicedShape:
    assert value is not None
    carried = work.trace.values[value]
    return slice_shape(carried.shape, carried.factors, only)


def selects_nothing_more(
    work: SplitContext, old: ir.Node, index: int, packed_in: SlicedShape, packed_out: SlicedShape
) -> bool:
    source = work.trace.values[old.inputs[0]]  # type: ignore[index]
    target = work.trace.values[old.outputs[index]]
    left = sorted(packed_in.slice_labels(f).tobytes() for f in source.factors)
    right = sorted(packed_out.slice_labels(f).tobytes() for f in target.factors)
    return left == right


def clone_movement(
    work: SplitContext,
    old: ir.Node,
    index: int,
    value: ir.Value,
    packed_in: SlicedShape,
    packed_out: SlicedShape,
    anchor: ir.Node,
    name: str,
) -> ir.Value:
    spec = lookup(old.domain, old.op_type)
    version = opset_version(work.copy, old.domain)
    if spec.selects and len(packed_out.new_shape) < len(packed_in.new_shape):
        dropped = [
            k for k in range(len(packed_in.new_shape)) if packed_in.new_shape[k] == 1 and packed_in.old_shape[k] != 1
        ]
        axes = work.repairs.constant(np.asarray(dropped, np.int64), f"{name}_axes")
        inputs = [value, axes] if version >= 13 else [value]
        attributes = {} if version >= 13 else {"axes": dropped}
        node = make_split_node(work, SQUEEZE, inputs, attributes, f"{name}_{old.op_type}")
        anchor.append(node)
    else:
        rest = [work.twins[old.name].inputs[k] for k in range(1, len(old.inputs))]
        name = work.repairs.unused_node_name(f"{name}_{old.op_type}")
        node = copy_node(work.twins[old.name], [value, *rest], name=name, outputs=[f"{name}_out"])
        anchor.append(node)
        if spec.recompute is not None:
            repair = spec.recompute(work.before.call(old, version), to_cut(packed_in), [to_cut(packed_out)])
            for k, array in repair.inputs.items():
                work.repairs.set_input(old, node, k, array)
    infer_node(work.after, node, work.copy, work.sizes)
    if work.after.shape.get(node.outputs[0]) != packed_out.new_shape:
        raise CheckFailed(f"{old.op_type} {old.name}: cannot be repeated for one part of {value.name}; use --uniform")
    return node.outputs[0]
