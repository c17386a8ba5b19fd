"""model -> analysis: groups, pins, cost. See docs/how-it-works.md for the picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir

from snpc.graph.cost import contraction_sizes, count_macs
from snpc.graph.pass_manager import PassObserver, run_pass
from snpc.graph.shapes import ShapeFacts, choose_dim_sizes, infer_graph, opset_version, weight_bytes
from snpc.passes.canonicalization.eliminate_dead_rows import ELIMINATE_DEAD_ROWS
from snpc.passes.grouping.drafts import GroupDraft, draft_groups, is_approximate
from snpc.passes.grouping.groups import build_groups
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.propagation.labels import LabelFlag
from snpc.passes.token_analysis.reduction_points import NO_TOKENS, TokenFacts, TokenReduction, find_reduction_points
from snpc.passes.weights.closed_form_kinds import GroupWeights, LazyGroupWeights
from snpc.types import Cost, Group, Model, Pin

QUOTED_LENGTHS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Analysis:
    """What snpc found in a model. ``binding`` is what MACs are quoted at; ``trace_graph`` is the passes' own
    material."""

    model: Model
    groups: tuple[Group, ...]
    pins: tuple[Pin, ...]
    cost: Cost
    dim_sizes: Mapping[str, int]
    traced_graph: TracedGraph = field(repr=False)
    dead_macs: int = 0
    """MACs that are spared whatever the widths: for rows that no output depends on (see ``passes.rows``), and for
    tokens that go; ``trace_graph`` does without them."""
    tokens: TokenFacts = field(default=NO_TOKENS, repr=False)
    reduction: TokenReduction | None = None
    """How tokens are reduced, where they are: ``trace_graph`` is then told by inputs which go (``snpc.tokens``)."""

    @property
    def name(self) -> str:
        """The model, in words."""
        tokens = f" with tokens {self.reduction.spec}" if self.reduction is not None else ""
        return f"{self.model.path.name}{tokens}"

    @property
    def digest(self) -> str:
        """Of all that is measured of it: the file's contents, and how tokens are reduced."""
        if self.reduction is None:
            return self.model.digest
        told = json.dumps(self.reduction.to_json(), sort_keys=True)
        return hashlib.sha256(f"{self.model.digest} {told}".encode()).hexdigest()

    @cached_property
    def weights(self) -> Mapping[str, GroupWeights]:
        """Group id -> the weights that produce and consume its units, and its closed form. Computed once per group."""
        return LazyGroupWeights(self.traced_graph, self.groups)

    def group(self, name: str) -> Group:
        return next(g for g in self.groups if g.id == name)


def analyze(
    model: Model,
    sizes: Mapping[str, int] | None = None,
    *,
    prune_kv_cache: bool = False,
    observer: PassObserver | None = None,
) -> Analysis:
    """Find everything that can be made narrower in ``model`` and why the rest cannot.

    ``sizes`` binds dynamic dimensions by name (``{"batch": 1, "sequence": 384}``) for the quoted MACs.
    ``prune_kv_cache`` lets caches of keys and values become narrower, past inputs and present outputs alike.
    ``observer`` is called after each graph pass.
    """
    binding, facts = choose_dim_sizes(model.graph)
    quoted, cost_facts = quoted_facts(model.graph, binding, facts, sizes or {})
    cost = cost_of(model.graph, cost_facts)
    tokens = find_reduction_points(model.graph, facts, binding)
    return analyze_graph(
        model,
        model.graph,
        (binding, facts),
        (quoted, cost_facts),
        cost,
        tokens=tokens,
        kv_cache=prune_kv_cache,
        observer=observer,
    )


def analyze_graph(
    model: Model,
    graph: ir.Model,
    bound: tuple[Mapping[str, int], ShapeFacts],
    quoted: tuple[Mapping[str, int], ShapeFacts],
    cost: Cost,
    *,
    tokens: TokenFacts = NO_TOKENS,
    reduction: TokenReduction | None = None,
    extra_macs: int = 0,
    kv_cache: bool = False,
    observer: PassObserver | None = None,
) -> Analysis:
    """The analysis of ``graph``, which is that of ``model`` or what became of it. ``bound`` and ``quoted``: sizes of
    dynamic dimensions with the graph's facts there; ``cost``: the model's; ``extra_macs``: what ``reduction`` adds."""
    (binding, facts), (at, cost_facts) = bound, quoted
    narrowed = run_pass(ELIMINATE_DEAD_ROWS, graph, observer, facts=facts)
    if narrowed.modified:
        graph, facts, cost_facts = narrowed.model, infer_graph(narrowed.model, binding), infer_graph(narrowed.model, at)
    found = trace_graph(graph, binding, facts, kv_cache)
    made = draft_groups(found.trace, found.units)
    groups = build_groups(graph, found.trace, found.units, cost_facts, made)
    spared = cost.macs - cost_of(graph, cost_facts).macs - extra_macs
    return Analysis(model, groups, collect_pins(found, groups, made), cost, at, found, spared, tokens, reduction)


def quoted_facts(
    model: ir.Model, binding: Mapping[str, int], facts: ShapeFacts, fixed: Mapping[str, int]
) -> tuple[dict[str, int], ShapeFacts]:
    """The sizes at which MACs are quoted, and the shapes there: batch 1, sequences of 128 (fewer where the model's
    position table is shorter), pictures as they were bound."""
    leading = {
        str(value.shape[0].value or f"{value.name}.0")
        for value in model.graph.inputs
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int)
    }
    for length in QUOTED_LENGTHS:
        sizes = {name: fixed.get(name, 1 if name in leading else max(size, length)) for name, size in binding.items()}
        found = infer_graph(model, sizes)
        if len(found.problems) <= len(facts.problems):
            return sizes, found
    return dict(binding), facts


def collect_pins(found: TracedGraph, groups: Sequence[Group], made: Sequence[GroupDraft]) -> tuple[Pin, ...]:
    """Pins of groups and of whatever else a weight makes, one per tensor, axis and reason."""
    free = np.zeros(found.trace.table.count, bool)
    for draft in made:
        if is_approximate(draft):
            free[draft.units] = True
    produced = np.zeros(found.trace.table.count, bool)
    flags = found.trace.table.flags[: found.trace.table.count]
    produced[found.units.unit_of_label[(flags & int(LabelFlag.PRODUCED)) > 0]] = True
    pins = {(pin.tensor, pin.axis, pin.reason): pin for group in groups for pin in group.pins}
    for note in found.trace.table.pins:
        own = found.units.unit_of_label[note.labels]
        if not len(own) or (produced[own] & ~free[own]).any():
            key = (note.tensor, note.axis, note.reason)
            pins.setdefault(key, Pin(note.tensor, note.axis, note.size, note.reason, note.operator, note.kind))
    return tuple(pins.values())


def cost_of(model: ir.Model, facts: ShapeFacts) -> Cost:
    """Parameters (float initializers that are used), MACs at the facts' binding, bytes of the weights, nodes."""
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None and v.uses()]
    weights = {id(tensor): tensor for tensor in tensors}.values()
    params = sum(tensor.size for tensor in weights if tensor.dtype.is_floating_point())
    macs = 0
    for node in model.graph:
        call = facts.call(node, opset_version(model, node.domain))
        macs += sum(count_macs(sizes) for _, _, sizes in contraction_sizes(call, node.domain))
    return Cost(params, macs, sum(weight_bytes(tensor) for tensor in weights), model.graph.num_nodes())
