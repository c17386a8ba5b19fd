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
import numpy.typing as npt
import onnx_ir as ir

from snpc.ops import lookup
from snpc.ops.attention import AttentionForm, form
from snpc.passes.labels import varying
from snpc.passes.pack import Dead, packing
from snpc.passes.shapes import Facts, attributes, opset
from snpc.passes.trace import Carried, Contraction, Trace

Vector = npt.NDArray[np.float64]
STANDARD = 1e-2  # relative distance from 1/sqrt(d) within which a scale counts as that


@dataclass(frozen=True)
class Scalar:
    """One number that multiplies (or divides) Q, K or the scores."""

    node: ir.Node
    index: int
    factor: float
    divides: bool

    def spelled(self, factor: float) -> float:
        return 1.0 / factor if self.divides else factor


@dataclass
class ScalePlan:
    """What to change so that every attention keeps its temperature.

    ``multiply``: (constant, axis) -> factor per position, before slicing; ``scalars``: (node, input) -> value;
    ``attributes``: (node, attribute) -> value; ``insert``: (node, input) -> factor, where nothing could be folded.
    """

    multiply: dict[tuple[str, int], Vector] = field(default_factory=dict)
    scalars: dict[tuple[str, int], float] = field(default_factory=dict)
    attributes: dict[tuple[str, str], float] = field(default_factory=dict)
    insert: dict[tuple[str, int], float] = field(default_factory=dict)


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


def plan_scales(model: ir.Model, facts: Facts, trace: Trace, dead: Dead) -> ScalePlan:
    plan = ScalePlan()
    folds: list[Fold] = []
    for contraction in trace.contractions:
        widths = score_widths(contraction, dead)
        if widths is None or widths[0] == widths[1]:
            continue
        old, new = widths
        factor = rescale(plan, model, facts, contraction, old, new)
        if factor != 1.0:
            fold = Fold(contraction.node, query_index(contraction), factor)
            try:
                walk(fold, operand(contraction), side_labels(contraction.left), trace, facts, model)
            except CannotFold:
                fold.constants.clear()
            folds.append(fold)
    merge_folds(plan, folds)
    return plan


def score_widths(contraction: Contraction, dead: Dead) -> tuple[int, int] | None:
    """(d before, d after) of a product of two activations that are both made by weights; None for anything else."""
    letters = contraction.letters
    summed = set(letters.left) & set(letters.right) - set(letters.out)
    if contraction.constant or len(summed) != 1:
        return None
    axis = letters.left.index(next(iter(summed)))
    if not any(axis in varying(f) for f in contraction.left.factors):
        return None
    packed = packing(contraction.left.shape, contraction.left.factors, dead)
    return packed.old[axis], packed.new[axis]


def query_index(contraction: Contraction) -> int:
    node = contraction.node
    spec = lookup(node.domain, node.op_type)
    return 0 if spec.kind == "attention" else spec.operands[0]


def operand(contraction: Contraction) -> ir.Value:
    value = contraction.node.inputs[query_index(contraction)]
    assert value is not None
    return value


def side_labels(carried: Carried) -> frozenset[int]:
    found: set[int] = set()
    for labels in carried.factors:
        found |= set(labels[labels >= 0].reshape(-1).tolist())
    return frozenset(found)


# -- what the scale is and should be ---------------------------------------------------------------------------------


def rescale(plan: ScalePlan, model: ir.Model, facts: Facts, contraction: Contraction, old: int, new: int) -> float:
    """Write the new scale into ``plan``; the factor that Q must take so that the scores stay as they are."""
    node = contraction.node
    if lookup(node.domain, node.op_type).kind == "attention":
        given = attributes(node).get("scale")
        if made_inside(form(facts.call(node, opset(model, node.domain)), node.domain), node):
            plan.attributes[str(node.name), "scale"] = float(given or 1.0 / math.sqrt(old))
            return 1.0
        if given is None or float(given) == 0.0:
            return math.sqrt(new / old)
        if not is_standard(float(given), old):
            return 1.0
        plan.attributes[str(node.name), "scale"] = 1.0 / math.sqrt(new)
        return float(given) * math.sqrt(new)
    scalars = list(scalars_around(node, facts))
    alpha = attributes(node).get("alpha", 1.0)
    scale = math.prod((s.factor for s in scalars), start=float(alpha))
    if not is_standard(scale, old):
        for scalar in scalars:
            plan.scalars[str(scalar.node.name), scalar.index] = scalar.spelled(scalar.factor)
        return 1.0
    after = 1.0
    if alpha != 1.0:
        share = math.log(alpha) / math.log(scale)
        plan.attributes[str(node.name), "alpha"] = new ** (-0.5 * share)
        after *= new ** (-0.5 * share)
    for scalar in scalars:
        share = math.log(scalar.factor) / math.log(scale)
        plan.scalars[str(scalar.node.name), scalar.index] = scalar.spelled(new ** (-0.5 * share))
        after *= new ** (-0.5 * share)
    return scale / after


def made_inside(shape: AttentionForm, node: ir.Node) -> bool:
    """Has Q no input of its own, or is a bias added to it inside? Then there is nothing to fold into."""
    return bool(shape.packed) or (
        shape.bias is not None and shape.bias < len(node.inputs) and bool(node.inputs[shape.bias])
    )


def is_standard(scale: float, width: int) -> bool:
    return scale > 0 and width > 1 and abs(scale * math.sqrt(width) - 1) < STANDARD


def scalars_around(node: ir.Node, facts: Facts) -> Iterator[Scalar]:
    """Numbers that multiply either operand or the product, as far as only movement and scaling lie between."""
    for index in lookup(node.domain, node.op_type).operands:
        value = node.inputs[index]
        seen = 0
        while value is not None and value.producer() is not None and seen < 64:
            producer = value.producer()
            assert producer is not None
            scalar, value = upstream(producer, facts)
            if scalar is not None:
                yield scalar
            seen += 1
    value = node.outputs[0]
    for _ in range(64):
        users = [u for u in (value.consumers() if value is not None else ()) if not is_shape(u)]
        if len(users) != 1:
            return
        scalar, follows = scalar_of(users[0], facts)
        if scalar is not None:
            yield scalar
        elif not follows:
            return
        value = users[0].outputs[0]


def upstream(node: ir.Node, facts: Facts) -> tuple[Scalar | None, ir.Value | None]:
    scalar, follows = scalar_of(node, facts)
    if scalar is not None:
        return scalar, node.inputs[1 - scalar.index]
    return None, node.inputs[0] if follows else None


def scalar_of(node: ir.Node, facts: Facts) -> tuple[Scalar | None, bool]:
    """(the number this node multiplies by, whether values only move through it)."""
    spec = lookup(node.domain, node.op_type)
    if spec.kind == "movement" or (spec.effect == "same" and spec.kind == "pointwise"):
        return None, True
    if spec.kind != "pointwise" or spec.effect != "scale" or len(node.inputs) != 2:
        return None, False
    for index in (1, 0):
        value = node.inputs[index]
        array = facts.value.get(value) if value is not None else None
        if array is not None and array.dtype.kind == "f" and array.size == 1 and float(array.reshape(-1)[0]) > 0:
            divides = spec.divides
            if divides and index == 0:
                continue
            number = float(array.reshape(-1)[0])
            return Scalar(node, index, 1.0 / number if divides else number, divides), False
    return None, False


def is_shape(node: ir.Node) -> bool:
    return lookup(node.domain, node.op_type).kind == "shape"


# -- folding a factor into what makes Q ------------------------------------------------------------------------------


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
    elif side_labels(trace.values[part]) & wanted:
        walk(fold, part, wanted, trace, facts, model)
    else:
        raise CannotFold


def v_is_constant(value: ir.Value) -> bool:
    return value.producer() is None and value.const_value is not None


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


def mark_projection(fold: Fold, node: ir.Node, wanted: frozenset[int], trace: Trace) -> None:
    spec = lookup(node.domain, node.op_type)
    weights = [node.inputs[k] for k in spec.operands]
    marked = False
    for weight in weights:
        if weight is None or not trace.values[weight].constant:
            continue
        root = weight
        while root.producer() is not None and lookup("", root.producer().op_type).kind == "movement":  # type: ignore[union-attr]
            fold.nodes.add(root.producer())  # type: ignore[arg-type]
            fold.values.add(root)
            root = root.producer().inputs[0]  # type: ignore[union-attr, assignment]
        fold.values.add(root)
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


def merge_folds(plan: ScalePlan, folds: list[Fold]) -> None:
    """Keep the folds that touch nothing else: every user of what they scale lies on the way of an equal fold."""
    good = [f for f in folds if f.constants]
    while True:
        nodes: dict[ir.Node, float] = {}
        for fold in good:
            for node in {*fold.nodes, fold.node}:
                nodes[node] = fold.factor
        bad = [f for f in good if not closed(f, nodes)]
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


def closed(fold: Fold, nodes: Mapping[ir.Node, float]) -> bool:
    values = fold.values | {value for value, _ in fold.constants}
    return all(
        nodes.get(user) == fold.factor or is_shape(user) for value in values for user in value.consumers()
    ) and not any(value.is_graph_output() for value in values)
