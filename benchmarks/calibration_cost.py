"""What a prune with calibration data costs beside plain passes over the same data; ``prune_cost.py --data`` calls it.

Each row runs in a process of its own. Passes of the dense model over all samples are timed twice before and twice
after, and their median is what ratios refer to. Stages are those that ``Execution.progress`` is told of; a stage inside
another one counts for itself only.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8
REST = "the rest"


def anonymous_bytes() -> int:
    """Bytes of this process in memory, without pages of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


@contextmanager
def sampled_peaks(stage: Callable[[], str] = lambda: REST, interval: float = 0.002) -> Iterator[dict[str, int]]:
    """The largest ``anonymous_bytes`` that was seen in each ``stage``, complete behind the block."""
    peaks, done = {stage(): anonymous_bytes()}, threading.Event()

    def sample() -> None:
        name = stage()
        peaks[name] = max(peaks.get(name, 0), anonymous_bytes())

    def watch() -> None:
        while not done.wait(interval):
            sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
        sample()


@dataclass(frozen=True)
class Seconds:
    """Seconds on the clock, and of processor time over all threads."""

    wall: float = 0.0
    cpu: float = 0.0

    @staticmethod
    def now() -> Seconds:
        return Seconds(time.perf_counter(), time.process_time())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    def over(self, other: Seconds) -> Seconds:
        return Seconds(self.wall / other.wall, self.cpu / other.cpu)


@dataclass
class StageTimes:
    """A progress display that shows nothing and keeps the seconds of every stage."""

    seconds: dict[str, Seconds] = field(default_factory=dict)
    inside: list[Seconds] = field(default_factory=list)
    names: list[str] = field(default_factory=lambda: [REST])

    @property
    def current(self) -> str:
        """The innermost stage."""
        return self.names[-1]

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Callable[[float], None]]:
        start = Seconds.now()
        self.inside.append(Seconds())
        self.names.append(name)
        try:
            yield lambda amount: None
        finally:
            self.names.pop()
            spent, nested = Seconds.now() - start, self.inside.pop()
            self.seconds[name] = self.seconds.get(name, Seconds()) + (spent - nested)
            if self.inside:
                self.inside[-1] += spent


@dataclass(frozen=True)
class DataRow:
    """How one prune is asked for. ``options``: of ``snpc.prune``. ``sweep``: several targets in one sweep instead.
    ``sizes``: of dynamic dimensions of the inputs. ``memory_limit``: bytes, of ``snpc.Execution``."""

    name: str
    model: Path
    samples: int
    threads: int
    options: dict[str, Any]
    sweep: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    memory_limit: int | None = None


@dataclass(frozen=True)
class DataCost:
    """``passes``: seconds of plain passes over the samples; ``total``: of the prune. In bytes: ``peaks`` of its stages,
    what was there ``before`` it, and ``passes_peak``."""

    name: str
    passes: Seconds
    total: Seconds
    stages: dict[str, Seconds]
    peaks: dict[str, int]
    before: int
    passes_peak: int
    macs: tuple[float, ...]
    drift: tuple[float, ...]

    @property
    def ratio(self) -> Seconds:
        return self.total.over(self.passes)

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def random_feeds(row: DataRow, samples: int) -> dict[str, Any]:
    """Random inputs: normal numbers, and token numbers for integers."""
    import snpc

    calibration = snpc.random_calibration(snpc.analyze(snpc.load(row.model), row.sizes or None), samples=samples)
    batches = list(calibration.batches())
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def plain_passes(model: Path, feeds: dict[str, Any], threads: int) -> Seconds:
    """Seconds of one pass of the dense model over ``feeds``."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    count = len(next(iter(feeds.values())))
    session.run(None, {name: array[:BATCH] for name, array in feeds.items()})
    start = Seconds.now()
    for first in range(0, count, BATCH):
        session.run(None, {name: array[first : first + BATCH] for name, array in feeds.items()})
    return Seconds.now() - start


def return_memory() -> None:
    """Give what is free back to the system, so that a peak holds nothing of earlier work."""
    ctypes.CDLL(None).malloc_trim(0)


def measure_row(row: DataRow) -> DataCost:
    """One row, in this process."""
    import snpc

    feeds = random_feeds(row, row.samples + max(row.samples // 4, 1))  # a fifth is held out
    passed = {name: array[: row.samples] for name, array in feeds.items()}
    return_memory()
    with sampled_peaks() as passes_peaks:
        passes = [plain_passes(row.model, passed, row.threads) for _ in range(2)]
    return_memory()
    times = StageTimes()
    execution = snpc.Execution(threads=row.threads, memory_limit=row.memory_limit, progress=times)
    inputs = snpc.load(row.model).inputs
    calibration = snpc.load_calibration(feeds, inputs, samples=row.samples, batch=BATCH)
    before = anonymous_bytes()
    with tempfile.TemporaryDirectory() as folder, sampled_peaks(lambda: times.current) as peaks:
        start = Seconds.now()
        macs, drift = (run_sweep if row.sweep else run_prune)(row, Path(folder), calibration, execution)
        total = Seconds.now() - start
    return_memory()
    passes += [plain_passes(row.model, passed, row.threads) for _ in range(2)]
    plain = Seconds(statistics.median(p.wall for p in passes), statistics.median(p.cpu for p in passes))
    known = sum(times.seconds.values(), Seconds())
    stages = {**times.seconds, REST: total - known}
    return DataCost(row.name, plain, total, stages, peaks, before, max(passes_peaks.values()), macs, drift)


Shares = tuple[tuple[float, ...], tuple[float, ...]]  # MACs that are left, as shares, and drifts


def run_prune(row: DataRow, folder: Path, calibration: Any, execution: Any) -> Shares:
    import snpc

    options = {"calibration": calibration, "execution": execution, **row.options}
    result = snpc.prune(row.model, folder / "pruned.onnx", **options)
    return (result.after.macs / result.before.macs,), (result.quality.drift,)


def run_sweep(row: DataRow, folder: Path, calibration: Any, execution: Any) -> Shares:
    """All targets at once. The rounds that time the models belong to judging them, not to pruning: one is run."""
    import snpc
    from snpc.pipeline import SweepRequest, sweep

    targets = [snpc.parse_target(text) for text in row.sweep]
    request = SweepRequest(snpc.Budget(target=targets[0]), row.options.get("tokens"), rounds=1)
    analysis = snpc.analyze(snpc.load(row.model))
    result = sweep(analysis, targets, folder, calibration, request, execution=execution)
    dense, *points = result.points
    return tuple(p.macs / dense.macs for p in points), tuple(p.drift for p in points)


def print_cost(cost: DataCost, samples: int) -> None:
    """The row's stages, beside plain passes, as a table in Markdown."""
    plain, ratio = cost.passes, cost.ratio
    print(f"\n{cost.name}: plain passes over {samples} samples {plain.wall:.1f} s ({plain.cpu:.1f} s of processors)\n")
    print("| stage | s | x plain passes | processor s | x plain passes | peak, MB |\n|---|---:|---:|---:|---:|---:|")
    for name, seconds in (*sorted(cost.stages.items(), key=lambda item: -item[1].wall), ("all", cost.total)):
        share, peak = seconds.over(plain), cost.peaks.get(name, cost.peak) / 1e6
        print(f"| {name} | {seconds.wall:.1f} | {share.wall:.2f} | {seconds.cpu:.1f} | {share.cpu:.2f} | {peak:.0f} |")
    macs, drift = (", ".join(f"{value:.3f}" for value in values) for values in (cost.macs, cost.drift))
    print(f"\n{ratio.wall:.2f} x plain passes, {ratio.cpu:.2f} x in processor time; MACs {macs}; drift {drift}")
    before, passes = cost.before / 1e6, cost.passes_peak / 1e6
    print(f"of the peak, {before:.0f} MB were there before; the plain passes had {passes:.0f} MB", flush=True)
