"""The stages of layer-wise fitting: residual sums whose error a weight in front can compensate, and the segments
between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph import Segment, ShapeFacts, split_into_segments
from snpc.ops import lookup
from snpc.passes import Analysis
from snpc.passes.grouping import TracedGraph
from snpc.passes.weights import closed_form_kinds, existing_bias
from snpc.types import Group, IntArray, Probe


class NotSegmentable(Exception):
    """The graph cannot be run in segments. The message is the reason."""


@dataclass(frozen=True)
class ResidualError:
    """The error of the residual stream that the consumer weight of ``group`` can compensate.

    ``value`` [..., D]: the residual sum behind the weight. ``width``: D. ``probe``: the hidden units that the weight
    reads [..., blocks * size * columns], with rows as in ``value``.
    """

    group: Group
    value: str
    width: int
    probe: Probe


@dataclass(frozen=True)
class FitStage:
    """A segment of the cut graph that ends with ``summed``, the residual sum whose ``error`` is compensated there."""

    segment: Segment
    error: ResidualError
    summed: str


def compensable_groups(analysis: Analysis, groups: Iterable[Group]) -> list[Group]:
    """Of the groups that are pruned, and the feed-forward groups that are not, those whose consumer weight can
    compensate for an error of the residual stream; attention outputs where layers or tokens are gone
    (docs/design-notes.md)."""
    chosen = {g.id for g in groups}
    if not follows_dense_stream(analysis):
        candidates = [g for g in analysis.groups if g.prunable and (g.id in chosen or g.role == "ffn")]
        kinds = closed_form_kinds(analysis.weights, candidates)
        refitted = [g for g in candidates if kinds.get(g.id) == "refit"]
        return [g for g in refitted if g.id in chosen or consumers_have_bias(analysis, g)]
    candidates = [g for g in analysis.groups if g.prunable and (g.id in chosen or g.role in ("ffn", "vo"))]
    kinds = closed_form_kinds(analysis.weights, candidates)  # the error is worth a bias that was not there
    return [g for g in candidates if kinds.get(g.id) in ("refit", "low_rank_vo")]


def follows_dense_stream(analysis: Analysis) -> bool:
    """Is more gone than widths, layers or tokens, so that the dense model's stream is another one?"""
    return analysis.removal is not None or analysis.reduction is not None


def consumers_have_bias(analysis: Analysis, group: Group) -> bool:
    """Is a bias added behind every node that reads the group?"""
    consumers = analysis.weights[group.id].consumers
    return all(existing_bias(node, consumer.width) is not None for consumer in consumers for node in consumer.nodes)


def residual_errors(analysis: Analysis, groups: Iterable[Group]) -> list[ResidualError]:
    """One per residual sum, in the order of the graph; where several weights end in one sum, that of the widest group.
    ``groups``: those that are pruned."""
    position = {
        str(value.name): index for index, node in enumerate(analysis.traced_graph.model.graph) for value in node.outputs
    }
    found: dict[str, ResidualError] = {}
    pruned = list(groups)
    for group in compensable_groups(analysis, pruned):
        error = residual_error(analysis, group) if not read_beside(analysis, group, pruned) else None
        if error is not None and not is_measurable(analysis, error):
            continue
        if error is not None and (error.value not in found or found[error.value].group.size < group.size):
            found[error.value] = error
    return sorted(found.values(), key=lambda error: position[error.value])


def read_beside(analysis: Analysis, group: Group, pruned: Iterable[Group]) -> bool:
    """Do other groups that are pruned cut what the consumers of the group read, as whole heads do beside the values in
    them? Then the columns that stay are not those of its units alone."""
    read = {(c.weight_slice.tensor, c.weight_slice.axis) for c in analysis.weights[group.id].consumers}
    others = (site for other in pruned if other.id != group.id for site in other.sites)
    return any((site.tensor, site.axis) in read for site in others)


def is_measurable(analysis: Analysis, error: ResidualError) -> bool:
    """Has the dense model the same rows there? Without the last attention, a classifier computes its class token only
    in front of it too."""
    if analysis.removal is None:
        return True
    source = analysis.removal.source
    shapes = [graph.facts.shapes_by_name for graph in (source, analysis.traced_graph)]
    return shapes[0].get(analysis.removal.stands_for(error.value).summed) == shapes[1].get(error.value)


def residual_error_values(analysis: Analysis, groups: Iterable[Group]) -> tuple[str, ...]:
    """Names of the residual sums at which the layer-wise fit of these groups may read the dense model."""
    return tuple(error.value for error in residual_errors(analysis, groups))


def residual_error(analysis: Analysis, group: Group) -> ResidualError | None:
    """The error that the group's one consumer weight can compensate. None where the weight is used more than once, or
    where the rows of the residual sum are not those of the hidden units."""
    graph, weights = analysis.traced_graph, analysis.weights[group.id]
    consumers = weights.consumers
    if len(consumers) != 1 or consumers[0].taps != 1 or len(consumers[0].nodes) != 1:
        return None
    if not follows_dense_stream(analysis) and consumers[0].columns != 1:  # whole heads, see ``compensable_groups``
        return None
    (consumer,), (node,) = consumers, consumers[0].nodes
    if len(list(graph.model.graph.initializers[consumer.weight_slice.tensor].uses())) != 1:
        return None
    probe, summed = weights.uses[0][0].probe, residual_sum_after(graph, node.outputs[0])
    shapes = graph.facts.shapes_by_name
    total, hidden = shapes.get(str(summed.name)), shapes.get(probe.tensor)
    if not total or not hidden or total[:-1] != hidden[:-1] or total[-1] != consumer.width:
        return None
    unit_axes = [axis for axis, size in enumerate(probe.units.shape) if size > 1]
    if unit_axes != [len(hidden) - 1] or hidden[-1] != group.size * group.blocks * consumer.columns:
        return None
    return ResidualError(group, str(summed.name), consumer.width, probe)


def fitted_sums(analysis: Analysis, base: TracedGraph, errors: Sequence[ResidualError]) -> list[str]:
    """Names of the residual sums of ``errors`` in the model ``base``, where a bias may have been added in front."""
    nodes = {node.name: node for node in base.model.graph}
    consumers = [analysis.weights[error.group.id].consumers[0] for error in errors]
    return [str(residual_sum_after(base, nodes[c.node.name].outputs[0]).name) for c in consumers]


def schedule_stages(
    cut: ir.Model, facts: ShapeFacts, errors: Sequence[ResidualError], sums: Sequence[str]
) -> list[FitStage]:
    """The segments of the ``cut`` graph up to its last residual error. ``facts`` know the types of its values; ``sums``
    are the names of its residual sums, one per error.

    Raises NotSegmentable where a value that crosses a border cannot be passed from one segment to the next.
    """
    position = {str(value.name): index for index, node in enumerate(cut.graph) for value in node.outputs}
    if any(name not in position for name in sums):
        raise NotSegmentable("the cut graph computes its residual sums otherwise")
    ends = {position[name] + 1: (error, name) for error, name in zip(errors, sums, strict=True)}
    segments = split_into_segments(cut, sorted(ends))
    stages = [FitStage(segment, *ends[segment.last]) for segment in segments if segment.last in ends]
    check_boundary_types(facts, [stage.segment for stage in stages])
    return stages


def check_boundary_types(facts: ShapeFacts, segments: Sequence[Segment]) -> None:
    """Raise NotSegmentable where the type of a value that crosses a border is unknown."""
    types = facts.types_by_name
    for name in (name for segment in segments for name in (*segment.inputs, *segment.outputs)):
        if name not in types:
            raise NotSegmentable(f"the type of {name} is not known")


def residual_sum_after(base: TracedGraph, value: ir.Value) -> ir.Value:
    """The sum in which a consumer's output joins another activation; its own output (with bias) where it joins none."""
    shape = base.facts.shape.get(value)
    while True:
        consumers = list(value.consumers())
        if len(consumers) != 1 or value.is_graph_output():
            return value
        node = consumers[0]
        spec = lookup(node.domain, node.op_type)
        if spec.effect != "add" or spec.subtracts or base.facts.shape.get(node.outputs[0]) != shape:
            return value
        value = node.outputs[0]
        activations = [v for v in node.inputs if v is not None and v.const_value is None]
        if len(activations) > 1:
            return value


def residual_sums(analysis: Analysis, group: Group) -> list[ir.Value]:
    """The values in which the group's contribution has joined the other activations, one per node that reads the group.
    None where one of its consumer weights has an unsupported form."""
    nodes = [node for consumer in analysis.weights[group.id].consumers for node in consumer.nodes]
    return [residual_sum_after(analysis.traced_graph, node.outputs[0]) for node in nodes]


def residual_values(analysis: Analysis) -> tuple[str, ...]:
    """Names of the values behind each attention and feed-forward layer, where it has joined the residual stream; in the
    order of the graph. A pruned file has them under the same names, and as wide unless the stream itself was cut."""
    base = analysis.traced_graph
    kinds = closed_form_kinds(analysis.weights, [g for g in analysis.groups if g.prunable])
    groups = [g for g in analysis.groups if kinds.get(g.id) in ("low_rank_vo", "refit")]
    names = {str(value.name) for g in groups for value in residual_sums(analysis, g)}
    return tuple(str(v.name) for node in base.model.graph for v in node.outputs if v.name in names)


def kept_columns(error: ResidualError, rows: Sequence[Sequence[int]] | None) -> IntArray:
    """The positions of the hidden value that stay, ascending; ``rows``: the units of each block that do, None: all."""
    units, group = error.probe.units.reshape(-1), error.group
    if rows is None:
        return np.arange(len(units))
    kept = [block * group.size + unit for block, row in enumerate(rows) for unit in row]
    return np.flatnonzero(np.isin(units, kept))
