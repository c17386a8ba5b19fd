"""Second moments of activations, per group, as its closed form needs them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.passes.analyze import Analysis
from snpc.passes.weights.closed_form_kinds import context_tensors
from snpc.passes.weights.consumers import consumer_uses
from snpc.runtime.statistics.packed_symmetric import unpack_symmetric
from snpc.types import FloatArray, Group

CLOSED_FORM_STATISTICS = frozenset(
    {"moment", "centred", "sums", "apart", "joint", "coupled"}
)  # of the statistics that closed forms take
CHUNK_ROWS = 64  # rows
ROUNDING_ERROR = (
    1e-6  # of the square of a mean: what rounding leaves of it, times the root of how many columns there are
)


@dataclass(frozen=True)
class ConsumerMoments:
    """What one weight reads of a group: the second moment [n, n] of its columns about their mean at each node that uses
    it, summed over these nodes; the means [n] there; how many rows."""

    moment: FloatArray
    means: tuple[FloatArray, ...]
    count: float


@dataclass(frozen=True)
class GroupMoments:
    """Second moments of a group's activations, as its form needs them.

    "scores": ``first`` (queries) and ``second`` (centred keys) [blocks, d, d], over ``count`` and ``second_count``
    rows. "coupled": ``first``, what the scores lose [blocks, size, size]. "values": ``context_tensors``
    [blocks][repeats].
    "refit": ``context_tensors`` [1][readers].
    """

    query_or_loss: FloatArray | None = None
    key: FloatArray | None = None
    count: float = 0.0
    second_count: float = 0.0
    consumers: tuple[tuple[ConsumerMoments, ...], ...] = ()


@dataclass(frozen=True)
class MomentSet:
    """Moments of the groups that have a closed form. ``forms``: group id -> "scores", "coupled", "values" or "refit";
    ``skipped``: group id -> why it has none; ``samples`` calibration samples were used, of ``source``."""

    analysis: Analysis
    forms: Mapping[str, str]
    moments: Mapping[str, GroupMoments]
    skipped: Mapping[str, str]
    samples: int = 0
    source: str = ""


def required_statistics(analysis: Analysis, group: Group, form: str) -> tuple[str, ...]:
    """Names of the statistics that a form takes. Those with "#" are of one activation: "joint:hidden#0.1" of the second
    node that uses the first reader."""
    if form == "scores":
        return ("moment:query", "centred:key", "sums:query", "sums:key")
    if form == "coupled":
        return ("coupled:query",)
    if form == "values":
        return tuple(f"apart:context#0.{k}" for k in range(len(context_tensors(group))))
    uses = consumer_uses(analysis.traced_graph, group)
    return tuple(f"joint:{use.probe.kind}#{r}.{k}" for r, mine in enumerate(uses) for k, use in enumerate(mine))


def group_moments(form: str, arrays: Mapping[str, FloatArray]) -> GroupMoments:
    """``arrays``: what ``required_statistics`` names, under these names."""
    if form == "scores":
        queries, keys = (float(arrays[f"sums:{kind}"][0, -1]) for kind in ("query", "key"))
        return GroupMoments(arrays["moment:query"], arrays["centred:key"], queries, keys)
    if form == "coupled":
        return GroupMoments(arrays["coupled:query"])
    readers: dict[int, dict[int, FloatArray]] = defaultdict(dict)
    for name, array in arrays.items():
        reader, use = name.partition("#")[2].split(".")
        readers[int(reader)][int(use)] = array
    uses = [[mine[k] for k in sorted(mine)] for _, mine in sorted(readers.items())]
    if form == "refit":
        return GroupMoments(
            consumers=(tuple(consumer_moments([unpack_symmetric(sums) for sums in mine]) for mine in uses),)
        )
    repeats, blocks = uses[0][0].shape[:2]
    return GroupMoments(
        consumers=tuple(
            tuple(consumer_moments([a[r, b].copy() for a in uses[0]]) for r in range(repeats)) for b in range(blocks)
        )
    )


def consumer_moments(sums: Sequence[FloatArray]) -> ConsumerMoments:
    """From X'X [n + 1, n + 1] per use, with a column of ones behind the others; taken over.

    X'X was summed in float32, so where a column hardly varies about its mean what is left without the mean is rounding,
    and may be negative: that much of the mean stays on the diagonal.
    """
    counts = [max(float(s[-1, -1]), 1.0) for s in sums]
    means = tuple(s[-1, :-1] / n for s, n in zip(sums, counts, strict=True))
    moment: FloatArray | None = None
    for total, count, mean in zip(sums, counts, means, strict=True):
        centred = total[:-1, :-1]
        for start in range(0, len(mean), CHUNK_ROWS):  # in pieces that stay in the cache
            piece = slice(start, start + CHUNK_ROWS)
            centred[piece] -= np.outer(count * mean[piece], mean)
        centred.flat[:: len(mean) + 1] += ROUNDING_ERROR * np.sqrt(len(mean)) * count * mean**2
        moment = centred if moment is None else moment + centred
    assert moment is not None
    return ConsumerMoments(moment, means, sum(counts))


class LazyMoments(Mapping[str, GroupMoments]):
    """Moments by group id, made from its sums when they are asked for: those may lie in files, and are big."""

    def __init__(self, forms: Mapping[str, str], sums: Mapping[str, Mapping[str, FloatArray]]) -> None:
        self.forms = forms
        self.sums = sums
        self.last: tuple[str, GroupMoments] | None = None  # asked for again, for the next width

    def __getitem__(self, group: str) -> GroupMoments:
        if self.last is None or self.last[0] != group:
            self.last = (group, group_moments(self.forms[group], self.sums[group]))
        return self.last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)
