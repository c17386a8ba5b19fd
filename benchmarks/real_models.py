"""What pruning costs trained models, at several sizes: the table and the picture of the README.

    python benchmarks/real_models.py ViT-Tiny vit_tiny.onnx --calib images/ --eval held-out/ --labels labels.csv
        --image-mean 0.5,0.5,0.5 --image-std 0.5,0.5,0.5
    python benchmarks/real_models.py MiniLM-L6 model.onnx --calib calib.npz --eval eval.npz --metric spearman
    python benchmarks/real_models.py "BART g2p" bart.onnx --calib calib.npz --eval eval.npz --metric tokens
    python benchmarks/real_models.py "Llama, 260 k" llama.onnx --calib calib.npz --eval eval.npz --metric perplexity

Models and data are your own copies. Every size is pruned in two ways: ``snpc`` is the default with calibration data,
and ``selection`` removes the units of smallest weight and changes nothing else, as most pruning tools do. Nothing is
trained; labels serve to evaluate only. MACs and parameters are those of the written files, the metric is measured on
them under onnxruntime, and the speed-up is the median of rounds in which dense and pruned model take turns, on one
sample and one thread. Each row is stored as soon as it is measured: a run that was stopped goes on with what is
missing.

Metrics: those of ``quality.py``, and ``spearman``: the rank correlation of the cosines of all pairs of samples with
those of the dense model, in per cent (output [N, D]).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quality import METRICS, Array, add_data_arguments, cosines, evaluation, numbers, quality  # type: ignore[import-not-found]
from scipy.stats import spearmanr

import snpc

RESULTS = Path(__file__).with_name("results") / "real_models.json"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "snpc": {},
    "selection": {"method": "select", "criterion": "magnitude", "tokens": "none"},
}


def measured(path: Path, dense: Path, metric: str, feeds: Mapping[str, Array], labels: Array | None) -> float:
    if metric != "spearman":
        return float(quality(path, metric, feeds, labels))
    return 100 * float(spearmanr(cosines(path, feeds), cosines(dense, feeds)).statistic)


def speed_up(dense: Path, pruned: Path, feeds: Mapping[str, Array]) -> float:
    sample = {name: values[:1] for name, values in feeds.items()}
    protocol = snpc.TimingProtocol(warmup=3, iterations=30, duration=5.0)
    timed = snpc.bench([dense, pruned], sample, protocol=protocol, execution=snpc.Execution(threads=1))
    return timed.speedups[-1].ratio


def prune_row(model: Path, way: str, target: float, options: argparse.Namespace, data: Any) -> dict[str, Any]:
    """One row of the results: the model pruned in one way to one share of its MACs, and measured."""
    calibration, feeds, labels = data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        start = time.perf_counter()
        extra = {} if way == "selection" else {"calibration": calibration}
        result = snpc.prune(model, path, target=f"macs={target}", effort=options.effort, **extra, **WAYS[way])
        seconds = time.perf_counter() - start
        return {
            "way": way,
            "target": target,
            "macs": result.after.macs,
            "params": result.after.params,
            "quality": round(measured(path, model, options.metric, feeds, labels), 3),
            "speed_up": round(speed_up(model, path, feeds), 2),
            "seconds": round(seconds),
            "effort": options.effort,
        }


def describe(
    model: snpc.Model, options: argparse.Namespace, feeds: Mapping[str, Array], labels: Array | None
) -> dict[str, Any]:
    """The entry of a model in the results, without rows. It is stored."""
    cost = snpc.analyze(model).cost
    dense = measured(options.model, options.model, options.metric, feeds, labels)
    entry = {
        "metric": options.metric,
        "calibration_samples": options.calib_samples,
        "evaluation_samples": len(next(iter(feeds.values()))),
        "dense": {"macs": cost.macs, "params": cost.params, "quality": round(dense, 3)},
        "rows": [],
    }
    store(entry, options)
    return entry


def stored(options: argparse.Namespace) -> dict[str, Any]:
    """The results by model, as they are in the file."""
    return dict(json.loads(options.results.read_text())) if options.results.exists() else {}


def store(entry: dict[str, Any], options: argparse.Namespace) -> None:
    entry["rows"].sort(key=lambda row: (row["way"], -row["target"]))
    options.results.write_text(json.dumps({**stored(options), options.name: entry}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the model, in the results")
    add_data_arguments(parser, (*METRICS, "spearman"))
    parser.add_argument("--targets", default="0.8,0.65,0.5,0.35,0.25", help="shares of the MACs that stay")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--effort", choices=("quick", "normal", "search"), default="normal")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    model = snpc.load(options.model)
    images = snpc.ImageOptions(mean=numbers(options.image_mean), std=numbers(options.image_std))
    calibration = snpc.load_calibration(
        options.calib, model.inputs, samples=options.calib_samples, images=images, held_out=64
    )
    feeds, labels = evaluation(options, model)
    entry = stored(options).get(options.name) or describe(model, options, feeds, labels)
    for target in map(float, options.targets.split(",")):
        for way in options.ways.split(","):
            if not any((row["way"], row["target"]) == (way, target) for row in entry["rows"]):
                row = prune_row(options.model, way, target, options, (calibration, feeds, labels))
                entry["rows"].append(row)
                store(entry, options)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
