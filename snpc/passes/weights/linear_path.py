"""Finds the constants that a value is linear in: a factor, or a change of basis, can be folded into these."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.graph import ShapeFacts, is_stored_constant, movement_behind, movement_root
from snpc.ops import lookup
from snpc.passes.propagation import LabeledValue, Trace, varying_axes


@dataclass
class LinearPath:
    """A way to multiply input ``index`` of ``node`` by ``factor``.

    ``constants``: (constant, axis) -> mask of the positions to multiply; ``nodes``, ``values``: those on the way.
    """

    node: ir.Node
    index: int
    factor: float
    constants: dict[tuple[ir.Value, int], npt.NDArray[np.bool_]] = field(default_factory=dict)
    nodes: set[ir.Node] = field(default_factory=set)
    values: set[ir.Value] = field(default_factory=set)


class NotLinear(Exception):
    """A value is not linear in constants that can be edited."""


def label_set(labeled: LabeledValue) -> frozenset[int]:
    """All labels of a value."""
    all_labels: set[int] = set()
    for labels in labeled.factors:
        all_labels |= set(labels[labels >= 0].reshape(-1).tolist())
    return frozenset(all_labels)


def trace_linear_path(
    path: LinearPath, value: ir.Value, group_labels: frozenset[int], trace: Trace, facts: ShapeFacts, model: ir.Model
) -> None:
    """Add to ``path`` the constants that ``value`` is linear in, at its positions with ``group_labels``.

    Raises NotLinear where an operator on the way is not linear.
    """
    if value in path.values:
        return
    path.values.add(value)
    node = value.producer()
    if node is None:
        mark_constant(path, value, labeled_positions(trace.values.get(value), group_labels))
        return
    path.nodes.add(node)
    spec = lookup(node.domain, node.op_type)
    if spec.kind in ("movement", "rotary") and node.inputs[0] is not None:
        trace_linear_path(path, node.inputs[0], group_labels, trace, facts, model)
    elif spec.kind == "concat" and is_joined_across(node, group_labels, trace):
        for joined, labels in parts_with_own_labels(node, group_labels, trace):
            if trace.values[joined].constant:
                trace_linear_term(path, node, joined, group_labels, trace, facts, model)
            else:
                trace_linear_path(path, joined, labels, trace, facts, model)
    elif spec.kind == "concat" or (spec.kind == "pointwise" and spec.effect == "add"):
        for part in node.inputs:
            beside = spec.kind == "concat" and part is not None and not label_set(trace.values[part]) & group_labels
            if part is not None and not beside:
                trace_linear_term(path, node, part, group_labels, trace, facts, model)
    elif spec.kind == "pointwise" and spec.effect in ("scale", "same"):
        linear = (
            [v for v in node.inputs[:1] if v is not None]
            if spec.divides
            else [v for v in node.inputs if v is not None and label_set(trace.values[v]) & group_labels]
        )
        if len(linear) != 1 or is_stored_constant(linear[0]):
            raise NotLinear
        trace_linear_path(path, linear[0], group_labels, trace, facts, model)
    elif spec.kind == "contraction" and not spec.has_activation:
        mark_projection(path, node, group_labels, trace)
    elif spec.kind == "normalize" and spec.per_axis:
        for index in spec.per_axis:
            if 0 < index < len(node.inputs) and node.inputs[index] is not None:
                mark_aligned_constant(path, node, node.inputs[index], group_labels, trace)  # type: ignore[arg-type]
    else:
        raise NotLinear


def trace_linear_term(
    path: LinearPath,
    node: ir.Node,
    part: ir.Value,
    group_labels: frozenset[int],
    trace: Trace,
    facts: ShapeFacts,
    model: ir.Model,
) -> None:
    if is_stored_constant(part):
        mark_aligned_constant(path, node, part, group_labels, trace)
    elif trace.values[part].constant:
        mark_moved_constant(path, node, part, group_labels, trace)
    elif label_set(trace.values[part]) & group_labels:
        trace_linear_path(path, part, group_labels, trace, facts, model)
    else:
        raise NotLinear


def is_cache(value: ir.Value | None, trace: Trace) -> bool:
    return value is not None and movement_root(value) in trace.caches


def is_joined_across(node: ir.Node, group_labels: frozenset[int], trace: Trace) -> bool:
    """Whether each part of a concatenation has all positions of the group, as where tokens, samples or heads are
    joined. The result then has the labels of one part, a cache for example, which are one unit with those of others."""
    result, wanted_labels = trace.values[node.outputs[0]], np.fromiter(group_labels, np.int64)
    axis = node.attributes["axis"].as_int() % len(result.shape)
    return any(axis not in varying_axes(f) and np.isin(f, wanted_labels).any() for f in result.factors)


def parts_with_own_labels(
    node: ir.Node, group_labels: frozenset[int], trace: Trace
) -> Iterator[tuple[ir.Value, frozenset[int]]]:
    """The parts of a concatenation but for caches, each with its own labels at the positions that have the group's
    labels in the result."""
    wanted_labels = np.fromiter(group_labels, np.int64)
    result = trace.values[node.outputs[0]]
    for part in node.inputs:
        if part is None or is_cache(part, trace):
            continue
        labels = [
            own[np.isin(joined, wanted_labels)]
            for own, joined in itertools.product(trace.values[part].factors, result.factors)
            if own.shape == joined.shape
        ]
        yield part, frozenset(np.concatenate(labels).tolist()) if labels else frozenset()


def labeled_positions(labeled: LabeledValue | None, group_labels: frozenset[int]) -> tuple[int, npt.NDArray[np.bool_]]:
    """(axis, mask of positions along it) of the group's labels in a tensor; they must lie along one axis."""
    if labeled is None:
        raise NotLinear
    wanted_labels = np.fromiter(group_labels, np.int64)
    for labels in labeled.factors:
        positions_mask = np.isin(labels, wanted_labels)
        axes = varying_axes(labels)
        if positions_mask.any():
            if len(axes) != 1:
                raise NotLinear
            return next(iter(axes)), positions_mask.reshape(-1)
    raise NotLinear


def mark_constant(path: LinearPath, value: ir.Value, where: tuple[int, npt.NDArray[np.bool_]]) -> None:
    if not is_stored_constant(value):
        raise NotLinear
    axis, positions_mask = where
    key = (value, axis)
    path.constants[key] = path.constants.get(key, np.zeros(len(positions_mask), bool)) | positions_mask


def mark_aligned_constant(
    path: LinearPath, node: ir.Node, constant: ir.Value, group_labels: frozenset[int], trace: Trace
) -> None:
    """Mark a bias or gain: its axes are aligned with those of the output, from the right."""
    out = trace.values.get(node.outputs[0])
    tensor = constant.const_value
    if out is None or tensor is None or not is_stored_constant(constant):
        raise NotLinear
    axis, positions_mask = repeated_positions(out, group_labels)
    constant_axis = len(tensor.shape) - (len(out.shape) - axis)
    if constant_axis < 0 or int(tensor.shape[constant_axis]) != len(positions_mask):  # type: ignore[arg-type]
        raise NotLinear
    mark_constant(path, constant, (constant_axis, positions_mask))


def repeated_positions(labeled: LabeledValue, group_labels: frozenset[int]) -> tuple[int, npt.NDArray[np.bool_]]:
    """As ``labeled_positions``; labels may also vary over heads, where every head has the same positions."""
    wanted_labels = np.fromiter(group_labels, np.int64)
    for labels in labeled.factors:
        positions_mask = np.isin(labels, wanted_labels)
        if not positions_mask.any():
            continue
        axis = max(varying_axes(labels))
        flat = np.moveaxis(positions_mask, axis, -1).reshape(-1, positions_mask.shape[axis])
        if not bool((flat == flat[0]).all()):
            raise NotLinear
        return axis, flat[0]
    raise NotLinear


def mark_moved_constant(
    path: LinearPath, node: ir.Node, part: ir.Value, group_labels: frozenset[int], trace: Trace
) -> None:
    """As ``mark_aligned_constant``, of a bias that is a movement of a constant (a slice of a packed one)."""
    out, labeled = trace.values.get(node.outputs[0]), trace.values[part]
    if out is None:
        raise NotLinear
    axis, positions_mask = repeated_positions(out, group_labels)
    constant_axis = len(labeled.shape) - (len(out.shape) - axis)
    matching = next(
        (
            labels
            for labels in labeled.factors
            if varying_axes(labels) == {constant_axis} and labels.size == len(positions_mask)
        ),
        None,
    )
    if matching is None:
        raise NotLinear
    root = constant_behind_movement(path, part)
    mark_constant(
        path, root, labeled_positions(trace.values.get(root), frozenset(matching.reshape(-1)[positions_mask].tolist()))
    )


def constant_behind_movement(path: LinearPath, value: ir.Value) -> ir.Value:
    """The value that only movement lies before ``value``; all that is passed becomes part of the path."""
    nodes = list(movement_behind(value))
    root = movement_root(value)
    if root.producer() is not None:
        raise NotLinear
    path.nodes.update(nodes)
    path.values.update((value, root, *(node.inputs[0] for node in nodes if node.inputs[0] is not None)))
    return root


def mark_projection(path: LinearPath, node: ir.Node, group_labels: frozenset[int], trace: Trace) -> None:
    spec = lookup(node.domain, node.op_type)
    weights = [node.inputs[k] for k in spec.operands]
    marked = False
    for weight in weights:
        if weight is None or not trace.values[weight].constant:
            continue
        root = constant_behind_movement(path, weight)
        mark_constant(path, root, labeled_positions(trace.values.get(root), group_labels))
        marked = True
    if not marked:
        raise NotLinear
    bias = node.inputs[spec.bias] if spec.bias is not None and spec.bias < len(node.inputs) else None
    if bias is not None:
        channel = bias if spec.letters is not None else None
        if channel is not None:
            mark_bias(path, node, channel, group_labels, trace)


def mark_bias(path: LinearPath, node: ir.Node, bias: ir.Value, group_labels: frozenset[int], trace: Trace) -> None:
    out = trace.values.get(node.outputs[0])
    tensor = bias.const_value
    if out is None or tensor is None:
        raise NotLinear
    _axis, positions_mask = repeated_positions(out, group_labels)
    if int(tensor.shape[-1]) != len(positions_mask):  # type: ignore[arg-type]
        raise NotLinear
    mark_constant(path, bias, (len(tensor.shape) - 1, positions_mask))
