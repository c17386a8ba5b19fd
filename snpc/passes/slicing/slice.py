"""graph -> graph: remove labels, shrink every constant, recompute every parameter that spells a size.

One forward pass. At each node the table's own rule is run on the shrunk labels with the parameters as they stand; only
where the result is not what it must be are the parameters repaired, and then the rule is run again. So a shape that
the graph computes for itself is left alone, and no repair is believed before it has been executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph.binding import alternative_dim_sizes
from snpc.graph.shapes import (
    ShapeFacts,
    attribute_values,
    infer_graph,
    infer_node,
    initial_facts,
    is_float,
    opset_version,
)
from snpc.ops import lookup
from snpc.ops.movement import collapse_constant_axes
from snpc.ops.spec import Blocked, Labels
from snpc.passes.grouping.units import Units
from snpc.passes.propagation.kv_cache import resize_interface
from snpc.passes.propagation.removal import NotRectangular, RemovedUnits, SlicedShape, slice_shape, to_cut
from snpc.passes.propagation.state import LabeledValue, Trace
from snpc.passes.slicing.shape_parameters import ShapeParameterEditor
from snpc.types import Shape

Multipliers = Mapping[tuple[str, int], npt.NDArray[np.float64]]
Cuts = Mapping[tuple[str, int], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class SlicedModel:
    """The shrunk model with its facts, and the nodes whose numeric constants changed their value on the way."""

    model: ir.Model
    facts: ShapeFacts
    removed: RemovedUnits


def find_removed_units(trace: Trace, units: Units, cuts: Cuts) -> RemovedUnits:
    """Units that lose a position of some constant's axis, as ``cuts`` says by (constant, axis)."""
    gone = np.zeros(trace.table.count, bool)
    for axis in trace.table.axes:
        removed = cuts.get((str(axis.constant.name), axis.axis))
        if removed is not None:
            labels = np.arange(axis.first_label, axis.first_label + axis.size)[removed]
            gone[units.unit_of_label[labels]] = True
    return RemovedUnits(units.unit_of_label, units.block_of_unit, extend_to_heads(units, gone))


def extend_to_heads(units: Units, gone: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """A head goes when a whole block of it goes, and takes its other blocks along."""
    every = np.flatnonzero(units.unit_of_label == np.arange(len(units.unit_of_label)))
    inside = every[units.block_of_unit[every] >= 0]
    owner = units.head_of_block[units.block_of_unit[inside]]
    size = len(gone)
    total = np.bincount(units.block_of_unit[inside], minlength=size)
    dead = np.bincount(units.block_of_unit[inside], weights=gone[inside], minlength=size)
    empty = np.flatnonzero((total > 0) & (dead == total))
    heads = units.head_of_block[empty]
    gone[heads[heads >= 0]] = True
    covered = (owner >= 0) & gone[np.maximum(owner, 0)]
    gone[inside[covered]] = True
    return gone


def slice_model(
    model: ir.Model,
    facts: ShapeFacts,
    trace: Trace,
    dead: RemovedUnits,
    sizes: Mapping[str, int],
    multiply: Multipliers | None = None,
    frozen: bool = False,
) -> SlicedModel:
    """A copy of ``model`` without the dead units. Raises CheckFailed (naming the node) where that cannot be done,
    ``NotRectangular`` where blocks that share a tensor keep different numbers.

    ``frozen``: what divides a size divides the one from before the cut."""
    copy = model.clone()
    names = {str(v.name): v for v in trace.values if v.name}
    for value in copy.graph.initializers.values():
        factors = {axis: vector for (name, axis), vector in (multiply or {}).items() if name == value.name}
        slice_constant(value, trace.values.get(names[str(value.name)]), dead, factors)
    changed = sliced_shapes(trace, (*model.graph.inputs, *model.graph.outputs), dead)
    resize_interface(copy, {name: dict(changed_sizes(packed)) for name, packed in changed.items()})
    new = initial_facts(copy, sizes)
    repairs = ShapeParameterEditor(copy, model, facts, new, sizes)
    old_nodes = {node.name: node for node in model.graph}
    for node in list(copy.graph):
        old = old_nodes[node.name]
        infer_node(new, node, copy, sizes)
        spec = lookup(node.domain, node.op_type)
        version = opset_version(model, node.domain)
        if frozen and divides_changed_size(old, node, facts, new):
            repairs.set_input(old, node, 0, facts.value[old.inputs[0]])  # type: ignore[index]
            infer_node(new, node, copy, sizes)
        if spec.resize_attributes is not None:
            fresh = spec.resize_attributes(facts.call(old, version), new.call(node, version))
            if set_attributes(node, fresh):
                infer_node(new, node, copy, sizes)
        if spec.resize_head_attributes is not None and (parts := sliced_inner_shapes(trace, old, dead)):
            inputs = {
                k: found.new_shape for k, v in enumerate(old.inputs) if v and (found := expected_shape(trace, v, dead))
            }
            if set_attributes(node, spec.resize_head_attributes(facts.call(old, version), node.domain, parts, inputs)):
                infer_node(new, node, copy, sizes)
        expected = [expected_shape(trace, v, dead) for v in old.outputs]
        step = MovementRewrite(old, node, facts, new, trace, dead, repairs, version, tuple(expected))
        if spec.kind == "movement" and any(
            e is not None and e.old_shape != e.new_shape for e in (expected[0], *sliced_inputs(trace, old, dead))
        ):
            check_movement(step, copy, sizes)
        elif (
            spec.recompute is not None
            and expected[0] is not None
            and new.shape.get(node.outputs[0]) != expected[0].new_shape
        ):
            recompute_parameters(step, copy, sizes)
        check_output_shapes(node, new, expected)
    return SlicedModel(copy, new, dead)


def holds_at_other_sizes(
    model: ir.Model, sliced: SlicedModel, before: ShapeFacts, trace: Trace, sizes: Mapping[str, int]
) -> bool:
    """Are all shapes right under another binding as well? Asked where sizes that the cut has changed are divided:
    a quotient may be right for one batch and wrong for another."""
    pairs = list(paired_nodes(model, sliced.model))
    if not any(divides_changed_size(old, node, before, sliced.facts) for old, node in pairs):
        return True
    other = alternative_dim_sizes(sizes)
    there, now = infer_graph(model, other), infer_graph(sliced.model, other)
    for old, node in pairs:
        for value, twin in zip(old.outputs, node.outputs, strict=True):
            packed = expected_shape(trace, value, sliced.removed)
            old_shape, new_shape = there.shape.get(value), now.shape.get(twin)
            if packed is None or old_shape is None or len(old_shape) != len(packed.old_shape):
                continue
            wanted = tuple(
                n * b // a if a else n for n, a, b in zip(old_shape, packed.old_shape, packed.new_shape, strict=True)
            )
            if new_shape != wanted:
                return False
    return True


def paired_nodes(model: ir.Model, copy: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Nodes with their counterparts."""
    olds = {node.name: node for node in model.graph}
    return ((olds[node.name], node) for node in copy.graph if node.name in olds)


def sliced_shapes(trace: Trace, values: Iterable[ir.Value], dead: RemovedUnits) -> dict[str, SlicedShape]:
    """How those of ``values`` that are no constants and lose something shrink, by name."""
    found = {}
    for value in values:
        packed = expected_shape(trace, value, dead) if value.const_value is None else None
        if packed is not None and packed.old_shape != packed.new_shape:
            found[str(value.name)] = packed
    return found


def changed_sizes(packed: SlicedShape) -> Iterator[tuple[int, int]]:
    return ((k, b) for k, (a, b) in enumerate(zip(packed.old_shape, packed.new_shape, strict=True)) if a != b)


def divides_changed_size(old: ir.Node, node: ir.Node, before: ShapeFacts, after: ShapeFacts) -> bool:
    """Does a node divide an integer that the cut has changed?"""
    if not lookup(node.domain, node.op_type).divides or is_float(after.dtype.get(node.outputs[0])):
        return False
    first, second = before.value.get(old.inputs[0]), after.value.get(node.inputs[0])  # type: ignore[arg-type]
    return first is not None and second is not None and not np.array_equal(first, second)


def sliced_inner_shapes(trace: Trace, node: ir.Node, dead: RemovedUnits) -> dict[str, Shape]:
    """Shapes, after the cut, of what a node holds inside: [B,H,N,D] by name."""
    return {
        name: slice_shape(c.shape, c.factors, dead).new_shape
        for (at, name), c in trace.inner_values.items()
        if at is node
    }


def sliced_inputs(trace: Trace, node: ir.Node, dead: RemovedUnits) -> list[SlicedShape | None]:
    return [expected_shape(trace, v, dead) for v in node.inputs[:1] if v is not None]


def expected_shape(trace: Trace, value: ir.Value, dead: RemovedUnits) -> SlicedShape | None:
    carried = trace.values.get(value)
    if carried is None:
        return None
    try:
        return slice_shape(carried.shape, carried.factors, dead)
    except NotRectangular:
        raise NotRectangular(str(value.name)) from None


def slice_constant(
    value: ir.Value, carried: LabeledValue | None, dead: RemovedUnits, factors: Mapping[int, npt.NDArray[np.float64]]
) -> None:
    if carried is None or value.const_value is None:
        return
    packed = slice_shape(carried.shape, carried.factors, dead)
    if packed.new_shape != packed.old_shape or factors:
        value.const_value = lazy_slice(value.const_value, packed.keep, packed.new_shape, str(value.name), factors)
        value.shape = ir.Shape(packed.new_shape)


def lazy_slice(
    tensor: ir.TensorProtocol,
    keep: Mapping[int, npt.NDArray[np.int64]],
    shape: Shape,
    name: str,
    factors: Mapping[int, npt.NDArray[np.float64]],
) -> ir.LazyTensor:
    """The kept part of ``tensor``, times ``factors`` per position of an axis, read when it is needed."""

    def read() -> ir.TensorProtocol:
        array = tensor.numpy()
        for axis, vector in factors.items():
            array = (array * vector.reshape([-1 if k == axis else 1 for k in range(array.ndim)])).astype(array.dtype)
        for axis, kept in keep.items():
            array = array.take(kept, axis)
        return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)


def set_attributes(node: ir.Node, changed: Mapping[str, Any]) -> bool:
    before = attribute_values(node)
    fresh = {k: v for k, v in changed.items() if before.get(k) != v}
    for name, value in fresh.items():
        if value is None:
            node.attributes.pop(name, None)
        else:
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
    return bool(fresh)


def check_output_shapes(node: ir.Node, facts: ShapeFacts, expected: list[SlicedShape | None]) -> None:
    for value, packed in zip(node.outputs, expected, strict=True):
        found = facts.shape.get(value)
        if packed is not None and found != packed.new_shape:
            shown = list(found) if found else "of unknown shape"
            raise CheckFailed(
                f"{node.op_type} {node.name}: output {value.name} would be {shown}, must be {list(packed.new_shape)}; "
                "exclude its group with --exclude and report this model"
            )


# -- movement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MovementRewrite:
    """A movement node before (``old``) and after (``node``) the cut."""

    old: ir.Node
    node: ir.Node
    before: ShapeFacts
    after: ShapeFacts
    trace: Trace
    dead: RemovedUnits
    repairs: ShapeParameterEditor
    version: int
    expected: tuple[SlicedShape | None, ...]


def check_movement(step: MovementRewrite, model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Run the node's rule on shrunk labels; repair its parameters if the outcome is wrong; run it again."""
    if reproduces_labels(step):
        return
    recompute_parameters(step, model, sizes)
    if not reproduces_labels(step):
        raise CheckFailed(
            f"{step.node.op_type} {step.node.name}: after recomputing its sizes its output is still wrong"
        )


def recompute_parameters(step: MovementRewrite, model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Write the node's recomputed parameters."""
    spec = lookup(step.node.domain, step.node.op_type)
    data = expected_shape(step.trace, step.old.inputs[0], step.dead) if step.old.inputs[0] is not None else None
    if spec.recompute is None or data is None:
        raise CheckFailed(f"{step.node.op_type} {step.node.name}: its sizes cannot be recomputed")
    call = step.before.call(step.old, step.version)
    try:
        repair = spec.recompute(call, to_cut(data), [to_cut(p) for p in step.expected if p is not None])
    except Blocked as block:
        raise CheckFailed(f"{step.node.op_type} {step.node.name}, axis {block.axis}: {block.reason}") from None
    set_attributes(step.node, repair.attrs)
    for index, array in repair.inputs.items():
        step.repairs.set_input(step.old, step.node, index, array)
    infer_node(step.after, step.node, model, sizes)


def reproduces_labels(step: MovementRewrite) -> bool:
    """Does the node, with its parameters as they are, put every shrunk label where it must be?"""
    source = step.old.inputs[0]
    carried = step.trace.values.get(source) if source is not None else None
    packed_in = expected_shape(step.trace, source, step.dead) if source is not None else None
    if carried is None or packed_in is None:
        return True
    call = step.after.call(step.node, step.version)
    for value, packed in zip(step.node.outputs, step.expected, strict=True):
        if packed is not None and step.after.shape.get(value) != packed.new_shape:
            return False
    old_call = step.before.call(step.old, step.version)
    spec = lookup(step.node.domain, step.node.op_type)
    labelled = [v in step.trace.values and bool(step.trace.values[v].factors) for v in step.old.outputs]
    for labels in carried.factors:
        if spec.move is None:
            continue
        try:
            wanted = spec.move(old_call, labels)
        except Blocked:
            continue
        try:
            shrunk = packed_in.slice_labels(labels)
            found = spec.move(call, shrunk)
        except Blocked:
            return False
        for out, want, got, is_labeled in zip(step.expected, wanted, found, labelled, strict=False):
            # One selected position has no label array of its own, but must still be the same position.
            is_single = want.size == 1 < labels.size and not step.dead.affects(want)
            if (
                out is not None
                and (is_labeled or is_single)
                and not equal_labels(out.slice_labels(want), got, shrunk.shape != labels.shape)
            ):
                return False
    return True


def equal_labels(left: Labels, right: Labels, narrow: bool) -> bool:
    """``narrow``: where one unit is left along an axis, a label array cannot tell it from no variation; what was padded
    to it (no label) or left out of it then counts by its labels alone."""
    if left.shape == right.shape and bool((collapse_constant_axes(left) == collapse_constant_axes(right)).all()):
        return True
    return narrow and (not left.size or np.array_equal(np.unique(left[left >= 0]), np.unique(right[right >= 0])))


def changed_scalars(
    model: ir.Model, old: ShapeFacts, new: ShapeFacts, copy: ir.Model
) -> list[tuple[ir.Node, int, float, float]]:
    """(node of the copy, input, value before, value after) where a float computed from shapes changed with the cut."""
    found = []
    before = {n.name: n for n in model.graph}
    for node in copy.graph:
        twin = before.get(node.name)
        if twin is None or all(v in new.value for v in node.outputs):
            continue
        for index, value in enumerate(node.inputs):
            other = twin.inputs[index] if index < len(twin.inputs) else None
            if value is None or other is None or value not in new.value or other not in old.value:
                continue
            a, b = old.value[other], new.value[value]
            if (
                a.dtype.kind == "f"
                and a.size == 1
                and b.size == 1
                and float(a.reshape(-1)[0]) != float(b.reshape(-1)[0])
            ):
                found.append((node, index, float(a.reshape(-1)[0]), float(b.reshape(-1)[0])))
    return found
