"""Units against zeros at the same loss of accuracy: what is left of the file, of memory and of the time.

    python benchmarks/structured_vs_unstructured.py [MODEL --calib A.npz --eval B.npz --labels NAME] [--drop 0.01]

Without a model: the digits example. Each method goes as far as ``--drop`` of the right answers allows, found by
bisection. "structured": ``snpc prune`` with closed forms. "magnitude": the smallest weights of all matrices together
are zero. Trained rows take ``--steps`` of distillation on the calibration data, all of them alike; "magnitude" and
"LOBSTER" are then ``snpc finetune --sparsify`` with plain decay and with ``--regularize lobster``. Steps of 0 leave
these rows out. The comparison is that of Bragagnolo et al., "On the role of structured pruning for neural network
compression" (ICIP 2021), under onnxruntime.

Columns: MACs; zeros in matrices; right answers; bytes of the file as it is, as zip (deflate) and as xz; memory that a
session takes at its peak, loading included; processor time of a run on one thread, in turns, all relative to the dense
file. ``--labels`` names an array of ``--eval`` that holds a class per row of the first output. Needs torch and Linux.
"""

from __future__ import annotations

import argparse
import lzma
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import snpc
import snpc.torch
from snpc.runtime.evaluation import EvaluationData, evaluate
from snpc.runtime.evaluation.bench import run_rounds
from snpc.runtime.execution import Execution, open_runner, random_feeds
from snpc.torch import TrainingOptions
from snpc.torch.training.sparsity import Sparsity, matrices, set_small_to_zero

DATA = Path(snpc.__file__).parent / "data" / "digits"
SHARES = tuple(round(0.95 - 0.05 * k, 2) for k in range(15)) + tuple(round(0.2 - 0.02 * k, 2) for k in range(8))
ZEROS = tuple(round(0.05 * k, 2) for k in range(1, 17)) + tuple(round(0.8 + 0.02 * k, 2) for k in range(1, 10))
RISES = (0.003, 0.006, 0.012, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)

PEAK = """
import sys
import numpy as np
import onnxruntime as ort

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

options = ort.SessionOptions()
options.intra_op_num_threads = 1
feeds = dict(np.load(sys.argv[2]))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
print(1024 * (status("VmHWM") - before))
"""

Make = Callable[[float], Path]


@dataclass(frozen=True)
class Row:
    method: str
    path: Path
    right: float


class Comparison:
    """One dense model, its data, and the files that methods make of it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.model, self.folder, self.steps, self.lr = options.model, folder, options.steps, options.lr
        self.analysis = snpc.analyze(snpc.load(self.model))
        inputs = self.analysis.model.inputs
        self.data = snpc.load_calibration(options.calib, inputs, samples=options.samples, batch=32)
        with np.load(options.eval) as arrays:
            labels = arrays[options.labels]
        self.eval = EvaluationData(
            snpc.load_calibration(options.eval, inputs, samples=len(labels), batch=32, held_out=0), labels
        )
        self.limit = self.right(self.model) - options.drop

    def right(self, path: Path) -> float:
        found = evaluate(path, self.eval, Execution(threads=1), keep=0).accuracy
        assert found is not None
        return found

    def strongest(self, method: str, make: Make, strengths: Sequence[float]) -> Row:
        """The result of the last strength that keeps enough right answers, by bisection; else the dense file."""
        best, low, high = Row(method, self.model, self.right(self.model)), -1, len(strengths)
        while high - low > 1:
            middle = (low + high) // 2
            path = make(strengths[middle])
            right = self.right(path)
            print(f"  {method} {strengths[middle]:g}: {100 * right:.1f}", file=sys.stderr, flush=True)
            if right >= self.limit:
                low, best = middle, Row(method, path, right)
            else:
                high = middle
        return best

    def structured(self, share: float) -> Path:
        path = self.folder / f"structured-{share}.onnx"
        if not path.exists():
            snpc.apply(snpc.plan(self.analysis, snpc.Budget(target=f"macs={share}"), calibration=self.data), path)
        return path

    def structured_trained(self, share: float) -> Path:
        return self.tuned(self.structured(share), f"structured-trained-{share}", TrainingOptions())

    def magnitude(self, zeros: float) -> Path:
        path = self.folder / f"magnitude-{zeros}.onnx"
        module = snpc.torch.load(self.model)
        weights = matrices(module.parameters())
        values = [weight.detach().clone() for weight in weights]
        sizes = torch.cat([value.abs().reshape(-1) for value in values]).sort().values
        set_small_to_zero(weights, values, float(sizes[int(zeros * len(sizes)) - 1]))
        snpc.torch.save(module, self.model, path)
        return path

    def magnitude_trained(self, rise: float) -> Path:
        return self.tuned(self.model, f"magnitude-trained-{rise}", TrainingOptions(sparsify=rise))

    def lobster(self, rise: float) -> Path:
        training = TrainingOptions(sparsify=rise, regularize="lobster", decay=1.0)
        return self.tuned(self.model, f"lobster-{rise}", training)

    def tuned(self, pruned: Path, name: str, training: TrainingOptions) -> Path:
        path = self.folder / f"{name}.onnx"
        options = {"steps": self.steps, "lr": self.lr, "evaluate": max(1, self.steps // 8)}
        snpc.torch.finetune(pruned, self.model, self.data, path, training=replace(training, **options))
        return path

    def rows(self) -> Iterator[Row]:
        yield Row("dense", self.model, self.right(self.model))
        yield self.strongest("structured", self.structured, SHARES)
        yield self.strongest("magnitude", self.magnitude, ZEROS)
        if self.steps:
            yield self.strongest("structured, trained", self.structured_trained, SHARES)
            yield self.strongest("magnitude, trained", self.magnitude_trained, RISES)
            yield self.strongest("LOBSTER, trained", self.lobster, RISES)


def peak_memory(path: Path, feeds: Path) -> int:
    """Bytes that opening a session and one run add to a fresh process, at their peak; the least of three."""
    runs = (subprocess.run([sys.executable, "-c", PEAK, str(path), str(feeds)], check=True, capture_output=True)
            for _ in range(3))  # fmt: skip
    return min(int(run.stdout) for run in runs)


def print_table(rows: Sequence[Row], batch: int, rounds: int, folder: Path) -> None:
    runners = [open_runner(row.path, execution=Execution(threads=1)) for row in rows]
    feeds = random_feeds(runners[0].inputs, batch=batch)
    np.savez(folder / "feeds.npz", **feeds)
    calls = [[runner.prepare(feeds)] for runner in runners]
    run_rounds(calls, iterations=2)
    times = run_rounds(calls, iterations=rounds, clock=time.process_time)
    measured = [Size.of(row.path, folder / "feeds.npz") for row in rows]
    print("| | MACs | zeros | right | file | zip | xz | peak memory | time |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    dense = measured[0]
    for k, (row, made) in enumerate(zip(rows, measured, strict=True)):
        shares = (made.plain / dense.plain, made.zip / dense.plain, made.xz / dense.plain, made.memory / dense.memory)
        cells = (
            row.method, f"{made.macs / dense.macs:.2f}", f"{100 * made.zeros:.0f} %", f"{100 * row.right:.1f}",
            *(f"{share:.2f}" for share in shares), f"{np.median(times[:, k] / times[:, 0]):.2f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |")


@dataclass(frozen=True)
class Size:
    """MACs, the share of zeros in matrices, and bytes: of the file, packed, and of memory."""

    macs: int
    zeros: float
    plain: int
    zip: int
    xz: int
    memory: int

    @classmethod
    def of(cls, path: Path, feeds: Path) -> Size:
        content = path.read_bytes()
        zeros, weights = Sparsity.of(snpc.torch.load(path).parameters())
        macs = snpc.analyze(snpc.load(path)).cost.macs
        packed = len(zlib.compress(content, 9)), len(lzma.compress(content))
        return cls(macs, zeros / weights, len(content), *packed, peak_memory(path, feeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=DATA / "digits_vit.onnx")
    parser.add_argument("--calib", type=Path, default=DATA / "calib.npz")
    parser.add_argument("--eval", type=Path, default=DATA / "eval.npz")
    parser.add_argument("--labels", default="labels")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--drop", type=float, default=0.01, help="of right answers, as a share")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=8, help="of memory and time")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = list(Comparison(options, Path(name)).rows())
        print_table(rows, options.batch, options.rounds, Path(name))


if __name__ == "__main__":
    main()
