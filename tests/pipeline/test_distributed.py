"""Whole prunes on workers: the same plan and the same weights, layer-wise fitting included, also where one dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import snpc
from snpc.runtime.batches import DistributedBatchValues
from snpc.runtime.execution import SILENT, Advance, Execution
from snpc.runtime.execution.progress import Progress
from tests.command_line import CALIB, VIT, Array, arrays
from tests.workers import local_client, process_pool


@dataclass
class KillAtStage:
    """Kills a process when the stage ``name`` begins."""

    name: str
    pid: int
    killed: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Advance]:
        if name == self.name and not self.killed:
            self.killed.append(name)
            os.kill(self.pid, signal.SIGKILL)
        with SILENT.stage(name, total) as advance:
            yield advance


def pruned(path: Path, executor: Executor | None, progress: Progress = SILENT) -> dict[str, Array]:
    """Pruned with trials, and fitted layer after layer."""
    calibration = snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=24, batch=4, held_out=4)
    execution = Execution(threads=1, executor=executor, progress=progress)
    snpc.prune(VIT, path, target="macs=0.6", tokens="none", calibration=calibration, execution=execution)
    return arrays(path)


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    with ThreadPoolExecutor(1) as executor:
        return pruned(tmp_path_factory.mktemp("one") / "one.onnx", executor)


def test_one_worker_fits_what_this_process_does(one_worker: dict[str, Array], tmp_path: Path) -> None:
    serial = pruned(tmp_path / "serial.onnx", None)
    assert serial.keys() == one_worker.keys()
    for name, array in serial.items():
        assert np.abs(one_worker[name] - array).max() <= 1e-9 * max(float(np.abs(array).max()), 1.0), name


def test_two_worker_processes_write_the_same(
    one_worker: dict[str, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the layers ran on them."""
    ran: list[Any] = []
    original = DistributedBatchValues.run
    monkeypatch.setattr(DistributedBatchValues, "run", lambda self, *a: ran.append(1) or original(self, *a))
    with process_pool(2) as executor:
        assert_same(pruned(tmp_path / "two.onnx", executor), one_worker)
    assert len(ran) > 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["statistics", "trials"])
def test_a_dask_worker_that_dies_changes_nothing(stage: str, one_worker: dict[str, Array], tmp_path: Path) -> None:
    with local_client(3) as client:
        victim = next(iter(client.run(os.getpid).values()))
        progress = KillAtStage(stage, victim)
        assert_same(pruned(tmp_path / "killed.onnx", client.get_executor(), progress), one_worker)
        assert progress.killed == [stage]
