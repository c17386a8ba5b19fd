"""Which constants make a value linearly: those that a factor, or a change of basis, can be folded into."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts
from snpc.graph.traversal import is_stored_constant, movement_behind, movement_root
from snpc.ops import lookup
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import LabeledValue, Trace


@dataclass
class LinearPath:
    """A way to multiply one operand by ``factor``: constants to scale, and all that was passed on the way."""

    node: ir.Node
    index: int
    factor: float
    constants: dict[tuple[ir.Value, int], npt.NDArray[np.bool_]] = field(default_factory=dict)
    nodes: set[ir.Node] = field(default_factory=set)
    values: set[ir.Value] = field(default_factory=set)


class NotLinear(Exception):
    pass


def label_set(carried: LabeledValue) -> frozenset[int]:
    found: set[int] = set()
    for labels in carried.factors:
        found |= set(labels[labels >= 0].reshape(-1).tolist())
    return frozenset(found)


def trace_linear_path(
    fold: LinearPath, value: ir.Value, wanted: frozenset[int], trace: Trace, facts: ShapeFacts, model: ir.Model
) -> None:
    """Find the constants that make ``value`` (its positions labelled ``wanted``) and through which it is linear."""
    if value in fold.values:
        return
    fold.values.add(value)
    node = value.producer()
    if node is None:
        mark_constant(fold, value, labeled_positions(trace.values.get(value), wanted))
        return
    fold.nodes.add(node)
    spec = lookup(node.domain, node.op_type)
    if spec.kind in ("movement", "rotary") and node.inputs[0] is not None:
        trace_linear_path(fold, node.inputs[0], wanted, trace, facts, model)
    elif spec.kind == "concat" or (spec.kind == "pointwise" and spec.effect == "add"):
        for part in node.inputs:
            if part is not None:
                trace_linear_term(fold, node, part, wanted, trace, facts, model)
    elif spec.kind == "pointwise" and spec.effect in ("scale", "same"):
        linear = (
            [v for v in node.inputs[:1] if v is not None]
            if spec.divides
            else [v for v in node.inputs if v is not None and label_set(trace.values[v]) & wanted]
        )
        if len(linear) != 1 or is_stored_constant(linear[0]):
            raise NotLinear
        trace_linear_path(fold, linear[0], wanted, trace, facts, model)
    elif spec.kind == "contraction" and not spec.has_activation:
        mark_projection(fold, node, wanted, trace)
    elif spec.kind == "normalize" and spec.per_axis:
        for index in spec.per_axis:
            if 0 < index < len(node.inputs) and node.inputs[index] is not None:
                mark_aligned_constant(fold, node, node.inputs[index], wanted, trace)  # type: ignore[arg-type]
    else:
        raise NotLinear


def trace_linear_term(
    fold: LinearPath,
    node: ir.Node,
    part: ir.Value,
    wanted: frozenset[int],
    trace: Trace,
    facts: ShapeFacts,
    model: ir.Model,
) -> None:
    if is_stored_constant(part):
        mark_aligned_constant(fold, node, part, wanted, trace)
    elif trace.values[part].constant:
        mark_moved_constant(fold, node, part, wanted, trace)
    elif label_set(trace.values[part]) & wanted:
        trace_linear_path(fold, part, wanted, trace, facts, model)
    else:
        raise NotLinear


def labeled_positions(carried: LabeledValue | None, wanted: frozenset[int]) -> tuple[int, npt.NDArray[np.bool_]]:
    """(axis, which positions) of a tensor that carry wanted labels; they must lie along one axis."""
    if carried is None:
        raise NotLinear
    names = np.fromiter(wanted, np.int64)
    for labels in carried.factors:
        hit = np.isin(labels, names)
        axes = varying_axes(labels)
        if hit.any():
            if len(axes) != 1:
                raise NotLinear
            return next(iter(axes)), hit.reshape(-1)
    raise NotLinear


def mark_constant(fold: LinearPath, value: ir.Value, where: tuple[int, npt.NDArray[np.bool_]]) -> None:
    if not is_stored_constant(value):
        raise NotLinear
    axis, hit = where
    key = (value, axis)
    fold.constants[key] = fold.constants.get(key, np.zeros(len(hit), bool)) | hit


def mark_aligned_constant(
    fold: LinearPath, node: ir.Node, constant: ir.Value, wanted: frozenset[int], trace: Trace
) -> None:
    """A bias or gain: its positions are those of the output it is aligned with, counted from the right."""
    out = trace.values.get(node.outputs[0])
    tensor = constant.const_value
    if out is None or tensor is None or not is_stored_constant(constant):
        raise NotLinear
    axis, hit = repeated_positions(out, wanted)
    own = len(tensor.shape) - (len(out.shape) - axis)
    if own < 0 or int(tensor.shape[own]) != len(hit):  # type: ignore[arg-type]
        raise NotLinear
    mark_constant(fold, constant, (own, hit))


def repeated_positions(carried: LabeledValue, wanted: frozenset[int]) -> tuple[int, npt.NDArray[np.bool_]]:
    """As ``labeled_positions``, but labels may also vary over heads as long as every head has the same positions."""
    names = np.fromiter(wanted, np.int64)
    for labels in carried.factors:
        hit = np.isin(labels, names)
        if not hit.any():
            continue
        axis = max(varying_axes(labels))
        flat = np.moveaxis(hit, axis, -1).reshape(-1, hit.shape[axis])
        if not bool((flat == flat[0]).all()):
            raise NotLinear
        return axis, flat[0]
    raise NotLinear


def mark_moved_constant(fold: LinearPath, node: ir.Node, part: ir.Value, wanted: frozenset[int], trace: Trace) -> None:
    """As ``mark_aligned_constant``, of a bias that is moved out of a constant on the way (a slice of a packed one)."""
    out, carried = trace.values.get(node.outputs[0]), trace.values[part]
    if out is None:
        raise NotLinear
    axis, hit = repeated_positions(out, wanted)
    own = len(carried.shape) - (len(out.shape) - axis)
    mine = next(
        (labels for labels in carried.factors if varying_axes(labels) == {own} and labels.size == len(hit)), None
    )
    if mine is None:
        raise NotLinear
    root = constant_behind_movement(fold, part)
    mark_constant(fold, root, labeled_positions(trace.values.get(root), frozenset(mine.reshape(-1)[hit].tolist())))


def constant_behind_movement(path: LinearPath, value: ir.Value) -> ir.Value:
    """The value that only movement lies before ``value``; all that is passed becomes part of the path."""
    nodes = list(movement_behind(value))
    root = movement_root(value)
    if root.producer() is not None:
        raise NotLinear
    path.nodes.update(nodes)
    path.values.update((value, root, *(node.inputs[0] for node in nodes if node.inputs[0] is not None)))
    return root


def mark_projection(fold: LinearPath, node: ir.Node, wanted: frozenset[int], trace: Trace) -> None:
    spec = lookup(node.domain, node.op_type)
    weights = [node.inputs[k] for k in spec.operands]
    marked = False
    for weight in weights:
        if weight is None or not trace.values[weight].constant:
            continue
        root = constant_behind_movement(fold, weight)
        mark_constant(fold, root, labeled_positions(trace.values.get(root), wanted))
        marked = True
    if not marked:
        raise NotLinear
    bias = node.inputs[spec.bias] if spec.bias is not None and spec.bias < len(node.inputs) else None
    if bias is not None:
        channel = bias if spec.letters is not None else None
        if channel is not None:
            mark_bias(fold, node, channel, wanted, trace)


def mark_bias(fold: LinearPath, node: ir.Node, bias: ir.Value, wanted: frozenset[int], trace: Trace) -> None:
    out = trace.values.get(node.outputs[0])
    tensor = bias.const_value
    if out is None or tensor is None:
        raise NotLinear
    _axis, hit = repeated_positions(out, wanted)
    if int(tensor.shape[-1]) != len(hit):  # type: ignore[arg-type]
        raise NotLinear
    mark_constant(fold, bias, (len(tensor.shape) - 1, hit))
