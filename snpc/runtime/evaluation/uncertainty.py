"""How certain a measured difference is: a standard error over samples, and an interval for shares of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from snpc.runtime.evaluation.distances import OutputMetric
from snpc.types import AnyArray, Difference

NORMAL_95 = 1.96  # standard errors on either side of a mean that hold it in 95 % of the cases


def with_uncertainty(
    difference: Difference, reference: Sequence[AnyArray], other: Sequence[AnyArray], metric: OutputMetric
) -> Difference:
    """The same with its ``error`` and ``interval``. ``reference``, ``other``: [samples, ...] of each batch.

    Samples are independent, rows of one sample (tokens) are not, so both are computed from a value per sample.
    """
    if not metric.judged or metric.function is not None or not all(a.ndim for a in reference):
        return difference
    slices = [(a[k : k + 1], b[k : k + 1]) for a, b in zip(reference, other, strict=True) for k in range(len(a))]
    if len(slices) < 2:
        return difference
    distances = np.array([metric.distance(a, b) for a, b in slices])
    error = float(distances.std(ddof=1) / np.sqrt(len(slices)))
    rows = rows_per_sample(slices[0][0], metric)
    if difference.agreement is None:
        return replace(difference, error=error, rows=rows)
    shares = np.array([np.mean(a.argmax(metric.axis) == b.argmax(metric.axis)) for a, b in slices])
    return replace(difference, error=error, rows=rows, interval=share_interval(shares, rows))


def rows_per_sample(sample: AnyArray, metric: OutputMetric) -> int:
    """How many rows of classes, or of values, a sample has."""
    return sample.size // max(sample.shape[metric.axis], 1) if sample.ndim > 1 else 1


def share_interval(shares: np.ndarray[tuple[int, ...], np.dtype[np.float64]], rows: int) -> tuple[float, float]:
    """95 % interval of the mean of ``shares`` [samples]: Wilson's where each sample has one row, and is right or wrong;
    else the normal one."""
    count, mean = len(shares), float(shares.mean())
    if rows > 1:
        half = NORMAL_95 * float(shares.std(ddof=1)) / count**0.5
        return max(0.0, mean - half), min(1.0, mean + half)
    z = NORMAL_95**2 / count
    center, half = (mean + z / 2) / (1 + z), float(np.sqrt(z * mean * (1 - mean) + z**2 / 4)) / (1 + z)
    return max(0.0, center - half), min(1.0, center + half)
