"""The closed forms against what they claim: brute force, plain least squares, and errors measured on the data."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snpc.runtime.closed_form import elimination
from snpc.runtime.closed_form.algebra import (
    DEFAULT_RIDGE,
    LowRankBasis,
    add_ridge,
    column_signs,
    refit_loss,
    refit_rows,
    solve_low_rank_qk,
    solve_low_rank_vo,
    solve_shared_qk,
    solve_symmetric,
    unit_columns,
)
from snpc.runtime.closed_form.dense_algebra import NUMPY_ALGEBRA
from snpc.runtime.closed_form.elimination import (
    EliminationOrder,
    LeastSquaresSystem,
    ObsState,
    cheapest_units,
    with_factors,
)
from snpc.runtime.closed_form.elimination import eliminate as eliminate_all
from snpc.runtime.statistics.moments import consumer_moments
from snpc.types import FloatArray, IntArray

ROWS = 60
SEEDS = st.integers(0, 10_000)
PLAIN = settings(max_examples=40, deadline=None)


def data(seed: int, size: int, rank: int | None = None, rows: int = ROWS) -> FloatArray:
    """Rows with correlated columns of uneven strength, as activations have them."""
    rng = np.random.default_rng(seed)
    inner = size if rank is None else rank
    return rng.normal(size=(rows, inner)) @ rng.normal(size=(inner, size)) * rng.uniform(0.2, 3, size)


def centre(x: FloatArray) -> FloatArray:
    return np.asarray(x - x.mean(0))


def energy(x: FloatArray) -> float:
    return float(np.sum(x * x))


def eliminate(moment: FloatArray, weight: FloatArray, steps: int = 48) -> EliminationOrder:
    """Units of one column, read by one weight."""
    return eliminate_all([LeastSquaresSystem(moment, weight)], len(moment), steps)


def close(found: float, expected: float, whole: float, rtol: float = 1e-8) -> bool:
    return abs(found - expected) <= rtol * expected + 1e-11 * whole


# -- query and key ---------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 9))
@PLAIN
def test_scores_are_unchanged_at_full_rank(seed: int, size: int) -> None:
    q, k = data(seed, size), centre(data(seed + 1, size))
    found = solve_low_rank_qk(q.T @ q, k.T @ k)
    np.testing.assert_allclose(found.encode @ found.decode, np.eye(size), atol=1e-7)
    np.testing.assert_allclose((q @ found.encode) @ (k @ found.decode.T).T, q @ k.T, atol=1e-7 * np.abs(q @ k.T).max())


@given(SEEDS, st.integers(1, 9), st.integers(1, 9))
@PLAIN
def test_score_loss_is_the_measured_error_over_all_pairs(seed: int, size: int, rank: int) -> None:
    """Also where the data span a subspace only."""
    q, k = data(seed, size, min(rank, size)), centre(data(seed + 1, size))
    found = solve_low_rank_qk(q.T @ q, k.T @ k)
    whole = energy(q @ k.T)
    assert found.loss.shape == (size + 1,)
    assert (np.diff(found.loss) <= 1e-12 * whole).all()
    for kept in range(size + 1):
        approximate = (q @ found.encode[:, :kept]) @ (k @ found.decode[:kept].T).T
        assert close(energy(q @ k.T - approximate), found.loss[kept], whole), kept


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_of_score_dimensions_is_better(seed: int) -> None:
    size, rng = 6, np.random.default_rng(seed)
    q, k = data(seed, size), centre(data(seed + 9, size))
    found = solve_low_rank_qk(q.T @ q, k.T @ k)
    scores = q @ k.T
    for kept in range(1, size):
        loss = found.loss[kept]
        columns = [energy(scores - q[:, list(s)] @ k[:, list(s)].T) for s in combinations(range(size), kept)]
        assert loss < min(columns)  # brute force, so what magnitude or any other criterion would choose is in it
        for _ in range(20):
            basis = np.linalg.qr(rng.normal(size=(size, kept)))[0]
            assert loss < energy(scores - q @ basis @ basis.T @ k.T)
            # the best that can be done with this subspace of queries, whatever is done to the keys
            seen = np.linalg.qr(q @ basis)[0]
            assert loss <= energy(scores - seen @ (seen.T @ scores)) * (1 + 1e-12)
        left, singular, right = np.linalg.svd(scores)
        best = (left[:, :kept] * singular[:kept]) @ right[:kept]
        assert close(loss, energy(scores - best), energy(scores), 1e-7)  # Eckart and Young: none is


@given(SEEDS, st.integers(2, 8))
@PLAIN
def test_scores_of_a_rotated_space_lose_the_same(seed: int, size: int) -> None:
    """q A and k A^-T have the scores of q and k."""
    q, k = data(seed, size), centre(data(seed + 1, size))
    mixed = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0] * 1.7
    a, b = q @ mixed, k @ np.linalg.inv(mixed).T
    one, two = solve_low_rank_qk(q.T @ q, k.T @ k).loss, solve_low_rank_qk(a.T @ a, b.T @ b).loss
    np.testing.assert_allclose(two, one, rtol=1e-6, atol=1e-9 * one[0])


def test_what_all_keys_share_costs_nothing() -> None:
    """A key offset moves every score of a query alike, which softmax does not see: no dimension is kept for it."""
    q, k = data(0, 5), data(1, 5, 2)
    offset = np.array([100.0, -50.0, 0.0, 70.0, 20.0])
    keys = centre(k + offset)
    found = solve_low_rank_qk(q.T @ q, keys.T @ keys)
    assert found.loss[2] < 1e-12 * found.loss[0]
    gap = q @ (k + offset).T - (q @ found.encode[:, :2]) @ ((k + offset) @ found.decode[:2].T).T
    np.testing.assert_allclose(gap, np.broadcast_to(gap.mean(1, keepdims=True), gap.shape), atol=1e-7 * np.abs(q).max())


# -- value and output ------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 8), st.integers(1, 12), st.integers(1, 8))
@PLAIN
def test_value_loss_is_the_measured_error(seed: int, size: int, width: int, rank: int) -> None:
    """For outputs wider and narrower than a head, and contexts of any rank."""
    c = centre(data(seed, size, min(rank, size)))
    weight = np.random.default_rng(seed).normal(size=(size, width))
    found = solve_low_rank_vo(c.T @ c, weight)
    whole = energy(c @ weight)
    assert found.encode.shape == found.decode.shape == (size, size)
    assert found.loss.shape == (size + 1,)
    for kept in range(size + 1):
        fitted = c @ found.encode[:, :kept] @ found.decode[:kept] @ weight
        assert close(energy(c @ weight - fitted), found.loss[kept], whole), kept
    np.testing.assert_allclose(
        c @ found.encode @ found.decode @ weight, c @ weight, atol=1e-7 * np.abs(c @ weight).max()
    )


@given(SEEDS, st.integers(1, 8), st.integers(0, 5))
@PLAIN
def test_values_are_unchanged_at_full_rank(seed: int, size: int, more: int) -> None:
    c = data(seed, size)
    weight = np.random.default_rng(seed).normal(size=(size, size + more))
    found = solve_low_rank_vo(c.T @ c, weight)
    np.testing.assert_allclose(found.encode @ found.decode, np.eye(size), atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_of_value_dimensions_is_better(seed: int) -> None:
    size, width, rng = 6, 9, np.random.default_rng(seed)
    c, weight = centre(data(seed, size)), rng.normal(size=(size, width))
    found, out = solve_low_rank_vo(c.T @ c, weight), c @ weight
    for kept in range(1, size):
        loss = found.loss[kept]
        for chosen in combinations(range(size), kept):
            columns = c[:, list(chosen)]
            assert loss < energy(out - columns @ weight[list(chosen)])
            assert loss < energy(out - columns @ np.linalg.lstsq(columns, out, rcond=None)[0])
        for _ in range(20):
            columns = c @ rng.normal(size=(size, kept))
            assert loss < energy(out - columns @ np.linalg.lstsq(columns, out, rcond=None)[0])


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_degenerate_moments_give_finite_results(rank: int) -> None:
    x = data(0, 6, 1)[:rank] if rank < 3 else data(0, 6, 3)
    moment = np.asarray(x.T @ x)
    other = data(1, 6).T @ data(1, 6)
    weight = np.random.default_rng(0).normal(size=(6, 4))
    for found in (
        solve_low_rank_qk(moment, other),
        solve_low_rank_qk(other, moment),
        solve_low_rank_qk(moment, moment),
    ):
        assert np.isfinite(found.encode).all() and np.isfinite(found.decode).all()
        assert np.abs(found.loss[min(rank, 3) :]).max() <= 1e-9 * max(found.loss[0], 1.0)
    values = solve_low_rank_vo(moment, weight)
    assert np.isfinite(values.encode).all() and np.isfinite(values.decode).all()
    assert np.abs(values.loss[min(rank, 3) :]).max() <= 1e-9 * max(values.loss[0], 1.0)
    gone = eliminate(moment, weight)
    assert sorted(gone.order.tolist()) == list(range(6))
    assert np.isfinite(gone.loss).all()
    assert np.isfinite(refit_rows(moment, weight, np.array([1, 4]))).all()
    still = eliminate(other, weight * 0)
    assert (still.loss == 0).all()
    assert sorted(still.order.tolist()) == list(range(6))


# -- selection with refit --------------------------------------------------------------------------------------------


def ridged(x: FloatArray) -> FloatArray:
    """The rows with a few more, so that plain least squares on them is ridge least squares on ``x``."""
    ridge = DEFAULT_RIDGE * np.trace(x.T @ x) / x.shape[1] + 1e-12
    return np.concatenate([x, np.sqrt(ridge) * np.eye(x.shape[1])])


def best_loss(rows: FloatArray, weight: FloatArray, keep: IntArray | list[int]) -> float:
    """What plain least squares cannot explain of ``rows @ weight`` with these columns."""
    out = rows @ weight
    if not len(keep):
        return energy(out)
    return energy(out - rows[:, keep] @ np.linalg.lstsq(rows[:, keep], out, rcond=None)[0])


@given(SEEDS, st.integers(2, 10), st.data())
@PLAIN
def test_refit_is_ridge_least_squares(seed: int, size: int, draw: st.DataObject) -> None:
    x, weight = centre(data(seed, size)), np.random.default_rng(seed).normal(size=(size, 5))
    keep = np.array(sorted(draw.draw(st.sets(st.integers(0, size - 1), min_size=1))), np.int64)
    rows = ridged(x)
    expected = np.linalg.lstsq(rows[:, keep], rows @ weight, rcond=None)[0]
    fitted = refit_rows(x.T @ x, weight, keep)
    np.testing.assert_allclose(fitted, expected, atol=1e-7 * np.abs(expected).max())
    measured = energy(x @ weight - x[:, keep] @ fitted)
    assert close(refit_loss(x.T @ x, weight, keep, fitted), measured, energy(x @ weight))
    sliced = energy(x @ weight - x[:, keep] @ weight[keep])
    assert measured <= sliced * (1 + 1e-9) + 1e-12 * energy(x @ weight)
    assert measured >= best_loss(x, weight, keep) * (1 - 1e-9) - 1e-12 * energy(x @ weight)


def test_refitting_all_units_changes_nothing() -> None:
    x, weight = data(3, 7, 4), np.random.default_rng(3).normal(size=(7, 5))
    np.testing.assert_allclose(refit_rows(x.T @ x, weight, np.arange(7)), weight, atol=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_elimination_is_greedy_and_near_the_optimum(seed: int) -> None:
    """Step by step what brute force would drop next; and not far from the best subset of each size there is."""
    size = 5 + seed % 4
    x, weight = centre(data(seed, size)), np.random.default_rng(seed).normal(size=(size, 4))
    found, rows = eliminate(x.T @ x, weight), ridged(x)
    whole = energy(rows @ weight)
    alive = list(range(size))
    for gone in found.order:
        costs = {unit: best_loss(rows, weight, [k for k in alive if k != unit]) for unit in alive}
        assert costs[int(gone)] <= min(costs.values()) * (1 + 1e-6) + 1e-10 * whole
        alive.remove(int(gone))
        kept = len(alive)
        keep = np.array(alive, np.int64)
        assert close(
            found.loss[kept], refit_loss(x.T @ x, weight, keep, refit_rows(x.T @ x, weight, keep)), whole, 1e-6
        )
        optimum = min(best_loss(rows, weight, list(s)) for s in combinations(range(size), kept))
        assert optimum * (1 - 1e-6) - 1e-10 * whole <= costs[int(gone)] <= 4 * optimum + 1e-10 * whole
    assert found.loss[size] == 0


@given(SEEDS, st.integers(2, 70))
@PLAIN
def test_elimination_loss_is_that_of_the_kept_units(seed: int, size: int) -> None:
    """At every width, between refreshes of the inverse too."""
    x, weight = centre(data(seed, size, rows=3 * size + 5)), np.random.default_rng(seed).normal(size=(size, 3))
    moment = x.T @ x
    found = eliminate(moment, weight)
    assert sorted(found.order.tolist()) == list(range(size))
    assert (np.diff(found.loss) <= 1e-9 * found.loss[0]).all()
    for kept in range(size):
        keep = np.sort(found.order[size - kept :])
        loss = refit_loss(moment, weight, keep, refit_rows(moment, weight, keep))
        assert abs(found.loss[kept] - loss) <= 0.01 * loss + 1e-5 * found.loss[0]


def test_the_order_of_a_large_layer_takes_one_inverse_in_single_precision() -> None:
    """Beside the moment and the weight: no second copy of the system, and nothing as large as another one."""
    columns = elimination.LARGE_ROWS
    x, weight = data(1, columns, 64), np.random.default_rng(1).normal(size=(columns, 8))
    system = LeastSquaresSystem(x.T @ x, weight, 0.01)
    eliminate(np.eye(2), weight[:2])  # imports what it takes
    tracemalloc.start()
    found = eliminate_all([system], columns)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(found.order.tolist()) == list(range(columns))
    assert peak < 1.8 * 4 * columns**2  # at this size the updates and the candidates count as much as the inverse


@given(SEEDS, st.integers(3, 12), st.data())
@PLAIN
def test_a_unit_that_others_can_stand_in_for_goes_first(seed: int, size: int, draw: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(200, size)), rng.normal(size=(size, 4))
    spare = draw.draw(st.integers(0, size - 1))
    others = np.delete(np.arange(size), spare)
    mix = np.zeros(size - 1)
    mix[:2] = 0.5, -0.3
    x[:, spare] = x[:, others] @ mix
    weight[spare] *= 5  # what reads it is large: magnitude would keep it
    weight[others] += 3 * np.sign(weight[others])
    found = eliminate(x.T @ x, weight)
    keep = np.delete(np.arange(size), found.order[0])
    assert found.order[0] in (spare, *others[:2])  # any one of the three that depend on each other
    assert found.loss[size - 1] < 1e-2 * found.loss[size - 2]
    loss = refit_loss(x.T @ x, weight, keep, refit_rows(x.T @ x, weight, keep))
    assert loss < 1e-5 * found.loss[0]


@given(SEEDS, st.integers(2, 30), st.integers(1, 3), st.sampled_from([5, 48]))
@PLAIN
def test_one_factor_gives_the_refit_of_every_width(seed: int, size: int, columns: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    found = [centre(data(seed + k, size * columns, rows=5 * size * columns)) for k in range(2)]
    systems = [LeastSquaresSystem(x.T @ x, rng.normal(size=(size * columns, 3))) for x in found]
    widths = range(1, size + 1)
    gone = with_factors(eliminate_all(systems, size, steps), systems)
    for width in widths:
        keep = np.sort(gone.order[size - width :])
        noted = gone.refit_for(keep)
        assert noted is not None
        for system, rows in zip(systems, noted, strict=True):
            expected = refit_rows(system.moment, system.weight, unit_columns(keep, columns))
            np.testing.assert_allclose(rows, expected, atol=1e-5 * np.abs(expected).max())
        if width < size - 1:
            others = np.sort(gone.order[:width])
            assert gone.refit_for(others) is None or np.array_equal(others, keep)


@given(SEEDS, st.integers(2, 30), st.integers(1, 3))
@PLAIN
def test_one_factor_gives_the_loss_of_every_width(seed: int, size: int, columns: int) -> None:
    """The sum of the squared rows behind a width is the error of the refitted weights, with the ridge's share."""
    rng = np.random.default_rng(seed)
    x = centre(data(seed, size * columns, rows=5 * size * columns))
    system = LeastSquaresSystem(x.T @ x, rng.normal(size=(size * columns, 3)))
    (factor,) = with_factors(eliminate_all([system], size), [system]).factors
    ridge = DEFAULT_RIDGE * np.trace(system.moment) / len(system.moment) + 1e-12
    for count in range(0, size * columns + 1, columns):
        keep = np.sort(factor.columns[:count])
        fitted = refit_rows(system.moment, system.weight, keep)
        change = system.weight.copy()
        change[keep] -= fitted
        expected = refit_loss(system.moment, system.weight, keep, fitted) + ridge * energy(change)
        assert factor.losses[count] == pytest.approx(expected, rel=1e-6, abs=1e-9 * factor.losses[0])


def test_large_systems_take_batches_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly the order of the exact elimination, and weights that are good to single precision."""
    x, weight = data(3, 120, 60, rows=400), np.random.default_rng(3).normal(size=(120, 6))
    system = LeastSquaresSystem(x.T @ x, weight, 0.01)
    exact = with_factors(eliminate_all([system], 120), [system])
    monkeypatch.setattr(elimination, "LARGE_ROWS", 100)
    large = with_factors(eliminate_all([system], 120), [system])
    assert large.factors[0].factor.dtype == np.float32 and exact.factors[0].factor.dtype == np.float64
    for width in (30, 60, 90, 110):
        assert large.loss[width] <= 1.2 * exact.loss[width] + 1e-6 * exact.loss[0]
        keep = np.sort(large.order[120 - width :])
        expected = refit_rows(system.moment, weight, keep, 0.01)
        np.testing.assert_allclose(large.factors[0].refit(width), expected, atol=1e-3 * np.abs(expected).max())
        lost = refit_loss(system.moment, weight, keep, expected)
        assert large.loss[width] == pytest.approx(lost, rel=0.05, abs=1e-5 * exact.loss[0])


def test_an_exact_copy_goes_first_and_its_weight_moves_to_the_other() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(200, 6)), rng.normal(size=(6, 4))
    x[:, 4] = x[:, 1]
    found = eliminate(x.T @ x, weight)
    assert found.order[0] in (1, 4)
    keep = np.delete(np.arange(6), found.order[0])
    fitted = refit_rows(x.T @ x, weight, keep)
    heir = int(np.flatnonzero(keep == 5 - found.order[0])[0])
    np.testing.assert_allclose(fitted[heir], weight[1] + weight[4], atol=1e-3 * np.abs(weight).max())


@given(SEEDS, st.integers(2, 40), st.sampled_from([3, 7, 48]))
@PLAIN
def test_the_order_of_the_units_does_not_matter(seed: int, size: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = data(seed, size, rows=200), rng.normal(size=(size, 3))
    turn = rng.permutation(size)
    one = eliminate(x.T @ x, weight, steps)
    two = eliminate(x[:, turn].T @ x[:, turn], weight[turn], steps)
    np.testing.assert_array_equal(turn[two.order], one.order)
    np.testing.assert_allclose(two.loss, one.loss, rtol=1e-6, atol=1e-9 * one.loss[0])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_units_that_go_together_go_as_if_one_by_one(count: int) -> None:
    """Within the cheapest 2 x count, the scores are exact after each."""
    x, weight = data(5, 8), np.random.default_rng(5).normal(size=(8, 3))
    going = cheapest_units([ObsState(LeastSquaresSystem(x.T @ x, weight), 8, np.dtype(np.float64))], 8, count)
    assert len(set(going)) == count
    first = {u: best_loss(ridged(x), weight, [k for k in range(8) if k != u]) for u in range(8)}
    pool = sorted(first, key=lambda u: first[u])[: 2 * count]
    alive = list(range(8))
    for unit in going:
        costs = {u: best_loss(ridged(x), weight, [k for k in alive if k != u]) for u in alive if u in pool}
        assert unit == min(costs, key=lambda u: costs[u])
        alive.remove(unit)


@pytest.mark.parametrize("much", [1, 7, 64])
@pytest.mark.parametrize("columns", [1, 3])
def test_what_is_put_off_is_not_lost(much: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inverse by halves and with parts not yet taken off it: the same order and loss."""
    size = 24
    systems = [LeastSquaresSystem(x.T @ x, x[:6].T) for x in (data(seed, size * columns, rows=300) for seed in (1, 2))]
    whole = eliminate_all(systems, size)
    monkeypatch.setattr(elimination, "BLOCK_ROWS", much)
    found = eliminate_all(systems, size)
    np.testing.assert_array_equal(found.order, whole.order)
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-9, atol=1e-12 * whole.loss[0])
    np.testing.assert_allclose(
        NUMPY_ALGEBRA.invert_positive_definite(add_ridge(systems[0].moment)) @ add_ridge(systems[0].moment),
        np.eye(size * columns),
        atol=1e-8,
    )


def test_more_steps_are_rarely_worse() -> None:
    """Scores that are refreshed after every unit against once for all: less is lost where half of the units stay."""
    better = []
    for seed in range(10):
        x, weight = data(seed, 40, 30, rows=200), np.random.default_rng(seed).normal(size=(40, 6))
        moment = x.T @ x
        losses = []
        for steps in (40, 1):
            keep = np.sort(eliminate(moment, weight, steps).order[20:])
            losses.append(refit_loss(moment, weight, keep, refit_rows(moment, weight, keep)))
        better.append(losses[0] <= losses[1] * (1 + 1e-9))
    assert sum(better) >= 8


def lost(systems: list[LeastSquaresSystem], size: int, keep: IntArray, ridge: bool = False) -> float:
    """What all readers lose when they are refitted to these units; with the ``ridge``, what they minimise."""
    total = 0.0
    for system in systems:
        rows = unit_columns(keep, len(system.moment) // size)
        fitted = refit_rows(system.moment, system.weight, rows, system.ridge)
        moment = add_ridge(system.moment, system.ridge) if ridge else system.moment
        total += refit_loss(moment, system.weight, rows, fitted)
    return total


@given(SEEDS, st.integers(2, 7), st.lists(st.integers(1, 4), min_size=1, max_size=3))
@PLAIN
def test_wide_units_with_several_readers_go_in_the_order_of_what_all_lose(
    seed: int, size: int, widths: list[int]
) -> None:
    """Heads of a few columns, kernels of a few offsets: greedy by brute force, and the loss is of the kept ones."""
    rng, systems = np.random.default_rng(seed), []
    for k, columns in enumerate(widths):
        x = centre(data(seed + k, size * columns, rows=5 * size * columns))
        systems.append(LeastSquaresSystem(x.T @ x, rng.normal(size=(size * columns, 3))))
    found = eliminate_all(systems, size)
    alive = list(range(size))
    for gone in found.order:
        costs = {u: lost(systems, size, np.array([k for k in alive if k != u], np.int64), True) for u in alive}
        assert costs[int(gone)] <= min(costs.values()) * (1 + 1e-6) + 1e-10 * found.loss[0]
        alive.remove(int(gone))
        assert close(found.loss[len(alive)], lost(systems, size, np.array(alive, np.int64)), found.loss[0], 1e-6)


def test_moments_that_rounding_left_indefinite_get_more_ridge() -> None:
    rng = np.random.default_rng(0)
    x = centre(rng.normal(size=(20, 300)))
    moment = x.T @ x - 0.05 * np.diag(rng.uniform(0, 20, 300))
    assert np.linalg.eigvalsh(moment)[0] < 0
    found = eliminate_all([LeastSquaresSystem(moment, rng.normal(size=(300, 4)))], 300)
    assert sorted(found.order.tolist()) == list(range(300)) and np.isfinite(found.loss).all()


def test_what_rounding_leaves_of_a_large_mean_is_no_spread() -> None:
    """Second moments of a batch are summed in float32: of columns that hardly vary nothing is left but noise."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([100 + 1e-3 * rng.normal(size=(4000, 64)), np.ones((4000, 1))], 1).astype(np.float32)
    sums = sum((np.asarray(part.T @ part, np.float64) for part in np.split(rows, 10)), np.zeros((65, 65)))
    mean = sums[-1, :-1] / 4000
    assert np.linalg.eigvalsh(sums[:-1, :-1] - 4000 * np.outer(mean, mean))[0] < 0
    found = consumer_moments([sums.copy()])
    assert np.linalg.eigvalsh(found.moment)[0] > 0
    plain = np.concatenate([rng.normal(size=(4000, 64)), np.ones((4000, 1))], 1)
    centred = centre(plain[:, :-1])
    np.testing.assert_allclose(consumer_moments([plain.T @ plain]).moment, centred.T @ centred, rtol=1e-5, atol=1e-3)


def test_the_largest_entry_of_a_column_gets_positive() -> None:
    vectors = np.array([[0.5, -0.1, 0.0], [-0.8, 0.9, 0.0]])
    assert column_signs(vectors).tolist() == [-1.0, 1.0, 1.0]


def test_bases_do_not_depend_on_the_signs_of_singular_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    query, key = (a.T @ a for a in rng.normal(size=(2, 40, 8)))
    weight, svd, eigh = rng.normal(size=(8, 20)), np.linalg.svd, np.linalg.eigh

    def bases() -> list[LowRankBasis]:
        return [solve_low_rank_qk(query, key), solve_shared_qk(query, key), solve_low_rank_vo(query, weight)]

    expected = bases()
    monkeypatch.setattr("numpy.linalg.svd", lambda *a, **k: (lambda u, s, v: (-u, s, -v))(*svd(*a, **k)))
    monkeypatch.setattr("numpy.linalg.eigh", lambda *a, **k: (lambda w, v: (w, -v))(*eigh(*a, **k)))
    for basis, other in zip(expected, bases(), strict=True):
        np.testing.assert_array_equal(basis.encode, other.encode)
        np.testing.assert_array_equal(basis.decode, other.decode)


def test_a_system_that_rounding_left_indefinite_is_solved() -> None:
    matrix, right = np.array([[1.0, 1.0], [1.0, 1.0 - 1e-9]]), np.array([[1.0], [2.0]])
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(matrix)
    np.testing.assert_allclose(matrix @ solve_symmetric(matrix, right), right, atol=1e-6)
