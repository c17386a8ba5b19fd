"""What pruning costs trained models, at several sizes: the table and the picture of the README.

    python benchmarks/real_models.py ViT-Tiny vit_tiny.onnx --calib images/ --eval held-out/ --labels labels.csv
        --image-mean 0.5,0.5,0.5 --image-std 0.5,0.5,0.5
    python benchmarks/real_models.py MiniLM-L6 model.onnx --calib calib.npz --eval eval.npz --metric spearman
    python benchmarks/real_models.py "BART g2p" bart.onnx --calib calib.npz --eval eval.npz --metric tokens
    python benchmarks/real_models.py "Llama 260k" llama.onnx --calib calib.npz --eval eval.npz --metric perplexity
    python benchmarks/real_models.py SmolLM2 model.onnx --calib calib.npz --eval eval.npz --metric perplexity
        --pruned pruned.onnx --targets 0.9 --seconds 616
    python benchmarks/real_models.py "Whisper base" encoder_model.onnx --calib calib.npz --eval eval.npz --metric words

Models and data are your own copies. Every size is pruned in several ways: ``snpc`` is the default with calibration
data; ``selection`` removes the units of smallest weight and changes nothing else, as most pruning tools do; ``layers``
(only where ``--ways`` names it) is the default with whole layers among what may go. ``--pruned`` measures a file that
``snpc prune`` wrote before, in ``--seconds``, and prunes nothing. Nothing is trained; labels serve to evaluate only.
MACs and parameters are those of the written files, the metric is measured on them under onnxruntime, and the speed-up
is the median of rounds in which dense and pruned model take turns, on one sample (and ``--batches``) and one thread.
Each row is stored as soon as it is measured: a run that was stopped goes on with what is missing.

Metrics: those of ``quality.py``, and ``spearman``: the rank correlation of the cosines of all pairs of samples with
those of the dense model, in per cent (output [N, D]); ``words``: 100 less the word error rate of a speech encoder, by
the decoder beside it (``transcripts.py``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from quality import METRICS, Array, add_data_arguments, cosines, evaluation, numbers, quality  # type: ignore[import-not-found]
from scipy.stats import spearmanr

import snpc
from snpc.types import RANKED_ROLES

RESULTS = Path(__file__).with_name("results") / "real_models.json"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "snpc": {},
    "selection": {"method": "select", "criterion": "magnitude", "tokens": "none"},
    "layers": {"roles": (*RANKED_ROLES, "layer")},
}


Data: TypeAlias = tuple[Mapping[str, Array], Array | None]  # inputs by name, and labels


def measured(path: Path, dense: Path, metric: str, feeds: Mapping[str, Array], labels: Array | None) -> float:
    if metric == "words":
        from transcripts import words_right  # type: ignore[import-not-found]  # needs tokenizers, as no other metric

        assert labels is not None, "--eval needs labels"
        return float(words_right(path, dense.parent, feeds, labels))
    if metric != "spearman":
        return float(quality(path, metric, feeds, labels))
    return 100 * float(spearmanr(cosines(path, feeds), cosines(dense, feeds)).statistic)


def speed_up(dense: Path, pruned: Path, feeds: Mapping[str, Array], batch: int) -> float:
    sample = {name: values[:batch] for name, values in feeds.items()}
    protocol = snpc.TimingProtocol(warmup=3, iterations=30, duration=5.0)
    timed = snpc.bench([dense, pruned], sample, protocol=protocol, execution=snpc.Execution(threads=1))
    return round(timed.speedups[-1].ratio, 2)


def prune_row(way: str, target: float, options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """One row of the results: the model pruned in one way to one share of its MACs, and measured."""
    calibration = {} if way == "selection" else {"calibration": calibration_data(options)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        start = time.perf_counter()
        snpc.prune(options.model, path, target=f"macs={target}", effort=options.effort, **calibration, **WAYS[way])
        return file_row(path, way, target, time.perf_counter() - start, options, data)


def file_row(
    path: Path, way: str, target: float, seconds: float, options: argparse.Namespace, data: Data
) -> dict[str, Any]:
    """One row of the results: a pruned file, measured."""
    feeds, labels = data
    cost = snpc.analyze(snpc.load(path)).cost
    return {
        "way": way,
        "target": target,
        "macs": cost.macs,
        "params": cost.params,
        "quality": round(measured(path, options.model, options.metric, feeds, labels), 3),
        "speed_up": speed_up(options.model, path, feeds, 1),
        **({f"speed_up_batch_{n}": speed_up(options.model, path, feeds, n) for n in options.batches}),
        "seconds": round(seconds),
        "effort": options.effort,
    }


def calibration_data(options: argparse.Namespace) -> snpc.Calibration:
    images = snpc.ImageOptions(mean=numbers(options.image_mean), std=numbers(options.image_std))
    inputs = snpc.load(options.model).inputs
    return snpc.load_calibration(options.calib, inputs, samples=options.calib_samples, images=images, held_out=64)


def describe(options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """The entry of a model in the results, without rows. It is stored."""
    feeds, labels = data
    cost = snpc.analyze(snpc.load(options.model)).cost
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
    add_data_arguments(parser, (*METRICS, "spearman", "words"))
    parser.add_argument("--targets", default="0.8,0.65,0.5,0.35,0.25", help="shares of the MACs that stay")
    parser.add_argument("--ways", default="snpc,selection", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--effort", choices=("quick", "normal", "search"), default="normal")
    parser.add_argument("--batches", type=int, nargs="*", default=(), help="sizes to time beside one sample")
    parser.add_argument("--pruned", type=Path, help="a file that was pruned before, to the only one of --targets")
    parser.add_argument("--seconds", type=float, default=0, help="that --pruned took")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    data = evaluation(options, snpc.load(options.model))
    entry = stored(options).get(options.name) or describe(options, data)
    for target in map(float, options.targets.split(",")):
        for way in ["snpc"] if options.pruned else options.ways.split(","):
            if not any((row["way"], row["target"]) == (way, target) for row in entry["rows"]):
                if options.pruned:
                    row = file_row(options.pruned, way, target, options.seconds, options, data)
                else:
                    row = prune_row(way, target, options, data)
                entry["rows"].append(row)
                store(entry, options)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
