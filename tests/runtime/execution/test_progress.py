"""Stages of a run, as whoever shows them hears of them."""

from __future__ import annotations

import pickle

import pytest

import snpc
from snpc.runtime.execution import SILENT
from tests.recorded_progress import RecordedProgress


def test_a_tracked_pass_is_a_stage_that_advances_after_each_batch() -> None:
    progress = RecordedProgress()
    execution = snpc.Execution(progress=progress)
    batches = execution.track("statistics", ["a", "b", "c"], 3)
    assert progress.begun == []  # nothing has been asked for
    assert next(batches) == "a"
    assert (progress.open, progress.finished) == (["statistics"], [])
    assert list(batches) == ["b", "c"]
    assert (progress.open, progress.finished) == ([], [("statistics", 3, 3)])


def test_a_pass_within_a_stage_is_a_stage_of_its_own() -> None:
    progress = RecordedProgress()
    execution = snpc.Execution(progress=progress)
    with execution.progress.stage("search", 2) as advance:
        for turn in range(2):
            assert sum(execution.track(f"pass {turn}", [1, 2], 2)) == 3
            advance(1)
    assert progress.begun == ["search", "pass 0", "pass 1"]
    assert progress.finished == [("pass 0", 2, 2), ("pass 1", 2, 2), ("search", 2, 2)]


def test_an_exception_ends_a_stage() -> None:
    progress = RecordedProgress()
    with pytest.raises(KeyError), progress.stage("search", 2):
        for _ in snpc.Execution(progress=progress).track("pass", iter({}.popitem, None), 2):
            raise AssertionError
    assert (progress.open, progress.finished) == ([], [("pass", 2, 0), ("search", 2, 0)])


def test_silence_is_the_default_and_survives_pickling() -> None:
    execution = snpc.Execution()
    assert execution.progress is SILENT
    assert pickle.loads(pickle.dumps(execution)) == execution
    with execution.progress.stage("pass", 1) as advance:
        advance(1)
    assert list(execution.track("pass", [{"x": 1}, {"x": 2}], 2)) == [{"x": 1}, {"x": 2}]
