"""Fewer tokens, alone and together with widths: what is left of the quality, and how much of the spared MACs is time.

    python benchmarks/tokens.py model.onnx --calib images/ --eval held-out/ --labels labels.csv
    python benchmarks/tokens.py encoder.onnx --calib images/ --eval held-out/ --rows '--tokens merge:13'

Each row is one call of ``snpc prune``. Without labels a row is judged by its drift: the norm of the change of the first
output over its norm, for all ``--eval`` samples together (features, segmentation, depth). ``speed / MACs``: speed-up of
onnxruntime over the dense model, measured side by side, over the factor by which MACs got fewer (1: every MAC that went
saved its share of the time). ``deciding``: share of the time that goes into nodes that snpc added, by onnxruntime's
profile. Data and labels as in ``quality.py``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from quality import evaluation, outputs, quality  # type: ignore[import-not-found]

import snpc
from snpc.runtime.evaluation.bench import run_rounds
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.feeds import random_feeds
from snpc.runtime.execution.runners import open_runner

BATCHES = (1, 8)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROWS = (
    "--tokens auto --roles none --target macs=0.7",
    "--tokens auto --roles none --target macs=0.5",
    "--target macs=0.7",
    "--tokens auto --target macs=0.5",
    "--tokens auto --target macs=0.4",
)


def drift(dense: Path, pruned: Path, feeds: dict[str, Any]) -> float:
    """Norm of the change of the first output over its norm."""
    change = whole = 0.0
    for (_, before), (_, after) in zip(outputs(dense, feeds), outputs(pruned, feeds), strict=True):
        change, whole = change + float(((after - before) ** 2).sum()), whole + float((before**2).sum())
    return float(np.sqrt(change / whole))


def deciding(path: Path, batch: int, folder: Path) -> float:
    """Share of the time of all nodes that is spent in those named tokens_*."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = snpc.load(path)
    shape = [batch, *(int(d) for d in model.inputs[0].shape[1:])]
    feeds = {model.inputs[0].name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    for _ in range(10):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [(e["name"], e["dur"]) for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    return sum(d for name, d in nodes if name.startswith("tokens_")) / sum(d for _, d in nodes)


def speeds(dense: Path, pruned: Path, threads: int, clock: str) -> list[float]:
    """Speed-ups by batch."""
    runners = [open_runner(path, execution=Execution(threads=threads)) for path in (dense, pruned)]
    found = []
    for batch in BATCHES:
        feeds = random_feeds(runners[0].inputs, batch=batch)
        calls = [[runner.prepare(feeds)] for runner in runners]
        run_rounds(calls, iterations=3)
        times = run_rounds(calls, iterations=20, duration=8.0, clock=CLOCKS[clock])
        found.append(float(np.median(times[:, 0] / times[:, 1])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--labels", type=Path, help="CSV of file name and class, for a folder of images")
    parser.add_argument("--image-mean", default="0.485,0.456,0.406")
    parser.add_argument("--image-std", default="0.229,0.224,0.225")
    parser.add_argument("--rows", default=";".join(ROWS), help="flags of `snpc prune`, separated by semicolons")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall", help="cpu with --threads 1: on a busy machine")
    options = parser.parse_args()
    feeds, labels = evaluation(options, snpc.load(options.model))
    images = Path(options.calib).is_dir()
    calib = ["--calib", options.calib]
    calib += ["--image-mean", options.image_mean, "--image-std", options.image_std] if images else []
    if labels is not None:
        print(f"dense: {quality(options.model, 'top1', feeds, labels):.1f}", flush=True)
    heads = [f"{what}, batch {batch}" for what in ("speed-up", "speed / MACs", "deciding") for batch in BATCHES]
    judged = "drift" if labels is None else "top-1"
    print(f"| | {judged} | MACs | {' | '.join(heads)} |\n|---|{'---:|' * (2 + len(heads))}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target, report = folder / "pruned.onnx", folder / "report.json"
        for row in options.rows.split(";"):
            command = [sys.executable, "-m", "snpc.cli", "prune", str(options.model), *row.split(), *calib]
            subprocess.run([*command, "-o", str(target), "--json", str(report)], check=True, capture_output=True)
            macs = json.loads(report.read_text())["macs"]
            left = macs["after"] / macs["before"]
            faster = speeds(options.model, target, options.threads, options.clock)
            cells = [f"{s:.2f} x" for s in faster] + [f"{s * left:.2f}" for s in faster]
            cells += [f"{100 * deciding(target, batch, folder):.1f} %" for batch in BATCHES]
            if labels is None:
                result = f"{drift(options.model, target, feeds):.3f}"
            else:
                result = f"{quality(target, 'top1', feeds, labels):.1f}"
            print(f"| `{row.strip()}` | {result} | {100 * left:.1f} % | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
