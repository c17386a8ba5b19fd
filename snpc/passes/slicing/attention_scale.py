"""Keeps the attention scale right when the width d of Q and K changes: the scores of kept channels must not change.

The scale s of softmax(s Q K') is a constant, a number that is computed at run time from a shape, or implied by a fused
node. One rule serves all of them. Where it is 1/sqrt(d_old), it becomes 1/sqrt(d_new), and sqrt(d_new/d_old) is folded
into the constants that make Q. Any other scale keeps its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph import (
    ScalarFactor,
    ShapeFacts,
    attribute_values,
    opset_version,
    reads_only_shape,
    scalar_factor_of,
    step_upstream,
)
from snpc.ops import AttentionForm, attention_form, lookup
from snpc.passes.propagation import Contraction, RemovedUnits, Trace, slice_shape, varying_axes
from snpc.passes.weights import LinearPath, NotLinear, label_set, trace_linear_path
from snpc.types import FloatArray

STANDARD_SCALE_TOLERANCE = 1e-2  # relative distance from 1/sqrt(d) within which a scale is taken for the standard one


@dataclass
class ScalePlan:
    """Changes after which every attention has the scores that it had.

    ``multiply``: (constant, axis) -> factor per position, applied before slicing; ``scalars``: (node, input) -> value;
    ``attributes``: (node, attribute) -> value; ``insert``: (node, input) -> factor of a new Mul, where no constant
    could take it.
    """

    multiply: dict[tuple[str, int], FloatArray] = field(default_factory=dict)
    scalars: dict[tuple[str, int], float] = field(default_factory=dict)
    attributes: dict[tuple[str, str], float] = field(default_factory=dict)
    insert: dict[tuple[str, int], float] = field(default_factory=dict)


def plan_scales(
    model: ir.Model, facts: ShapeFacts, trace: Trace, removed: RemovedUnits, keep_scales: bool = False
) -> ScalePlan:
    """The changes for every product of Q and K whose width is cut.

    ``keep_scales``: every scale keeps its value, as no constant may be multiplied by a factor.
    """
    plan = ScalePlan()
    paths: list[LinearPath] = []
    for contraction in trace.contractions:
        widths = score_widths(contraction, removed)
        if widths is None or widths[0] == widths[1]:
            continue
        old, new = widths
        if keep_scales:
            keep_score_scale(plan, model, facts, contraction, old)
            continue
        factor = plan_score_scale(plan, model, facts, contraction, old, new)
        if factor != 1.0:
            path = LinearPath(contraction.node, query_input(contraction), factor)
            try:
                trace_linear_path(path, query_operand(contraction), label_set(contraction.left), trace, facts, model)
            except NotLinear:
                path.constants.clear()
            paths.append(path)
    merge_linear_paths(plan, paths)
    return plan


def score_widths(contraction: Contraction, removed: RemovedUnits) -> tuple[int, int] | None:
    """(d before, d after) of a product of two activations; None for any other contraction."""
    axis = score_width_axis(contraction)
    if axis is None:
        return None
    sliced = slice_shape(contraction.left.shape, contraction.left.factors, removed)
    return sliced.old_shape[axis], sliced.new_shape[axis]


def score_width_axis(contraction: Contraction) -> int | None:
    """The axis of the left operand that a product of queries and keys sums over; None for any other contraction."""
    letters = contraction.letters
    summed = set(letters.left) & set(letters.right) - set(letters.out)
    if contraction.has_weight or len(summed) != 1:
        return None
    axis = letters.left.index(next(iter(summed)))
    return axis if any(axis in varying_axes(f) for f in contraction.left.factors) else None


def query_input(contraction: Contraction) -> int:
    node = contraction.node
    spec = lookup(node.domain, node.op_type)
    return 0 if spec.kind == "attention" else spec.operands[0]


def query_operand(contraction: Contraction) -> ir.Value:
    value = contraction.node.inputs[query_input(contraction)]
    assert value is not None
    return value


# -- the scale before and after ---------------------------------------------------------------------------------


def plan_score_scale(
    plan: ScalePlan, model: ir.Model, facts: ShapeFacts, contraction: Contraction, old: int, new: int
) -> float:
    """Write the new scale into ``plan``. Returns the factor on Q that keeps the scores."""
    node = contraction.node
    if lookup(node.domain, node.op_type).kind == "attention":
        attribute = attribute_values(node).get("scale")
        if makes_query_inside(attention_form(facts.call(node, opset_version(model, node.domain)), node.domain), node):
            plan.attributes[str(node.name), "scale"] = float(attribute or 1.0 / math.sqrt(old))
            return 1.0
        if attribute is None or float(attribute) == 0.0:
            return math.sqrt(new / old)
        if not is_standard_scale(float(attribute), old):
            return 1.0
        plan.attributes[str(node.name), "scale"] = 1.0 / math.sqrt(new)
        return float(attribute) * math.sqrt(new)
    scalars = list(scalar_factors_around(node, facts))
    alpha = attribute_values(node).get("alpha", 1.0)
    scale = math.prod((s.factor for s in scalars), start=float(alpha))
    if not is_standard_scale(scale, old):
        keep_scalars(plan, scalars)
        return 1.0
    after = 1.0
    if alpha != 1.0:
        share = math.log(alpha) / math.log(scale)
        plan.attributes[str(node.name), "alpha"] = new ** (-0.5 * share)
        after *= new ** (-0.5 * share)
    for scalar in scalars:
        share = math.log(scalar.factor) / math.log(scale)
        plan.scalars[str(scalar.node.name), scalar.index] = scalar.stored_number(new ** (-0.5 * share))
        after *= new ** (-0.5 * share)
    return scale / after


def keep_score_scale(plan: ScalePlan, model: ir.Model, facts: ShapeFacts, contraction: Contraction, old: int) -> None:
    """Write the scale of width ``old`` into ``plan``, where the graph or the node would compute another."""
    node = contraction.node
    if lookup(node.domain, node.op_type).kind == "attention":
        plan.attributes[str(node.name), "scale"] = float(attribute_values(node).get("scale") or 1.0 / math.sqrt(old))
    else:
        keep_scalars(plan, scalar_factors_around(node, facts))


def keep_scalars(plan: ScalePlan, scalars: Iterable[ScalarFactor]) -> None:
    for scalar in scalars:
        plan.scalars[str(scalar.node.name), scalar.index] = scalar.stored_number(scalar.factor)


def makes_query_inside(shape: AttentionForm, node: ir.Node) -> bool:
    """Does the node itself make Q, or add a bias to it? Then no constant outside of it can take a factor."""
    bias = shape.bias
    return bool(shape.packed) or (bias is not None and bias < len(node.inputs) and node.inputs[bias] is not None)


def is_standard_scale(scale: float, width: int) -> bool:
    return scale > 0 and width > 1 and abs(scale * math.sqrt(width) - 1) < STANDARD_SCALE_TOLERANCE


def scalar_factors_around(node: ir.Node, facts: ShapeFacts) -> Iterator[ScalarFactor]:
    """Numbers that multiply an operand or the product, with nothing but movement and scaling in between."""
    for index in lookup(node.domain, node.op_type).operands:
        value = node.inputs[index]
        steps = 0
        while value is not None and value.producer() is not None and not value.is_graph_output() and steps < 64:
            producer = value.producer()
            assert producer is not None
            scalar, value = step_upstream(producer, facts)
            if scalar is not None:
                yield scalar
            steps += 1
    yield from scalar_factors_behind(node, facts)


def scalar_factors_behind(node: ir.Node, facts: ShapeFacts) -> Iterator[ScalarFactor]:
    """Numbers that multiply the product, with nothing but movement in between."""
    value: ir.Value | None = node.outputs[0]
    for _ in range(64):
        users = [u for u in (value.consumers() if value is not None else ()) if not reads_only_shape(u)]
        if len(users) != 1 or (value is not None and value.is_graph_output()):
            return
        scalar, follows = scalar_factor_of(users[0], facts)
        if scalar is not None:
            yield scalar
        elif not follows:
            return
        value = users[0].outputs[0]


# -- folding a factor into the constants that make Q -----------------------------------------------------------------


def merge_linear_paths(plan: ScalePlan, paths: list[LinearPath]) -> None:
    """Fold along paths that scale nothing else: every consumer of a scaled value lies on a path of that factor."""
    foldable = [f for f in paths if f.constants]
    while True:
        nodes: dict[ir.Node, float] = {}
        for path in foldable:
            for node in {*path.nodes, path.node}:
                nodes[node] = path.factor
        conflicting = [f for f in foldable if not has_only_scaled_consumers(f, nodes)]
        if not conflicting:
            break
        foldable = [f for f in foldable if f not in conflicting]
    for path in foldable:
        for (value, axis), positions in path.constants.items():
            plan.multiply[str(value.name), axis] = np.where(
                positions, path.factor, plan.multiply.get((str(value.name), axis), np.ones(len(positions)))
            )
    for path in paths:
        if not any(path is g for g in foldable):
            plan.insert[str(path.node.name), path.index] = path.factor


def has_only_scaled_consumers(path: LinearPath, nodes: Mapping[ir.Node, float]) -> bool:
    values = path.values | {value for value, _ in path.constants}
    return all(
        nodes.get(user) == path.factor or reads_only_shape(user) for value in values for user in value.consumers()
    ) and not any(value.is_graph_output() for value in values)
