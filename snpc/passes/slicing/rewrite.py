"""The rewrite: split packed projections where widths would differ, slice, keep attention scales, check the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph import GraphPass, PassObserver, ShapeFacts
from snpc.ops import MUL
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.propagation import RemovedUnits, SlicedShape, slice_shape
from snpc.passes.slicing.attention_scale import ScalePlan, plan_scales
from snpc.passes.slicing.mask import mask_model
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
from snpc.types import IntArray

MAX_SPLITS = 4  # splitting one packed value can leave another that is packed


@dataclass(frozen=True)
class RewrittenModel:
    """The sliced model. ``source``: the graph that was sliced, packed projections split where need be.

    ``rounded``: of a model that is written quantized, what its constants stand for, at their full size, where that
    differs from those of ``source``; None of any other. ``as_stored``: how many other quantized constants it has.
    """

    model: ir.Model
    source: TracedGraph
    removed: RemovedUnits
    rounded: Mapping[str, ir.TensorProtocol] | None = None
    as_stored: int = 0

    def masked(self) -> ir.Model:
        """The masked model that the sliced one must equal."""
        return mask_model(self.source.model, self.source.trace, self.removed, self.rounded)

    def kept_positions(self) -> dict[str, Mapping[int, IntArray]]:
        """Axis -> positions that stay, of the constants of ``model`` that were cut."""
        trace = self.source.trace
        constants = {name: trace.values.get(v) for name, v in self.source.model.graph.initializers.items()}
        sliced = {n: slice_shape(v.shape, v.factors, self.removed) for n, v in constants.items() if v is not None}
        return {name: shape.keep for name, shape in sliced.items() if shape.keep}

    def sliced_interface(self) -> dict[str, SlicedShape]:
        """How the inputs and outputs that became narrower shrink, by name."""
        graph = self.source.model.graph
        return sliced_shapes(self.source.trace, (*graph.inputs, *graph.outputs), self.removed)


@dataclass(frozen=True)
class RewriteState:
    """What the steps of a rewrite hand on: the graph that is sliced, what is removed, and (once sliced) the result."""

    source: TracedGraph
    cuts: Cuts
    removed: RemovedUnits
    keep_scales: bool = False
    scales: ScalePlan | None = None
    sliced: SlicedModel | None = None

    @property
    def model(self) -> ir.Model:
        return self.source.model if self.sliced is None else self.sliced.model


def rewrite_model(
    source: TracedGraph, cuts: Cuts, observer: PassObserver | None = None, *, keep_scales: bool = False
) -> RewrittenModel:
    """Remove the positions that ``cuts`` names by (constant, axis), and all that goes with them. ``keep_scales``: the
    scale of attention stays that of the full width, where a constant would have to be multiplied for another one."""
    state = RewriteState(source, cuts, find_removed_units(source.trace, source.units, cuts), keep_scales)
    for step in REWRITE_PASSES:
        state = step.run(state)
        if observer is not None:
            observer(step.name, state.model)
    return RewrittenModel(state.model, state.source, state.removed)


def split_packed_projections(state: RewriteState) -> RewriteState:
    """Split values whose parts would keep different widths, and trace the graph again."""
    source, removed = state.source, state.removed
    for _ in range(MAX_SPLITS):
        ragged = non_rectangular_values(source.trace, removed)
        if not ragged:
            return replace(state, source=source, removed=removed)
        model = split_packed(source.model, source.facts, source.trace, ragged, source.dim_sizes)
        source = trace_graph(model, source.dim_sizes, kv_cache=source.kv_cache)
        removed = find_removed_units(source.trace, source.units, state.cuts)
    raise CheckFailed(f"{ragged[0].name}: its blocks would keep different widths; use --uniform")


def slice_units(state: RewriteState) -> RewriteState:
    """Slice every constant; where a size that changes is divided, the quotient of before the cut may be needed."""
    source, removed = state.source, state.removed
    scales = plan_scales(source.model, source.facts, source.trace, removed, state.keep_scales)
    for freeze_dividends in (False, True):
        sliced = slice_model(
            source.model, source.facts, source.trace, removed, source.dim_sizes, scales.multiply, freeze_dividends
        )
        if holds_at_other_sizes(source.model, sliced, source.facts, source.trace, source.dim_sizes):
            return replace(state, scales=scales, sliced=sliced)
    raise CheckFailed("a size that the cut changes is divided, which would be wrong at other sizes of the inputs")


def restore_attention_scales(state: RewriteState) -> RewriteState:
    """Write the planned scales into the sliced model."""
    assert state.sliced is not None and state.scales is not None
    apply_scales(state.source, state.sliced, state.scales)
    return state


def sort_sliced_nodes(state: RewriteState) -> RewriteState:
    state.model.graph.sort()
    return state


REWRITE_PASSES = (
    GraphPass(
        "split-packed-projections",
        "rewrite",
        split_packed_projections,
        "splits a packed projection whose parts would keep different widths",
        "before slicing: a tensor has one width per axis",
    ),
    GraphPass(
        "slice",
        "rewrite",
        slice_units,
        "removes units from every constant and recomputes the parameters that spell a size",
        "needs a graph in which every value stays rectangular",
    ),
    GraphPass(
        "restore-attention-scales",
        "rewrite",
        restore_attention_scales,
        "writes the attention scales of the new widths, and restores other numbers that a shape has changed",
        "after slicing, which tells which numbers have changed",
    ),
    GraphPass(
        "sort-sliced-nodes",
        "rewrite",
        sort_sliced_nodes,
        "puts nodes into topological order",
        "after the passes that add nodes",
    ),
)


def apply_scales(source: TracedGraph, sliced: SlicedModel, plan: ScalePlan) -> None:
    """Write the planned scales. Any other number that changed because a shape did gets its old value back."""
    copy = sliced.model
    editor = ShapeParameterEditor(copy, source.model, source.facts, sliced.facts, source.dim_sizes)
    nodes = {str(n.name): n for n in copy.graph}
    numbers = dict(plan.scalars)
    for node, index, before, _ in changed_scalars(source.model, source.facts, sliced.facts, copy):
        numbers.setdefault((str(node.name), index), before)
    for (name, index), number in numbers.items():
        set_scalar(editor, sliced.facts, nodes[name], index, number)
    for (name, attribute), number in plan.attributes.items():
        set_attributes(nodes[name], {attribute: float(number)})
    for (name, index), factor in plan.insert.items():
        node = nodes[name]
        value = node.inputs[index]
        assert value is not None
        dtype = sliced.facts.dtype[value]
        assert dtype is not None
        scale = editor.constant(np.asarray(factor, dtype.numpy()), f"{name}_scale")
        node.replace_input_with(
            index, editor.insert(node, MUL, [value, scale], editor.unused_node_name(f"{name}_rescale"))
        )


def set_scalar(editor: ShapeParameterEditor, facts: ShapeFacts, node: ir.Node, index: int, number: float) -> None:
    value = node.inputs[index]
    assert value is not None
    current = facts.value[value]
    if abs(float(current.reshape(-1)[0]) - number) > 1e-6 * abs(number):
        constant = np.full(current.shape, number, current.dtype)
        node.replace_input_with(index, editor.constant(constant, f"{node.outputs[0].name}_{index}"))
