"""A model in segments whose weights are inputs, so that a trial of changed weights runs only from their segment on.

The dense model runs once per batch; what crosses each border is kept. A trial of one group starts from the kept values
in front of the first segment that uses the group's weights, not from the inputs of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from snpc.graph import Segment, extract_segment, split_into_segments
from snpc.passes import Analysis
from snpc.passes.canonicalization import finalize
from snpc.passes.grouping import TracedGraph
from snpc.passes.slicing import weigh_statistics, weights_name
from snpc.runtime.batches import must_stream, stream_segments
from snpc.runtime.closed_form import NotSegmentable, check_boundary_types, constant_array, residual_sums
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    Execution,
    RunFunction,
    SessionLoadError,
    SpillableStore,
    save_runnable,
    temporary_session,
    weight_budget,
)
from snpc.runtime.sensitivity.session_pool import SessionPool
from snpc.types import AnyArray, Feeds, Group

SegmentStates = list[dict[str, AnyArray]]  # the values that enter each segment, and those that leave the last


@dataclass(frozen=True)
class SegmentSession:
    """A segment in two sessions: ``session`` with constant weights, ``with_weight_inputs`` with those of its
    ``weights`` as inputs that a trial may change (the same session where there are none). Constant weights run faster,
    and most segments of a trial are unchanged."""

    segment: Segment
    session: RunFunction
    with_weight_inputs: RunFunction
    weights: Mapping[str, AnyArray]

    def uses(self, names: Collection[str]) -> bool:
        """Is one of these weights an input?"""
        return not self.weights.keys().isdisjoint(names)

    def run(self, state: Mapping[str, AnyArray], changed: Mapping[str, AnyArray] | None = None) -> dict[str, AnyArray]:
        """The live values behind the segment; ``changed``: new contents of weights, by name."""
        if changed is None:
            outputs = self.session(state)
        else:
            weights = {name: changed.get(name, array) for name, array in self.weights.items()}
            outputs = self.with_weight_inputs({**state, **weights})
        return {name: array for name, array in {**state, **outputs}.items() if name in self.segment.live_values}


@dataclass(frozen=True)
class SavedSegment:
    """The files of a segment's two sessions; ``variable`` None: trials change nothing in it."""

    segment: Segment
    fixed: str
    variable: str | None


@dataclass(frozen=True)
class SegmentedModel:
    """``spans``: group id -> the first and the last segment in which its weights are used. ``saved``: the files of the
    segments, where they are wanted."""

    segments: tuple[SegmentSession, ...]
    spans: Mapping[str, tuple[int, int]]
    outputs: tuple[str, ...]
    saved: tuple[SavedSegment, ...] = ()

    def dense_states(self, feeds: Feeds, store: SpillableStore) -> SegmentStates:
        """The dense model's values at every border, kept in ``store``."""
        states = [dict(feeds)]
        for segment in self.segments:
            before = states[-1]
            after = segment.run(before)
            states.append({name: before[name] if name in before else store.keep(a) for name, a in after.items()})
        return states

    def outputs_with(self, dense: SegmentStates, group_id: str, arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """The model's outputs where the group's weights are ``arrays``."""
        first, last = self.spans[group_id]
        return self.outputs_between(dense, first, last, arrays)

    def outputs_between(
        self, dense: SegmentStates, first: int, last: int, arrays: Mapping[str, AnyArray]
    ) -> dict[str, AnyArray]:
        """The model's outputs where weights of the segments from ``first`` to ``last`` are ``arrays``."""
        state = dense[first]
        for index, segment in enumerate(self.segments[first:], start=first):
            state = segment.run(state, arrays if index <= last else None)
        return {name: state[name] for name in self.outputs}

    def outputs_from(self, states: SegmentStates, first: int, arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """The model's outputs with the weights ``arrays``, which change nothing before segment ``first``."""
        state = states[first]
        for segment in self.segments[first:]:
            state = segment.run(state, arrays if segment.uses(arrays) else None)
        return {name: state[name] for name in self.outputs}

    def states_from(self, states: SegmentStates, first: int, arrays: Mapping[str, AnyArray]) -> SegmentStates:
        """``states`` with those behind segment ``first`` on computed anew, with the weights ``arrays``."""
        after = states[: first + 1]
        for segment in self.segments[first:]:
            after.append(segment.run(after[-1], arrays if segment.uses(arrays) else None))
        return after


@contextmanager
def open_segmented_model(
    analysis: Analysis,
    changed: Mapping[str, Collection[str]],
    execution: Execution = DEFAULT_EXECUTION,
    folder: Path | None = None,
) -> Iterator[SegmentedModel]:
    """The analyzed model in segments that end where a group's contribution joins the residual stream. Where it does not
    fit into memory, sessions are opened as trials run them.

    ``changed``: group id -> names of the constants that its trials change. Where a segment cannot be run on its own,
    the model is one segment. ``folder``: where the segments are saved for other processes.
    """
    source = analysis.traced_graph
    ends = [end for group in analysis.groups if group.id in changed for end in segment_ends(analysis, group)]
    names = {name for constants in changed.values() for name in constants}
    with ExitStack() as stack:
        if folder is None and must_stream(source.model, execution):
            segments = split_into_segments(source.model, sorted({*ends, *streamed_ends(source, execution)}))
            check_boundary_types(source.facts, segments)
            sessions = open_lazily(source, segments, names, execution, stack)
            yield segmented_model(source, sessions, changed, ())
            return
        try:
            segments = split_into_segments(source.model, sorted(set(ends)))
            check_boundary_types(source.facts, segments)
            sessions = open_segments(source, segments, names, execution, stack)
        except (NotSegmentable, SessionLoadError):
            segments = split_into_segments(source.model, [])
            sessions = open_segments(source, segments, names, execution, stack)
        saved = () if folder is None else save_segments(source, segments, names, folder)
        yield segmented_model(source, sessions, changed, saved)


def segmented_model(
    source: TracedGraph,
    sessions: tuple[SegmentSession, ...],
    changed: Mapping[str, Collection[str]],
    saved: tuple[SavedSegment, ...],
) -> SegmentedModel:
    spans = {group_id: span_of(sessions, constants) for group_id, constants in changed.items()}
    computed = [value for value in source.model.graph.outputs if value.producer() is not None]  # the rest is stored
    return SegmentedModel(sessions, spans, tuple(str(value.name) for value in computed), saved)


def span_of(sessions: Sequence[SegmentSession], constants: Collection[str]) -> tuple[int, int]:
    """The first and the last segment that uses one of these constants; all segments where none does."""
    used = [index for index, session in enumerate(sessions) if session.uses(constants)]
    return min(used, default=0), max(used, default=len(sessions) - 1)


def open_segments(
    source: TracedGraph, segments: Sequence[Segment], names: set[str], execution: Execution, stack: ExitStack
) -> tuple[SegmentSession, ...]:
    """Sessions that ``stack`` closes. Where one of them does not load, none stays open."""
    with ExitStack() as opened:
        sessions = tuple(open_segment(source, segment, names, execution, opened) for segment in segments)
        stack.push(opened.pop_all())
    return sessions


def streamed_ends(source: TracedGraph, execution: Execution) -> list[int]:
    """Where segments end that fit into memory."""
    return [segment.last for segment in stream_segments(source.model, source.facts, execution)]


def open_lazily(
    source: TracedGraph, segments: Sequence[Segment], names: set[str], execution: Execution, stack: ExitStack
) -> tuple[SegmentSession, ...]:
    """Sessions that share a pool, which ``stack`` closes."""
    pool = SessionPool(weight_budget(execution.memory_limit), execution)
    stack.callback(pool.close)
    sessions = []
    for segment in segments:
        _, variable, weights = segment_models(source, segment, names)
        fixed_run = pool.lazily(partial(fixed_model, source, segment, names))
        variable_run = fixed_run if variable is None else pool.lazily(partial(variable_model, source, segment, names))
        sessions.append(SegmentSession(segment, fixed_run, variable_run, weights))
    return tuple(sessions)


def fixed_model(source: TracedGraph, segment: Segment, names: set[str]) -> ir.Model:
    return segment_models(source, segment, names)[0]


def variable_model(source: TracedGraph, segment: Segment, names: set[str]) -> ir.Model:
    model = segment_models(source, segment, names)[1]
    assert model is not None
    return model


def open_segment(
    source: TracedGraph, segment: Segment, names: set[str], execution: Execution, stack: ExitStack
) -> SegmentSession:
    """The two sessions of one segment; ``names``: constants that trials change."""
    fixed, variable, weights = segment_models(source, segment, names)
    session = stack.enter_context(temporary_session(fixed, execution=execution, memory="shared"))
    if variable is None:
        return SegmentSession(segment, session, session, weights)
    with_weight_inputs = stack.enter_context(temporary_session(variable, execution=execution, memory="shared"))
    return SegmentSession(segment, session, with_weight_inputs, weights)


def save_segments(
    source: TracedGraph, segments: Sequence[Segment], names: set[str], folder: Path
) -> tuple[SavedSegment, ...]:
    """Write the models of all segments to ``folder``."""
    saved = []
    for index, segment in enumerate(segments):
        fixed, variable, _ = segment_models(source, segment, names)
        files = f"fixed-{index}.onnx", f"variable-{index}.onnx"
        save_runnable(fixed, folder / files[0])
        if variable is not None:
            save_runnable(variable, folder / files[1])
        saved.append(SavedSegment(segment, files[0], files[1] if variable is not None else None))
    return tuple(saved)


def segment_models(
    source: TracedGraph, segment: Segment, names: set[str]
) -> tuple[ir.Model, ir.Model | None, dict[str, AnyArray]]:
    """(the segment, the same with the constants ``names`` as inputs, these constants); None where it has none."""
    model = extract_segment(source.model, segment, source.facts)
    weights = {
        name: constant_array(source.model.graph.initializers[name])
        for name in model.graph.initializers
        if name in names
    }
    fixed = finalize(model.clone() if weights else model)
    if not weights:
        return fixed, None, weights
    weigh_statistics(model.graph, source.trace, (s for s in source.trace.statistics if weights_name(s) in names))
    weights |= {
        name: constant_array(value) for name, value in model.graph.initializers.items() if name in names - set(weights)
    }
    # weights become inputs before the model is finalized: constants that are equal now may differ in a trial
    return fixed, finalize(weights_to_inputs(model, names)), weights


def segment_ends(analysis: Analysis, group: Group) -> list[int]:
    """Indices (into the nodes) behind which the group's contribution has joined the other activations; none where that
    is not clear."""
    producers = [value.producer() for value in residual_sums(analysis, group)]
    position = {node: index for index, node in enumerate(analysis.traced_graph.model.graph)}
    return [position[node] + 1 for node in producers if node is not None]


def weights_to_inputs(model: ir.Model, names: set[str]) -> ir.Model:
    """``model`` with these constants as inputs; changed in place."""
    for name in names & set(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        value.const_value = None
        if not value.is_graph_input():
            model.graph.inputs.append(value)
    return model
