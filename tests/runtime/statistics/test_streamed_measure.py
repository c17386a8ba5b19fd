"""Statistics that are measured segment after segment are those of one pass over the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import snpc
from snpc import Budget
from snpc.runtime.batches import DenseValues
from snpc.runtime.closed_form import residual_error_values
from snpc.runtime.execution import Execution, memory, temporary_session
from snpc.runtime.io import StoredStage, WorkFolder
from snpc.runtime.statistics.measure import statistic_requests
from snpc.runtime.statistics.moments import required_statistics
from snpc.runtime.statistics.statistics import Statistics, is_streamed
from snpc.runtime.statistics.streamed_measure import GraphPositions, MeasuredSegment, StreamedMeasurement, plan_segments
from tests.closed_forms import calibration_of, prunable_of, random_feeds
from tests.oracle import analysis_of
from tests.patching import patch
from tests.recorded_progress import RecordedProgress

NAMES = ("llama__ts17", "bert__ts17")


class Stopped(Exception):
    """The run is ended here."""


def weights_of(name: str) -> int:
    """Bytes of the model's float32 weights."""
    return 4 * analysis_of(name).cost.params


@contextmanager
def memory_for(name: str, share: float) -> Iterator[None]:
    """Sessions may hold this share of the model's weights, as if that were all memory; 1 and more: all of them."""
    with pytest.MonkeyPatch.context() as patching:
        limit = int(share * weights_of(name))
        patch(patching, "snpc.runtime.batches.streamed_model.weight_budget", lambda _: limit)
        yield


def assert_equal_sums(found: Statistics, expected: Statistics) -> None:
    for half in ("sums", "odd"):
        a, b = getattr(found, half), getattr(expected, half)
        assert {k: set(v) for k, v in a.items()} == {k: set(v) for k, v in b.items()}
        for group, arrays in b.items():
            for key, array in arrays.items():
                np.testing.assert_allclose(a[group][key], array, rtol=1e-3, atol=1e-5 * float(np.abs(array).max()))


@pytest.mark.parametrize("method", ["auto", "select"])
@pytest.mark.parametrize("name", NAMES)
def test_sums_and_dense_values_are_those_of_the_whole_model(name: str, method: snpc.PruningMethod) -> None:
    """With "select", llama's queries and keys of all layers are one group, which a criterion observes together."""
    analysis, groups = analysis_of(name), prunable_of(analysis_of(name))
    data = calibration_of(analysis, random_feeds(name, 6), 2)
    found = []
    for share in (1.5, 0.5):
        dense = DenseValues(residual_error_values(analysis, groups), data, 1 << 30)
        with memory_for(name, share):
            assert is_streamed(analysis, Execution()) == (share < 1)
            statistics = snpc.measure_statistics(analysis, data, groups, method=method, criterion="snp", dense=dense)
        found.append((statistics, dense.batches))
    (expected, before), (sums, after) = found
    assert_equal_sums(sums, expected)
    for a, b in zip(after, before, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_plans_are_the_same(name: str) -> None:
    analysis = analysis_of(name)
    data = calibration_of(analysis, random_feeds(name, 6), 2)
    plans = []
    for share in (1.5, 0.5):
        with memory_for(name, share):
            plans.append(snpc.plan(analysis, Budget(target=snpc.parse_target("macs=0.8")), data, effort="quick"))
    assert plans[0].slices.keep == plans[1].slices.keep


def test_sessions_hold_one_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    name, sizes = NAMES[1], []

    def noted(model: object, **options: object) -> object:
        sizes.append(memory.session_bytes(memory.model_weights(model)))  # type: ignore[arg-type]
        return temporary_session(model, **options)  # type: ignore[arg-type]

    patch(monkeypatch, "snpc.runtime.statistics.streamed_measure.temporary_session", noted)
    analysis = analysis_of(name)
    data = calibration_of(analysis, random_feeds(name, 4), 2)
    with memory_for(name, 0.5):
        snpc.measure_statistics(analysis, data, prunable_of(analysis))
    assert len(sizes) > 2
    assert max(sizes) < weights_of(name) / 2


def test_groups_that_are_observed_together_wait_for_their_last_segment() -> None:
    name = NAMES[0]
    analysis = analysis_of(name)
    groups, data = prunable_of(analysis), calibration_of(analysis, random_feeds(name, 2), 2)
    requests = statistic_requests(analysis, {g.id: required_statistics(analysis.weights[g.id]) for g in groups})
    together = {g.id for g in groups}
    with memory_for(name, 0.5):
        segments = plan_segments(analysis, data, requests, together, (), Execution())
    measured = [r.output for part in segments for requests in part.passes for r in requests]
    complete = [r.output for part in segments for r in part.complete]
    assert sorted(measured) == sorted(complete) == sorted(r.output for r in requests)
    for part in segments:
        inside = {r.output for requests in part.passes for r in requests}
        assert inside <= part.live | {r.output for r in part.complete}


def test_a_request_lies_in_one_segment() -> None:
    analysis = analysis_of(NAMES[0])
    positions = GraphPositions(analysis)
    groups = prunable_of(analysis)
    requests = statistic_requests(analysis, {g.id: required_statistics(analysis.weights[g.id]) for g in groups})
    data = calibration_of(analysis, random_feeds(NAMES[0], 2), 2)
    with memory_for(NAMES[0], 0.1):
        segments = plan_segments(analysis, data, requests, (), (), Execution())
    assert len(segments) > 5
    for part in segments:
        for request in (r for requests in part.passes for r in requests):
            first, last = positions.span(request)
            assert part.segment.first <= first <= last < part.segment.last


@pytest.mark.parametrize("finished", [1, 2, None])
def test_a_run_that_was_killed_goes_on_behind_the_finished_segments(
    finished: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same sums and values, bit for bit; ``finished`` None: it was not killed, and nothing runs again."""
    expected, values, ran = measured(None)
    if finished is None:
        measured(tmp_path)
    else:
        with monkeypatch.context() as stopping, pytest.raises(Stopped):
            stop_after_sums(stopping, finished)
            measured(tmp_path)
    resumed, again, run_again = measured(tmp_path)
    assert run_again == ([] if finished is None else ran[finished:])
    for half in ("sums", "odd"):
        for group, arrays in getattr(expected, half).items():
            for key, array in arrays.items():
                assert np.array_equal(getattr(resumed, half)[group][key], array)
    for a, b in zip(again, values, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("share", [0.4, 0.7, 2])
def test_a_resumed_run_with_more_or_less_memory_keeps_the_segments(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory differs from run to run; also where the whole model would fit now."""
    _, _, ran = measured(None)
    with monkeypatch.context() as stopping, pytest.raises(Stopped):
        stop_after_sums(stopping, 1)
        measured(tmp_path)
    _, _, run_again = measured(tmp_path, share)
    assert run_again == ran[1:]


def test_segments_that_are_too_large_now_are_cut_again(tmp_path: Path) -> None:
    _, _, ran = measured(tmp_path)
    _, _, run_again = measured(tmp_path, 0.1)
    assert len(run_again) > len(ran)
    assert measured(tmp_path, 0.1)[2] == []


def measured(work: Path | None, share: float = 0.5) -> tuple[Statistics, list[dict[str, np.ndarray]], list[str]]:
    """The statistics, the values of the dense model, and the segments that ran."""
    name, progress = NAMES[1], RecordedProgress()
    analysis = analysis_of(name)
    groups, data = prunable_of(analysis), calibration_of(analysis, random_feeds(name, 6), 2)
    dense = DenseValues(residual_error_values(analysis, groups), data, 1 << 30)
    folder = WorkFolder(work) if work is not None else None
    execution = Execution(work=folder, progress=progress)
    ran: list[str] = []
    run = StreamedMeasurement.measure

    def noted(self: StreamedMeasurement, part: MeasuredSegment, *arguments: Any) -> None:
        ran.append(part.name)
        run(self, part, *arguments)

    with pytest.MonkeyPatch.context() as patching, memory_for(name, share):
        patching.setattr(StreamedMeasurement, "measure", noted)
        statistics = snpc.measure_statistics(analysis, data, groups, dense=dense, execution=execution)
    assert progress.complete("statistics")
    return statistics, dense.batches, ran


def stop_after_sums(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """End the run when the sums of so many segments are stored."""
    put, stored = StoredStage.put, []

    def put_and_stop(self: StoredStage, entry: str, *arguments: Any) -> None:
        put(self, entry, *arguments)
        stored.extend([entry] if entry.startswith("sums") else [])
        if len(stored) == count:
            raise Stopped

    monkeypatch.setattr(StoredStage, "put", put_and_stop)
