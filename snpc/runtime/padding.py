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

from snpc.ops.spec import Shape
from snpc.passes.rewrite import Traced
from snpc.passes.shapes import Facts, evaluate, other_binding
from snpc.passes.streams import Source, streams_of
from snpc.runtime.feeds import Feeds
from snpc.runtime.instrument import Instrument
from snpc.runtime.layout import Layout, Told, layout_of, rows_of
from snpc.runtime.scratch import scratch
from snpc.types import AnyArray, Probe

ATTENDED = 1e-9  # a weight that is more than nothing
HIDDEN = -1e3  # what a mask adds to hide a key is less

Masks = Callable[[Feeds], dict[str, AnyArray]]


@dataclass(frozen=True)
class Padding:
    """``told``: probed tensor -> where it stands which of its rows count; ``sources``: what tells it, by input name."""

    told: Mapping[str, Told] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)


def padding_of(traced: Traced, probes: Iterable[tuple[Probe, int]]) -> Padding:
    """Where padding shows for each probe of so many units."""
    streams = streams_of(traced)
    if not streams.sources:
        return Padding()
    sizes = other_binding(traced.sizes)
    facts = (traced.facts, *([evaluate(traced.model, sizes)] if sizes != traced.sizes else []))
    shapes = [{str(v.name): shape for v, shape in known.shape.items()} for known in facts]
    told: dict[str, Told] = {}
    for probe, units in probes:
        layout = layout_of(probe, units)
        for index, source in enumerate(streams.sources):
            orders = {order_of(source, layout, known.get(probe.tensor), mine) for known, mine in zip(shapes, facts)}
            if streams.of.get(probe.tensor) == source.stream and len(orders) == 1 and None not in orders:
                told[probe.tensor] = Told(f"snpc_counts_{index}", orders.pop())
                break
    names = {t.name for t in told.values()}
    sources = {f"snpc_counts_{index}": source for index, source in enumerate(streams.sources)}
    return Padding(told, {name: source for name, source in sources.items() if name in names})


def order_of(source: Source, layout: Layout, shape: Shape | None, facts: Facts) -> str | None:
    """How the rows of a tensor of this shape are the source's tokens; None where they are not."""
    weights = facts.shape.get(source.value)
    if weights is None or shape is None:
        return None
    batch, tokens = weights[0] // max(source.period, 1), weights[source.key_axis]
    orders = {(batch, tokens): "plain", (batch * tokens, 1): "merged", (tokens, batch): "turned"}
    return orders.get(rows_of(layout, shape))


@contextmanager
def token_masks(traced: Traced, padding: Padding, provider: str = "cpu", threads: int = 0) -> Iterator[Masks]:
    """A call from feeds to [batch, tokens] per input that ``padding`` names: does the token count?"""
    if not padding.sources:
        yield lambda feeds: {}
        return
    instrument = Instrument(traced.model)
    for name, source in padding.sources.items():
        value = instrument.values[str(source.value.name)]
        instrument.expose(instrument.attended(value, source) if source.kind == "weights" else value, name)
    with scratch(instrument.model, provider=provider, threads=threads) as run:

        def masks(feeds: Feeds) -> dict[str, AnyArray]:
            return {name: counting(array) for name, array in run(feeds).items()}

        yield masks


def counting(array: AnyArray) -> AnyArray:
    """[batch, tokens]: of the most that each key gets, or of a mask [batch, .., keys]. Where no token of a sample
    counts, nothing is known, and all do."""
    if array.dtype == bool:
        open_keys = array
    else:
        floats = array.dtype.kind == "f"
        least = ATTENDED if array.ndim == 2 and floats else HIDDEN if floats else 0
        open_keys = array > least
    counts: AnyArray = open_keys.any(axis=tuple(range(1, array.ndim - 1)))
    return counts | ~counts.any(axis=1, keepdims=True)
