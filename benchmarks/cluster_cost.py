"""What spreading a prune over worker processes costs: time with 1 and 2 workers, bytes that move, and a model of the
cost for more workers.

    python benchmarks/cluster_cost.py model.onnx data.npz --samples 64 --target macs=0.6 --workers 1 2

Each worker runs onnxruntime with one thread. On a machine that does other work, look at the processor time: a run takes
the time of this process plus that of the workers divided by their number. Programs and sums are measured; what many
workers take is computed from them (``cost_model``), for a network of 10 Gbit/s.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import snpc
from snpc.runtime.batches import BatchProgram, BatchSums, DistributedBatchValues

BANDWIDTH = 1.25e9  # bytes per second: 10 Gbit/s
LATENCY = 0.01  # seconds per task and per merge
FAN_IN = 4  # sums that one merge takes


@dataclass
class Step:
    """One program: its bytes, those of its sums, and the seconds until they were there."""

    program: int
    sums: int
    seconds: float


@dataclass
class Run:
    """One prune. ``seconds``: wall clock. ``own`` and ``workers``: processor time of this process and of all others."""

    count: int
    seconds: float = 0.0
    own: float = 0.0
    workers: float = 0.0
    steps: list[Step] = field(default_factory=list)


def recorded(steps: list[Step]) -> Any:
    """``DistributedBatchValues.run``, which notes what it moved."""
    original = DistributedBatchValues.run

    def run(self: DistributedBatchValues, program: BatchProgram, *arguments: Any) -> BatchSums:
        start = time.perf_counter()
        sums = original(self, program, *arguments)
        folder = Path(self.programs[-1].folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        moved = sum(array.nbytes for half in (sums.even, sums.odd) for array in half.values())
        steps.append(Step(size, moved, time.perf_counter() - start))
        return sums

    return run


def measure(options: argparse.Namespace, count: int) -> Run:
    run = Run(count)
    original = DistributedBatchValues.run
    DistributedBatchValues.run = recorded(run.steps)  # type: ignore[method-assign]
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(count, mp_context=context) as executor:
            list(executor.map(time.sleep, [1.0] * count))  # the workers are there before the clock starts
            loaded = snpc.load(options.model)
            calibration = snpc.load_calibration(
                options.data, loaded.inputs, samples=options.samples, batch=options.batch, held_out=2
            )
            processes = [psutil.Process(pid) for pid in executor._processes]
            start, own, workers = time.perf_counter(), time.process_time(), processor_time(processes)
            snpc.prune(
                options.model,
                options.output,
                target=options.target,
                uniform=options.uniform,
                tokens="none",
                calibration=calibration,
                execution=snpc.Execution(executor=executor, threads=1),
            )
            run.seconds = time.perf_counter() - start
            run.own, run.workers = time.process_time() - own, processor_time(processes) - workers
    finally:
        DistributedBatchValues.run = original  # type: ignore[method-assign]
    return run


def processor_time(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def cost_model(run: Run, count: int, samples: float) -> tuple[float, float, float]:
    """(seconds of the passes, of them on the network, bytes through the busiest link) with ``count`` workers and
    ``samples`` times the samples. A program goes from worker to worker, in log2 rounds; sums are merged by
    ``FAN_IN``."""
    compute = run.workers * samples / count
    rounds = max((count - 1).bit_length(), 1)
    merges = 0
    while FAN_IN**merges < count:
        merges += 1
    network = sum(
        step.program * rounds / BANDWIDTH + (FAN_IN - 1) * merges * step.sums / BANDWIDTH + LATENCY * (rounds + merges)
        for step in run.steps
    )
    busiest = sum(2 * step.program + FAN_IN * step.sums for step in run.steps)
    return compute + network, network, busiest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--target", default="macs=0.6")
    parser.add_argument("--uniform", action="store_true", help="all groups alike: no trials")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path("cluster-cost.onnx"))
    options = parser.parse_args()
    runs = []
    print(f"{'workers':>7} {'seconds':>8} {'own CPU':>8} {'worker CPU':>10} {'own + workers/N':>15}")
    for count in options.workers:
        run = measure(options, count)
        runs.append(run)
        ideal = run.own + run.workers / count
        print(f"{count:7} {run.seconds:8.1f} {run.own:8.1f} {run.workers:10.1f} {ideal:15.1f}", flush=True)
    print(f"\n{'step':>4} {'program MB':>10} {'sums MB':>8} {'seconds':>8}")
    for number, step in enumerate(runs[-1].steps):
        print(f"{number:4} {step.program / 1e6:10.2f} {step.sums / 1e6:8.2f} {step.seconds:8.2f}")
    print(f"\n{'workers':>7} {'samples':>8} {'passes s':>9} {'network s':>9} {'busiest link MB':>15}")
    for count, factor in ((1, 1), (2, 1), (16, 1), (16, 16), (256, 16), (256, 256)):
        seconds, network, busiest = cost_model(runs[0], count, factor)
        print(f"{count:7} {options.samples * factor:8} {seconds:9.1f} {network:9.2f} {busiest / 1e6:15.1f}")
    options.output.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
