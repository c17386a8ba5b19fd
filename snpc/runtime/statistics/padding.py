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

from snpc.graph.binding import other_binding
from snpc.graph.shapes import Facts, evaluate
from snpc.ops.attention import FORMS
from snpc.ops.spec import Shape
from snpc.passes.grouping.traced import Traced
from snpc.passes.token_analysis.padding_sources import Source, Streams, streams_of
from snpc.runtime.execution.temporary_session import scratch
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.probe_layout import Order, Told, layout_of, rows_of
from snpc.types import AnyArray, Feeds, Probe

ATTENDED = 1e-9  # a weight that is more than nothing
HIDDEN = -1e3  # what a mask adds to hide a key is less

Counts = npt.NDArray[np.bool_]
Masks = Mapping[str, Counts]
Rows = Callable[[Shape], tuple[int, int]]
"""From the shape of a tensor to (samples, rows of each)."""


@dataclass(frozen=True)
class Padding:
    """``told``: tensor -> where it stands which of its rows count; ``sources``: what tells it, by input name."""

    told: Mapping[str, Told] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)


def padding_of(traced: Traced, tensors: Iterable[tuple[str, Rows]]) -> Padding:
    """Where padding shows for each of these (tensor, how its rows are counted)."""
    streams = streams_of(traced)
    if not streams.sources:
        return Padding()
    sizes = other_binding(traced.sizes)
    known = [traced.facts, *([evaluate(traced.model, sizes)] if sizes != traced.sizes else [])]
    views = [(facts, {str(v.name): shape for v, shape in facts.shape.items()}) for facts in known]
    told: dict[str, Told | None] = {}
    outside = outside_of(traced)
    for tensor, rows in tensors:
        mine: Told | None = None
        tokens = outside.get(tensor, tensor)
        for index, source in enumerate(streams.sources):
            if streams.of.get(tokens) != source.stream:
                continue
            order, *others = {order_of(source, rows, shapes.get(tokens), facts) for facts, shapes in views}
            if order is None or others:
                continue
            if order == "merged" and any(tokens_first(streams, source, facts) for facts, _ in views):
                continue  # which of the two axes was merged into the other is not known
            mine = Told(f"snpc_counts_{index}", order)
            break
        told[tensor] = mine if told.get(tensor, mine) == mine else None
    found = {tensor: mine for tensor, mine in told.items() if mine is not None}
    names = sorted({mine.name for mine in found.values()})
    return Padding(found, {name: streams.sources[int(name.rpartition("_")[2])] for name in names})


def outside_of(traced: Traced) -> dict[str, str]:
    """What a fused node makes inside ("node.q") -> the input that has the same tokens."""
    found: dict[str, str] = {}
    for node in traced.model.graph:
        if (node.domain, node.op_type) in FORMS:
            fused = FORMS[node.domain, node.op_type]
            for part, index in zip("qkv", (fused.query, fused.key, fused.value), strict=True):
                given = node.inputs[index] if index < len(node.inputs) else None
                given = node.inputs[fused.query] if given is None else given  # all three in one input
                if given is not None:
                    found[f"{node.name}.{part}"] = str(given.name)
    return found


def probe_rows(probes: Iterable[tuple[Probe, int]]) -> Iterator[tuple[str, Rows]]:
    """Probes of so many units, as ``padding_of`` takes them."""
    for probe, units in probes:
        layout = layout_of(probe, units)
        yield probe.tensor, lambda shape, layout=layout: rows_of(layout, shape)  # type: ignore[misc]


def sizes_of(source: Source, facts: Facts) -> tuple[int, int] | None:
    """(batch, tokens) of a source."""
    shape = facts.shape.get(source.value)
    return None if shape is None else (shape[0] // max(source.period, 1), shape[source.key_axis])


def tokens_first(streams: Streams, source: Source, facts: Facts) -> bool:
    """Does any tensor of the source's stream have its tokens ahead of its batch?"""
    batch, tokens = sizes_of(source, facts) or (1, 1)
    return batch != tokens and any(
        shape is not None and len(shape) > 2 and shape[:2] == (tokens, batch)
        for value, shape in facts.shape.items()
        if streams.of.get(str(value.name)) == source.stream
    )


def order_of(source: Source, rows: Rows, shape: Shape | None, facts: Facts) -> Order | None:
    """How the rows of a tensor of this shape are the source's tokens; None where they are not."""
    sizes = sizes_of(source, facts)
    if sizes is None or shape is None:
        return None
    batch, tokens = sizes
    orders: dict[tuple[int, int], Order]
    orders = {(tokens, batch): "turned", (batch * tokens, 1): "merged", (batch, tokens): "plain"}
    return orders.get(rows(shape))


@contextmanager
def token_masks(
    traced: Traced, padding: Padding, provider: str = "cpu", threads: int = 0
) -> Iterator[Callable[[Feeds], Masks]]:
    """A call from feeds to bool [batch, tokens] per input that ``padding`` names: does the token count?"""
    if not padding.sources:
        yield lambda feeds: {}
        return
    instrument = Instrument(traced.model)
    for name, source in padding.sources.items():
        if source.kind == "weights":
            instrument.expose(instrument.attended(source), name)
        else:
            dtype = traced.facts.dtype[source.value]
            instrument.expose(instrument.values[str(source.value.name)], name, dtype or ir.DataType.UNDEFINED)
    with scratch(instrument.model, provider=provider, threads=threads) as run:
        yield lambda feeds: {
            name: counting(array, padding.sources[name].kind == "weights") for name, array in run(feeds).items()
        }


def counting(array: AnyArray, weights: bool) -> Counts:
    """[batch, tokens]: of the most that each key gets (``weights``), or of a mask [batch, .., keys].

    Where no token of a sample counts, nothing is known, and all do.
    """
    least = ATTENDED if weights else HIDDEN if array.dtype.kind in "fV" else 0
    counts: Counts = np.any(array > least, axis=tuple(range(1, array.ndim - 1)))
    counts[~counts.any(axis=1)] = True
    return counts
