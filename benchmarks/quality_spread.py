"""Quality over several draws of calibration data: the mean and the spread of each setting, and how two settings differ.

    python benchmarks/quality_spread.py model.onnx --calib images/ --eval held-out/ --labels labels.csv
        --record rows.jsonl

A setting is EFFORT:TOKENS:TARGET, as of ``snpc prune``: ``normal:none:macs=0.8`` cuts widths only. Every setting is
pruned once per ``--seeds``, which draw the calibration samples; top-1 and the divergence from the dense model are those
of the written file on all evaluation samples. ``--record`` gets one JSON line per run, with the seconds that it took: a
run that was stopped goes on with what is missing, and ``--settings ''`` prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from quality import BATCH, evaluation, numbers

import snpc

Array = np.ndarray[Any, np.dtype[Any]]
SETTINGS = (
    *(f"normal:none:macs={share}" for share in (0.9, 0.8, 0.7, 0.6)),
    *(f"normal:auto:macs={share}" for share in (0.7, 0.5, 0.4)),
    *(f"quick:none:macs={share}" for share in (0.9, 0.8, 0.7, 0.6)),
    *(f"quick:auto:macs={share}" for share in (0.7, 0.5, 0.4)),
    *(f"search:auto:macs={share}" for share in (0.5, 0.4)),
    *(f"normal:none:macs={share}" for share in (0.5, 0.4)),
    *(f"search:none:macs={share}" for share in (0.5, 0.4)),
)


@dataclass(frozen=True)
class Run:
    """One pruned model. ``top1``: per cent; ``divergence``: KL from the dense model, nats; ``macs``: share of them."""

    setting: str
    seed: int
    top1: float
    divergence: float
    agreement: float
    macs: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Samples with labels, and what the dense model makes of them: log-probabilities [samples, classes]."""

    feeds: Mapping[str, Array]
    labels: Array
    threads: int
    dense: Array

    def judge(self, path: Path) -> tuple[float, float, float]:
        """(top-1 in per cent, divergence from the dense model in nats, share of equal top entries in per cent)."""
        found = log_probabilities(path, self.feeds, self.threads)
        divergence = float((np.exp(self.dense) * (self.dense - found)).sum(1).mean())
        agreement = 100 * float((found.argmax(1) == self.dense.argmax(1)).mean())
        return self.top1(found), divergence, agreement

    def top1(self, values: Array) -> float:
        return 100 * float((values.argmax(1) == self.labels).mean())


def log_probabilities(path: Path, feeds: Mapping[str, Array], threads: int) -> Array:
    """[samples, classes] of the first output, in float64."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    starts = range(0, len(next(iter(feeds.values()))), BATCH)
    parts = [session.run(None, {k: v[start : start + BATCH] for k, v in feeds.items()})[0] for start in starts]
    logits = np.concatenate(parts).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def prune_once(options: argparse.Namespace, setting: str, seed: int, judged: Evaluation) -> Run:
    effort, tokens, target = setting.split(":", 2)
    images = snpc.ImageOptions(mean=numbers(options.image_mean), std=numbers(options.image_std))
    shaped = {"images": images} if Path(options.calib).is_dir() else {}
    inputs = snpc.load(options.model).inputs
    calibration = snpc.load_calibration(options.calib, inputs, samples=options.samples, seed=seed, **shaped)
    asked: dict[str, Any] = {"target": target, "tokens": tokens, "effort": effort}
    execution = snpc.Execution(threads=options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "cut.onnx", time.perf_counter()
        result = snpc.prune(options.model, path, calibration=calibration, execution=execution, **asked)
        seconds = time.perf_counter() - start
        top1, divergence, agreement = judged.judge(path)
    share = result.after.macs / result.before.macs
    return Run(setting, seed, top1, divergence, agreement, share, seconds)


def recorded(path: Path) -> Iterator[Run]:
    if path.is_file():
        yield from (Run(**json.loads(line)) for line in path.read_text().splitlines())


def print_table(runs: list[Run], settings: list[str]) -> None:
    """One row per setting: means, and the least and the largest top-1 over the draws."""
    print("| effort | tokens | target | top-1 | from .. to | KL | same top entry | draws |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for setting in settings:
        found = [run for run in runs if run.setting == setting]
        if not found:
            continue
        top1 = [run.top1 for run in found]
        divergence, same = (np.mean([getattr(run, name) for run in found]) for name in ("divergence", "agreement"))
        words = " | ".join(setting.split(":"))
        print(f"| {words} | {np.mean(top1):.1f} | {min(top1):.1f} .. {max(top1):.1f} | {divergence:.3f} "
              f"| {same:.1f} % | {len(found)} |")  # fmt: skip


def print_differences(runs: list[Run], settings: list[str]) -> None:
    """quick and search beside normal, over the draws that both have."""
    by_key = {(run.setting, run.seed): run for run in runs}
    for setting in settings:
        effort, rest = setting.split(":", 1)
        pairs = [(run, by_key.get((f"normal:{rest}", run.seed))) for run in runs if run.setting == setting]
        gains = [run.top1 - normal.top1 for run, normal in pairs if normal is not None]
        if effort != "normal" and gains:
            print(f"{setting}: {np.mean(gains):+.1f} points beside normal ({min(gains):+.1f} .. {max(gains):+.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=128, help="calibration samples of a draw")
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--labels", type=Path, help="CSV of file name and class, for a folder of images")
    parser.add_argument("--image-mean", default="0.485,0.456,0.406")
    parser.add_argument("--image-std", default="0.229,0.224,0.225")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, required=True, help="JSON lines, one per run; added to")
    options = parser.parse_args()
    settings = [text for text in options.settings.split(",") if text]
    seeds = [int(text) for text in options.seeds.split(",")]
    if settings:
        feeds, labels = evaluation(options, snpc.load(options.model))
        assert labels is not None, "the evaluation data needs labels"
        dense = log_probabilities(options.model, feeds, options.threads)
        judged = Evaluation(feeds, labels, options.threads, dense)
        print(f"dense: {judged.top1(dense):.1f} on {len(labels)} samples", flush=True)
    done = {(run.setting, run.seed) for run in recorded(options.record)}
    for seed in seeds:
        for setting in settings:
            if (setting, seed) not in done:
                run = prune_once(options, setting, seed, judged)
                with options.record.open("a") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
                print(f"{setting} seed {seed}: {run.top1:.2f} KL {run.divergence:.4f} {run.seconds:.0f} s", flush=True)
    runs = list(recorded(options.record))
    shown = settings or list(dict.fromkeys(run.setting for run in runs))
    print_table(runs, shown)
    print_differences(runs, shown)


if __name__ == "__main__":
    main()
