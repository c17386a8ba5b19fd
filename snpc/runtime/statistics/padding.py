"""Padded tokens do not count: which rows of a probe are tokens that nobody attends to, as the graph itself says.

Where a mask that depends on the inputs goes into an attention, a key that has no weight for any query of any head is
padded, and so is the row of that token in every probe of the same stream (``passes.streams``). Where it cannot be told
whose tokens the rows of a probe are, all of them count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.graph.binding import alternative_dim_sizes
from snpc.graph.shapes import ShapeFacts, infer_graph
from snpc.ops.attention import ATTENTION_FORMS
from snpc.passes.grouping.traced import TracedGraph
from snpc.passes.token_analysis.padding_sources import PaddingSource, TokenStreams, find_token_streams
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.temporary_session import temporary_session
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.probe_layout import RowMask, RowOrder, infer_probe_layout, samples_and_rows
from snpc.types import AnyArray, Feeds, Probe, Shape

MIN_ATTENTION_WEIGHT = 1e-9  # a weight that is more than nothing
MASKED_SCORE = -1e3  # what a mask adds to hide a key is less

TokenMask = npt.NDArray[np.bool_]
TokenMasks = Mapping[str, TokenMask]
RowCounter = Callable[[Shape], tuple[int, int]]
"""From the shape of a tensor to (samples, rows of each)."""


@dataclass(frozen=True)
class PaddingMasks:
    """``told``: tensor -> where it stands which of its rows count; ``sources``: what tells it, by input name."""

    row_masks: Mapping[str, RowMask] = field(default_factory=dict)
    sources: Mapping[str, PaddingSource] = field(default_factory=dict)


def find_padding(traced: TracedGraph, tensors: Iterable[tuple[str, RowCounter]]) -> PaddingMasks:
    """Where padding shows for each of these (tensor, how its rows are counted)."""
    streams = find_token_streams(traced)
    if not streams.sources:
        return PaddingMasks()
    sizes = alternative_dim_sizes(traced.dim_sizes)
    known = [traced.facts, *([infer_graph(traced.model, sizes)] if sizes != traced.dim_sizes else [])]
    views = [(facts, {str(v.name): shape for v, shape in facts.shape.items()}) for facts in known]
    told: dict[str, RowMask | None] = {}
    outside = fused_operand_inputs(traced)
    for tensor, rows in tensors:
        mine: RowMask | None = None
        tokens = outside.get(tensor, tensor)
        for index, source in enumerate(streams.sources):
            if streams.stream_of.get(tokens) != source.stream:
                continue
            order, *others = {row_order(source, rows, shapes.get(tokens), facts) for facts, shapes in views}
            if order is None or others:
                continue
            if order == "merged" and any(has_tokens_first(streams, source, facts) for facts, _ in views):
                continue  # which of the two axes was merged into the other is not known
            mine = RowMask(f"snpc_counts_{index}", order)
            break
        told[tensor] = mine if told.get(tensor, mine) == mine else None
    found = {tensor: mine for tensor, mine in told.items() if mine is not None}
    names = sorted({mine.name for mine in found.values()})
    return PaddingMasks(found, {name: streams.sources[int(name.rpartition("_")[2])] for name in names})


def fused_operand_inputs(traced: TracedGraph) -> dict[str, str]:
    """What a fused node makes inside ("node.q") -> the input that has the same tokens."""
    found: dict[str, str] = {}
    for node in traced.model.graph:
        if (node.domain, node.op_type) in ATTENTION_FORMS:
            fused = ATTENTION_FORMS[node.domain, node.op_type]
            for part, index in zip("qkv", (fused.query, fused.key, fused.value), strict=True):
                given = node.inputs[index] if index < len(node.inputs) else None
                given = node.inputs[fused.query] if given is None else given  # all three in one input
                if given is not None:
                    found[f"{node.name}.{part}"] = str(given.name)
    return found


def probe_row_counters(probes: Iterable[tuple[Probe, int]]) -> Iterator[tuple[str, RowCounter]]:
    """Probes of so many units, as ``find_padding`` takes them."""
    for probe, units in probes:
        layout = infer_probe_layout(probe, units)
        yield probe.tensor, lambda shape, layout=layout: samples_and_rows(layout, shape)  # type: ignore[misc]


def source_sizes(source: PaddingSource, facts: ShapeFacts) -> tuple[int, int] | None:
    """(batch, tokens) of a source."""
    shape = facts.shape.get(source.value)
    return None if shape is None else (shape[0] // max(source.heads_on_axis, 1), shape[source.key_axis])


def has_tokens_first(streams: TokenStreams, source: PaddingSource, facts: ShapeFacts) -> bool:
    """Does any tensor of the source's stream have its tokens ahead of its batch?"""
    batch, tokens = source_sizes(source, facts) or (1, 1)
    return batch != tokens and any(
        shape is not None and len(shape) > 2 and shape[:2] == (tokens, batch)
        for value, shape in facts.shape.items()
        if streams.stream_of.get(str(value.name)) == source.stream
    )


def row_order(source: PaddingSource, rows: RowCounter, shape: Shape | None, facts: ShapeFacts) -> RowOrder | None:
    """How the rows of a tensor of this shape are the source's tokens; None where they are not."""
    sizes = source_sizes(source, facts)
    if sizes is None or shape is None:
        return None
    batch, tokens = sizes
    orders: dict[tuple[int, int], RowOrder]
    orders = {(tokens, batch): "turned", (batch * tokens, 1): "merged", (batch, tokens): "plain"}
    return orders.get(rows(shape))


@contextmanager
def token_mask_runner(
    traced: TracedGraph, padding: PaddingMasks, execution: Execution = DEFAULT_EXECUTION
) -> Iterator[Callable[[Feeds], TokenMasks]]:
    """A call from feeds to bool [batch, tokens] per input that ``padding`` names: does the token count?"""
    if not padding.sources:
        yield lambda feeds: {}
        return
    instrument = Instrument(traced.model)
    for name, source in padding.sources.items():
        if source.kind == "weights":
            instrument.add_output(instrument.max_attention(source), name)
        else:
            dtype = traced.facts.dtype[source.value]
            instrument.add_output(instrument.values[str(source.value.name)], name, dtype or ir.DataType.UNDEFINED)
    with temporary_session(instrument.model, execution=execution) as run:
        yield lambda feeds: {
            name: valid_tokens(array, padding.sources[name].kind == "weights") for name, array in run(feeds).items()
        }


def valid_tokens(array: AnyArray, weights: bool) -> TokenMask:
    """[batch, tokens]: of the most that each key gets (``weights``), or of a mask [batch, .., keys].

    Where no token of a sample counts, nothing is known, and all do.
    """
    least = MIN_ATTENTION_WEIGHT if weights else MASKED_SCORE if array.dtype.kind in "fV" else 0
    counts: TokenMask = np.any(array > least, axis=tuple(range(1, array.ndim - 1)))
    counts[~counts.any(axis=1)] = True
    return counts
