"""Which constants make a value linearly: those that a factor, or a change of basis, can be folded into."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.graph.shapes import Facts
from snpc.graph.traversal import v_is_constant
from snpc.ops import lookup
from snpc.passes.propagation.labels import varying
from snpc.passes.propagation.propagate import Carried, Trace


@dataclass
class Fold:
    """A way to multiply one operand by ``factor``: constants to scale, and all that was passed on the way."""

    node: ir.Node
    index: int
    factor: float
    constants: dict[tuple[ir.Value, int], npt.NDArray[np.bool_]] = field(default_factory=dict)
    nodes: set[ir.Node] = field(default_factory=set)
    values: set[ir.Value] = field(default_factory=set)


class CannotFold(Exception):
    pass


def side_labels(carried: Carried) -> frozenset[int]:
    found: set[int] = set()
    for labels in carried.factors:
        found |= set(labels[labels >= 0].reshape(-1).tolist())
    return frozenset(found)


def walk(fold: Fold, value: ir.Value, wanted: frozenset[int], trace: Trace, facts: Facts, model: ir.Model) -> None:
    """Find the constants that make ``value`` (its positions labelled ``wanted``) and through which it is linear."""
    if value in fold.values:
        return
    fold.values.add(value)
    node = value.producer()
    if node is None:
        mark_constant(fold, value, positions(trace.values.get(value), wanted))
        return
    fold.nodes.add(node)
    spec = lookup(node.domain, node.op_type)
    if spec.kind in ("movement", "rotary") and node.inputs[0] is not None:
        walk(fold, node.inputs[0], wanted, trace, facts, model)
    elif spec.kind == "concat" or (spec.kind == "pointwise" and spec.effect == "add"):
        for part in node.inputs:
            if part is not None:
                walk_term(fold, node, part, wanted, trace, facts, model)
    elif spec.kind == "pointwise" and spec.effect in ("scale", "same"):
        linear = (
            [v for v in node.inputs[:1] if v is not None]
            if spec.divides
            else [v for v in node.inputs if v is not None and side_labels(trace.values[v]) & wanted]
        )
        if len(linear) != 1 or v_is_constant(linear[0]):
            raise CannotFold
        walk(fold, linear[0], wanted, trace, facts, model)
    elif spec.kind == "contraction" and not spec.curved:
        mark_projection(fold, node, wanted, trace)
    elif spec.kind == "normalise" and spec.per_axis:
        for index in spec.per_axis:
            if 0 < index < len(node.inputs) and node.inputs[index] is not None:
                mark_aligned(fold, node, node.inputs[index], wanted, trace)  # type: ignore[arg-type]
    else:
        raise CannotFold


def walk_term(
    fold: Fold, node: ir.Node, part: ir.Value, wanted: frozenset[int], trace: Trace, facts: Facts, model: ir.Model
) -> None:
    if v_is_constant(part):
        mark_aligned(fold, node, part, wanted, trace)
    elif trace.values[part].constant:
        mark_moved(fold, node, part, wanted, trace)
    elif side_labels(trace.values[part]) & wanted:
        walk(fold, part, wanted, trace, facts, model)
    else:
        raise CannotFold


def positions(carried: Carried | None, wanted: frozenset[int]) -> tuple[int, npt.NDArray[np.bool_]]:
    """(axis, which positions) of a tensor that carry wanted labels; they must lie along one axis."""
    if carried is None:
        raise CannotFold
    names = np.fromiter(wanted, np.int64)
    for labels in carried.factors:
        hit = np.isin(labels, names)
        axes = varying(labels)
        if hit.any():
            if len(axes) != 1:
                raise CannotFold
            return next(iter(axes)), hit.reshape(-1)
    raise CannotFold


def mark_constant(fold: Fold, value: ir.Value, where: tuple[int, npt.NDArray[np.bool_]]) -> None:
    if not v_is_constant(value):
        raise CannotFold
    axis, hit = where
    key = (value, axis)
    fold.constants[key] = fold.constants.get(key, np.zeros(len(hit), bool)) | hit


def mark_aligned(fold: Fold, node: ir.Node, constant: ir.Value, wanted: frozenset[int], trace: Trace) -> None:
    """A bias or gain: its positions are those of the output it is aligned with, counted from the right."""
    out = trace.values.get(node.outputs[0])
    tensor = constant.const_value
    if out is None or tensor is None or not v_is_constant(constant):
        raise CannotFold
    axis, hit = spread_positions(out, wanted)
    own = len(tensor.shape) - (len(out.shape) - axis)
    if own < 0 or int(tensor.shape[own]) != len(hit):  # type: ignore[arg-type]
        raise CannotFold
    mark_constant(fold, constant, (own, hit))


def spread_positions(carried: Carried, wanted: frozenset[int]) -> tuple[int, npt.NDArray[np.bool_]]:
    """As ``positions``, but labels may also vary over heads as long as every head has the same positions."""
    names = np.fromiter(wanted, np.int64)
    for labels in carried.factors:
        hit = np.isin(labels, names)
        if not hit.any():
            continue
        axis = max(varying(labels))
        flat = np.moveaxis(hit, axis, -1).reshape(-1, hit.shape[axis])
        if not bool((flat == flat[0]).all()):
            raise CannotFold
        return axis, flat[0]
    raise CannotFold


def mark_moved(fold: Fold, node: ir.Node, part: ir.Value, wanted: frozenset[int], trace: Trace) -> None:
    """As ``mark_aligned``, of a bias that is moved out of a constant on the way (a slice of a packed one)."""
    out, carried = trace.values.get(node.outputs[0]), trace.values[part]
    if out is None:
        raise CannotFold
    axis, hit = spread_positions(out, wanted)
    own = len(carried.shape) - (len(out.shape) - axis)
    mine = next((labels for labels in carried.factors if varying(labels) == {own} and labels.size == len(hit)), None)
    if mine is None:
        raise CannotFold
    root = moved_from(fold, part)
    mark_constant(fold, root, positions(trace.values.get(root), frozenset(mine.reshape(-1)[hit].tolist())))


def moved_from(fold: Fold, value: ir.Value) -> ir.Value:
    """The constant that only movement lies behind, all of which is marked as passed."""
    fold.values.add(value)
    while (node := value.producer()) is not None:
        if lookup(node.domain, node.op_type).kind != "movement" or node.inputs[0] is None:
            raise CannotFold
        fold.nodes.add(node)
        value = node.inputs[0]
        fold.values.add(value)
    return value


def mark_projection(fold: Fold, node: ir.Node, wanted: frozenset[int], trace: Trace) -> None:
    spec = lookup(node.domain, node.op_type)
    weights = [node.inputs[k] for k in spec.operands]
    marked = False
    for weight in weights:
        if weight is None or not trace.values[weight].constant:
            continue
        root = moved_from(fold, weight)
        mark_constant(fold, root, positions(trace.values.get(root), wanted))
        marked = True
    if not marked:
        raise CannotFold
    bias = node.inputs[spec.bias] if spec.bias is not None and spec.bias < len(node.inputs) else None
    if bias is not None:
        channel = bias if spec.letters is not None else None
        if channel is not None:
            mark_bias(fold, node, channel, wanted, trace)


def mark_bias(fold: Fold, node: ir.Node, bias: ir.Value, wanted: frozenset[int], trace: Trace) -> None:
    out = trace.values.get(node.outputs[0])
    tensor = bias.const_value
    if out is None or tensor is None:
        raise CannotFold
    _axis, hit = spread_positions(out, wanted)
    if int(tensor.shape[-1]) != len(hit):  # type: ignore[arg-type]
        raise CannotFold
    mark_constant(fold, bias, (len(tensor.shape) - 1, hit))
