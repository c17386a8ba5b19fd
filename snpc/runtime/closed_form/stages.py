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
from snpc.passes.weights.attention_operands import score_products
from snpc.passes.weights.closed_form_kinds import closed_form_kinds
from snpc.passes.weights.consumers import consumer_weights
from snpc.passes.weights.edits import WeightEdits, apply_edits, existing_bias
from snpc.planning.plan import SlicePlan
from snpc.runtime.closed_form.fit import ClosedForms
from snpc.runtime.statistics.measure import StatisticRequest, statistic_requests
from snpc.runtime.statistics.moments import required_statistics
from snpc.types import Group


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
    forms: dict[str, str]
    requests: tuple[StatisticRequest, ...]
    residual_errors: tuple[ResidualError, ...]


def groups_to_fit(analysis: Analysis, plan: SlicePlan) -> tuple[list[Group], dict[str, str]]:
    """Groups of the plan that have a closed form, and the feed-forward groups that are not cut but can make up."""
    wanted = [g for g in analysis.groups if g.prunable and (g.id in plan.keep or g.role == "ffn")]
    forms, _ = closed_form_kinds(analysis, wanted)
    found = [
        g
        for g in wanted
        if forms.get(g.id) not in (None, "coupled")
        and (g.id in plan.keep or consumers_have_bias(analysis.traced_graph, g))
    ]
    return found, {g.id: forms[g.id] for g in found}


def consumers_have_bias(source: TracedGraph, group: Group) -> bool:
    return all(existing_bias(node, r.width) is not None for r in consumer_weights(source, group) for node in r.nodes)


def add_missing_biases(compression: ClosedForms, plan: SlicePlan) -> TracedGraph:
    """The model in which every reader that will be fitted has a bias (of zeros, if it had none)."""
    source = compression.analysis.traced_graph
    groups, forms = groups_to_fit(compression.analysis, plan)
    readers = [reader for g in groups if forms[g.id] != "scores" for reader in consumer_weights(source, g)]
    nodes = [(node, reader.width) for reader in readers for node in reader.nodes]
    missing = {str(node.name): np.zeros(width) for node, width in nodes if existing_bias(node, width) is None}
    if not missing:
        return source
    return trace_graph(apply_edits(source, WeightEdits({}, dict(missing))), source.dim_sizes, kv_cache=source.kv_cache)


def schedule_stages(analysis: Analysis, base: TracedGraph, plan: SlicePlan) -> list[FitStage]:
    """The segments up to the last one in which something is fitted. ``base`` is the model ``add_missing_biases``.

    Raises NotSequential where a value that crosses a border cannot be handed from one segment to the next.
    """
    groups, forms = groups_to_fit(analysis, plan)
    position = {str(node.name): k for k, node in enumerate(base.model.graph)}
    nodes = list(base.model.graph)
    meets: dict[str, ir.Value] = {}
    ends: dict[str, int] = {}
    for group in groups:
        if forms[group.id] != "scores":
            last = max(position[str(n.name)] for r in consumer_weights(analysis.traced_graph, group) for n in r.nodes)
            value = residual_sum_after(base, nodes[last].outputs[0])
            meets[group.id] = value
            ends[group.id] = position[str(value.producer().name)] + 1  # type: ignore[union-attr]
    for group in groups:
        if forms[group.id] == "scores":
            closed = max(position[str(c.node.name)] for c in score_products(analysis.traced_graph, group)) + 1
            ends[group.id] = min((end for end in ends.values() if end >= closed), default=closed)
    found = []
    for segment in split_into_segments(base.model, sorted(set(ends.values()))):
        mine = [g for g in groups if ends[g.id] == segment.last]
        wanted = statistic_requests(analysis, {g.id: required_statistics(analysis, g, forms[g.id]) for g in mine})
        inside = [g for g in mine if is_inside_segment(base, segment, position, g, [w for w in wanted if w.group is g])]
        gaps = [gap for g in inside if forms[g.id] == "refit" for gap in residual_errors(base, g, meets[g.id], wanted)]
        chosen = {g.id: forms[g.id] for g in inside if g.id in plan.keep or any(gap.group is g for gap in gaps)}
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


def residual_sums(base: TracedGraph, group: Group) -> list[ir.Value]:
    """Where what the group does has joined the other activations, for every use of every weight that reads it. Raises
    NoPlace where one has not the form that can be refitted."""
    nodes = [node for reader in consumer_weights(base, group) for node in reader.nodes]
    return [residual_sum_after(base, node.outputs[0]) for node in nodes]


def residual_values(analysis: Analysis) -> tuple[str, ...]:
    """Names of the values behind each attention and feed-forward layer, where it has joined the residual stream; in the
    order of the graph. A pruned file has them under the same names, and as wide unless the stream itself was cut."""
    base = analysis.traced_graph
    forms, _ = closed_form_kinds(analysis, [g for g in analysis.groups if g.prunable])
    fitted = [g for g in analysis.groups if forms.get(g.id, "scores") not in ("scores", "coupled")]
    found = {str(value.name) for g in fitted for value in residual_sums(base, g)}
    return tuple(str(v.name) for node in base.model.graph for v in node.outputs if v.name in found)


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
    base: TracedGraph, group: Group, value: ir.Value, wanted: Sequence[StatisticRequest]
) -> list[ResidualError]:
    """The group's gap, where its rows are those of the hidden units; else nothing."""
    probe = next((w for w in wanted if w.group is group and w.kind == "joint"), None)
    found = consumer_weights(base, group)
    if len(found) != 1 or found[0].columns != 1 or len(found[0].nodes) != 1:
        return []
    width = found[0].width
    shapes = {str(v.name): shape for v, shape in base.facts.shape.items()}
    behind, hidden = shapes.get(str(value.name)), shapes.get(probe.probe.tensor) if probe else None
    if probe is None or not behind or not hidden or behind[:-1] != hidden[:-1] or behind[-1] != width:
        return []
    varies = [k for k, size in enumerate(probe.probe.units.shape) if size > 1]
    if varies != [len(hidden) - 1] or hidden[-1] != group.size:
        return []
    return [ResidualError(group, str(value.name), width, probe)]
