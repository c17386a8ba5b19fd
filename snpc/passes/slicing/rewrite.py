"""The whole rewrite: unpack where widths would differ, keep the attention scale, slice, and check what came out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph.shapes import ShapeFacts
from snpc.ops.names import MUL
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.propagation.removal import RemovedUnits, SlicedShape
from snpc.passes.slicing.attention_scale import ScalePlan, plan_scales
from snpc.passes.slicing.shape_parameters import ShapeParameterEditor
from snpc.passes.slicing.slice import (
    Cuts,
    SlicedModel,
    changed_scalars,
    find_removed_units,
    holds_at_other_sizes,
    set_attributes,
    slice_model,
    sliced_shapes,
)
from snpc.passes.slicing.split_packed import non_rectangular_values, split_packed


@dataclass(frozen=True)
class RewrittenModel:
    """The shrunk model; ``source`` is what was sliced (unpacked where need be), ``dead`` what went from it."""

    model: ir.Model
    source: TracedGraph
    removed: RemovedUnits

    def sliced_interface(self) -> dict[str, SlicedShape]:
        """How the inputs and outputs that became narrower shrink, by name."""
        graph = self.source.model.graph
        return sliced_shapes(self.source.trace, (*graph.inputs, *graph.outputs), self.removed)


def rewrite_model(source: TracedGraph, cuts: Cuts) -> RewrittenModel:
    """Remove the positions that ``cuts`` names by (constant, axis), and all that goes with them."""
    for _ in range(4):
        dead = find_removed_units(source.trace, source.units, cuts)
        ragged = non_rectangular_values(source.trace, dead)
        if not ragged:
            break
        unpacked = split_packed(source.model, source.facts, source.trace, ragged, source.dim_sizes)
        source = trace_graph(unpacked, source.dim_sizes, kv_cache=source.kv_cache)
    else:
        raise CheckFailed(f"{ragged[0].name}: its blocks would keep different widths; use --uniform")
    plan = plan_scales(source.model, source.facts, source.trace, dead)
    sliced = slice_model(source.model, source.facts, source.trace, dead, source.dim_sizes, plan.multiply)
    if not holds_at_other_sizes(source.model, sliced, source.facts, source.trace, source.dim_sizes):
        sliced = slice_model(
            source.model, source.facts, source.trace, dead, source.dim_sizes, plan.multiply, frozen=True
        )
        if not holds_at_other_sizes(source.model, sliced, source.facts, source.trace, source.dim_sizes):
            raise CheckFailed(
                "a size that the cut changes is divided, which would be wrong at other sizes of the inputs"
            )
    apply_scales(source, sliced, plan)
    sliced.model.graph.sort()
    return RewrittenModel(sliced.model, source, dead)


def apply_scales(source: TracedGraph, sliced: SlicedModel, plan: ScalePlan) -> None:
    """Write the planned scales; any other number that changed because a shape did goes back to what it was."""
    copy = sliced.model
    repairs = ShapeParameterEditor(copy, source.model, source.facts, sliced.facts, source.dim_sizes)
    nodes = {str(n.name): n for n in copy.graph}
    wanted = dict(plan.scalars)
    for node, index, before, _ in changed_scalars(source.model, source.facts, sliced.facts, copy):
        wanted.setdefault((str(node.name), index), before)
    for (name, index), number in wanted.items():
        set_scalar(repairs, sliced.facts, nodes[name], index, number)
    for (name, attribute), number in plan.attributes.items():
        set_attributes(nodes[name], {attribute: float(number)})
    for (name, index), factor in plan.insert.items():
        node = nodes[name]
        value = node.inputs[index]
        assert value is not None
        kind = sliced.facts.dtype[value]
        assert kind is not None
        scale = repairs.constant(np.asarray(factor, kind.numpy()), f"{name}_scale")
        node.replace_input_with(
            index, repairs.insert(node, MUL, [value, scale], repairs.unused_name(f"{name}_rescale"))
        )


def set_scalar(repairs: ShapeParameterEditor, facts: ShapeFacts, node: ir.Node, index: int, number: float) -> None:
    value = node.inputs[index]
    assert value is not None
    now = facts.value[value]
    if abs(float(now.reshape(-1)[0]) - number) > 1e-6 * abs(number):
        constant = np.full(now.shape, number, now.dtype)
        node.replace_input_with(index, repairs.constant(constant, f"{node.outputs[0].name}_{index}"))
