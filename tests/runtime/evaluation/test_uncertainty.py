"""Intervals hold the true value as often as they say, and errors are those of independent samples."""

from __future__ import annotations

import numpy as np
import pytest

from snpc.runtime.evaluation.compare import judge_outputs
from snpc.runtime.evaluation.distances import OutputMetric
from snpc.runtime.evaluation.metrics import OutputMetrics
from snpc.runtime.evaluation.uncertainty import share_interval
from snpc.types import Difference

KL = OutputMetrics({"y": OutputMetric("kl", "logits")}, final=True)


def judged(a: list[np.ndarray], b: list[np.ndarray], metrics: OutputMetrics = KL) -> Difference:
    (found,) = judge_outputs([{"y": x} for x in a], [{"y": y} for y in b], metrics)
    return found


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_the_interval_of_a_share_covers_it(share: float) -> None:
    rng = np.random.default_rng(0)
    inside = [
        low <= share <= high
        for low, high in (share_interval((rng.random(64) < share).astype(np.float64), 1) for _ in range(400))
    ]
    assert 0.9 <= np.mean(inside) <= 1.0


def test_the_error_is_that_of_a_mean_over_samples() -> None:
    """Over many draws of 32 samples, distances scatter by as much as the errors say."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(60):
        a = rng.standard_normal((32, 10))
        found.append(judged([a[:16], a[16:]], [b + rng.standard_normal(b.shape) for b in (a[:16], a[16:])]))
    scatter = np.std([d.distance for d in found])
    assert 0.7 < np.mean([d.error for d in found]) / scatter < 1.4


def test_rows_of_one_sample_are_not_independent() -> None:
    """Sixteen tokens that are right or wrong together say as much as one."""
    rng = np.random.default_rng(2)
    a = np.repeat(rng.standard_normal((20, 1, 5)), 16, axis=1)
    b = np.where(np.arange(20)[:, None, None] < 10, a, -a)
    found = judged([a], [b])
    assert found.rows == 16 and found.interval is not None
    low, high = found.interval
    assert low < 0.35 and high > 0.65


def test_one_sample_has_no_error() -> None:
    found = judged([np.eye(3)[:1]], [np.eye(3)[1:2]])
    assert (found.error, found.interval) == (0.0, None)


def test_what_is_not_judged_has_none() -> None:
    metrics = OutputMetrics({"y": OutputMetric("none")}, final=True)
    found = judged([np.ones((4, 2))], [np.zeros((4, 2))], metrics)
    assert (found.error, found.interval, found.grade) == (0.0, None, "unknown")
