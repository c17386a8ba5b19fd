"""Values on workers: the sums are those of one process, bit for bit, whoever dies; and nothing but programs and sums
moves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from snpc.errors import UserError
from snpc.runtime.batches import BatchProgram, BatchSums, DistributedBatchValues, LocalBatchValues
from snpc.runtime.calibration import Calibration, load_calibration
from snpc.runtime.execution import Execution
from snpc.types import AnyArray, TensorSpec
from tests.workers import local_client, process_pool

WIDTH, SAMPLES = 64, 26
X = TensorSpec("x", np.dtype(np.float32), ("batch", WIDTH))
EXECUTION = Execution(threads=1)


def data() -> Calibration:
    """13 batches: of two samples."""
    x = np.random.default_rng(0).normal(size=(SAMPLES, WIDTH)).astype(np.float32)
    return load_calibration({"x": x}, [X], batch=2, samples=SAMPLES, held_out=0)


def layer(source: str, target: str, seed: int) -> ir.Model:
    """target = source @ W, and gram = target' target, total = the sum of target."""
    weight = np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8
    shape = ["batch", WIDTH]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [source, "w"], [target]),
            helper.make_node("Transpose", [target], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["t", target], ["gram"]),
            helper.make_node("ReduceSum", [target, "axes"], ["total"], keepdims=0),
        ],
        "layer",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(target, TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("gram", TensorProto.FLOAT, [WIDTH, WIDTH]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, [WIDTH]),
        ],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([0]), "axes")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


LAYERS = 4


def program(number: int) -> BatchProgram:
    """Layer ``number``; the values of the layer before go."""
    name = f"h{number}"
    live = frozenset({"x", name})
    source = "x" if number == 0 else f"h{number - 1}"
    return BatchProgram(layer(source, name, number), ("gram", "total"), {name: name}, live)


@dataclass(frozen=True)
class KillOnce:
    """Observes gram and total, and kills the first process that asks."""

    marker: str

    def __call__(self, outputs: Mapping[str, AnyArray], calibration: Calibration, number: int) -> dict[str, AnyArray]:
        try:
            Path(self.marker).touch(exist_ok=False)
        except FileExistsError:
            return {name: outputs[name] for name in ("gram", "total")}
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def run_all(values: Any, before: Callable[[int], None] = lambda number: None) -> list[BatchSums]:
    sums = []
    for number in range(LAYERS):
        before(number)
        sums.append(values.run(program(number)))
    return sums


def assert_equal(found: list[BatchSums], expected: list[BatchSums], tolerance: float = 0.0) -> None:
    for mine, other in zip(found, expected, strict=True):
        for half, expected_half in ((mine.even, other.even), (mine.odd, other.odd)):
            assert set(half) == set(expected_half) and half
            for name, array in expected_half.items():
                assert half[name].dtype == np.float64
                assert np.abs(half[name] - array).max() <= tolerance * np.abs(array).max(), name


def values_on(executor: Executor) -> DistributedBatchValues:
    return DistributedBatchValues(data(), executor, EXECUTION)


@pytest.fixture(scope="module")
def one_thread() -> list[BatchSums]:
    with ThreadPoolExecutor(1) as executor:
        return run_all(values_on(executor))


def test_one_worker_adds_up_what_this_process_does(one_thread: list[BatchSums]) -> None:
    local = LocalBatchValues(data().batches(), EXECUTION)
    assert_equal(one_thread, run_all(local), 1e-12)


def test_the_sums_are_those_of_numpy(one_thread: list[BatchSums]) -> None:
    x = np.concatenate([feeds["x"] for feeds in data().batches()]).astype(np.float64)
    weight = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)) / 8
    hidden = x @ weight
    gram = one_thread[0].total("gram")
    assert np.abs(gram - hidden.T @ hidden).max() < 1e-4 * np.abs(gram).max()


@pytest.mark.parametrize("workers", [2, 3])
def test_worker_processes_change_no_bit(workers: int, one_thread: list[BatchSums]) -> None:
    with process_pool(workers) as executor:
        values = values_on(executor)
        assert_equal(run_all(values), one_thread)
        folder = values.folder.path
        values.close()
        assert not folder.exists()


def test_threads_change_no_bit(one_thread: list[BatchSums]) -> None:
    with ThreadPoolExecutor(5) as executor:
        assert_equal(run_all(values_on(executor)), one_thread)


def test_a_pool_that_lost_a_worker_says_so() -> None:
    with process_pool(2) as executor:
        values = values_on(executor)
        values.run(program(0))
        os.kill(next(iter(executor._processes)), signal.SIGKILL)
        with pytest.raises(UserError, match="a worker process ended"):
            for number in range(1, LAYERS):
                values.run(program(number))


def test_a_worker_that_sees_no_shared_folder_is_sent_all(one_thread: list[BatchSums]) -> None:
    """As a pool whose workers are on other machines: values stay with a process, and a task may come to another."""
    with process_pool(2) as executor:
        values = values_on(executor)
        values.reference = replace(values.reference, folder=str(values.folder.path / "elsewhere"))
        hidden = [program(number) for number in range(LAYERS)]
        assert_equal([values.run(hidden[number]) for number in range(LAYERS)], one_thread)
        assert values.traffic.replays > 0


# -- Dask ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dask_client() -> Iterator[Any]:
    """Four workers, of which tests kill three."""
    with local_client(4) as client:
        yield client


def worker_pids(client: Any) -> dict[str, int]:
    pids: dict[str, int] = client.run(os.getpid)
    return pids


def test_dask_workers_change_no_bit(dask_client: Any, one_thread: list[BatchSums]) -> None:
    values = values_on(dask_client.get_executor())
    assert_equal(run_all(values), one_thread)
    assert values.traffic.replays == 0


def test_layers_move_programs_and_sums_alone(dask_client: Any) -> None:
    """However many samples there are."""
    moved = []
    for repeats in (1, 4):
        x = np.tile(np.concatenate([feeds["x"] for feeds in data().batches()]), (repeats, 1))
        calibration = load_calibration({"x": x}, [X], batch=2 * repeats, samples=len(x), held_out=0)
        values = DistributedBatchValues(calibration, dask_client.get_executor(), EXECUTION)
        run_all(values)
        moved.append(replace(values.traffic))
        values.close()
    assert moved[0] == moved[1]
    assert moved[0].sums == LAYERS * 2 * 8 * (WIDTH * WIDTH + WIDTH)  # of even and of odd batches, in float64


@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_dask_worker_changes_no_bit(killed: int, dask_client: Any, one_thread: list[BatchSums]) -> None:
    """Its values are computed again by the others; ``killed``: the layer in front of which it dies."""
    values = values_on(dask_client.get_executor())
    before = worker_pids(dask_client)
    victim = before[min(before)]

    def kill(number: int) -> None:
        if number == killed:
            os.kill(victim, signal.SIGKILL)

    assert_equal(run_all(values, kill), one_thread)
    assert victim not in worker_pids(dask_client).values()
    if killed:
        assert values.traffic.replays == 1
    else:  # nothing lies on a worker yet: tasks that are not sent when it dies go to another one
        assert values.traffic.replays <= 1


def test_a_dask_worker_that_dies_in_the_middle_of_a_layer(dask_client: Any, one_thread: list[BatchSums]) -> None:
    values = values_on(dask_client.get_executor())
    found = [values.run(program(0))]
    found.append(values.run(replace(program(1), observe=KillOnce(str(values.folder.path / "killed")))))
    found += [values.run(program(number)) for number in range(2, LAYERS)]
    assert (values.folder.path / "killed").exists()
    assert_equal(found, one_thread)
