"""Folds the scale of attention into what makes queries, so that no number multiplies scores, queries or keys.

softmax(s Q K') is softmax((s Q) K'): the weights and the bias that make Q are multiplied by s. TensorRT asks that
queries or keys be scaled before their product, where attention is to become one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph import (
    ScalarFactor,
    ShapeFacts,
    add_constant,
    attribute_values,
    choose_dim_sizes,
    make_node,
    reads_only_shape,
    step_upstream,
    unused_name,
)
from snpc.ops import MUL, lookup
from snpc.passes.fusion import FusionResult
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.propagation import Contraction
from snpc.passes.slicing.attention_scale import (
    ScalePlan,
    merge_linear_paths,
    query_input,
    query_operand,
    scalar_factors_behind,
    score_width_axis,
)
from snpc.passes.slicing.slice import lazy_slice
from snpc.passes.weights import LinearPath, NotLinear, label_set, trace_linear_path


@dataclass(frozen=True)
class ScaledScores:
    """A product of queries and keys, and the numbers around it that a factor on the queries can stand for."""

    contraction: Contraction
    on_query: tuple[ScalarFactor, ...]
    elsewhere: tuple[ScalarFactor, ...]

    @property
    def scalars(self) -> tuple[ScalarFactor, ...]:
        return (*self.on_query, *self.elsewhere)

    @property
    def factor(self) -> float:
        return math.prod(s.factor for s in self.scalars)


class FoldAttentionScale(ir.passes.FunctionalPass):
    """Multiply what makes queries by the scale of their attention; ``count``: attentions that were changed.

    Where no constant can take the factor, queries are multiplied by it, unless that is what the graph does already.
    """

    def call(self, model: ir.Model) -> FusionResult:
        copy = model.clone()
        source = trace_graph(copy, *choose_dim_sizes(copy))
        attentions = [s for c in source.trace.contractions if (s := scaled_scores(c, source.facts)) is not None]
        paths = {s.contraction.node: query_path(s, source) for s in attentions}
        plan = ScalePlan()
        merge_linear_paths(plan, list(paths.values()))
        inserted = {name for name, _ in plan.insert}
        changed = [s for s in attentions if s.elsewhere or str(s.contraction.node.name) not in inserted]
        multiply_constants(copy, plan)
        for attention in changed:
            if str(attention.contraction.node.name) in inserted:
                multiply_query(copy, attention, source.facts)
            for scalar in attention.scalars:
                remove_scalar(copy, scalar)
        copy.graph.sort()
        return FusionResult(copy, bool(changed), len(changed))


# -- finding ---------------------------------------------------------------------------------------------------------


def scaled_scores(contraction: Contraction, facts: ShapeFacts) -> ScaledScores | None:
    """The numbers around a product of queries and keys; None of another product, or where there are none."""
    node = contraction.node
    spec = lookup(node.domain, node.op_type)
    if spec.kind == "attention" or contraction.part or score_width_axis(contraction) is None:
        return None
    if attribute_values(node).get("alpha", 1.0) != 1.0:
        return None
    query = query_input(contraction)
    (key,) = (index for index in spec.operands if index != query)
    scalars = ScaledScores(
        contraction,
        tuple(scalars_of_operand(node, query, facts)),
        tuple(
            s
            for s in (*scalars_of_operand(node, key, facts), *scalar_factors_behind(node, facts))
            if is_removable(s, facts)
        ),
    )
    return scalars if scalars.scalars else None


def scalars_of_operand(node: ir.Node, index: int, facts: ShapeFacts) -> Iterator[ScalarFactor]:
    """Numbers that multiply one operand and nothing else."""
    value = node.inputs[index]
    while value is not None and (producer := value.producer()) is not None:
        users = [user for user in value.consumers() if not reads_only_shape(user)]
        if len(users) != 1 or value.is_graph_output():
            return
        scalar, value = step_upstream(producer, facts)
        if scalar is not None and is_removable(scalar, facts):
            yield scalar


def is_removable(scalar: ScalarFactor, facts: ShapeFacts) -> bool:
    """Can the node be left out? It changes neither shape nor type, and its result is no output."""
    data, out = scalar.node.inputs[1 - scalar.index], scalar.node.outputs[0]
    assert data is not None
    same = facts.shape.get(data) == facts.shape.get(out) and facts.dtype.get(data) == facts.dtype.get(out)
    return same and not out.is_graph_output()


def query_path(attention: ScaledScores, source: TracedGraph) -> LinearPath:
    """The constants that take the factor; none where something on the way is not linear."""
    contraction = attention.contraction
    path = LinearPath(contraction.node, query_input(contraction), attention.factor)
    labels = label_set(contraction.left)
    try:
        trace_linear_path(path, query_operand(contraction), labels, source.trace, source.facts, source.model)
    except NotLinear:
        path.constants.clear()
    return path


# -- writing ---------------------------------------------------------------------------------------------------------


def multiply_constants(model: ir.Model, plan: ScalePlan) -> None:
    for (name, axis), vector in plan.multiply.items():
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        shape = tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type]
        value.const_value = lazy_slice(tensor, {}, shape, name, {axis: vector})


def multiply_query(model: ir.Model, attention: ScaledScores, facts: ShapeFacts) -> None:
    """Insert a product of the queries and the factor, where no constant could take it."""
    node, index = attention.contraction.node, query_input(attention.contraction)
    query = query_operand(attention.contraction)
    dtype = facts.dtype[query]
    assert dtype is not None
    name = unused_name(f"{node.name}_query_scale", {*model.graph.initializers, *(str(n.name) for n in model.graph)})
    number = add_constant(model.graph, np.asarray(attention.factor, dtype.numpy()), name)
    scaled = make_node(MUL, [query, number], name=name)
    model.graph.append(scaled)
    node.replace_input_with(index, scaled.outputs[0])


def remove_scalar(model: ir.Model, scalar: ScalarFactor) -> None:
    data = scalar.node.inputs[1 - scalar.index]
    assert data is not None
    scalar.node.outputs[0].replace_all_uses_with(data)
    model.graph.remove(scalar.node, safe=True)
