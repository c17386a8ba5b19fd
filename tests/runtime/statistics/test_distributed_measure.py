"""Statistics that workers measure are those of one process, with padding, without, and for criteria."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import snpc
from snpc.errors import UserError
from snpc.runtime.execution import Execution
from snpc.runtime.statistics import Statistics
from tests.closed_forms import calibration_of, prunable_of, random_feeds
from tests.oracle import analysis_of
from tests.workers import process_pool

BERT = "bert__ts17"  # takes a mask
VIT = "vit_timm__ts17"


def assert_same(found: Statistics, expected: Statistics, tolerance: float = 0.0) -> None:
    assert replace(found, sums={}, odd={}) == replace(expected, sums={}, odd={})
    for mine, other in ((found.sums, expected.sums), (found.odd, expected.odd)):
        assert {group: set(arrays) for group, arrays in mine.items()} == {g: set(a) for g, a in other.items()}
        for group, arrays in other.items():
            for name, array in arrays.items():
                assert np.abs(mine[group][name] - array).max() <= tolerance * np.abs(array).max(), (group, name)


def measured(name: str, execution: Execution, criterion: str = "mixed", method: str = "auto") -> Statistics:
    analysis = analysis_of(name)
    feeds = random_feeds(name, 14)
    for key in feeds:
        if "mask" in key:
            feeds[key][::2, -3:] = 0
    calibration = calibration_of(analysis, feeds, 2)
    groups = prunable_of(analysis)
    return snpc.measure_statistics(
        analysis,
        calibration,
        groups,
        method=method,
        criterion=criterion,
        execution=execution,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("name", "criterion", "method"),
    [(VIT, "mixed", "auto"), (BERT, "mixed", "auto"), (VIT, "snp", "select"), (BERT, "activation", "select")],
)
def test_workers_measure_what_one_process_does(name: str, criterion: str, method: str) -> None:
    serial = measured(name, Execution(threads=1), criterion, method)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(3) as three:
        found = [measured(name, Execution(threads=1, executor=e), criterion, method) for e in (one, three)]
    assert_same(found[1], found[0])
    # Sums of one process are in another order, and the odd half is kept in single precision.
    assert_same(replace(found[0], odd={}), replace(serial, odd={}), 1e-12)
    assert_same(found[0], serial, 1e-6)


def test_worker_processes_measure_the_same() -> None:
    with ThreadPoolExecutor(1) as one, process_pool(2) as two:
        assert_same(*(measured(BERT, Execution(threads=1, executor=executor)) for executor in (two, one)))


def test_passes_by_memory_go_on_where_they_are() -> None:
    limited = Execution(threads=1, memory_limit=1_200_000)
    with ThreadPoolExecutor(2) as executor:
        assert_same(measured(BERT, replace(limited, executor=executor)), measured(BERT, limited), 1e-6)


def test_a_worker_names_the_samples_that_are_not_finite() -> None:
    analysis = analysis_of(VIT)
    feeds = random_feeds(VIT, 12)
    for key in feeds:
        feeds[key][5] = 3e38
    calibration = calibration_of(analysis, feeds, 2)
    with (
        process_pool(2) as executor,
        pytest.raises(UserError, match=r"in samples 4 to 5, activations of .* not finite"),
    ):
        snpc.measure_statistics(analysis, calibration, prunable_of(analysis), execution=Execution(executor=executor))
