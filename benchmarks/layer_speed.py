"""How much latency goes with whole layers: the share of the time that is saved, beside that of the MACs, at batch 1.

    python benchmarks/layer_speed.py deit-t deit-s --folder build/speed
    python benchmarks/layer_speed.py vit.onnx --share 0.25 --share 0.5

Models of random weights are exported as by ``speed.py``; files are taken as they are. Every second attention and
feed-forward layer goes until the share of them is reached, nothing stands for them, and all files run in the same
interleaved rounds (`snpc bench`) under onnxruntime's default session. "per MAC" is the share of the latency over the
share of the MACs. ``--clock cpu`` with ``--threads 1`` counts processor seconds: what to use on a machine that others
load. Without files of one's own it needs torch and transformers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from speed import CASES, CLOCKS, export

import snpc
from snpc.passes import remove_sublayers
from snpc.runtime.evaluation.bench import median_interval, run_rounds
from snpc.runtime.execution import Execution
from snpc.runtime.execution.feeds import random_feeds
from snpc.runtime.execution.runners import open_runner


def without_layers(analysis: snpc.Analysis, share: float, path: Path) -> float:
    """Write the model without this share of its layers; returns its MACs."""
    layers = [s.name for s in analysis.sublayers if s.removable and s.kind != "convolution"]
    order = [*layers[1::4], *layers[2::4], *layers[3::4], *layers[::4]]
    shorter = remove_sublayers(analysis, order[: round(share * len(layers))])
    return snpc.apply(snpc.PruningPlan(snpc.SlicePlan(shorter, "none", {}, {})), path).after.macs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", help=f"{', '.join(CASES)}, or an ONNX file")
    parser.add_argument("--share", type=float, action="append", help="of the layers  [default: 0.25 and 0.5]")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps the exported files")
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    options = parser.parse_args()
    print("| model | layers gone | MACs gone | latency gone | 95 % interval | per MAC |")
    print(f"|---|{5 * '---:|'}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.models:
            measure(name, options, folder)


def measure(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Print a row per share of the layers that are gone from one model."""
    dense, shares = Path(name), options.share or [0.25, 0.5]
    if name in CASES:
        dense = folder / f"{name}.onnx"
        if not dense.exists():
            export(CASES[name], dense)
    analysis = snpc.analyze(snpc.load(dense))
    files = [folder / f"{dense.stem}-{share:g}.onnx" for share in shares]
    macs = [without_layers(analysis, share, file) for share, file in zip(shares, files, strict=True)]
    runners = [open_runner(file, execution=Execution(threads=options.threads)) for file in (dense, *files)]
    feeds = random_feeds(runners[0].inputs)
    calls = [[runner.prepare(feeds)] for runner in runners]
    run_rounds(calls, iterations=3)
    times = run_rounds(calls, iterations=options.rounds, clock=CLOCKS[options.clock])
    for number, (share, left) in enumerate(zip(shares, macs, strict=True), start=1):
        saved = 1 - times[:, number] / times[:, 0]
        (low, high), gone = median_interval(saved), 1 - left / analysis.cost.macs
        middle = float(np.median(saved))
        cells = (dense.stem, f"{100 * share:.0f} %", f"{100 * gone:.1f} %", f"{100 * middle:.1f} %")
        print(f"| {' | '.join(cells)} | {100 * low:.1f} to {100 * high:.1f} % | {middle / gone:.2f} |", flush=True)


if __name__ == "__main__":
    main()
