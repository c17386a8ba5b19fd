"""Weight streaming: a model whose weights do not fit into memory runs one segment after the other.

All batches pass a segment before the next is opened, so that every weight is read once for all of them. What crosses a
border is kept in memory while that is little, then in temporary files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import Segment, ShapeFacts, extract_segment, infer_graph, split_into_segments
from snpc.passes.canonicalization import InlineFunctions
from snpc.runtime.batches.partition import Span, partition, weights_of
from snpc.runtime.execution import (
    ARTIFACT_SUFFIXES,
    DEFAULT_EXECUTION,
    SILENT,
    Advance,
    Execution,
    RunFunction,
    SpillableStore,
    file_session,
    format_bytes,
    free_memory,
    ignore_advance,
    memory_budget,
    model_weights,
    open_runner,
    save_runnable,
    session_bytes,
    temporary_session,
    too_large_reason,
    track,
    weight_budget,
)
from snpc.runtime.io import read_model
from snpc.temporary import temporary_folder
from snpc.types import AnyArray, Feeds

SEGMENT_SHARE = 3  # one part in so many of the memory is for the weights of a segment
KNOWN_SHARE = 2  # the same for a segment of an earlier run, which had more memory
BORDER_SHARE = 8  # the same for values at borders


def must_stream(model: ir.Model, execution: Execution) -> bool:
    """Whether the weights of ``model`` in a session take more than the memory limit. Other devices than the CPU have
    memory of their own."""
    return execution.on_cpu and session_bytes(model_weights(model)) > weight_budget(execution.memory_limit)


def check_runs_whole(model: ir.Model, execution: Execution, subject: str, instead: str) -> None:
    """Raise UserError where the weights of ``model`` in one session take more than the memory limit, or, where there is
    none, than the free memory. ``subject``: what cannot be streamed, with its verb; ``instead``: what to ask for."""
    needed, limit, free = session_bytes(model_weights(model)), execution.memory_limit, free_memory()
    available = free if limit is None else min(limit, free)
    if not execution.on_cpu or needed <= available:
        return
    there = "are free" if available == free else "is the --memory-limit"
    raise UserError(
        f"{subject} the whole model at once, whose weights take {format_bytes(needed)}, and "
        f"{format_bytes(available)} {there}: {instead}"
    )


def border_store(execution: Execution) -> SpillableStore:
    """Where values at the borders of segments lie."""
    return SpillableStore(memory_budget(execution.memory_limit) // BORDER_SHARE)


def stream_segments(
    model: ir.Model,
    facts: ShapeFacts,
    execution: Execution,
    together: Iterable[Span] = (),
    known: Sequence[int] = (),
) -> list[Segment]:
    """The segments in which ``model`` is streamed; see ``partition``. ``known``: the ends of those of an earlier run,
    whose results are lost with other segments: they stay while there is memory for them, and what lies behind them is
    one more."""
    budget, nodes = weight_budget(execution.memory_limit), list(model.graph)
    segments = split_into_segments(model, known)
    weights = (weights_of(nodes[segment.first : segment.last]) for segment in segments[: len(known)])
    if known and all(session_bytes(tensors) <= budget // KNOWN_SHARE for tensors in weights):
        return segments
    return partition(model, facts, budget // SEGMENT_SHARE, together)


def too_large_to_stream(model: ir.Model, facts: ShapeFacts, execution: Execution) -> str:
    """Why not even the segments of ``model`` can be run on this machine, for a message; "" where they can."""
    if not must_stream(model, execution):
        return ""
    nodes = list(model.graph)
    parts = (nodes[s.first : s.last] for s in stream_segments(model, facts, execution))
    return next(filter(None, (too_large_reason(weights_of(part)) for part in parts)), "")


@dataclass(frozen=True)
class StreamedModel:
    """A model that runs in ``segments``. ``facts`` know the types of what crosses their borders, by name."""

    model: ir.Model
    segments: Sequence[Segment]
    facts: ShapeFacts
    execution: Execution = DEFAULT_EXECUTION

    def __call__(self, feeds: Feeds) -> dict[str, AnyArray]:
        """The outputs by name, for one batch. Raises UserError where it does not run on these feeds."""
        return self.run([feeds])[0]

    def run(self, batches: Iterable[Feeds], advance: Advance = ignore_advance) -> list[dict[str, AnyArray]]:
        """The outputs for each batch, by name. ``advance`` is told of every segment that all batches have passed."""
        store = border_store(self.execution)
        states: list[Mapping[str, AnyArray]] = list(batches)
        for segment in self.segments:
            part = extract_segment(self.model, segment, self.facts)
            with temporary_session(
                part, execution=self.execution, optimization="basic", memory="least", external=True
            ) as run:
                for number, state in enumerate(states):
                    states[number] = live_after(segment, state, run(state), store)
            advance(1)
        names = [str(value.name) for value in self.model.graph.outputs]
        return [{name: state[name] for name in names} for state in states]


def live_after(
    segment: Segment, before: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray], store: SpillableStore
) -> dict[str, AnyArray]:
    """The values of a batch that nodes behind ``segment`` use, or that leave the model."""
    kept = {name: store.keep(array) for name, array in outputs.items() if name in segment.live_values}
    return {name: array for name, array in before.items() if name in segment.live_values} | kept


@contextmanager
def open_graph(model: ir.Model, facts: ShapeFacts, execution: Execution = DEFAULT_EXECUTION) -> Iterator[RunFunction]:
    """A function from feeds to outputs of a graph, for few runs: in one session, or streamed where that takes more
    than the memory limit. ``facts`` as for ``partition``. ``model`` must not be used again."""
    streamed = streamed_model(model, facts, execution)
    if streamed is not None:
        yield streamed
        return
    with temporary_folder() as folder:
        path = folder / "model.onnx"
        save_runnable(model, path, external=True)
        with file_session(path, execution) as run:
            yield run


@contextmanager
def open_file(path: Path, execution: Execution = DEFAULT_EXECUTION) -> Iterator[RunFunction]:
    """The same of the model or artifact in ``path``."""
    if path.suffix in ARTIFACT_SUFFIXES:
        yield open_runner(path, execution=execution).run
        return
    model = read_model(path)
    streamed = None
    if must_stream(model, execution):
        InlineFunctions()(model)  # segments have none
        streamed = streamed_model(model, infer_graph(model, {}, measure=False), execution)
    if streamed is not None:
        yield streamed
        return
    with file_session(path, execution, model) as run:
        yield run


def streamed_model(model: ir.Model, facts: ShapeFacts, execution: Execution) -> StreamedModel | None:
    """None where the model fits into memory, or cannot be cut."""
    if not must_stream(model, execution):
        return None
    segments = stream_segments(model, facts, execution)
    return StreamedModel(model, segments, facts, execution) if len(segments) > 1 else None


def run_each(
    run: RunFunction, batches: Sequence[Feeds], execution: Execution, stage: str | None = None
) -> Iterator[dict[str, AnyArray]]:
    """The outputs for each batch. ``stage``: the name of the run as a stage of ``execution.progress``; None: it is part
    of one."""
    progress = SILENT if stage is None else execution.progress
    if isinstance(run, StreamedModel):
        with progress.stage(stage or "", len(run.segments)) as advance:
            yield from run.run(batches, advance)
        return
    for feeds in track(progress, stage or "", batches, len(batches)):
        yield run(feeds)
