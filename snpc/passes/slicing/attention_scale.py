"""The attention scale keeps its meaning: softmax(s Q K') must not change when the width d of Q and K does.

The scale hides in four places: a constant; a number computed at run time from a shape; an Attention node that derives
it from the width; and later fusions that do the same. One rule serves all: where the scale is 1/sqrt(d_old), make it
1/sqrt(d_new) and fold sqrt(d_new/d_old) into what makes Q. Where it is something else, it keeps its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts, attribute_values, opset_version
from snpc.graph.traversal import ScalarFactor, reads_only_shape, scalar_factor_of, step_upstream
from snpc.ops import lookup
from snpc.ops.attention import AttentionForm, attention_form
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.removal import RemovedUnits, slice_shape
from snpc.passes.propagation.state import Contraction, Trace
from snpc.passes.weights.linear_path import LinearPath, NotLinear, label_set, trace_linear_path
from snpc.types import FloatArray

STANDARD_SCALE_TOLERANCE = 1e-2  # relative distance from 1/sqrt(d) within which a scale counts as that


@dataclass
class ScalePlan:
    """What to change so that every attention keeps its temperature.

    ``multiply``: (constant, axis) -> factor per position, before slicing; ``scalars``: (node, input) -> value;
    ``attribute_values``: (node, attribute) -> value; ``insert``: (node, input) -> factor, where nothing could be
    folded.
    """

    multiply: dict[tuple[str, int], FloatArray] = field(default_factory=dict)
    scalars: dict[tuple[str, int], float] = field(default_factory=dict)
    attributes: dict[tuple[str, str], float] = field(default_factory=dict)
    insert: dict[tuple[str, int], float] = field(default_factory=dict)


def plan_scales(model: ir.Model, facts: ShapeFacts, trace: Trace, dead: RemovedUnits) -> ScalePlan:
    plan = ScalePlan()
    folds: list[LinearPath] = []
    for contraction in trace.contractions:
        widths = score_widths(contraction, dead)
        if widths is None or widths[0] == widths[1]:
            continue
        old, new = widths
        factor = plan_score_scale(plan, model, facts, contraction, old, new)
        if factor != 1.0:
            fold = LinearPath(contraction.node, query_input(contraction), factor)
            try:
                trace_linear_path(fold, query_operand(contraction), label_set(contraction.left), trace, facts, model)
            except NotLinear:
                fold.constants.clear()
            folds.append(fold)
    merge_linear_paths(plan, folds)
    return plan


def score_widths(contraction: Contraction, dead: RemovedUnits) -> tuple[int, int] | None:
    """(d before, d after) of a product of two activations that are both made by weights; None for anything else."""
    letters = contraction.letters
    summed = set(letters.left) & set(letters.right) - set(letters.out)
    if contraction.has_weight or len(summed) != 1:
        return None
    axis = letters.left.index(next(iter(summed)))
    if not any(axis in varying_axes(f) for f in contraction.left.factors):
        return None
    packed = slice_shape(contraction.left.shape, contraction.left.factors, dead)
    return packed.old_shape[axis], packed.new_shape[axis]


def query_input(contraction: Contraction) -> int:
    node = contraction.node
    spec = lookup(node.domain, node.op_type)
    return 0 if spec.kind == "attention" else spec.operands[0]


def query_operand(contraction: Contraction) -> ir.Value:
    value = contraction.node.inputs[query_input(contraction)]
    assert value is not None
    return value


# -- what the scale is and should be ---------------------------------------------------------------------------------


def plan_score_scale(
    plan: ScalePlan, model: ir.Model, facts: ShapeFacts, contraction: Contraction, old: int, new: int
) -> float:
    """Write the new scale into ``plan``; the factor that Q must take so that the scores stay as they are."""
    node = contraction.node
    if lookup(node.domain, node.op_type).kind == "attention":
        given = attribute_values(node).get("scale")
        if makes_query_inside(attention_form(facts.call(node, opset_version(model, node.domain)), node.domain), node):
            plan.attributes[str(node.name), "scale"] = float(given or 1.0 / math.sqrt(old))
            return 1.0
        if given is None or float(given) == 0.0:
            return math.sqrt(new / old)
        if not is_standard_scale(float(given), old):
            return 1.0
        plan.attributes[str(node.name), "scale"] = 1.0 / math.sqrt(new)
        return float(given) * math.sqrt(new)
    scalars = list(scalar_factors_around(node, facts))
    alpha = attribute_values(node).get("alpha", 1.0)
    scale = math.prod((s.factor for s in scalars), start=float(alpha))
    if not is_standard_scale(scale, old):
        for scalar in scalars:
            plan.scalars[str(scalar.node.name), scalar.index] = scalar.stored_number(scalar.factor)
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


def makes_query_inside(shape: AttentionForm, node: ir.Node) -> bool:
    """Has Q no input of its own, or is a bias added to it inside? Then there is nothing to fold into."""
    bias = shape.bias
    return bool(shape.packed) or (bias is not None and bias < len(node.inputs) and node.inputs[bias] is not None)


def is_standard_scale(scale: float, width: int) -> bool:
    return scale > 0 and width > 1 and abs(scale * math.sqrt(width) - 1) < STANDARD_SCALE_TOLERANCE


def scalar_factors_around(node: ir.Node, facts: ShapeFacts) -> Iterator[ScalarFactor]:
    """Numbers that multiply either operand or the product, as far as only movement and scaling lie between."""
    for index in lookup(node.domain, node.op_type).operands:
        value = node.inputs[index]
        seen = 0
        while value is not None and value.producer() is not None and not value.is_graph_output() and seen < 64:
            producer = value.producer()
            assert producer is not None
            scalar, value = step_upstream(producer, facts)
            if scalar is not None:
                yield scalar
            seen += 1
    value = node.outputs[0]
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


# -- folding a factor into what makes Q ------------------------------------------------------------------------------


def merge_linear_paths(plan: ScalePlan, folds: list[LinearPath]) -> None:
    """Keep the folds that touch nothing else: every user of what they scale lies on the way of an equal fold."""
    good = [f for f in folds if f.constants]
    while True:
        nodes: dict[ir.Node, float] = {}
        for fold in good:
            for node in {*fold.nodes, fold.node}:
                nodes[node] = fold.factor
        bad = [f for f in good if not has_only_scaled_consumers(f, nodes)]
        if not bad:
            break
        good = [f for f in good if f not in bad]
    for fold in good:
        for (value, axis), hit in fold.constants.items():
            plan.multiply[str(value.name), axis] = np.where(
                hit, fold.factor, plan.multiply.get((str(value.name), axis), np.ones(len(hit)))
            )
    for fold in folds:
        if not any(fold is g for g in good):
            plan.insert[str(fold.node.name), fold.index] = fold.factor


def has_only_scaled_consumers(fold: LinearPath, nodes: Mapping[ir.Node, float]) -> bool:
    values = fold.values | {value for value, _ in fold.constants}
    return all(
        nodes.get(user) == fold.factor or reads_only_shape(user) for value in values for user in value.consumers()
    ) and not any(value.is_graph_output() for value in values)
