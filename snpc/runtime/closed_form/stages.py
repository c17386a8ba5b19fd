"""Which groups are fitted in which segment of the graph, when a model is fitted layer after layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph.subgraph import Segment, split_into_segments
from snpc.ops import lookup
from snpc.passes.analyze import Analysis
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.weights.closed_form_kinds import closed_form_kinds
from snpc.passes.weights.edits import WeightEdits, apply_edits, existing_bias
from snpc.planning.plan import SlicePlan
from snpc.runtime.closed_form.fit import ClosedForms
from snpc.runtime.statistics.measure import StatisticRequest, statistic_requests
from snpc.runtime.statistics.moments import required_statistics
from snpc.types import ClosedFormKind, Group


class NotSegmentable(Exception):
    """The graph cannot be run in segments; the reason is the message."""


@dataclass(frozen=True)
class ResidualError:
    """Where the reader of hidden units meets the residual stream: ``value`` [..., D], rows as in ``wanted``'s probe.
    ``cross`` and ``total`` name the outputs in which its sums come."""

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
    """A segment, the groups that are fitted in it, and what is measured for them."""

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
    """The segments up to the last one in which something is fitted. ``base`` is the model ``add_missing_biases``.

    Raises NotSequential where a value that crosses a border cannot be handed from one segment to the next.
    """
    groups, kinds = groups_to_fit(analysis, plan)
    position = {str(node.name): k for k, node in enumerate(base.model.graph)}
    nodes = list(base.model.graph)
    meets: dict[str, ir.Value] = {}
    ends: dict[str, int] = {}
    for group in groups:
        if kinds[group.id] != "low_rank_qk":
            last = max(position[str(n.name)] for c in analysis.weights[group.id].consumers for n in c.nodes)
            value = residual_sum_after(base, nodes[last].outputs[0])
            meets[group.id] = value
            ends[group.id] = position[str(value.producer().name)] + 1  # type: ignore[union-attr]
    for group in groups:
        if kinds[group.id] == "low_rank_qk":
            closed = max(position[str(p.node.name)] for p in analysis.weights[group.id].products) + 1
            ends[group.id] = min((end for end in ends.values() if end >= closed), default=closed)
    found = []
    for segment in split_into_segments(base.model, sorted(set(ends.values()))):
        mine = [g for g in groups if ends[g.id] == segment.last]
        wanted = statistic_requests(analysis, {g.id: required_statistics(analysis.weights[g.id]) for g in mine})
        inside = [g for g in mine if is_inside_segment(base, segment, position, g, [w for w in wanted if w.group is g])]
        gaps = [
            gap
            for g in inside
            if kinds[g.id] == "refit"
            for gap in residual_errors(analysis, base, g, meets[g.id], wanted)
        ]
        chosen = {g.id: kinds[g.id] for g in inside if g.id in plan.keep or any(gap.group is g for gap in gaps)}
        kept = tuple(g for g in inside if g.id in chosen)
        found.append(FitStage(segment, kept, chosen, tuple(w for w in wanted if w.group.id in chosen), tuple(gaps)))
    while found and not found[-1].groups:
        found.pop()
    check_boundary_types(base, [stage.segment for stage in found])
    return found


def check_boundary_types(base: TracedGraph, found: Sequence[Segment]) -> None:
    types = {str(v.name): dtype for v, dtype in base.facts.dtype.items()}
    for name in (name for segment in found for name in (*segment.inputs, *segment.outputs)):
        if types.get(name) is None:
            raise NotSegmentable(f"the type of {name} is not known")


def residual_sum_after(base: TracedGraph, value: ir.Value) -> ir.Value:
    """The sum in which a reader's output meets another activation; its own (biased) output where it does not."""
    shape = base.facts.shape.get(value)
    while True:
        users = list(value.consumers())
        if len(users) != 1 or value.is_graph_output():
            return value
        spec = lookup(users[0].domain, users[0].op_type)
        after = users[0].outputs[0]
        if spec.effect != "add" or spec.subtracts or base.facts.shape.get(after) != shape:
            return value
        value = after
        others = [v for v in users[0].inputs if v is not None and v.const_value is None]
        if len(others) > 1:
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


def is_inside_segment(
    base: TracedGraph, segment: Segment, position: dict[str, int], group: Group, wanted: Sequence[StatisticRequest]
) -> bool:
    """Does all that makes, reads and shows the group lie in the segment?"""
    constants = [base.model.graph.initializers[site.tensor] for site in group.sites]
    users = [position.get(str(node.name), -1) for value in constants for node, _ in value.uses()]
    shown = {w.probe.tensor for w in wanted}
    nodes = list(base.model.graph)[segment.first : segment.last]
    made = {str(v.name) for node in nodes for v in node.outputs}
    made |= {f"{node.name}.{part}" for node in nodes for part in "qkv"}  # what a fused node makes inside
    return all(segment.first <= k < segment.last for k in users) and bool(shown) and shown <= made


def residual_errors(
    analysis: Analysis, base: TracedGraph, group: Group, value: ir.Value, wanted: Sequence[StatisticRequest]
) -> list[ResidualError]:
    """The group's gap, where its rows are those of the hidden units; else nothing."""
    probe = next((w for w in wanted if w.group is group and w.key.kind == "gram_joint"), None)
    consumers = analysis.weights[group.id].consumers
    if len(consumers) != 1 or consumers[0].columns != 1 or len(consumers[0].nodes) != 1:
        return []
    width = consumers[0].width
    shapes = {str(v.name): shape for v, shape in base.facts.shape.items()}
    behind, hidden = shapes.get(str(value.name)), shapes.get(probe.probe.tensor) if probe else None
    if probe is None or not behind or not hidden or behind[:-1] != hidden[:-1] or behind[-1] != width:
        return []
    varies = [k for k, size in enumerate(probe.probe.units.shape) if size > 1]
    if varies != [len(hidden) - 1] or hidden[-1] != group.size:
        return []
    return [ResidualError(group, str(value.name), width, probe)]
