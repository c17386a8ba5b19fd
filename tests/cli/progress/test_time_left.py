"""The time left of a run: an estimate that is corrected by what stages really take."""

from __future__ import annotations

import pytest

from snpc.cli.progress.time_left import RunEstimate


def test_nothing_is_known_before_anything_advances() -> None:
    run = RunEstimate()
    assert run.seconds_left(0.0) is None
    run.begin("statistics", 4, 0.0)
    assert run.seconds_left(3.0) is None


def test_a_stage_alone_is_judged_by_its_own_speed() -> None:
    run = RunEstimate()
    stage = run.begin("statistics", 4, 0.0)
    run.advance(stage, 1, 2.0)
    assert run.seconds_left(2.0) == pytest.approx(6.0)
    assert run.seconds_left(3.5) == pytest.approx(4.5)  # it counts down between advances
    assert run.seconds_left(30.0) == 0.0
    run.advance(stage, 3, 9.0)
    assert run.seconds_left(9.0) == 0.0


def test_stages_that_have_not_begun_cost_what_those_that_ended_took_per_unit() -> None:
    run = RunEstimate()
    run.expect([("statistics", 2.0), ("trials", 1.0), ("layers", 3.0)])
    stage = run.begin("statistics", 4, 0.0)
    run.advance(stage, 2, 5.0)
    assert run.seconds_left(5.0) == pytest.approx(5 + 5 * 4)  # 10 s for 2 units: 5 s each
    run.advance(stage, 2, 12.0)
    run.end(stage, 12.0)
    assert run.seconds_left(12.0) == pytest.approx(6 * 4)  # it took 12
    stage = run.begin("trials", 10, 12.0)
    assert run.seconds_left(12.0) == pytest.approx(6 + 18)  # begun: as expected
    run.advance(stage, 5, 22.0)
    half = 0.5 * (0.5 * 20 + 0.5 * 6)  # by its own speed 20 s, expected 6
    assert run.seconds_left(22.0) == pytest.approx(half + 18)


def test_a_stage_that_is_passed_over_is_given_up() -> None:
    run = RunEstimate()
    run.expect([("statistics", 1.0), ("trials", 5.0), ("layers", 1.0), ("verification", 1.0)])
    run.end(run.begin("statistics", 1, 0.0), 4.0)
    assert run.seconds_left(4.0) == pytest.approx(28.0)
    run.begin("layers", 1, 4.0)
    assert run.seconds_left(4.0) == pytest.approx(4 + 4)
    run.begin("anything else", 1, 5.0)
    assert run.seconds_left(5.0) == pytest.approx(3 + 4)


def test_a_stage_within_another_is_part_of_its_time() -> None:
    run = RunEstimate()
    search = run.begin("search", 4, 0.0)
    inner = run.begin("layers", 10, 0.0)
    run.advance(inner, 5, 5.0)
    assert run.seconds_left(5.0) == pytest.approx(5.0)
    run.end(inner, 10.0)
    run.advance(search, 1, 10.0)
    assert run.seconds_left(10.0) == pytest.approx(30.0)
    inner = run.begin("layers", 10, 10.0)
    run.advance(inner, 1, 11.0)
    assert run.seconds_left(11.0) == pytest.approx(29.0)  # of the search, which lasts longer


def test_what_an_exception_left_open_ends_with_the_stage_around_it() -> None:
    run = RunEstimate()
    search = run.begin("search", 2, 0.0)
    lost = run.begin("layers", 10, 0.0)
    run.end(search, 1.0)
    assert run.open == []
    run.end(lost, 2.0)  # late, when the generator is collected
    assert run.open == []


def test_the_time_left_falls_while_a_run_goes_as_expected() -> None:
    run = RunEstimate()
    costs = [("statistics", 3.0), ("order", 2.0), ("trials", 4.0), ("layers", 6.0)]
    run.expect(costs)
    now, seen = 0.0, []
    for name, cost in costs:
        stage = run.begin(name, 10, now)
        for _ in range(10):
            now += cost * 0.7 / 10
            run.advance(stage, 1, now)
            left = run.seconds_left(now)
            assert left is not None
            seen.append(left)
        run.end(stage, now)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == pytest.approx(15 * 0.7 - 0.21) and seen[-1] == 0.0
