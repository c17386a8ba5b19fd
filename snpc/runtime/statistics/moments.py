"""Second moments of a group's activations, as its closed form takes them; computed from measured statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from snpc.passes.weights import GroupWeights
from snpc.runtime.batches import unpack_symmetric
from snpc.runtime.statistics.keys import StatisticKey
from snpc.types import ClosedFormKind, FloatArray

CHUNK_ROWS = 64  # rows that stay in the cache
ROUNDING_ERROR = 1e-6  # relative to the square of a mean, per root of the number of columns


@dataclass(frozen=True)
class ConsumerMoments:
    """What one consumer weight reads, in n columns. ``moment`` [n, n]: the second moment about the mean, summed over
    the nodes that use the weight. ``means``: [n] at each of these nodes. ``count``: number of rows. ``odd``: X'X of
    each use over one half of the samples, packed, where halves were kept apart."""

    moment: FloatArray
    means: tuple[FloatArray, ...]
    count: float
    odd: tuple[FloatArray, ...] = ()

    def odd_moment(self) -> FloatArray | None:
        """[n, n] in float32: the part of ``moment`` of one half of the samples, about the same means."""
        total: FloatArray | None = None
        for packed, mean in zip(self.odd, self.means, strict=bool(self.odd)):
            moment = moment_about(unpack_symmetric(packed), mean)
            total = moment if total is None else total + moment
        return total


@dataclass(frozen=True)
class ScoreMoments:
    """For "low_rank_qk": ``query`` [blocks, d, d], the second moment of the queries over ``query_count`` rows, and
    ``key`` [blocks, d, d], that of the centered keys over ``key_count`` rows."""

    query: FloatArray
    key: FloatArray
    query_count: float
    key_count: float


@dataclass(frozen=True)
class GroupMoments:
    """Second moments of a group's activations. Its closed form fills one of the fields.

    ``scores``: "low_rank_qk". ``score_losses``: [blocks, size, size] each, see ``score_loss.py``: one of all products
    of "score_selection", one per product of "score_refit". ``consumers``: [blocks][repeats] of "low_rank_vo",
    [1][consumers] of "refit". ``normalized``: of the outputs of each normalization of a hidden layer or of queries and
    keys, beside "refit" and "score_refit".
    """

    scores: ScoreMoments | None = None
    score_losses: tuple[FloatArray, ...] = ()
    consumers: tuple[tuple[ConsumerMoments, ...], ...] = ()
    normalized: tuple[ConsumerMoments, ...] = ()


@dataclass(frozen=True)
class MomentSet:
    """Moments by group id, of the groups that have a closed form (``kinds``). ``skipped``: group id -> why it has none;
    ``samples`` calibration samples were used, of ``source``."""

    kinds: Mapping[str, ClosedFormKind]
    moments: Mapping[str, GroupMoments]
    skipped: Mapping[str, str]
    samples: int = 0
    source: str = ""


def required_statistics(weights: GroupWeights) -> tuple[StatisticKey, ...]:
    """The statistics that the group's closed form takes."""
    match weights.kind:
        case "low_rank_qk":
            return (
                StatisticKey("moment", "query"),
                StatisticKey("gram_centered", "key"),
                StatisticKey("row_sums", "query"),
                StatisticKey("row_sums", "key"),
            )
        case "score_selection":
            return (StatisticKey("score_loss", "query"),)
        case "low_rank_vo":
            return tuple(StatisticKey("gram_per_repeat", use.probe.kind, 0, k) for k, use in enumerate(weights.uses[0]))
        case "refit":
            read = [
                StatisticKey("gram_joint", use.probe.kind, consumer, k)
                for consumer, uses in enumerate(weights.uses)
                for k, use in enumerate(uses)
            ]
            return (*read, *normalized_keys(weights))
        case "score_refit":
            products = [StatisticKey("score_loss", "query", 0, k) for k in range(len(weights.products))]
            return (*products, *normalized_keys(weights))
        case None:
            return ()


def normalized_keys(weights: GroupWeights) -> list[StatisticKey]:
    """One per normalization and probe of its outputs."""
    return [
        StatisticKey("gram_joint", "normalized", number, k)
        for number, normalization in enumerate(weights.normalizations)
        for k in range(len(normalization.probes))
    ]


def group_moments(
    kind: ClosedFormKind, sums: Mapping[StatisticKey, FloatArray], odd: Mapping[StatisticKey, FloatArray] | None = None
) -> GroupMoments:
    """From the sums that ``required_statistics`` names; ``odd``: those of them whose halves were kept apart."""
    if kind == "low_rank_qk":
        counts = [float(sums[StatisticKey("row_sums", probe)][0, -1]) for probe in ("query", "key")]
        query, key = sums[StatisticKey("moment", "query")], sums[StatisticKey("gram_centered", "key")]
        return GroupMoments(scores=ScoreMoments(query, key, *counts))
    if kind == "score_selection":
        return GroupMoments(score_losses=(sums[StatisticKey("score_loss", "query")],))
    uses = sums_by_use({key: array for key, array in sums.items() if key.probe != "normalized"})
    inside = sums_by_use({key: array for key, array in sums.items() if key.probe == "normalized"})
    normalized = unpacked_moments(inside)
    if kind == "score_refit":
        return GroupMoments(score_losses=tuple(uses[0]), normalized=normalized)
    if kind == "refit":
        read = unpacked_moments(uses)
        halves = sums_by_use({key: array for key, array in (odd or {}).items() if key.probe != "normalized"})
        read = tuple(replace(m, odd=tuple(half)) for m, half in zip(read, halves, strict=True)) if halves else read
        return GroupMoments(consumers=(read,), normalized=normalized)
    repeats, blocks = uses[0][0].shape[:2]
    return GroupMoments(
        consumers=tuple(
            tuple(consumer_moments([a[r, b].copy() for a in uses[0]]) for r in range(repeats)) for b in range(blocks)
        )
    )


def unpacked_moments(sums: Sequence[Sequence[FloatArray]]) -> tuple[ConsumerMoments, ...]:
    """From packed sums [consumers][uses]."""
    return tuple(consumer_moments([unpack_symmetric(packed) for packed in arrays]) for arrays in sums)


def sums_by_use(sums: Mapping[StatisticKey, FloatArray]) -> list[list[FloatArray]]:
    """[consumers][uses]: the sums in the order of these numbers in their keys."""
    by_consumer: dict[int, dict[int, FloatArray]] = defaultdict(dict)
    for name, array in sums.items():
        assert name.consumer is not None and name.use is not None
        by_consumer[name.consumer][name.use] = array
    return [[arrays[k] for k in sorted(arrays)] for _, arrays in sorted(by_consumer.items())]


def consumer_moments(sums: Sequence[FloatArray]) -> ConsumerMoments:
    """From X'X [n + 1, n + 1] per use, with a column of ones behind the others. The arrays are overwritten.

    X'X was summed in float32. Where a column hardly varies about its mean, subtracting the mean leaves rounding errors,
    which may be negative; the diagonal keeps as much of the mean as these errors can be.
    """
    counts = [max(float(s[-1, -1]), 1.0) for s in sums]
    means = tuple(s[-1, :-1] / n for s, n in zip(sums, counts, strict=True))
    moment: FloatArray | None = None
    for total, count, mean in zip(sums, counts, means, strict=True):
        centered = total[:-1, :-1]
        for start in range(0, len(mean), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            centered[chunk] -= np.outer(count * mean[chunk], mean)
        centered.flat[:: len(mean) + 1] += ROUNDING_ERROR * np.sqrt(len(mean)) * count * mean**2
        moment = centered if moment is None else moment + centered
    assert moment is not None
    return ConsumerMoments(moment, means, sum(counts))


def moment_about(sums: FloatArray, mean: FloatArray) -> FloatArray:
    """[n, n]: the second moment about any ``mean`` [n], from X'X [n + 1, n + 1] with a column of ones,
    which is overwritten."""
    count, total, moment = sums[-1, -1], sums[-1, :-1].copy(), sums[:-1, :-1]
    for start in range(0, len(mean), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        moment[chunk] += np.outer(mean[chunk], count * mean - total) - np.outer(total[chunk], mean)
    return moment


class LazyMoments(Mapping[str, GroupMoments]):
    """Moments by group id, computed from their sums when they are read: sums are big, and may lie in files. ``odd``:
    those of one half of the samples."""

    def __init__(
        self,
        kinds: Mapping[str, ClosedFormKind],
        sums: Mapping[str, Mapping[str, FloatArray]],
        odd: Mapping[str, Mapping[str, FloatArray]],
    ) -> None:
        self.kinds = kinds
        self.sums = sums
        self.odd = odd
        self.last: tuple[str, GroupMoments] | None = None  # read again for the next width

    def __getitem__(self, group_id: str) -> GroupMoments:
        if self.last is None or self.last[0] != group_id:
            self.last = None  # before the next are made
            sums, odd = (
                {StatisticKey.parse(name): array for name, array in part.get(group_id, {}).items()}
                for part in (self.sums, self.odd)
            )
            self.last = (group_id, group_moments(self.kinds[group_id], sums, odd))
        return self.last[1]

    def release(self) -> None:
        """Forget what was read last, which may be a gigabyte."""
        self.last = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)
