"""Pruning a decoder that is larger than the memory for it: seconds and peak memory of every stage, layer by layer.

    python benchmarks/large_model.py FOLDER [--layers 4,8] [--width 4096] [--hidden 11008] [--memory-limit 4GB]
                                            [--samples 16] [--sequence 128] [--target macs=0.8] [--work]

Writes FOLDER/LAYERS/model.onnx with weights.bin beside it (half precision, random numbers, a small vocabulary; 0.4 GB a
layer at the size of seven billion parameters), and runs in processes of their own: a prune by magnitude without data,
and one that fits weights to random tokens with --effort quick. Memory is anonymous memory: weights in mapped files do
not count, the copies in single precision that onnxruntime makes of them do. Of several numbers of layers, the last
lines extrapolate to 32 of them, in seconds of processors, which other work on the machine changes less.
``seven_billion.py`` does it for models that fit, beside plain passes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from calibration_cost import REST, Seconds, StageTimes, anonymous_bytes, sampled_peaks

ROOT = Path(__file__).resolve().parent.parent
EXTRAPOLATED = 32  # layers
SAMPLES_PER_BATCH = 4  # samples per batch


class PrintedStages(StageTimes):
    """Says how long a stage took as soon as it ends: such runs take hours."""

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Callable[[float], None]]:
        with super().stage(name, total) as advance:
            yield advance
        seconds = self.seconds[name]
        print(f"{name}: {seconds.wall:.0f} s, {seconds.cpu:.0f} s of processors", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class LargePrune:
    """What is run: ``options`` of ``snpc.prune``; ``samples`` of ``sequence`` random tokens, none without data."""

    name: str
    model: Path
    options: dict[str, Any]
    samples: int
    sequence: int
    memory_limit: str
    work: Path | None = None


@dataclass(frozen=True)
class LargeCost:
    """``stages`` and ``peaks`` (bytes) by stage; ``before``: bytes that were there when it began."""

    total: Seconds
    stages: dict[str, Seconds]
    peaks: dict[str, int]
    before: int

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def measure_prune(asked: LargePrune) -> LargeCost:
    """In this process."""
    import numpy as np

    import snpc
    from snpc.runtime.execution import parse_bytes

    times, calibration = PrintedStages(), None
    work = snpc.WorkFolder(asked.work) if asked.work is not None else None
    execution = snpc.Execution(memory_limit=parse_bytes(asked.memory_limit), progress=times, work=work)
    if asked.samples:
        drawn = np.random.default_rng(0).integers(0, 1000, (asked.samples + 4, asked.sequence))
        inputs = snpc.load(asked.model).inputs
        calibration = snpc.load_calibration(
            {"input_ids": drawn}, inputs, samples=asked.samples, batch=SAMPLES_PER_BATCH
        )
    before = anonymous_bytes()
    with tempfile.TemporaryDirectory(dir=asked.model.parent) as folder, sampled_peaks(lambda: times.current) as peaks:
        start = Seconds.now()
        snpc.prune(
            asked.model, Path(folder) / "pruned.onnx", calibration=calibration, execution=execution, **asked.options
        )
        total = Seconds.now() - start
    rest = total - sum(times.seconds.values(), Seconds())  # scores of units, the plan
    return LargeCost(total, {**times.seconds, REST: rest}, dict(peaks), before)


def print_large_cost(name: str, layers: int, cost: LargeCost) -> None:
    print(f"\n{name}, {layers} layers: {cost.total.wall:.0f} s ({cost.total.cpu:.0f} s of processors), "
          f"peak {cost.peak / 1e9:.2f} GB\n")  # fmt: skip
    print("| stage | s | processor s | peak, GB |\n|---|---:|---:|---:|")
    for stage, seconds in sorted(cost.stages.items(), key=lambda item: -item[1].wall):
        print(f"| {stage} | {seconds.wall:.1f} | {seconds.cpu:.1f} | {cost.peaks.get(stage, 0) / 1e9:.2f} |")
    sys.stdout.flush()


def print_extrapolation(name: str, costs: dict[int, LargeCost]) -> None:
    """Linear in the number of layers, from the smallest and the largest file."""
    (few, first), (many, last) = min(costs.items()), max(costs.items())
    if few == many:
        return
    seconds = (last.total.cpu - first.total.cpu) / (many - few)
    memory = (last.peak - first.peak) / (many - few)
    more = EXTRAPOLATED - many
    print(f"\n{name}: {seconds:.1f} s of processors and {memory / 1e6:.0f} MB per further layer; "
          f"{EXTRAPOLATED} layers: {(last.total.cpu + more * seconds) / 60:.0f} min of processors, "
          f"{(last.peak + more * max(memory, 0.0)) / 1e9:.2f} GB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", default="4,8")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--memory-limit", default="4GB")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--target", default="macs=0.8")
    parser.add_argument("--roles", help="what is cut, as of snpc prune")
    parser.add_argument("--only", choices=["magnitude", "quick"], help="one of the two prunes")
    parser.add_argument("--work", action="store_true", help="keep finished stages in FOLDER/LAYERS/work")
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.models.layouts import Llama, write_llama

    budget: dict[str, Any] = {"target": options.target}
    if options.roles:
        budget["roles"] = tuple(options.roles.split(","))
    prunes: dict[str, tuple[dict[str, Any], int]] = {
        "magnitude": ({"ratio": 0.25, "method": "select", "criterion": "magnitude"}, 0),
        "quick": ({**budget, "effort": "quick", "tokens": "none"}, options.samples),
    }
    costs: dict[str, dict[int, LargeCost]] = {}
    for layers in (int(text) for text in options.layers.split(",")):
        folder = options.folder / str(layers)
        sizes = Llama(layers, options.width, options.heads, options.kv_heads, options.hidden, options.vocabulary)
        path = folder / "model.onnx"
        if not path.is_file():
            write_llama(folder, sizes)
        for name, (asked, samples) in prunes.items():
            if options.only in (None, name):
                work = folder / "work" if options.work else None
                row = LargePrune(name, path, asked, samples, options.sequence, options.memory_limit, work)
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    cost = pool.submit(measure_prune, row).result()
                costs.setdefault(name, {})[layers] = cost
                print_large_cost(name, layers, cost)
        if not options.keep:
            shutil.rmtree(folder)
    for name, measured in costs.items():
        print_extrapolation(name, measured)


if __name__ == "__main__":
    main()
