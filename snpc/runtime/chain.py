"""A model in pieces whose weights are inputs: a change of a few weights is run from where they are used, not from the
start, on what the dense model hands over there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from snpc.passes.analyze import Analysis
from snpc.passes.edit import NoPlace, reader_of
from snpc.passes.segment import Segment, extract, segments
from snpc.runtime.feeds import Feeds
from snpc.runtime.model_io import clean, save
from snpc.runtime.session import open_session
from snpc.runtime.silent import constant_array
from snpc.runtime.stages import NotSequential, check_borders, stream_behind
from snpc.types import AnyArray, Group

if TYPE_CHECKING:
    import onnxruntime as ort

States = list[dict[str, AnyArray]]  # what enters each piece, and what the last one leaves


@dataclass(frozen=True)
class Piece:
    """A segment as a session. ``weights``: those that are inputs, as they are in the dense model."""

    segment: Segment
    session: ort.InferenceSession
    weights: Mapping[str, AnyArray]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, state: Mapping[str, AnyArray], arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """The state behind the piece."""
        given = {**self.weights, **{k: v for k, v in arrays.items() if k in self.weights}}
        made = self.session.run(list(self.outputs), {k: given[k] if k in given else state[k] for k in self.inputs})
        after = {**state, **dict(zip(self.outputs, made, strict=True))}
        return {k: v for k, v in after.items() if k in self.segment.needed}


@dataclass(frozen=True)
class Chain:
    """``spans``: group id -> the first and the last piece in which its weights are used."""

    pieces: tuple[Piece, ...]
    spans: Mapping[str, tuple[int, int]]
    outputs: tuple[str, ...]

    def states(self, feeds: Feeds) -> States:
        found = [dict(feeds)]
        for piece in self.pieces:
            found.append(piece.run(found[-1], {}))
        return found

    def changes(
        self,
        dense: States,
        group: str,
        arrays: Mapping[str, AnyArray],
        measure: Callable[[Sequence[AnyArray], Sequence[AnyArray]], float],
        through: bool,
    ) -> tuple[float, float]:
        """``measure`` of (dense, changed) values: of what leaves the group's last piece, and of the model's outputs
        (0 unless ``through``)."""
        first, last = self.spans[group]
        state = dense[first]
        for piece in self.pieces[first : last + 1]:
            state = piece.run(state, arrays)
        names = self.pieces[last].outputs
        near = measure([dense[last + 1][k] for k in names], [state[k] for k in names])
        if not through:
            return near, 0.0
        for piece in self.pieces[last + 1 :]:
            state = piece.run(state, {})
        return near, measure([dense[-1][k] for k in self.outputs], [state[k] for k in self.outputs])


def chain_of(analysis: Analysis, changed: Mapping[str, Mapping[str, AnyArray]], folder: Path, provider: str) -> Chain:
    """The analysed model in pieces that end where what groups do meets the residual stream. ``changed``: group id ->
    contents of the constants that a change of it touches (only their names count)."""
    source = analysis.traced
    ends = [end for g in analysis.groups if g.id in changed for end in end_of(analysis, g)]
    found = segments(source.model, sorted(set(ends)))
    try:
        check_borders(source, found)
    except NotSequential:  # then in one piece
        found = segments(source.model, [])
    names = {name for arrays in changed.values() for name in arrays}
    pieces = []
    for number, segment in enumerate(found):
        model = open_weights(clean(extract(source.model, segment, source.facts)), names)
        path = folder / f"piece{number}.onnx"
        save(model, path)
        session = open_session(path, provider=provider)
        weights = {k: constant_array(source.model.graph.initializers[k]) for k in inputs_of(model) if k in names}
        pieces.append(Piece(segment, session, weights, inputs_of(model), tuple(segment.outputs)))
    spans = {}
    for name, arrays in changed.items():
        used = [k for k, piece in enumerate(pieces) if not piece.weights.keys().isdisjoint(arrays)]
        spans[name] = (min(used, default=0), max(used, default=len(pieces) - 1))
    return Chain(tuple(pieces), spans, tuple(str(v.name) for v in source.model.graph.outputs))


def inputs_of(model: ir.Model) -> tuple[str, ...]:
    return tuple(str(v.name) for v in model.graph.inputs)


def end_of(analysis: Analysis, group: Group) -> list[int]:
    """The place (an index into the nodes) behind which what the group does has joined the other activations, where it
    is clear."""
    try:
        node = reader_of(analysis.traced, group).node
    except NoPlace:
        return []
    value = stream_behind(analysis.traced, node.outputs[0])
    position = {n: k for k, n in enumerate(analysis.traced.model.graph)}
    producer = value.producer()
    return [position[producer] + 1] if producer is not None else []


def open_weights(model: ir.Model, names: set[str]) -> ir.Model:
    """``model`` with these constants as inputs."""
    for name in names & set(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        value.const_value = None
        if not value.is_graph_input():
            model.graph.inputs.append(value)
    return model
