"""A model in pieces whose weights are inputs: a change of a few weights is run from where they are used, not from the
start, on what the dense model hands over there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import onnx_ir as ir

from snpc.graph.subgraph import Segment, extract_segment, split_into_segments
from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.grouping.traced import TracedGraph
from snpc.runtime.closed_form.masked_weights import constant_array
from snpc.runtime.closed_form.stages import NotSegmentable, check_boundary_types, residual_sums
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.memory import SpillableStore
from snpc.runtime.execution.session import SessionLoadError
from snpc.runtime.execution.temporary_session import RunFunction, temporary_session
from snpc.types import AnyArray, Feeds, Group

SegmentStates = list[dict[str, AnyArray]]  # what enters each piece, and what the last one leaves


@dataclass(frozen=True)
class SegmentSession:
    """A segment twice: ``fixed``, as it is, and ``open``, with those ``weights`` as inputs that are to be changed (the
    same where there are none). Fixed weights run faster, and most pieces of a run are fixed."""

    segment: Segment
    session: RunFunction
    with_weight_inputs: RunFunction
    weights: Mapping[str, AnyArray]

    def run(self, state: Mapping[str, AnyArray], arrays: Mapping[str, AnyArray] | None = None) -> dict[str, AnyArray]:
        """The state behind the piece; ``arrays``: contents of weights that differ."""
        if arrays is None:
            made = self.session(state)
        else:
            made = self.with_weight_inputs({**state, **{k: arrays.get(k, v) for k, v in self.weights.items()}})
        return {k: v for k, v in {**state, **made}.items() if k in self.segment.live_values}


@dataclass(frozen=True)
class SegmentedModel:
    """``spans``: group id -> the first and the last piece in which its weights are used."""

    segments: tuple[SegmentSession, ...]
    spans: Mapping[str, tuple[int, int]]
    outputs: tuple[str, ...]

    def dense_states(self, feeds: Feeds, shelf: SpillableStore) -> SegmentStates:
        """What the dense model gives, kept on ``shelf``."""
        found = [dict(feeds)]
        for piece in self.segments:
            held = found[-1]
            made = piece.run(held)
            found.append({k: held[k] if k in held else shelf.keep(v) for k, v in made.items()})
        return found

    def outputs_with(self, dense: SegmentStates, group: str, arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """The model's outputs where the group's weights are ``arrays``."""
        first, last = self.spans[group]
        state = dense[first]
        for number, piece in enumerate(self.segments[first:], start=first):
            state = piece.run(state, arrays if number <= last else None)
        return {name: state[name] for name in self.outputs}


@contextmanager
def open_segmented_model(
    analysis: Analysis, changed: Mapping[str, Collection[str]], execution: Execution = DEFAULT_EXECUTION
) -> Iterator[SegmentedModel]:
    """The analysed model in pieces that end where what groups do meets the residual stream. ``changed``: group id ->
    names of the constants that a change of it touches."""
    source = analysis.traced_graph
    ends = [end for g in analysis.groups if g.id in changed for end in segment_ends(analysis, g)]
    names = {name for mine in changed.values() for name in mine}
    with ExitStack() as stack:
        try:
            found = split_into_segments(source.model, sorted(set(ends)))
            check_boundary_types(source, found)
            pieces = open_segments(source, found, names, execution, stack)
        except (NotSegmentable, SessionLoadError):  # then in one piece
            pieces = open_segments(source, split_into_segments(source.model, []), names, execution, stack)
        spans = {}
        for name, mine in changed.items():
            used = [k for k, piece in enumerate(pieces) if not piece.weights.keys().isdisjoint(mine)]
            spans[name] = (min(used, default=0), max(used, default=len(pieces) - 1))
        yield SegmentedModel(pieces, spans, tuple(str(v.name) for v in source.model.graph.outputs))


def open_segments(
    source: TracedGraph, found: Sequence[Segment], names: set[str], execution: Execution, stack: ExitStack
) -> tuple[SegmentSession, ...]:
    """What is open is closed with ``stack``, but for where one piece does not load: then none stays open."""
    with ExitStack() as mine:
        pieces = tuple(open_segment(source, segment, names, execution, mine) for segment in found)
        stack.push(mine.pop_all())
    return pieces


def open_segment(
    source: TracedGraph, segment: Segment, names: set[str], execution: Execution, stack: ExitStack
) -> SegmentSession:
    model = extract_segment(source.model, segment, source.facts)
    weights = {k: constant_array(source.model.graph.initializers[k]) for k in model.graph.initializers if k in names}
    fixed = stack.enter_context(
        temporary_session(finalize(model.clone() if weights else model), execution=execution, memory="shared")
    )
    if not weights:
        return SegmentSession(segment, fixed, fixed, weights)
    # opened before it is cleaned: constants that are equal now need not be so once they are changed
    opened = stack.enter_context(
        temporary_session(finalize(weights_to_inputs(model, names)), execution=execution, memory="shared")
    )
    return SegmentSession(segment, fixed, opened, weights)


def segment_ends(analysis: Analysis, group: Group) -> list[int]:
    """The place (an index into the nodes) behind which what the group does has joined the other activations, where it
    is clear."""
    producers = [value.producer() for value in residual_sums(analysis, group)]
    position = {n: k for k, n in enumerate(analysis.traced_graph.model.graph)}
    return [position[p] + 1 for p in producers if p is not None]


def weights_to_inputs(model: ir.Model, names: set[str]) -> ir.Model:
    """``model`` with these constants as inputs."""
    for name in names & set(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        value.const_value = None
        if not value.is_graph_input():
            model.graph.inputs.append(value)
    return model
