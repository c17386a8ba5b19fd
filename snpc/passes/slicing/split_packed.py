"""Splits a packed projection, so that Q, K and V can be cut to different widths.

``x W -> [B,N,3,H,D] -> transpose -> split`` ties the widths of Q, K and V: a tensor has one width per axis. Before they
are cut differently, the flat projection is split into its parts, and each part gets its own copy of the movements that
followed, sliced to that part as everything else is sliced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from snpc.errors import CheckFailed
from snpc.graph import Attribute, ShapeFacts, copy_node, infer_node, make_node, opset_version
from snpc.ops import GATHER, SPLIT, SQUEEZE, lookup
from snpc.passes.propagation import (
    LabeledValue,
    NotRectangular,
    RemovedUnits,
    SlicedShape,
    Trace,
    slice_shape,
    to_cut,
    varying_axes,
)
from snpc.passes.slicing.shape_parameters import ShapeParameterEditor
from snpc.types import IntArray


@dataclass(frozen=True)
class PackedPart:
    """A value that is a movement of part of the packed one. ``channels``: which of the packed channels it holds;
    ``path``: the nodes on the way, each with the index of its output."""

    value: ir.Value
    path: tuple[tuple[ir.Node, int], ...]
    channels: IntArray


@dataclass(frozen=True)
class SplitContext:
    """The graph that is split, its copy that is changed, and what is known of both."""

    model: ir.Model
    copy: ir.Model
    before: ShapeFacts
    after: ShapeFacts
    trace: Trace
    editor: ShapeParameterEditor
    dim_sizes: Mapping[str, int]
    twins: Mapping[str | None, ir.Node]

    def twin(self, value: ir.Value) -> ir.Value:
        """The value of the copy that ``value`` of the model corresponds to."""
        producer = value.producer()
        assert producer is not None
        return self.twins[producer.name].outputs[value.index() or 0]

    def node(
        self, op: str, inputs: list[ir.Value], attributes: Mapping[str, Attribute], name: str, outputs: int = 1
    ) -> ir.Node:
        name = self.editor.unused_node_name(name)
        return make_node(op, inputs, attributes, name=name, outputs=[f"{name}_out{k}" for k in range(outputs)])


@dataclass(frozen=True)
class MovementNode:
    """One movement node on the path of a part, with the shapes of its input and output for that part alone."""

    node: ir.Node
    output: int
    input_shape: SlicedShape
    output_shape: SlicedShape


def non_rectangular_values(trace: Trace, removed: RemovedUnits) -> list[ir.Value]:
    """Values that would not be rectangular any more without the removed units."""
    values = []
    for value, labeled in trace.values.items():
        try:
            slice_shape(labeled.shape, labeled.factors, removed)
        except NotRectangular:
            values.append(value)
    return values


def split_packed(
    model: ir.Model, facts: ShapeFacts, trace: Trace, packed: list[ir.Value], dim_sizes: Mapping[str, int]
) -> ir.Model:
    """A copy of ``model`` in which the values ``packed`` are split into their parts.

    Raises CheckFailed where a packed value is not a movement of a flat projection, or is read by anything but movement.
    """
    copy = model.clone()
    twins = {node.name: node for node in copy.graph}
    after = copy_facts(facts, model, copy)
    editor = ShapeParameterEditor(copy, model, facts, after, dim_sizes)
    context = SplitContext(model, copy, facts, after, trace, editor, dim_sizes, twins)
    for root in dict.fromkeys(packed_root(value, set(packed)) for value in packed):
        split_packed_root(context, root, set(packed))
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


def packed_root(value: ir.Value, packed: set[ir.Value]) -> ir.Value:
    """The flat value that a packed one is a movement of."""
    while value in packed:
        node = value.producer()
        if node is None or lookup(node.domain, node.op_type).kind != "movement" or node.inputs[0] is None:
            raise CheckFailed(
                f"{value.name}: its blocks would keep different widths and it cannot be split; "
                "use --uniform, or --exclude one of its groups"
            )
        value = node.inputs[0]
    return value


def find_packed_parts(context: SplitContext, root: ir.Value, packed: set[ir.Value]) -> list[PackedPart]:
    """The first values behind ``root`` that are not packed. Raises CheckFailed for a consumer that is no movement."""
    _, labels = flat_axis(context.trace.values[root])
    channel_of = {int(label): k for k, label in enumerate(labels)}
    parts: list[PackedPart] = []
    stack: list[tuple[ir.Value, tuple[tuple[ir.Node, int], ...]]] = [(root, ())]
    while stack:
        value, path = stack.pop()
        if value not in packed and value is not root:
            unique = {int(x) for factor in context.trace.values[value].factors for x in np.unique(factor)}
            channels = sorted(channel_of[label] for label in unique & channel_of.keys())
            parts.append(PackedPart(value, path, np.array(channels, np.int64)))
            continue
        for node in value.consumers():
            kind = lookup(node.domain, node.op_type).kind
            if kind == "shape":
                continue
            if kind != "movement" or node.inputs[0] is not value:
                if value is root:
                    raise CheckFailed(f"{root.name} is read by {node.op_type} {node.name} as well; use --uniform")
                raise CheckFailed(f"{node.op_type} {node.name} reads parts of different widths; use --uniform")
            stack += [(out, (*path, (node, index))) for index, out in enumerate(node.outputs)]
    return [part for part in parts if part.value.uses()]


def flat_axis(labeled: LabeledValue) -> tuple[int, IntArray]:
    """(axis, labels along it) of a value whose channels all lie along one axis."""
    for labels in sorted(labeled.factors, key=lambda f: -f.size):
        axes = varying_axes(labels)
        if len(axes) == 1 and len(np.unique(labels)) == labels.size:
            return next(iter(axes)), labels.reshape(-1).astype(np.int64)
    raise CheckFailed(f"{labeled.name}: its channels do not lie along one axis; use --uniform")


def split_packed_root(context: SplitContext, root: ir.Value, packed: set[ir.Value]) -> None:
    """Split the flat value ``root`` and repeat, for each part, the movements that followed."""
    axis, labels = flat_axis(context.trace.values[root])
    parts = find_packed_parts(context, root, packed)
    channel_sets = list(dict.fromkeys(tuple(part.channels.tolist()) for part in parts))
    channels = [channel for part in channel_sets for channel in part]
    if len(channels) != len(set(channels)):
        raise CheckFailed(f"{root.name}: its parts overlap; use --uniform")
    split = split_flat_projection(context, root, axis, channel_sets, len(labels))
    values = dict(zip(channel_sets, split, strict=True))
    count = context.trace.table.count
    for part in parts:
        other_labels = np.zeros(count, bool)
        other_labels[np.delete(labels, part.channels)] = True
        others = RemovedUnits(other_labels, np.full(count, -1))
        value = replay_movements(context, part, values[tuple(part.channels.tolist())], others)
        context.twin(part.value).replace_all_uses_with(value)


def split_flat_projection(
    context: SplitContext, root: ir.Value, axis: int, parts: list[tuple[int, ...]], total: int
) -> list[ir.Value]:
    """One value per part of the flat projection: by a Split where all parts are contiguous, else by Gathers."""
    source = context.twin(root)
    producer = source.producer()
    assert producer is not None
    order = sorted(parts, key=lambda p: p[0])
    contiguous = [c for part in order for c in part] == list(range(total))
    name = f"{root.name}__parts"
    if contiguous:
        sizes = [len(part) for part in order]
        inputs = [source]
        attributes: dict[str, Attribute] = {"axis": axis}
        if opset_version(context.copy) >= 13:
            inputs.append(context.editor.constant(np.asarray(sizes, np.int64), name))
        else:
            attributes["split"] = sizes
        split = context.node(SPLIT, inputs, attributes, name, len(order))
        producer.append(split)
        values = dict(zip(order, split.outputs, strict=True))
    else:
        values = {}
        for k, part in enumerate(parts):
            index = context.editor.constant(np.asarray(part, np.int64), f"{name}_{k}")
            gather = context.node(GATHER, [source, index], {"axis": axis}, f"{name}_{k}")
            producer.append(gather)
            values[part] = gather.outputs[0]
    for part in parts:
        shape = list(context.before.shape[root] or ())
        shape[axis] = len(part)
        context.after.shape[values[part]] = tuple(shape)
        context.after.dtype[values[part]] = context.before.dtype[root]
    return [values[part] for part in parts]


def replay_movements(context: SplitContext, part: PackedPart, value: ir.Value, others: RemovedUnits) -> ir.Value:
    """The movements on a part's path once more, on ``value``, which holds that part alone."""
    anchor = context.twins[part.path[-1][0].name]
    for old, index in part.path:
        input_shape = sliced_part(context, old.inputs[0], others)
        output_shape = sliced_part(context, old.outputs[index], others)
        movement = MovementNode(old, index, input_shape, output_shape)
        if input_shape.new_shape == output_shape.new_shape and selects_nothing_more(context, movement):
            continue  # the part is all that this Split or Slice would select
        value = clone_movement(context, movement, value, anchor, f"{part.value.name}__own")
    return value


def sliced_part(context: SplitContext, value: ir.Value | None, others: RemovedUnits) -> SlicedShape:
    assert value is not None
    labeled = context.trace.values[value]
    return slice_shape(labeled.shape, labeled.factors, others)


def selects_nothing_more(context: SplitContext, movement: MovementNode) -> bool:
    """Does the node leave all labels of the part where they are?"""
    source = context.trace.values[movement.node.inputs[0]]  # type: ignore[index]
    target = context.trace.values[movement.node.outputs[movement.output]]
    before = sorted(movement.input_shape.slice_labels(factor).tobytes() for factor in source.factors)
    after = sorted(movement.output_shape.slice_labels(factor).tobytes() for factor in target.factors)
    return before == after


def clone_movement(
    context: SplitContext, movement: MovementNode, value: ir.Value, anchor: ir.Node, name: str
) -> ir.Value:
    """The movement of one part, behind ``anchor``: a Squeeze where the node selected the part, else a copy of it."""
    old, before, after = movement.node, movement.input_shape, movement.output_shape
    spec = lookup(old.domain, old.op_type)
    version = opset_version(context.copy, old.domain)
    if spec.selects and len(after.new_shape) < len(before.new_shape):
        dropped = [k for k, size in enumerate(before.new_shape) if size == 1 and before.old_shape[k] != 1]
        axes = context.editor.constant(np.asarray(dropped, np.int64), f"{name}_axes")
        inputs = [value, axes] if version >= 13 else [value]
        attributes = {} if version >= 13 else {"axes": dropped}
        node = context.node(SQUEEZE, inputs, attributes, f"{name}_{old.op_type}")
        anchor.append(node)
    else:
        rest = [context.twins[old.name].inputs[k] for k in range(1, len(old.inputs))]
        name = context.editor.unused_node_name(f"{name}_{old.op_type}")
        node = copy_node(context.twins[old.name], [value, *rest], name=name, outputs=[f"{name}_out"])
        anchor.append(node)
        if spec.recompute is not None:
            update = spec.recompute(context.before.call(old, version), to_cut(before), [to_cut(after)])
            for k, array in update.inputs.items():
                context.editor.set_input(old, node, k, array)
    infer_node(context.after, node, context.copy, context.dim_sizes)
    if context.after.shape.get(node.outputs[0]) != after.new_shape:
        raise CheckFailed(f"{old.op_type} {old.name}: cannot be repeated for one part of {value.name}; use --uniform")
    return node.outputs[0]
