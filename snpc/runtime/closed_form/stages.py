"""The stages of layerwise fitting: segments of the graph, and the groups that are fitted in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph import Segment, split_into_segments
from snpc.ops import lookup
from snpc.passes import Analysis
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.weights import WeightEdits, apply_edits, closed_form_kinds, existing_bias
from snpc.planning import SlicePlan
from snpc.runtime.closed_form.fit import ClosedForms
from snpc.runtime.statistics import StatisticRequest, required_statistics, statistic_requests
from snpc.types import ClosedFormKind, Group


class NotSegmentable(Exception):
    """The graph cannot be run in segments. The message is the reason."""


@dataclass(frozen=True)
class ResidualError:
    """The error of the residual stream behind a group's consumer weight.

    ``value`` [..., D]: the residual sum, with rows as in the probe of ``request``. ``width``: D. ``cross`` and
    ``total`` name the outputs of the instrumented model that hold the sums of the error.
    """

    group: Group
    value: str
    width: int
    request: StatisticRequest

    @property
    def cross(self) -> str:
        return f"{self.request.output}_cross"

    @property
    def total(self) -> str:
        return f"{self.request.output}_total"


@dataclass(frozen=True)
class FitStage:
    """A segment of the graph, the groups that are fitted in it, their closed forms and what is measured."""

    segment: Segment
    groups: tuple[Group, ...]
    kinds: dict[str, ClosedFormKind]
    requests: tuple[StatisticRequest, ...]
    residual_errors: tuple[ResidualError, ...]


def groups_to_fit(analysis: Analysis, plan: SlicePlan) -> tuple[list[Group], dict[str, ClosedFormKind]]:
    """(groups, group id -> closed form) that change weights: those of the plan, and the feed-forward groups that the
    plan leaves whole but that can compensate for the loss before them."""
    candidates = [g for g in analysis.groups if g.prunable and (g.id in plan.keep or g.role == "ffn")]
    kinds = closed_form_kinds(analysis.weights, candidates)
    groups = [
        g
        for g in candidates
        if kinds.get(g.id) not in (None, "score_selection") and (g.id in plan.keep or consumers_have_bias(analysis, g))
    ]
    return groups, {g.id: kinds[g.id] for g in groups}


def consumers_have_bias(analysis: Analysis, group: Group) -> bool:
    """Is a bias added behind every node that reads the group?"""
    consumers = analysis.weights[group.id].consumers
    return all(existing_bias(node, consumer.width) is not None for consumer in consumers for node in consumer.nodes)


def add_missing_biases(closed_forms: ClosedForms, plan: SlicePlan) -> TracedGraph:
    """The model in which every consumer weight that will be fitted has a bias (of zeros, if it had none)."""
    analysis, source = closed_forms.analysis, closed_forms.analysis.traced_graph
    groups, kinds = groups_to_fit(analysis, plan)
    consumers = [c for g in groups if kinds[g.id] != "low_rank_qk" for c in analysis.weights[g.id].consumers]
    nodes = [(node, consumer.width) for consumer in consumers for node in consumer.nodes]
    missing = {str(node.name): np.zeros(width) for node, width in nodes if existing_bias(node, width) is None}
    if not missing:
        return source
    return trace_graph(apply_edits(source, WeightEdits({}, dict(missing))), source.dim_sizes, kv_cache=source.kv_cache)


def schedule_stages(analysis: Analysis, base: TracedGraph, plan: SlicePlan) -> list[FitStage]:
    """The segments up to the last one in which a group is fitted. ``base``: the model of ``add_missing_biases``.

    Raises NotSegmentable where a value that crosses a border cannot be passed from one segment to the next.
    """
    groups, kinds = groups_to_fit(analysis, plan)
    position = {str(node.name): index for index, node in enumerate(base.model.graph)}
    sums = residual_sum_of_each(analysis, base, [g for g in groups if kinds[g.id] != "low_rank_qk"], position)
    ends = stage_ends(analysis, groups, sums, position)
    stages = []
    for segment in split_into_segments(base.model, sorted(set(ends.values()))):
        candidates = [g for g in groups if ends[g.id] == segment.last]
        stages.append(stage_of_segment(analysis, base, plan, segment, candidates, sums))
    while stages and not stages[-1].groups:
        stages.pop()
    check_boundary_types(base, [stage.segment for stage in stages])
    return stages


def residual_sum_of_each(
    analysis: Analysis, base: TracedGraph, groups: Sequence[Group], position: Mapping[str, int]
) -> dict[str, ir.Value]:
    """Group id -> where the output of its last consumer has joined the residual stream of ``base``."""
    nodes = list(base.model.graph)
    sums = {}
    for group in groups:
        last = max(position[str(n.name)] for c in analysis.weights[group.id].consumers for n in c.nodes)
        sums[group.id] = residual_sum_after(base, nodes[last].outputs[0])
    return sums


def stage_ends(
    analysis: Analysis, groups: Sequence[Group], sums: Mapping[str, ir.Value], position: Mapping[str, int]
) -> dict[str, int]:
    """Group id -> index of the node in front of which its stage ends: behind its residual sum, or for query and key at
    the first end of another group behind their product."""
    ends: dict[str, int] = {}
    for group in groups:
        if group.id in sums:
            producer = sums[group.id].producer()
            assert producer is not None
            ends[group.id] = position[str(producer.name)] + 1
    for group in groups:
        if group.id not in sums:
            closed = max(position[str(product.node.name)] for product in analysis.weights[group.id].products) + 1
            ends[group.id] = min((end for end in ends.values() if end >= closed), default=closed)
    return ends


def stage_of_segment(
    analysis: Analysis,
    base: TracedGraph,
    plan: SlicePlan,
    segment: Segment,
    candidates: Sequence[Group],
    sums: Mapping[str, ir.Value],
) -> FitStage:
    """The stage of one segment: of the candidates, those that lie inside it and that the plan prunes, or whose consumer
    weight can compensate for a residual error."""
    weights = analysis.weights
    requests = statistic_requests(analysis, {g.id: required_statistics(weights[g.id]) for g in candidates})
    inside = [g for g in candidates if is_inside_segment(base, segment, g, [r for r in requests if r.group is g])]
    errors = [
        error
        for g in inside
        if weights[g.id].kind == "refit"
        for error in residual_errors(analysis, base, g, sums[g.id], requests)
    ]
    fitted = [g for g in inside if g.id in plan.keep or any(error.group is g for error in errors)]
    kinds = closed_form_kinds(weights, fitted)
    chosen = tuple(request for request in requests if request.group.id in kinds)
    return FitStage(segment, tuple(fitted), kinds, chosen, tuple(errors))


def check_boundary_types(base: TracedGraph, segments: Sequence[Segment]) -> None:
    """Raise NotSegmentable where the type of a value that crosses a border is unknown."""
    types = {str(value.name): dtype for value, dtype in base.facts.dtype.items()}
    for name in (name for segment in segments for name in (*segment.inputs, *segment.outputs)):
        if types.get(name) is None:
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


def is_inside_segment(base: TracedGraph, segment: Segment, group: Group, requests: Sequence[StatisticRequest]) -> bool:
    """Do all nodes that use the group's weights, and all its measured activations, lie in the segment?"""
    nodes = list(base.model.graph)[segment.first : segment.last]
    inside = set(nodes)
    users = [node for site in group.sites for node, _ in base.model.graph.initializers[site.tensor].uses()]
    probed = {request.probe.tensor for request in requests}
    produced = {str(value.name) for node in nodes for value in node.outputs}
    produced |= {f"{node.name}.{part}" for node in nodes for part in "qkv"}  # inside a fused attention node
    return inside.issuperset(users) and bool(probed) and probed <= produced


def residual_errors(
    analysis: Analysis, base: TracedGraph, group: Group, value: ir.Value, requests: Sequence[StatisticRequest]
) -> list[ResidualError]:
    """The residual error that the group's one consumer weight can compensate; none where the rows of the residual sum
    ``value`` are not those of the hidden units."""
    of_reader = [r for r in requests if r.group is group and r.key.kind == "gram_joint" and r.key.probe != "normalized"]
    request = next(iter(of_reader), None)
    consumers = analysis.weights[group.id].consumers
    if request is None or len(consumers) != 1 or consumers[0].columns != 1 or len(consumers[0].nodes) != 1:
        return []
    width = consumers[0].width
    shapes = {str(v.name): shape for v, shape in base.facts.shape.items()}
    summed, hidden = shapes.get(str(value.name)), shapes.get(request.probe.tensor)
    if not summed or not hidden or summed[:-1] != hidden[:-1] or summed[-1] != width:
        return []
    unit_axes = [axis for axis, size in enumerate(request.probe.units.shape) if size > 1]
    if unit_axes != [len(hidden) - 1] or hidden[-1] != group.size:
        return []
    return [ResidualError(group, str(value.name), width, request)]
