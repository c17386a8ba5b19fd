"""Statistics of a model whose weights do not fit into memory, measured one segment after the other.

A segment is a small model of its own, with the statistics of its layers. All batches pass it before the next is opened;
what crosses its border, and is needed behind it, is kept for every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from snpc.errors import UserError
from snpc.graph import Segment, extract_segment
from snpc.passes import Analysis
from snpc.runtime.batches import DenseValues, border_store, stream_segments
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import Advance, Execution, memory_budget, temporary_session
from snpc.runtime.io import StoredStage
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.measure import (
    StatisticRequest,
    add_requests,
    padding_of,
    refused_batch,
    split_by_memory,
)
from snpc.runtime.statistics.padding import token_mask_runner
from snpc.types import AnyArray

Observe = Callable[[Sequence[StatisticRequest], int, Mapping[str, AnyArray]], None]
"""Takes what requests measured of the batch of this number."""


@dataclass(frozen=True)
class MeasuredSegment:
    """``passes``: the requests of each run over the segment; the last run also makes the values ``kept``, which batches
    carry on, and ``dense``, which the layer-wise fit reads. ``complete``: requests whose group has been measured with
    this segment, and was not before. ``live``: what batches carry on behind it."""

    segment: Segment
    passes: tuple[tuple[StatisticRequest, ...], ...]
    kept: tuple[str, ...]
    dense: tuple[str, ...]
    complete: tuple[StatisticRequest, ...]
    live: frozenset[str]

    @property
    def name(self) -> str:
        """It tells segments of one model apart, however that is cut."""
        return f"nodes {self.segment.first} to {self.segment.last}"


class GraphPositions:
    """Where the nodes of a graph stand, by their names and those of the values that they make."""

    def __init__(self, analysis: Analysis) -> None:
        self.nodes: dict[str, int] = {}
        self.values: dict[str, int] = {}
        for index, node in enumerate(analysis.traced_graph.model.graph):
            self.nodes[str(node.name)] = index
            self.values |= {str(value.name): index for value in node.outputs}

    def of(self, name: str) -> int:
        """Of a value, or one inside a fused node ("node.q"); 0 of an input."""
        return self.values.get(name, self.nodes.get(name.rpartition(".")[0], 0))

    def span(self, request: StatisticRequest) -> tuple[int, int]:
        """The first and the last node that make what the request reads."""
        read = [self.of(probe.tensor) for probe in (request.probe, request.partner) if probe is not None]
        if request.product is not None:
            read.append(self.nodes[str(request.product.node.name)])
        return min(read), max(read)


def plan_segments(
    analysis: Analysis,
    calibration: Calibration,
    requests: Sequence[StatisticRequest],
    together: Collection[str],
    dense: Sequence[str],
    execution: Execution,
    known: Sequence[int] = (),
) -> tuple[MeasuredSegment, ...]:
    """The segments up to the last in which something is measured. ``together``: groups whose statistics are observed at
    once, also where they are in several segments. ``dense``: values that are kept. ``known``: see
    ``stream_segments``."""
    source, positions = analysis.traced_graph, GraphPositions(analysis)
    limit = memory_budget(execution.memory_limit) // 2
    spans = {request.output: positions.span(request) for request in requests}
    segments = stream_segments(source.model, source.facts, execution, spans.values(), known)
    masks = padding_of(analysis, requests).sources
    own = [[r for r in requests if s.first <= spans[r.output][0] < s.last] for s in segments]
    last = {r.group.id: number for number, measured in enumerate(own) for r in measured}
    planned = []
    for number, (segment, measured) in enumerate(zip(segments, own, strict=True)):
        values = [str(v.name) for node in list(source.model.graph)[segment.first : segment.last] for v in node.outputs]
        earlier = [r for part in own[: number + 1] for r in part if r.group.id in together]
        waiting = {r.output for r in earlier if last[r.group.id] > number}
        complete = tuple(r for r in earlier if last[r.group.id] == number)
        later = {name for other in segments[number + 1 :] for name in other.inputs}
        passes = tuple(split_by_memory(analysis, calibration, measured, limit)) or ((),)
        kept, live = tuple(name for name in values if name in later), frozenset({*later, *waiting, *masks})
        made = tuple(name for name in values if name in dense)
        planned.append(MeasuredSegment(segment, passes, kept, made, complete, live))
    needed = [number for number, part in enumerate(planned) if part.passes != ((),) or part.dense]
    return tuple(planned[: max(needed, default=-1) + 1])


class StreamedMeasurement:
    """A pass over ``calibration``, segment after segment. ``states``: what each batch carries. ``dense`` takes the
    values that it names. ``closed``: groups whose statistics are sums, observed as they come. ``known``: the ends of
    segments that an earlier run has measured, or some of them."""

    def __init__(
        self,
        analysis: Analysis,
        calibration: Calibration,
        requests: Sequence[StatisticRequest],
        closed: Collection[str],
        dense: DenseValues | None,
        execution: Execution,
        known: Sequence[int] = (),
    ) -> None:
        self.analysis, self.calibration, self.dense, self.execution = analysis, calibration, dense, execution
        self.together = frozenset(r.group.id for r in requests) - frozenset(closed)
        names = dense.names if dense is not None else ()
        self.segments = plan_segments(analysis, calibration, requests, self.together, names, execution, known)
        self.padding = padding_of(analysis, requests)
        self.store = border_store(execution)
        self.states: list[dict[str, AnyArray]] = []

    def steps(self, part: MeasuredSegment) -> int:
        """Runs of a segment over one batch."""
        return len(part.passes) * len(self.calibration.batch_plan)

    def begin(self) -> None:
        """Bring all batches in front of the first segment."""
        with token_mask_runner(self.analysis.traced_graph, self.padding, self.execution) as masks:
            self.states = [
                {name: self.store.keep(array) for name, array in {**feeds, **masks(feeds)}.items()}
                for feeds in self.calibration.batches()
            ]

    def measure(self, part: MeasuredSegment, observe: Observe, advance: Advance) -> None:
        """Let all batches pass a segment. Raises UserError where the model does not run on one."""
        for requests in part.passes:
            self.run(part, requests, requests is part.passes[-1], observe, advance)
        for number, state in enumerate(self.states):
            if part.complete:
                observe(part.complete, number, state)
            self.states[number] = {name: array for name, array in state.items() if name in part.live}

    def run(
        self,
        part: MeasuredSegment,
        requests: Sequence[StatisticRequest],
        is_last: bool,
        observe: Observe,
        advance: Advance,
    ) -> None:
        """One run over a segment: the last one hands on its values."""
        source, kept = self.analysis.traced_graph, part.kept if is_last else ()
        instrument = Instrument(extract_segment(source.model, part.segment, source.facts), self.padding.row_masks)
        values = dict.fromkeys((*kept, *(part.dense if is_last else ())))
        if not values and not requests:  # nothing reads what it makes, and onnxruntime takes no empty graph
            advance(len(self.states))
            return
        model = add_requests(instrument, requests, tuple(values), source.facts.types_by_name)
        at_once = [request for request in requests if request.group.id not in self.together]
        carried = (*kept, *(request.output for request in requests if request.group.id in self.together))
        with temporary_session(model, execution=self.execution, memory="least", external=True) as run:
            for number, state in enumerate(self.states):
                try:
                    outputs = run(state)
                except UserError as error:
                    raise UserError(refused_batch(self.analysis, state, error)) from None
                observe(at_once, number, outputs)
                if self.dense is not None and is_last:
                    self.dense.put(number, {name: outputs[name] for name in part.dense})
                self.states[number] = state | {name: self.store.keep(outputs[name]) for name in carried}
                advance(1)

    def keep_in(self, stage: StoredStage, index: int) -> None:
        """Store what batches carry on behind a segment, in place of what they carried in front of it."""
        part = self.segments[index]
        if self.dense is not None:
            stage.put_batches(f"dense of {part.name}", self.dense.batches_of(part.dense))
        stage.put_batches(f"values behind {part.name}", self.states)
        if index:
            stage.remove(f"values behind {self.segments[index - 1].name}")

    def restore(self, stage: StoredStage, count: int) -> bool:
        """Bring all batches behind the first ``count`` segments, one at least. False where what that takes was not
        stored."""
        batches, done = len(self.calibration.batch_plan), self.segments[:count]
        states = stage.get_batches(f"values behind {done[-1].name}", batches)
        dense = [stage.get_batches(f"dense of {part.name}", batches) for part in done] if self.dense is not None else []
        if states is None or None in dense:
            return False
        self.states = states
        for number in range(batches):
            for found in dense:
                assert found is not None and self.dense is not None
                self.dense.take(number, found[number])
        return True
