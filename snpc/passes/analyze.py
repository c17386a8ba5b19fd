"""Analysis: the groups, pins and cost of a model (docs/how-it-works.md shows how they are found)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import (
    DimSizes,
    PassObserver,
    ShapeFacts,
    choose_dim_sizes,
    cost_of,
    infer_graph,
    leading_dims,
    run_pass,
)
from snpc.ops import names as op
from snpc.passes.canonicalization import ELIMINATE_DEAD_ROWS
from snpc.passes.companions import GraphAlignment, GroupMatch, align_graphs, match_groups, restrict_groups
from snpc.passes.grouping import (
    GroupDraft,
    TracedGraph,
    build_groups,
    draft_groups,
    pins_that_hold,
    to_pin,
    trace_graph,
)
from snpc.passes.propagation import LabelFlag
from snpc.passes.quantization import with_float_graph, with_stored_widths
from snpc.passes.rotation import ResidualStream, entered_graph, entry_weight, turned_graph
from snpc.passes.sublayers import (
    NO_SUBSTITUTES,
    SublayerGraph,
    SublayerRemoval,
    Substitute,
    Substitutes,
    maps_tokens,
    without_sublayers,
)
from snpc.passes.token_analysis import NO_TOKENS, TOKEN_AXIS, TokenFacts, TokenReduction, find_reduction_points
from snpc.passes.weights import GroupWeights, LazyGroupWeights
from snpc.types import (
    QUANTIZED_TOKENS_REASON,
    ChosenMetric,
    Cost,
    FloatArray,
    Group,
    Model,
    Pin,
    SharedProduct,
    StreamBasis,
    Sublayer,
)

QUOTED_LENGTHS = (128, 64, 32, 16)

QUANTIZED_TOKENS = TokenFacts((), (Pin("", TOKEN_AXIS, 0, QUANTIZED_TOKENS_REASON, "the model"),), 0)


@dataclass(frozen=True)
class Analysis:
    """The groups, pins and cost of a model. ``dim_sizes``: sizes of dynamic dimensions at which MACs are quoted;
    ``traced_graph``: labels and units, for passes."""

    model: Model
    groups: tuple[Group, ...]
    pins: tuple[Pin, ...]
    cost: Cost
    dim_sizes: DimSizes
    traced_graph: TracedGraph = field(repr=False)
    dead_macs: int = 0
    """MACs saved at any widths: for rows that no output depends on (``eliminate_dead_rows``), and for
    removed tokens. ``traced_graph`` does not contain them."""
    tokens: TokenFacts = field(default=NO_TOKENS, repr=False)
    reduction: TokenReduction | None = None
    """How tokens are reduced, if they are. ``traced_graph`` then has inputs that say which tokens are removed."""
    given_sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of dynamic dimensions that the caller gave: random inputs have them."""
    removal: SublayerRemoval | None = None
    """The sublayers that are gone, if any are. ``traced_graph`` does not contain them, ``model`` does."""
    metrics: Mapping[str, ChosenMetric] = field(default_factory=dict)
    """How the user wants outputs to be judged, by output; "" for all that are judged. Empty: each as suits it."""
    companions: tuple[Companion, ...] = field(default=(), repr=False)
    """Models that are cut alike; what they cannot cut is pinned here."""
    entries: tuple[str, ...] = ()
    """Values behind which residual streams begin, by a weight that ``traced_graph`` has and ``model`` has not."""
    stream_bases: tuple[StreamBasis, ...] = ()
    """Residual streams that were looked at with data: which are rotated in ``traced_graph``, and why others are not."""
    shared_products: tuple[SharedProduct, ...] = field(default=(), repr=False)
    """What several groups account for at once."""

    @property
    def name(self) -> str:
        """Name of the model's file, with its token reduction and the layers that are gone."""
        tokens = f" with tokens {self.reduction.spec}" if self.reduction is not None else ""
        layers = f" without {', '.join(self.removal.names)}" if self.removal is not None else ""
        return f"{self.model.path.name}{tokens}{layers}"

    @property
    def digest(self) -> str:
        """SHA-256 of everything that statistics depend on: the file's contents, how tokens are reduced, which
        layers are gone, and the bases of rotated streams."""
        changes: list[object] = []
        if self.reduction is not None:
            changes.append(self.reduction.to_json())
        if self.removal is not None:
            numbers = {name: substitute.numbers() for name, substitute in self.removal.substitutes.items()}
            changes.append([self.removal.names, numbers])
        changes += self.entries
        changes += [[stream.group, stream.digest] for stream in self.stream_bases if stream.rotated]
        if not changes:
            return self.model.digest
        text = " ".join(json.dumps(change, sort_keys=True) for change in changes)
        return hashlib.sha256(f"{self.model.digest} {text}".encode()).hexdigest()

    @property
    def identity(self) -> tuple[str, Mapping[str, int], bool]:
        """What tells this analysis from others: ``digest``, the sizes that the caller gave, and whether KV caches are
        cut."""
        return self.digest, self.given_sizes, self.traced_graph.kv_cache

    @cached_property
    def weights(self) -> Mapping[str, GroupWeights]:
        """Group id -> the weights that produce and consume its units, and its closed form. Computed once per group."""
        return LazyGroupWeights(self.traced_graph, self.groups)

    @cached_property
    def sublayer_graph(self) -> SublayerGraph:
        """The layers beside the residual stream, with MACs at ``dim_sizes``."""
        graph = self.traced_graph.model
        return SublayerGraph(graph, infer_graph(graph, dict(self.dim_sizes)))

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """The layers beside the residual stream, in the order of the graph, and why some cannot go."""
        return tuple(replace(s, reason=s.reason or self.deciding(s)) for s in self.sublayer_graph.sublayers)

    def deciding(self, sublayer: Sublayer) -> str:
        """Why fewer tokens need the layer; "" where they do not."""
        if self.reduction is None:
            return ""
        inside, read = self.sublayer_graph.names_in(sublayer.name)
        if self.reduction.decided_by & inside:
            return "what it adds decides which tokens go"
        merges = not sublayer.params or not read.isdisjoint(self.reduction.decisions)
        return "tokens get fewer inside it" if merges else ""

    def saved_before(self, kind: str) -> int:
        """What is saved of "macs", "params" or "bytes" at any widths: MACs of dead rows and removed tokens, and what
        went with removed sublayers."""
        if kind == "macs" or self.removal is None:
            return self.dead_macs if kind == "macs" else 0
        before, after = (cost_of(traced.model, traced.facts) for traced in (self.removal.source, self.traced_graph))
        return int(getattr(before, kind) - getattr(after, kind))

    @property
    def deciding_macs(self) -> int:
        """MACs of deciding which tokens go; ``traced_graph`` does not contain them."""
        if self.reduction is None:
            return 0
        graph = self.traced_graph.model
        return self.cost.macs - self.dead_macs - cost_of(graph, infer_graph(graph, dict(self.dim_sizes))).macs

    def share_left(self, kind: str) -> float:
        """What is left of the model's "macs", "params" or "bytes" at full widths."""
        return 1 - self.saved_before(kind) / float(max(getattr(self.cost, kind), 1))

    def stream_loss(self, group: Group) -> FloatArray | None:
        """[size + 1]: what a rotated residual stream loses by its width, added up over its normalizations, so that a
        layer that loses all of what it reads counts 1; None of any other group."""
        losses = (s.norms * np.array(s.rotation) for s in self.stream_bases if s.rotated and s.group == group.id)
        return next(losses, None)

    def group(self, name: str) -> Group:
        """The group with this id."""
        return next(g for g in self.groups if g.id == name)


@dataclass(frozen=True)
class Companion:
    """A model that is cut alike: its ``analysis``, which of its constants and nodes are those of the first model, and
    by group id of the first model, its group that is the same."""

    analysis: Analysis
    alignment: GraphAlignment = field(repr=False)
    matches: Mapping[str, GroupMatch] = field(repr=False)

    @property
    def name(self) -> str:
        return self.analysis.model.source.name


def analyze(
    model: Model,
    dim_sizes: Mapping[str, int] | None = None,
    *,
    prune_kv_cache: bool = False,
    observer: PassObserver | None = None,
) -> Analysis:
    """Find everything that can be made narrower in ``model`` and why the rest cannot.

    ``dim_sizes``: sizes of dynamic dimensions by name (``{"batch": 1, "sequence": 384}``) at which MACs are quoted, and
    which random inputs have.
    ``prune_kv_cache``: KV caches may be narrowed, past inputs and present outputs together.
    ``observer`` is called after each graph pass.
    """
    chosen = SizedFacts(*choose_dim_sizes(model.graph, dim_sizes))
    quoted = quoted_facts(model.graph, chosen, dim_sizes or {})
    cost = replace(cost_of(model.graph, quoted.facts), nodes=model.nodes)
    model = with_float_graph(model, observer)
    if model.quantized is not None:
        chosen = SizedFacts(chosen.dim_sizes, infer_graph(model.graph, chosen.dim_sizes))
        quoted = SizedFacts(quoted.dim_sizes, infer_graph(model.graph, quoted.dim_sizes))
    tokens = QUANTIZED_TOKENS
    if model.quantized is None:
        tokens = find_reduction_points(model.graph, chosen.facts, chosen.dim_sizes)
    sized = GraphAtSizes(model.graph, chosen, quoted, dim_sizes or {})
    analysis = analyze_graph(model, sized, cost, tokens=tokens, kv_cache=prune_kv_cache, observer=observer)
    for companion in model.companions:
        analysis = with_companion(
            analysis, analyze(companion, known_sizes(companion, dim_sizes), prune_kv_cache=prune_kv_cache)
        )
    return analysis


def known_sizes(model: Model, dim_sizes: Mapping[str, int] | None) -> dict[str, int]:
    """The sizes of dimensions that the model has."""
    names = {dim for spec in model.inputs for dim in spec.shape}
    return {name: size for name, size in (dim_sizes or {}).items() if name in names}


def with_companion(analysis: Analysis, other: Analysis) -> Analysis:
    """The analysis with what ``other``, and its companions, cannot cut alike pinned."""
    alignment = align_graphs(analysis.traced_graph.model, other.traced_graph.model)
    matches, reasons = match_groups(analysis.groups, other.groups, alignment)
    companion = Companion(other, alignment, matches)
    groups = restrict_groups(analysis.groups, reasons, companion.name)
    pins = {pin: None for group in groups for pin in group.pins} | dict.fromkeys(analysis.pins)
    site = analysis.traced_graph.model.graph.inputs[0]
    alike = Pin(str(site.name), 0, 0, f"{companion.name} is cut alike, in widths only", companion.name)
    return replace(
        analysis,
        groups=groups,
        pins=tuple(pins),
        tokens=replace(analysis.tokens, points=(), pins=analysis.tokens.pins or (alike,)),
        companions=(*analysis.companions, companion),
    )


@dataclass(frozen=True)
class SizedFacts:
    """Sizes of dynamic dimensions, and the shapes of a graph at these sizes."""

    dim_sizes: DimSizes
    facts: ShapeFacts


@dataclass(frozen=True)
class GraphAtSizes:
    """A graph with its shapes at the sizes it is ``traced`` at, and at those its MACs are ``quoted`` at.

    ``given``: sizes that the caller asked for.
    """

    graph: ir.Model
    traced: SizedFacts
    quoted: SizedFacts
    given: Mapping[str, int] = field(default_factory=dict)


def analyze_graph(
    model: Model,
    sized: GraphAtSizes,
    cost: Cost,
    *,
    tokens: TokenFacts = NO_TOKENS,
    reduction: TokenReduction | None = None,
    extra_macs: int = 0,
    kv_cache: bool = False,
    observer: PassObserver | None = None,
) -> Analysis:
    """The analysis of a graph that is that of ``model``, or was derived from it by ``reduction``.

    ``cost``: cost of the model; ``extra_macs``: MACs that the reduction adds.
    ``observer`` is called after each graph pass.
    """
    graph, traced, quoted = sized.graph, sized.traced, sized.quoted
    facts, cost_facts = traced.facts, quoted.facts
    if model.quantized is None:  # what is written back has the nodes of the file, on all rows
        narrowed = run_pass(ELIMINATE_DEAD_ROWS, graph, observer, facts=facts)
        if narrowed.modified:
            graph = narrowed.model
            facts, cost_facts = infer_graph(graph, traced.dim_sizes), infer_graph(graph, quoted.dim_sizes)
    traced_graph = trace_graph(graph, traced.dim_sizes, facts, kv_cache)
    drafts = draft_groups(traced_graph.trace, traced_graph.units)
    groups, products = build_groups(graph, traced_graph.trace, traced_graph.units, cost_facts, drafts)
    if model.quantized is not None:
        groups = with_stored_widths(model.quantized, groups)
    pins = collect_pins(traced_graph, groups, drafts)
    dead_macs = cost.macs - cost_of(graph, cost_facts).macs - extra_macs
    sizes, given = quoted.dim_sizes, sized.given
    return Analysis(
        model, groups, pins, cost, sizes, traced_graph, dead_macs, tokens, reduction, given, shared_products=products
    )


def remove_sublayers(analysis: Analysis, names: Iterable[str], substitutes: Substitutes = NO_SUBSTITUTES) -> Analysis:
    """The analysis of the graph without these sublayers. ``substitutes``: name -> what stands for one.

    Raises UserError for names that are not those of sublayers, and for sublayers that cannot go.
    """
    known = {sublayer.name: sublayer for sublayer in analysis.sublayers}
    wanted = set(names)
    for name in sorted(wanted):
        if name not in known:
            raise UserError(f"{analysis.model.path.name}: has no layer {name!r}; `snpc inspect` lists them")
        if not known[name].removable:
            raise UserError(f"{analysis.model.path.name}: the layer {name} cannot go: {known[name].reason}")
        if name in substitutes:
            check_substitute(analysis, known[name], substitutes[name])
    if analysis.removal is not None:
        raise UserError("whole layers are removed once, from a model that has all of them")
    gone = tuple(sublayer for sublayer in analysis.sublayers if sublayer.name in wanted)
    if not gone:
        return analysis
    source = analysis.traced_graph
    graph, continued = without_sublayers(source, gone, substitutes)
    sized = at_sizes_of(analysis, graph)
    without = analyze_graph(
        analysis.model,
        sized,
        analysis.cost,
        tokens=analysis.tokens,
        reduction=analysis.reduction,
        extra_macs=analysis.deciding_macs,
        kv_cache=source.kv_cache,
    )
    used = {name: substitute for name, substitute in substitutes.items() if name in wanted}
    return replace(without, removal=SublayerRemoval(gone, used, source, continued), metrics=analysis.metrics)


def check_substitute(analysis: Analysis, sublayer: Sublayer, substitute: Substitute) -> None:
    """Raise UserError where it has not the width of what the sublayer adds, or of what it reads."""
    shapes = analysis.traced_graph.facts.shapes_by_name
    added, read = shapes.get(sublayer.branch, ()), shapes.get(sublayer.read, ())
    where, width = analysis.model.path.name, (added or (0,))[-1]
    if substitute.constant.shape != (width,):
        raise UserError(f"{where}: {substitute.constant.size} numbers stand for {sublayer.name}, not {width}")
    if substitute.map is None:
        return
    if not maps_tokens(read, added) or not substitute.map.fits(read[-1], width):
        raise UserError(f"{where}: the map that stands for {sublayer.name} does not fit what the layer reads and adds")


def enter_streams(analysis: Analysis, values: Sequence[str]) -> Analysis:
    """The analysis of the graph with a weight, the identity, behind each of these values (``passes.rotation``), so that
    a residual stream begins there. What lies in front of it keeps its channels."""
    graph = entered_graph(analysis.traced_graph, values)
    return analysis_with_same_outputs(analysis, graph, tuple(values))


def turn_streams(analysis: Analysis, turns: Sequence[tuple[ResidualStream, FloatArray]]) -> Analysis:
    """The analysis of the graph with each stream turned by its matrix (``passes.rotation``): no output changes."""
    return analysis_with_same_outputs(analysis, turned_graph(analysis.traced_graph, turns), analysis.entries)


def analysis_with_same_outputs(analysis: Analysis, graph: ir.Model, entries: tuple[str, ...]) -> Analysis:
    """The analysis of another graph for the same outputs. What was added to it counts as MACs that are not saved."""
    source = analysis.traced_graph
    sized = at_sizes_of(analysis, graph)
    before = cost_of(source.model, infer_graph(source.model, dict(analysis.dim_sizes)))
    added = cost_of(graph, sized.quoted.facts).macs - before.macs
    changed = analyze_graph(analysis.model, sized, analysis.cost, kv_cache=source.kv_cache)
    return replace(
        changed,
        groups=tuple(pinned_in_front(group, {entry_weight(value) for value in entries}) for group in changed.groups),
        dead_macs=analysis.dead_macs - added,
        tokens=analysis.tokens,
        reduction=analysis.reduction,
        metrics=analysis.metrics,
        entries=entries,
    )


def pinned_in_front(group: Group, weights: Collection[str]) -> Group:
    """The group, pinned where it is what a stream's first weight reads."""
    site = next((site for site in group.sites if site.tensor in weights and site.axis == 0), None)
    if site is None or group.role != "residual":
        return group
    pin = Pin(site.tensor, 0, group.size, "in front of a residual stream that is rotated", op.MATMUL)
    return replace(group, pins=(*group.pins, pin))


def cost_without(analysis: Analysis, names: Collection[str], substitutes: Substitutes = NO_SUBSTITUTES) -> Cost:
    """What the model costs with these sublayers replaced, and without rows that no output depends on then."""
    gone = [sublayer for sublayer in analysis.sublayers if sublayer.name in names]
    graph, _ = without_sublayers(analysis.traced_graph, gone, substitutes)
    sized = at_sizes_of(analysis, graph)
    narrowed = run_pass(ELIMINATE_DEAD_ROWS, graph, None, facts=sized.traced.facts)
    cost = cost_of(narrowed.model, infer_graph(narrowed.model, analysis.dim_sizes))
    return replace(cost, macs=cost.macs + analysis.deciding_macs)


def at_sizes_of(analysis: Analysis, graph: ir.Model) -> GraphAtSizes:
    """A graph that was made from the analyzed one, at the same sizes."""
    traced, quoted = analysis.traced_graph.dim_sizes, analysis.dim_sizes
    return GraphAtSizes(
        graph,
        SizedFacts(traced, infer_graph(graph, traced)),
        SizedFacts(quoted, infer_graph(graph, quoted)),
        analysis.given_sizes,
    )


def quoted_facts(model: ir.Model, chosen: SizedFacts, fixed: Mapping[str, int]) -> SizedFacts:
    """The sizes at which MACs are quoted, and the shapes there.

    Batch 1, sequences of 128 (fewer where the model's position table is shorter), and images of the ``chosen`` sizes;
    ``fixed``: sizes that the caller asks for.
    """
    leading = leading_dims(model.graph)
    for length in QUOTED_LENGTHS:
        wanted = {name: 1 if name in leading else max(size, length) for name, size in chosen.dim_sizes.items()}
        dim_sizes = chosen.dim_sizes.resized({**wanted, **fixed}, fixed)
        facts = infer_graph(model, dim_sizes)
        if len(facts.problems) <= len(chosen.facts.problems):
            return SizedFacts(dim_sizes, facts)
    return chosen


def collect_pins(traced_graph: TracedGraph, groups: Sequence[Group], drafts: Sequence[GroupDraft]) -> tuple[Pin, ...]:
    """Pins of the groups, and of all other labels that weights produce; one per tensor, axis and reason."""
    free = np.zeros(traced_graph.trace.table.count, bool)
    for draft in drafts:
        if draft.approximate:
            free[draft.units] = True
    produced = np.zeros(traced_graph.trace.table.count, bool)
    flags = traced_graph.trace.table.flags[: traced_graph.trace.table.count]
    produced[traced_graph.units.unit_of_label[(flags & int(LabelFlag.PRODUCED)) > 0]] = True
    pins = {(pin.tensor, pin.axis, pin.reason): pin for group in groups for pin in group.pins}
    for label_pin in pins_that_hold(traced_graph.trace, traced_graph.units):
        own = traced_graph.units.unit_of_label[label_pin.labels]
        if not len(own) or (produced[own] & ~free[own]).any():
            key = (label_pin.tensor, label_pin.axis, label_pin.reason)
            pins.setdefault(key, to_pin(label_pin))
    return tuple(pins.values())
