"""The ridge by halves, against the errors on the population that the samples were drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from snpc.runtime.closed_form.algebra import refit_rows
from snpc.runtime.closed_form.ridge import HALF_TO_WHOLE, RIDGES, Regression, choose_ridge, refit_regression
from snpc.types import FloatArray

UNITS, KEPT, OUTPUTS = 60, 40, 12


def decaying_covariance(rng: np.random.Generator, power: float) -> FloatArray:
    """[units, units]: eigenvalues 1, 2^-power, 3^-power and so on, in random directions."""
    basis = np.linalg.qr(rng.standard_normal((UNITS, UNITS)))[0]
    return np.asarray((basis * np.arange(1, UNITS + 1) ** -power) @ basis.T)


def half_moments(rng: np.random.Generator, covariance: FloatArray, rows: int) -> list[FloatArray]:
    """Second moments of two halves of ``rows`` normal rows."""
    drawn = rng.multivariate_normal(np.zeros(UNITS), covariance, rows, method="eigh")
    return [half.T @ half for half in (drawn[::2], drawn[1::2])]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rows", [50, 120, 600, 6000])
def test_the_chosen_ridge_is_near_the_best_on_the_population(power: float, rows: int) -> None:
    """Mean over draws of the explained share of the error; the best of a fine grid is chosen with knowledge of the
    population, draw by draw."""
    rng = np.random.default_rng([int(10 * power), rows])
    keep, fine = np.arange(KEPT), np.geomspace(1e-5, 30, 60)
    chosen, best, tiny = [], [], []
    for _ in range(8):
        covariance, weight = decaying_covariance(rng, power), rng.standard_normal((UNITS, OUTPUTS))
        halves = [refit_regression(moment, weight, keep) for moment in half_moments(rng, covariance, rows)]
        whole, population = halves[0] + halves[1], refit_regression(covariance, weight, keep)
        mean_fill = float(np.sum(weight[KEPT:] * (covariance[KEPT:, KEPT:] @ weight[KEPT:])))
        remaining = {r: mean_fill + population.excess_error(whole.solve(r)) for r in (*fine, math.inf)}
        chosen.append(mean_fill + population.excess_error(whole.solve(choose_ridge(halves).ridge)))
        best.append(min(remaining.values()))
        tiny.append(remaining[fine[0]])
    assert np.mean(chosen) <= 1.03 * np.mean(best)
    if rows <= 120:
        assert np.mean(chosen) < 0.95 * np.mean(tiny)  # where rows are few the choice matters


def test_columns_that_say_nothing_choose_the_mean() -> None:
    """Kept columns that are independent of the removed ones: in most draws nothing is better than the mean, and what is
    chosen otherwise loses next to nothing on the population."""
    keep, choices, losses, without_choice = np.arange(KEPT), [], [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        weight = rng.standard_normal((UNITS, OUTPUTS))
        halves = [refit_regression(m, weight, keep) for m in half_moments(rng, np.eye(UNITS), 100)]
        choice = choose_ridge(halves)
        fitted = (halves[0] + halves[1]).solve(choice.ridge)
        assert choice.beats_mean or not fitted.any()
        choices.append(choice.beats_mean)
        losses.append(float(np.sum(fitted**2)) / float(np.sum(weight[KEPT:] ** 2)))
        without_choice.append(float(np.sum((halves[0] + halves[1]).solve(RIDGES[0]) ** 2) / np.sum(weight[KEPT:] ** 2)))
    assert sum(choices) <= 8
    assert max(losses) < 0.02
    assert min(without_choice) > 0.2


def test_every_column_is_told_about_at_any_scale() -> None:
    """A linear relation without noise: the smallest ridge, whatever the unit of the columns."""
    rng = np.random.default_rng(0)
    keep, mixing = np.arange(KEPT), rng.standard_normal((KEPT, UNITS - KEPT))
    for scale in (1e-6, 1.0, 1e6):
        drawn = scale * rng.standard_normal((400, KEPT))
        rows = np.hstack([drawn, drawn @ mixing])
        halves = [refit_regression(r.T @ r, np.ones((UNITS, OUTPUTS)), keep) for r in (rows[::2], rows[1::2])]
        assert choose_ridge(halves).ridge <= RIDGES[0]


def test_the_walk_finds_what_the_whole_grid_has() -> None:
    rng = np.random.default_rng(3)
    for power, rows in [(0.5, 80), (1.0, 200), (2.0, 2000)]:
        moments = half_moments(rng, decaying_covariance(rng, power), rows)
        halves = [
            refit_regression(m, rng.standard_normal((UNITS, 1)) @ np.ones((1, 3)), np.arange(KEPT)) for m in moments
        ]
        first, second = halves
        errors = {r: second.excess_error(first.solve(r)) + first.excess_error(second.solve(r)) for r in RIDGES}
        tried = choose_ridge(halves).excess
        assert min(tried, key=lambda r: tried[r]) == min(errors, key=lambda r: errors[r])
        np.testing.assert_allclose([tried[r] for r in tried], [errors[r] for r in tried], rtol=1e-3)


def test_random_combinations_stand_for_many_targets() -> None:
    rng = np.random.default_rng(4)
    moments = half_moments(rng, decaying_covariance(rng, 1.0), 90)
    weight = rng.standard_normal((UNITS, 640)) * np.geomspace(1, 30, 640)  # outputs of very different size
    halves = [refit_regression(moment, weight, np.arange(KEPT)) for moment in moments]
    first, second = halves
    errors = {
        r: second.excess_error(first.solve(r)) + first.excess_error(second.solve(r)) for r in np.geomspace(1e-4, 10, 51)
    }
    ridge = choose_ridge(halves).ridge / HALF_TO_WHOLE
    reached = second.excess_error(first.solve(ridge)) + first.excess_error(second.solve(ridge))
    assert reached <= 0.99 * min(errors.values())


def test_fewer_rows_than_columns_are_no_error() -> None:
    rng = np.random.default_rng(5)
    halves = [
        refit_regression(m, np.eye(UNITS), np.arange(KEPT)) for m in half_moments(rng, decaying_covariance(rng, 1.0), 8)
    ]
    assert choose_ridge(halves).ridge > RIDGES[0]
    empty = [Regression(np.zeros((0, 0)), np.zeros((0, 3)))] * 2
    assert not choose_ridge(empty).beats_mean
    constant = [Regression(np.zeros((4, 4)), np.zeros((4, 3)))] * 2
    assert not choose_ridge(constant).beats_mean


def test_the_regression_of_a_refit_gives_its_rows() -> None:
    rng = np.random.default_rng(6)
    moment, weight = decaying_covariance(rng, 1.0), rng.standard_normal((UNITS, OUTPUTS))
    keep = np.sort(rng.permutation(UNITS)[:KEPT])
    regression = refit_regression(moment, weight, keep)
    share = np.trace(moment) / UNITS / regression.mean_diagonal  # refit_rows takes the mean over all columns
    np.testing.assert_allclose(
        weight[keep] + regression.solve(0.01 * share), refit_rows(moment, weight, keep, 0.01), rtol=1e-9
    )
