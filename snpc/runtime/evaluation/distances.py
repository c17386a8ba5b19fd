"""Distances of one output: Kullback-Leibler divergence, relative change, cosine, or a function of the user.

- "kl": Kullback-Leibler divergence in nats, mean over rows, of the original's distribution over classes from the other;
  for logits, log-probabilities and probabilities. Log-probabilities need not add up to one (matchers have matrices of
  them): then it is the generalized divergence ``sum p log(p/q) - p + q``, so that rows without mass do not count.
- "relative": root mean square of the difference over that of the original; for heat maps, masks, boxes, regression.
  Of logits and log-probabilities, only what a softmax sees counts: see ``visible_values``.
- "cosine": one minus the cosine, mean over rows; for embeddings of length one.
- "mismatch": share of entries that differ; for integers, where a model has no other output.
- "none": not judged: KV caches, and integers beside other outputs.
- any other name: a function of the user.

All distances are over entries that are finite in both. A value that is finite in one only is an infinite distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from snpc.errors import UserError
from snpc.types import AnyArray, BoolArray, FloatArray, MetricFunction

Domain = Literal["probabilities", "log_probabilities", "logits", "values"]
MetricCandidate = Literal["", "integers", "linear", "classes"]

METRIC_NAMES = ("kl", "relative", "cosine", "mismatch", "none")
INVISIBLE = 1e3  # a logit so far below the largest of its row has no probability at any precision: a mask
# a softmax at 1 tells little of a sample of which the model is sure, so few samples are noisy: docs/design-notes.md
PLANNING_TEMPERATURE = 4.0
LARGEST_LOGARITHM = 100.0  # of what is called a log-probability: a broken model may have any, and must not overflow
CACHED_ENTRIES = 1 << 15
SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class OutputMetric:
    """How one output is judged.

    ``name``: one of ``METRIC_NAMES``, or that of ``function``. ``domain``, ``axis``: what its values are, and the axis
    of the classes. ``why``: for reports. ``chosen``: by the user. ``candidate``: what values decide yet.
    """

    name: str
    domain: Domain = "values"
    axis: int = -1
    why: str = ""
    function: MetricFunction | None = field(default=None, compare=False)
    chosen: bool = False
    candidate: MetricCandidate = ""
    temperature: float = 1.0

    @property
    def judged(self) -> bool:
        return self.name != "none"

    def distance(self, reference: AnyArray, other: AnyArray, mask: BoolArray | None = None) -> float:
        """Distance of ``other`` from ``reference``, 0 where they are equal. ``mask`` [batch, rows]: rows that count."""
        total = self.sums(reference, other, mask)
        if self.name == "relative":
            return float(np.sqrt(total.distance / max(total.scale, 1e-300)))
        return total.distance / max(total.rows, 1)

    def change(self, reference: AnyArray, other: AnyArray, mask: BoolArray | None = None) -> float:
        """The distance for planning: like a squared error, and as a share of the distance of an output that is zero
        (of classes: of equal probabilities), so that several outputs can be averaged. Classes are compared at
        ``PLANNING_TEMPERATURE``."""
        total = replace(self, temperature=PLANNING_TEMPERATURE).sums(reference, other, mask)
        if self.name in ("relative", "kl"):
            return total.distance / max(total.scale, 1e-300)
        return total.distance / max(total.rows, 1)

    def relative_change(self, reference: AnyArray, other: AnyArray) -> float:
        """The distance by "relative", of the same values."""
        return replace(self, name="relative", function=None).distance(reference, other)

    def sums(self, reference: AnyArray, other: AnyArray, mask: BoolArray | None = None) -> DistanceSums:
        """Sums over samples, taken one by one, since logits over a vocabulary are big."""
        if not same_finiteness(reference, other):
            return DistanceSums(np.inf, 1.0, 1)
        if self.function is not None:
            values = called_metric(self.name, self.function, reference, other)
            return DistanceSums(float(values.sum()), 1.0, values.size)
        total = DistanceSums(0.0, 0.0, 0)
        for x, y in sample_pairs(reference, other, mask):
            total += self.of_sample(x, y)
        return total

    def of_sample(self, x: FloatArray, y: FloatArray) -> DistanceSums:
        """Of one sample, or of its rows that count."""
        total = DistanceSums(0.0, 0.0, 0)
        if not x.size:
            return total
        for rows in row_chunks(*class_rows(x, y, self.axis)):
            total += self.of_rows(*rows)
        return total

    def of_rows(self, x: FloatArray, y: FloatArray) -> DistanceSums:
        """Of [rows, classes]."""
        if self.name == "kl":
            return divergence(self.domain, x, y, self.temperature)
        if self.name == "cosine":
            return cosine_distance(x, y)
        if self.name == "mismatch":
            return DistanceSums(float(np.sum((x != y) & np.isfinite(x))), 1.0, x.size)
        a, b = self.visible_values(x, y)
        return DistanceSums(float(np.sum((a - b) ** 2)), float(np.sum(a**2)), a.size)

    def visible_values(self, x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What "relative" compares of [rows, classes]: the values; of log-probabilities the probabilities; of logits
        those that are not masked. Entries that are not finite are zero in both."""
        finite = np.isfinite(x) & np.isfinite(y)
        if self.domain == "log_probabilities":
            return tuple(np.where(finite, np.exp(np.where(finite, a, 0.0)), 0.0) for a in (x, y))  # type: ignore[return-value]
        if self.domain == "logits":
            finite &= ~(masked_logits(x) & masked_logits(y))
        return np.where(finite, x, 0.0), np.where(finite, y, 0.0)


@dataclass(frozen=True)
class DistanceSums:
    """``distance`` summed over ``rows`` (or entries), and ``scale``: that of an output which is zero."""

    distance: float
    scale: float
    rows: int

    def __add__(self, other: DistanceSums) -> DistanceSums:
        return DistanceSums(self.distance + other.distance, self.scale + other.scale, self.rows + other.rows)


def same_finiteness(reference: AnyArray, other: AnyArray) -> bool:
    """Are NaN and either infinity at the same entries? True for what has no such values."""
    if reference.dtype.kind in "biuOSU" or other.dtype.kind in "biuOSU":
        return True
    x, y = as_float(reference), as_float(other)
    if np.isfinite(x).all() and np.isfinite(y).all():
        return True
    return all(np.array_equal(test(x), test(y)) for test in (np.isnan, np.isposinf, np.isneginf))


def as_float(array: AnyArray) -> AnyArray:
    """bfloat16 as float32; what numpy knows stays."""
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def sample_pairs(
    reference: AnyArray, other: AnyArray, mask: BoolArray | None
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Both arrays sample by sample as float64, without rows that ``mask`` does not have."""
    arrays = (np.atleast_1d(reference), np.atleast_1d(other))
    for k in range(len(arrays[0])):
        x, y = (np.asarray(a[k] if mask is None else a[k][mask[k]], np.float64) for a in arrays)
        yield x, y


def class_rows(x: FloatArray, y: FloatArray, axis: int) -> tuple[FloatArray, FloatArray]:
    """[rows, classes] of both."""
    if x.ndim == 0:
        return x.reshape(1, 1), y.reshape(1, 1)
    return tuple(np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]) for a in (x, y))  # type: ignore[return-value]


def row_chunks(x: FloatArray, y: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Neighboring rows of both, so few that what is computed of them stays in the processor's cache."""
    count = max(CACHED_ENTRIES // max(x.shape[-1], 1), 1)
    for start in range(0, len(x), count):
        yield x[start : start + count], y[start : start + count]


def divergence(domain: Domain, x: FloatArray, y: FloatArray, temperature: float = 1.0) -> DistanceSums:
    """Kullback-Leibler divergence of rows ``x`` from rows ``y``; ``scale``: of equal probabilities from ``x``."""
    finite = np.isfinite(x) & np.isfinite(y)
    counts = finite.sum(-1)
    rows = counts > 0
    log_p, log_q = (tempered(log_probabilities(domain, a[rows], finite[rows]), temperature) for a in (x, y))
    p, q = np.exp(log_p), np.exp(log_q)
    surplus = q.sum(-1) - p.sum(-1)
    gap = np.subtract(log_p, log_q, out=np.zeros_like(p), where=p > 0)
    distances = np.sum(p * gap, -1) + surplus
    mass = p.sum(-1)
    log_share = np.log(np.maximum(mass, 1e-300)) - np.log(counts[rows])
    from_equal = np.sum(p * np.subtract(log_p, log_share[:, None], out=np.zeros_like(p), where=p > 0), -1)
    return DistanceSums(float(np.maximum(distances, 0).sum()), float(np.maximum(from_equal, 0).sum()), int(rows.sum()))


def tempered(log_p: FloatArray, temperature: float) -> FloatArray:
    """Distributions flattened as by a softmax at ``temperature``; the mass of each row stays."""
    if temperature == 1.0:
        return log_p
    largest = log_p.max(-1, keepdims=True)
    mass = largest + np.log(np.exp(log_p - largest).sum(-1, keepdims=True))
    flat: FloatArray = (log_p - largest) / temperature
    return np.asarray(flat - np.log(np.exp(flat).sum(-1, keepdims=True)) + mass)


def log_probabilities(domain: Domain, rows: FloatArray, finite: BoolArray) -> FloatArray:
    """Logarithms of the probabilities that ``rows`` are; -inf where they are not finite.

    Log-probabilities stay as they are. A probability of zero counts as the least one that float32 has.
    """
    if domain == "log_probabilities":
        return np.where(finite, np.minimum(rows, LARGEST_LOGARITHM), -np.inf)
    if domain == "probabilities":
        clipped = np.where(finite, np.maximum(rows, SMALLEST_PROBABILITY), 0.0)
        total = clipped.sum(-1, keepdims=True)
        return np.where(finite, np.log(np.where(finite, clipped, 1.0)) - np.log(total), -np.inf)
    logits = np.where(finite, rows, -np.inf)
    shifted: FloatArray = logits - logits.max(-1, keepdims=True)
    normalized: FloatArray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def cosine_distance(x: FloatArray, y: FloatArray) -> DistanceSums:
    """One minus the cosine of every row; 1 where one of the two is zero, 0 where both are."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
    norms = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    product = norms[0] * norms[1]
    cosines = np.divide(np.sum(x * y, -1), product, out=np.zeros_like(product), where=product > 0)
    cosines[(norms[0] == 0) & (norms[1] == 0)] = 1.0
    return DistanceSums(float(np.sum(np.maximum(1 - cosines, 0))), float(len(x)), len(x))


def masked_logits(rows: FloatArray) -> BoolArray:
    """Entries of [rows, classes] that no softmax sees."""
    finite = np.where(np.isfinite(rows), rows, -np.inf)
    largest = finite.max(-1, keepdims=True, initial=-np.inf)
    return np.asarray(finite < np.where(np.isfinite(largest), largest, 0.0) - INVISIBLE)


def called_metric(name: str, function: MetricFunction, reference: AnyArray, other: AnyArray) -> FloatArray:
    """What a function of the user says of one output. Raises UserError for anything but numbers from 0 on."""
    result = function(reference, other)
    try:
        values = np.asarray(result, np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise UserError(f"--metric {name}: it gave a {type(result).__name__}, not a number or one per sample") from None
    if not values.size or not np.isfinite(values).all() or (values < 0).any():
        raise UserError(
            f"--metric {name}: it gave {result!r:.80}; it should give a number from 0 on, or one per sample"
        )
    return values
