"""The search of token schedules, with a made-up change of the outputs in place of one that is measured."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

import snpc
from snpc.pipeline import token_schedule
from snpc.pipeline.token_schedule import (
    ScheduleEvaluator,
    TokenSchedule,
    TokenWay,
    best_variant,
    best_window,
    neighbors,
    prepare_evaluator,
    schedules_at_levels,
    window_profiles,
)
from snpc.runtime.execution import Execution
from snpc.tokens import TOKEN_METHODS
from tests.command_line import CALIB, VIT

BLOCKS = 11
WAY = TokenWay(TOKEN_METHODS["guided"])


class MadeUpDrift:
    """An evaluator that costs what the removed tokens save behind each block, of 12 with 100 tokens each."""

    def __init__(self, drift: Callable[[TokenSchedule], float]) -> None:
        self.change = drift
        self.tried: list[TokenSchedule] = []
        self.execution = Execution()
        self.analysis = SimpleNamespace(tokens=SimpleNamespace(points=range(BLOCKS)))

    def macs(self, schedule: TokenSchedule) -> float:
        return float(1200 - sum(n * (BLOCKS - k) for k, n in enumerate(schedule)))

    def scale_to_macs(self, way: TokenWay, profile: tuple[float, ...], macs: float) -> TokenSchedule | None:
        for scale in range(1000):
            schedule = tuple(round(scale / 10 * share) for share in profile)
            if sum(schedule) > 99:
                return None
            if self.macs(schedule) <= macs:
                return schedule
        return None

    def drift(self, way: TokenWay, schedule: TokenSchedule) -> float:
        self.tried.append(schedule)
        return self.change(schedule)


def early_and_late(schedule: TokenSchedule) -> float:
    """Early tokens cost most, and so do many in one place."""
    return float(sum(n**2 * (3 + abs(k - 5)) for k, n in enumerate(schedule)))


def as_evaluator(made_up: MadeUpDrift) -> ScheduleEvaluator:
    return made_up  # type: ignore[return-value]


@pytest.mark.parametrize("macs", [500.0, 700.0, 850.0, 1000.0])
def test_from_any_stretch_the_best_one_is_found(macs: float) -> None:
    windows = window_profiles(BLOCKS)
    made_up = MadeUpDrift(early_and_late)
    best = best_window(as_evaluator(made_up), WAY, macs, windows)
    assert best is not None
    reached = {w: made_up.scale_to_macs(WAY, profile, macs) for w, profile in windows.items()}
    least = min(early_and_late(schedule) for schedule in reached.values() if schedule is not None)
    for start in windows:
        found = best_window(as_evaluator(made_up), WAY, macs, windows, start)
        assert found is not None
        schedule = made_up.scale_to_macs(WAY, windows[found], macs)
        assert schedule is not None and early_and_late(schedule) == least


def test_near_the_best_stretch_few_are_tried() -> None:
    windows, made_up = window_profiles(BLOCKS), MadeUpDrift(early_and_late)
    best = best_window(as_evaluator(made_up), WAY, 800.0, windows)
    assert best is not None and len(made_up.tried) <= len(windows)
    made_up.tried.clear()
    assert best_window(as_evaluator(made_up), WAY, 800.0, windows, best) == best
    assert len(made_up.tried) <= 1 + len(neighbors(best, windows)) < len(windows)


def test_no_stretch_reaches_too_few_macs() -> None:
    windows, evaluator = window_profiles(BLOCKS), as_evaluator(MadeUpDrift(early_and_late))
    assert best_window(evaluator, WAY, 1.0, windows) is None
    assert schedules_at_levels(evaluator, WAY, [1.0, 2.0])[1] == []


def test_each_level_has_a_stretch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_schedule, "best_unmerging", lambda _, way, *__: way)
    made_up, windows, levels = MadeUpDrift(early_and_late), window_profiles(BLOCKS), [500.0, 700.0, 850.0, 1000.0]
    _, reached = schedules_at_levels(as_evaluator(made_up), WAY, levels)
    assert [level for level, _ in reached] == levels
    for level, schedule in reached:
        assert made_up.macs(schedule) <= level
        whole = [made_up.scale_to_macs(WAY, profile, level) for profile in windows.values()]
        even = min(early_and_late(s) for s in whole if s is not None)
        assert early_and_late(schedule) <= token_schedule.DRIFT_TIE_RATIO * even


def test_fewer_steps_only_where_the_change_is_the_same() -> None:
    profile = window_profiles(BLOCKS)[(1, 1)]
    by_steps = best_variant(as_evaluator(MadeUpDrift(lambda _: 1.0)), WAY, 700.0, profile)
    assert by_steps is not None and np.count_nonzero(by_steps) < np.count_nonzero(profile)
    smooth = best_variant(as_evaluator(MadeUpDrift(early_and_late)), WAY, 700.0, profile)
    assert smooth is not None and np.count_nonzero(smooth) == np.count_nonzero(profile)


def test_a_real_schedule_changes_no_more_than_even_stretches() -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    data = snpc.load_calibration(CALIB, analysis.model.inputs, samples=16)
    evaluator = prepare_evaluator(analysis, data, Execution())
    levels = [share * analysis.cost.macs for share in (0.4, 0.5, 0.6)]
    way, reached = schedules_at_levels(evaluator, TokenWay(TOKEN_METHODS["merge"]), levels)
    assert len(reached) == len(levels)
    for level, schedule in reached:
        assert evaluator.macs(way, schedule) <= level
        near = (evaluator.scale_to_macs(way, p, level) for p in window_profiles(len(schedule)).values())
        even = min(evaluator.drift(way, s) for s in near if s is not None)
        assert evaluator.drift(way, schedule) <= token_schedule.DRIFT_TIE_RATIO * even + 1e-4
