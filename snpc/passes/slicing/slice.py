"""Slicing: removes units from every constant and recomputes every parameter that spells a size.

One forward pass. At each movement node the rule of the operator table is run on the sliced labels, with the parameters
as they are. Only where the result is wrong are the parameters recomputed, and then the rule is run again. So a shape
that the graph computes at run time is left alone, and no new parameter is trusted before it has been executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph import (
    MeasuredValue,
    ShapeFacts,
    alternative_dim_sizes,
    attribute_values,
    infer_graph,
    infer_node,
    infer_nodes,
    initial_facts,
    is_float,
    opset_version,
)
from snpc.ops import Blocked, Labels, collapse_constant_axes, lookup
from snpc.passes.canonicalization import EliminateDeadNodes
from snpc.passes.grouping import Units
from snpc.passes.propagation import (
    LabeledValue,
    NotRectangular,
    RemovedUnits,
    SlicedShape,
    Trace,
    resize_interface,
    slice_shape,
    to_cut,
)
from snpc.passes.slicing.shape_parameters import ShapeParameterEditor
from snpc.types import Shape

Multipliers = Mapping[tuple[str, int], npt.NDArray[np.float64]]
Cuts = Mapping[tuple[str, int], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class SlicedModel:
    """The sliced model, its shapes and known values, and the units that were removed."""

    model: ir.Model
    facts: ShapeFacts
    removed: RemovedUnits


def find_removed_units(trace: Trace, units: Units, cuts: Cuts) -> RemovedUnits:
    """The heads all of whose positions in constants go, and the units that lose a position elsewhere. ``cuts``:
    (constant, axis) -> positions to remove."""
    cut, stored = np.zeros(trace.table.count, bool), np.zeros(trace.table.count, bool)
    for axis in trace.table.axes:
        labels = slice(axis.first_label, axis.first_label + axis.size)
        stored[labels] = True
        positions = cuts.get((str(axis.constant.name), axis.axis))
        if positions is not None:
            cut[labels] = positions
    heads = units.head_of_label
    removed_heads = np.zeros(trace.table.count, bool)
    removed_heads[heads[cut & (heads >= 0)]] = True
    removed_heads[heads[stored & ~cut & (heads >= 0)]] = False
    removed_units = np.zeros(trace.table.count, bool)
    removed_units[units.unit_of_label[cut & ~((heads >= 0) & removed_heads[heads])]] = True
    return units.removal(removed_units, removed_heads)


def slice_model(
    model: ir.Model,
    facts: ShapeFacts,
    trace: Trace,
    removed: RemovedUnits,
    dim_sizes: Mapping[str, int],
    multipliers: Multipliers | None = None,
    freeze_dividends: bool = False,
) -> SlicedModel:
    """A copy of ``model`` without the removed units.

    ``multipliers``: (constant, axis) -> factor per position, applied before slicing. ``freeze_dividends``: a node that
    divides a size divides the size from before the cut. Raises CheckFailed, which names the node, where slicing is not
    possible, and NotRectangular where blocks that share a tensor keep different numbers of units.
    """
    copy = model.clone()
    drop_removed_experts(copy, trace, removed)
    names = {str(v.name): v for v in trace.values if v.name}
    for value in copy.graph.initializers.values():
        factors = {axis: vector for (name, axis), vector in (multipliers or {}).items() if name == value.name}
        slice_constant(value, trace.values.get(names[str(value.name)]), removed, factors)
    changed = sliced_shapes(trace, (*model.graph.inputs, *model.graph.outputs), removed)
    resize_interface(copy, {name: dict(changed_sizes(sliced)) for name, sliced in changed.items()})
    after = initial_facts(copy, dim_sizes)
    editor = ShapeParameterEditor(copy, model, facts, after, dim_sizes)
    old_nodes = {node.name: node for node in model.graph}
    for node in list(copy.graph):
        old = old_nodes[node.name]
        expected = [expected_shape(trace, v, removed) for v in old.outputs]
        expect_measured_shapes(facts, after, old, node, expected)
        infer_node(after, node, copy, dim_sizes)
        spec = lookup(node.domain, node.op_type)
        version = opset_version(model, node.domain)
        if freeze_dividends and divides_changed_size(old, node, facts, after):
            editor.set_input(old, node, 0, facts.value[old.inputs[0]])  # type: ignore[index]
            infer_node(after, node, copy, dim_sizes)
        if spec.resize_attributes is not None:
            attributes = spec.resize_attributes(facts.call(old, version), after.call(node, version))
            if set_attributes(node, attributes):
                infer_node(after, node, copy, dim_sizes)
        if spec.resize_head_attributes is not None and (parts := sliced_inner_shapes(trace, old, removed)):
            inputs = {
                index: sliced.new_shape
                for index, value in enumerate(old.inputs)
                if value is not None and (sliced := expected_shape(trace, value, removed))
            }
            if set_attributes(node, spec.resize_head_attributes(facts.call(old, version), node.domain, parts, inputs)):
                infer_node(after, node, copy, dim_sizes)
        step = MovementRewrite(old, node, facts, after, trace, removed, editor, version, tuple(expected))
        if spec.kind == "movement" and any(
            e is not None and e.old_shape != e.new_shape for e in (expected[0], *sliced_inputs(trace, old, removed))
        ):
            check_movement(step, copy, dim_sizes)
        elif (
            spec.recompute is not None
            and expected[0] is not None
            and after.shape.get(node.outputs[0]) != expected[0].new_shape
        ):
            recompute_parameters(step, copy, dim_sizes)
        check_output_shapes(node, after, expected)
    return SlicedModel(copy, after, removed)


def drop_removed_experts(model: ir.Model, trace: Trace, removed: RemovedUnits) -> None:
    """Remove the nodes that compute what a removed expert adds, from a copy of the model that was traced."""
    nodes = {node.name: node for node in model.graph}
    dropped = [n.name for n, label in trace.expert_outputs.items() if removed.removed[label]]
    for name in dropped:
        node = nodes[name]
        data = node.inputs[0]
        assert data is not None
        node.outputs[0].replace_all_uses_with(data)
    if dropped:
        EliminateDeadNodes()(model)


def holds_at_other_sizes(
    model: ir.Model, result: SlicedModel, before: ShapeFacts, trace: Trace, dim_sizes: Mapping[str, int]
) -> bool:
    """Are all shapes right at other sizes of the dynamic dimensions too?

    This is checked only where a size that the cut changes is divided: a quotient may be right for one batch and wrong
    for another.
    """
    pairs = list(paired_nodes(model, result.model))
    if not any(divides_changed_size(old, node, before, result.facts) for old, node in pairs):
        return True
    other = alternative_dim_sizes(dim_sizes)
    old_facts, new_facts = infer_graph(model, other), infer_graph(result.model, other)
    if trace.expert_outputs:  # as many tokens for an expert as in the original
        new_facts = initial_facts(result.model, other)
        for old, node in pairs:
            for value, twin in zip(old.outputs, node.outputs, strict=True):
                if value in old_facts.measured:
                    new_facts.measured[twin] = old_facts.measured[value]
        new_facts = infer_nodes(result.model, new_facts, other)
    for old, node in pairs:
        for value, twin in zip(old.outputs, node.outputs, strict=True):
            sliced = expected_shape(trace, value, result.removed)
            old_shape, new_shape = old_facts.shape.get(value), new_facts.shape.get(twin)
            if sliced is None or old_shape is None or len(old_shape) != len(sliced.old_shape):
                continue
            sizes = zip(old_shape, sliced.old_shape, sliced.new_shape, strict=True)
            if new_shape != tuple(size * kept // full if full else size for size, full, kept in sizes):
                return False
    return True


def paired_nodes(model: ir.Model, copy: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Nodes of ``model`` with their counterparts in ``copy``."""
    olds = {node.name: node for node in model.graph}
    return ((olds[node.name], node) for node in copy.graph if node.name in olds)


def sliced_shapes(trace: Trace, values: Iterable[ir.Value], removed: RemovedUnits) -> dict[str, SlicedShape]:
    """Name -> shape before and after, of those of ``values`` that are no constants and become smaller."""
    changed = {}
    for value in values:
        sliced = expected_shape(trace, value, removed) if value.const_value is None else None
        if sliced is not None and sliced.old_shape != sliced.new_shape:
            changed[str(value.name)] = sliced
    return changed


def changed_sizes(sliced: SlicedShape) -> Iterator[tuple[int, int]]:
    """(axis, new size) of every axis that changes."""
    sizes = zip(sliced.old_shape, sliced.new_shape, strict=True)
    return ((axis, new) for axis, (old, new) in enumerate(sizes) if old != new)


def divides_changed_size(old: ir.Node, node: ir.Node, before: ShapeFacts, after: ShapeFacts) -> bool:
    """Does a node divide an integer that the cut has changed?"""
    if not lookup(node.domain, node.op_type).divides or is_float(after.dtype.get(node.outputs[0])):
        return False
    first, second = before.value.get(old.inputs[0]), after.value.get(node.inputs[0])  # type: ignore[arg-type]
    return first is not None and second is not None and not np.array_equal(first, second)


def sliced_inner_shapes(trace: Trace, node: ir.Node, removed: RemovedUnits) -> dict[str, Shape]:
    """Shapes [B, H, N, D] after the cut of the values inside a fused node, by name."""
    return {
        name: slice_shape(c.shape, c.factors, removed).new_shape
        for (at, name), c in trace.inner_values.items()
        if at is node
    }


def sliced_inputs(trace: Trace, node: ir.Node, removed: RemovedUnits) -> list[SlicedShape | None]:
    return [expected_shape(trace, v, removed) for v in node.inputs[:1] if v is not None]


def expected_shape(trace: Trace, value: ir.Value, removed: RemovedUnits) -> SlicedShape | None:
    """The shape that ``value`` must have by its labels; None for a value without any. Raises NotRectangular."""
    labeled = trace.values.get(value)
    if labeled is None:
        return None
    try:
        return slice_shape(labeled.shape, labeled.factors, removed)
    except NotRectangular:
        raise NotRectangular(str(value.name)) from None


def slice_constant(
    value: ir.Value, labeled: LabeledValue | None, removed: RemovedUnits, factors: Mapping[int, npt.NDArray[np.float64]]
) -> None:
    if labeled is None or value.const_value is None:
        return
    sliced = slice_shape(labeled.shape, labeled.factors, removed)
    if sliced.new_shape != sliced.old_shape or factors:
        value.const_value = lazy_slice(value.const_value, sliced.keep, sliced.new_shape, str(value.name), factors)
        value.shape = ir.Shape(sliced.new_shape)


def lazy_slice(
    tensor: ir.TensorProtocol,
    keep: Mapping[int, npt.NDArray[np.int64]],
    shape: Shape,
    name: str,
    factors: Mapping[int, npt.NDArray[np.float64]],
) -> ir.LazyTensor:
    """The kept part of ``tensor``, times ``factors`` (axis -> factor per position); computed when it is read.

    ``keep``: axis -> positions that stay. ``shape``: that of the result.
    """

    def read() -> ir.TensorProtocol:
        array = tensor.numpy()
        for axis, vector in factors.items():
            array = (array * vector.reshape([-1 if k == axis else 1 for k in range(array.ndim)])).astype(array.dtype)
        for axis, kept in keep.items():
            array = array.take(kept, axis)
        return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)


def set_attributes(node: ir.Node, attributes: Mapping[str, Any]) -> bool:
    """Set attributes, or remove those that are None. Whether any of them had another value before."""
    before = attribute_values(node)
    changes = {name: value for name, value in attributes.items() if before.get(name) != value}
    for name, value in changes.items():
        if value is None:
            node.attributes.pop(name, None)
        else:
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
    return bool(changes)


def expect_measured_shapes(
    before: ShapeFacts, after: ShapeFacts, old: ir.Node, node: ir.Node, expected: Sequence[SlicedShape | None]
) -> None:
    """What no inference knows and a run of the original showed has the expected shape: the cut file is run as well."""
    for value, twin, sliced in zip(old.outputs, node.outputs, expected, strict=True):
        seen = before.measured.get(value)
        if seen is not None:
            after.measured[twin] = MeasuredValue(sliced.new_shape if sliced else seen.shape, before.dtype.get(value))


def check_output_shapes(node: ir.Node, facts: ShapeFacts, expected: list[SlicedShape | None]) -> None:
    for value, sliced in zip(node.outputs, expected, strict=True):
        shape = facts.shape.get(value)
        if sliced is not None and shape != sliced.new_shape:
            text = list(shape) if shape else "of unknown shape"
            raise CheckFailed(
                f"{node.op_type} {node.name}: output {value.name} would be {text}, must be {list(sliced.new_shape)}; "
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
    removed: RemovedUnits
    editor: ShapeParameterEditor
    version: int
    expected: tuple[SlicedShape | None, ...]


def check_movement(step: MovementRewrite, model: ir.Model, dim_sizes: Mapping[str, int]) -> None:
    """Run the node's rule on the sliced labels; if the result is wrong, recompute its parameters and run it again."""
    if reproduces_labels(step):
        return
    recompute_parameters(step, model, dim_sizes)
    if not reproduces_labels(step):
        raise CheckFailed(
            f"{step.node.op_type} {step.node.name}: after recomputing its sizes its output is still wrong"
        )


def recompute_parameters(step: MovementRewrite, model: ir.Model, dim_sizes: Mapping[str, int]) -> None:
    """Write the parameters that the operator table computes for the sliced shapes."""
    spec = lookup(step.node.domain, step.node.op_type)
    data = expected_shape(step.trace, step.old.inputs[0], step.removed) if step.old.inputs[0] is not None else None
    if spec.recompute is None or data is None:
        raise CheckFailed(f"{step.node.op_type} {step.node.name}: its sizes cannot be recomputed")
    call = step.before.call(step.old, step.version)
    try:
        update = spec.recompute(call, to_cut(data), [to_cut(p) for p in step.expected if p is not None])
    except Blocked as block:
        raise CheckFailed(f"{step.node.op_type} {step.node.name}, axis {block.axis}: {block.reason}") from None
    set_attributes(step.node, update.attrs)
    for index, array in update.inputs.items():
        step.editor.set_input(step.old, step.node, index, array)
    infer_node(step.after, step.node, model, dim_sizes)


def reproduces_labels(step: MovementRewrite) -> bool:
    """Does the node, with its parameters as they are, move every sliced label to its position in the sliced output?"""
    source = step.old.inputs[0]
    labeled = step.trace.values.get(source) if source is not None else None
    sliced_input = expected_shape(step.trace, source, step.removed) if source is not None else None
    if labeled is None or sliced_input is None:
        return True
    call = step.after.call(step.node, step.version)
    for value, sliced in zip(step.node.outputs, step.expected, strict=True):
        if sliced is not None and step.after.shape.get(value) != sliced.new_shape:
            return False
    old_call = step.before.call(step.old, step.version)
    spec = lookup(step.node.domain, step.node.op_type)
    has_labels = [v in step.trace.values and bool(step.trace.values[v].factors) for v in step.old.outputs]
    for labels in labeled.factors:
        if spec.move is None:
            continue
        try:
            expected_labels = spec.move(old_call, labels)
        except Blocked:
            continue
        try:
            sliced_labels = sliced_input.slice_labels(labels)
            actual_labels = spec.move(call, sliced_labels)
        except Blocked:
            return False
        narrow = sliced_labels.shape != labels.shape
        outputs = zip(step.expected, expected_labels, actual_labels, has_labels, strict=False)
        for sliced, expected, actual, is_labeled in outputs:
            # One selected position has no label array of its own, but must still be the same position.
            is_single = expected.size == 1 < labels.size and not step.removed.affects(expected)
            matters = is_labeled or is_single
            if sliced is not None and matters and not equal_labels(sliced.slice_labels(expected), actual, narrow):
                return False
    return True


def equal_labels(left: Labels, right: Labels, narrow: bool) -> bool:
    """Do two label arrays say the same?

    ``narrow``: one of them was sliced. Where one unit is left along an axis, a label array cannot tell it from an axis
    without variation; then only the sets of labels are compared.
    """
    if left.shape == right.shape and bool((collapse_constant_axes(left) == collapse_constant_axes(right)).all()):
        return True
    return narrow and (not left.size or np.array_equal(np.unique(left[left >= 0]), np.unique(right[right >= 0])))


def changed_scalars(
    model: ir.Model, old: ShapeFacts, new: ShapeFacts, copy: ir.Model
) -> list[tuple[ir.Node, int, float, float]]:
    """(node of the copy, input, value before, value after) where a float computed from shapes changed with the cut."""
    changed = []
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
                changed.append((node, index, float(a.reshape(-1)[0]), float(b.reshape(-1)[0])))
    return changed
