"""Distances of outputs against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from snpc.errors import UserError
from snpc.runtime.evaluation.distances import Domain, OutputMetric, same_finiteness

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 5, 7)), RNG.normal(size=(3, 5, 7))


def softmax(x: Array) -> Array:
    return np.asarray(np.exp(x) / np.exp(x).sum(-1, keepdims=True))


def written_out(p: Array, q: Array) -> float:
    """Mean over rows of sum p log(p/q)."""
    return float(np.mean(np.sum(p * np.log(p / q), -1)))


@pytest.mark.parametrize(
    ("domain", "form"),
    [("logits", lambda x: x), ("log_probabilities", lambda x: np.log(softmax(x))), ("probabilities", softmax)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_divergence_is_that_of_the_definition(domain: Domain, form: Any) -> None:
    x, y = LOGITS
    expected = written_out(softmax(x), softmax(y))
    assert OutputMetric("kl", domain).distance(form(x), form(y)) == pytest.approx(expected)
    assert OutputMetric("kl", domain).distance(form(x), form(x)) == 0
    other_axis = OutputMetric("kl", domain, axis=-3)
    assert other_axis.distance(*(np.moveaxis(form(a), -1, 0)[None] for a in (x, y))) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["kl", "relative", "cosine"])
def test_small_changes_count_by_their_square(name: str) -> None:
    """Loss curves add changes up as squares."""
    x, step = LOGITS[0], 1e-3 * LOGITS[1]
    metric = OutputMetric(name, "logits")
    assert metric.change(x, x + 2 * step) == pytest.approx(4 * metric.change(x, x + step), rel=0.05)


@pytest.mark.parametrize("name", ["kl", "relative"])
def test_an_output_of_zeros_has_changed_by_one(name: str) -> None:
    x = LOGITS[0]
    assert OutputMetric(name, "logits").change(x, np.zeros_like(x)) == pytest.approx(1)


def test_logits_may_be_shifted() -> None:
    x = LOGITS[0]
    assert OutputMetric("kl", "logits").distance(x, x + 5) == pytest.approx(0, abs=1e-12)


def test_rows_without_mass_do_not_count() -> None:
    """Of a matrix of log-probabilities that need not add up to one, the row of a point without a match says nothing."""
    x, y = np.array([[[-0.1, -9.0], [-80.0, -90.0]]]), np.array([[[-0.1, -9.0], [-95.0, -70.0]]])
    assert OutputMetric("kl", "log_probabilities").distance(x, y) < 1e-20
    assert OutputMetric("relative", "log_probabilities").distance(x, y) < 1e-20
    assert OutputMetric("relative").distance(x, y) > 0.2


@pytest.mark.parametrize("mask", [-np.inf, -1e4, np.finfo(np.float32).min])
@pytest.mark.parametrize("name", ["kl", "relative"])
def test_masked_logits_do_not_count(name: str, mask: float) -> None:
    x, y = (a.astype(np.float32).copy() for a in LOGITS)
    expected = OutputMetric(name, "logits").distance(x[..., 2:], y[..., 2:])
    x[..., :2] = y[..., :2] = mask
    assert OutputMetric(name, "logits").distance(x, y) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["kl", "relative", "cosine", "mismatch"])
def test_a_number_that_is_none_any_more_is_infinitely_far(name: str, value: float) -> None:
    x = LOGITS[0].copy()
    y = x.copy()
    y[0, 0, 0] = value
    for before, after in ((x, y), (y, x)):
        assert OutputMetric(name, "logits").distance(before, after) == np.inf
        assert OutputMetric(name, "logits").change(before, after) == np.inf
    assert OutputMetric(name, "logits").distance(y, y) == pytest.approx(0, abs=1e-12)


def test_finiteness_tells_infinities_apart() -> None:
    a = np.array([np.inf, -np.inf, np.nan, 1.0])
    assert same_finiteness(a, a)
    assert not same_finiteness(a, -a)
    assert same_finiteness(np.array([1]), np.array([2]))


def test_relative_is_root_mean_square() -> None:
    assert OutputMetric("relative").distance(np.array([[3.0, 4.0]]), np.array([[3.0, 1.0]])) == pytest.approx(3 / 5)


def test_cosine() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 3.0], [0.0, 1.0], [0.0, 0.0]])
    assert OutputMetric("cosine").distance(x, y) == pytest.approx(1 / 3)


def test_mismatch_is_of_entries() -> None:
    assert OutputMetric("mismatch").distance(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]])) == 0.25


def test_rows_that_do_not_count() -> None:
    x, y = LOGITS
    mask = np.ones((3, 5), bool)
    mask[:, 3:] = False
    for name in ("kl", "relative", "cosine"):
        metric = OutputMetric(name, "logits")
        assert metric.distance(x, y, mask) == pytest.approx(metric.distance(x[:, :3], y[:, :3]))


@pytest.mark.parametrize("answer", [float("nan"), -1.0, [], "far", [0.5, -0.5]])
def test_what_a_function_may_not_say(answer: Any) -> None:
    with pytest.raises(UserError, match="--metric mine: it gave"):
        OutputMetric("mine", function=lambda a, b: answer).distance(*LOGITS)


def test_a_function_may_answer_per_sample() -> None:
    metric = OutputMetric("mine", function=lambda a, b: np.abs(a - b).mean((1, 2)))
    assert metric.distance(*LOGITS) == pytest.approx(np.abs(LOGITS[0] - LOGITS[1]).mean())
