"""What is left of a model's quality: closed forms beside every criterion, on data of your own, in one table.

    python benchmarks/quality.py model.onnx --calib images/ --eval held-out/ --labels labels.csv
    python benchmarks/quality.py model.onnx --calib calib.npz --eval eval.npz --metric tokens

``--eval`` is an .npz with the model's inputs and ``labels``, or a folder of images with a CSV of file name and class.
Metrics: ``top1`` (logits [N, C], in per cent), ``tokens`` (logits [N, T, V] against labels [N, T], 0 is padding, in per
cent), ``perplexity`` (logits [N, T, V]; each token predicts the next one of the first input). Nothing is trained;
labels serve to evaluate only. Every number is that of the written file under onnxruntime. ``--ways`` takes any
criterion, with torch those that ask for gradients too (``--ways taylor,lrp``). What is trained, learned masks,
schedules, adapters and new weights have their rows in ``quality_torch.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import snpc
from snpc.runtime.calibration import read_picture_labels

with contextlib.suppress(ModuleNotFoundError):
    import snpc.torch  # registers gradients for the criteria that ask for them

Array = np.ndarray[Any, np.dtype[Any]]
WAYS = ("auto", "parallel", "mixed", "activation", "magnitude", "snp", "random")
UNIFORM = (("qk", 0.5), ("qk", 0.75), ("vo", 0.5), ("ffn", 0.5))
METRICS = ("top1", "tokens", "perplexity")
TARGETS = ("macs=0.9", "macs=0.8", "macs=0.7", "macs=0.6")
BATCH = 20


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def evaluation(options: argparse.Namespace, model: snpc.Model) -> tuple[dict[str, Array], Array | None]:
    """Inputs by name, and labels."""
    if options.eval.is_dir():
        images = snpc.ImageOptions(mean=numbers(options.image_mean), std=numbers(options.image_std))
        found = snpc.load_calibration(
            str(options.eval), model.inputs, samples=1 << 30, batch=BATCH, images=images, held_out=0
        )
        name = model.inputs[0].name
        if options.labels is None:
            return {name: np.concatenate([f[name] for f in found.batches()])}, None
        labels = read_picture_labels(options.eval, options.labels)
        return {name: np.concatenate([f[name] for f in found.batches()])}, labels
    with np.load(options.eval) as data:
        arrays = dict(data)
    return {s.name: arrays[s.name] for s in model.inputs}, arrays.get("labels")


def outputs(path: Path, feeds: Mapping[str, Array], batch: int = BATCH) -> Iterator[tuple[slice, Array]]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    count = len(next(iter(feeds.values())))
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        yield part, np.asarray(session.run(None, {k: v[part] for k, v in feeds.items()})[0], np.float64)


def quality(path: Path, metric: str, feeds: Mapping[str, Array], labels: Array | None) -> float:
    batch = 1 if metric == "perplexity" else BATCH  # a row of logits per token is large where the vocabulary is
    return quality_of(outputs(path, feeds, batch), metric, feeds, labels)


def quality_of(
    found: Iterable[tuple[slice, Array]], metric: str, feeds: Mapping[str, Array], labels: Array | None
) -> float:
    """``found``: ``outputs`` of a model."""
    right = total = surprise = 0.0
    for part, logits in found:
        if metric == "perplexity":
            truth = next(iter(feeds.values()))[part][:, 1:]
            logits = logits[:, :-1]
            highest = logits.max(-1, keepdims=True)
            scale = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
            surprise += float((scale - np.take_along_axis(logits, truth[..., None], -1)[..., 0]).sum())
            total += truth.size
            continue
        assert labels is not None, "--eval needs labels"
        counted = labels[part] != 0 if metric == "tokens" else np.ones(labels[part].shape, bool)
        right += float(((logits.argmax(-1) == labels[part]) & counted).sum())
        total += float(counted.sum())
    return float(np.exp(surprise / total)) if metric == "perplexity" else 100 * right / total


def cosines(path: Path, feeds: Mapping[str, Array]) -> Array:
    """[pairs] cosines of all pairs of samples, of the first output [N, D]."""
    rows = np.concatenate([values for _, values in outputs(path, feeds)])
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray((rows @ rows.T)[np.triu_indices(len(rows), 1)])


def add_data_arguments(parser: argparse.ArgumentParser, metrics: Sequence[str]) -> None:
    """The model, the data that it is fitted to and judged on, and how."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--labels", type=Path, help="CSV of file name and class, for a folder of images")
    parser.add_argument("--metric", choices=metrics, default="top1")
    parser.add_argument("--image-mean", default="0.485,0.456,0.406")
    parser.add_argument("--image-std", default="0.229,0.224,0.225")


def decided(analysis: snpc.Analysis, calibration: snpc.Calibration, way: str, choice: snpc.Budget) -> snpc.PruningPlan:
    if way in ("auto", "parallel"):
        return snpc.plan(analysis, choice, calibration=calibration, method=way)  # type: ignore[arg-type]
    return snpc.plan(analysis, choice, calibration=calibration, method="select", criterion=way)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_data_arguments(parser, METRICS)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--no-uniform", action="store_true", help="targets only")
    options = parser.parse_args()
    model = snpc.load(options.model)
    analysis = snpc.analyze(model)
    images = snpc.ImageOptions(mean=numbers(options.image_mean), std=numbers(options.image_std))
    shaped = {"images": images} if Path(options.calib).is_dir() else {}
    calibration = snpc.load_calibration(options.calib, model.inputs, samples=options.calib_samples, **shaped)
    feeds, labels = evaluation(options, model)
    present = {g.role for g in analysis.groups if g.prunable}
    uniform = [(role, ratio) for role, ratio in UNIFORM if role in present and not options.no_uniform]
    cells: list[tuple[str, snpc.Budget]] = [
        (f"{role} -{100 * ratio:.0f} %", snpc.Budget(ratio, (role,), uniform=True))  # type: ignore[arg-type]
        for role, ratio in uniform
    ]
    cells += [(target, snpc.Budget(target=target)) for target in options.targets.split(",") if target]
    print(f"dense: {quality(options.model, options.metric, feeds, labels):.2f} ({options.metric})", flush=True)
    print(f"| | {' | '.join(name for name, _ in cells)} |\n|---|{'---:|' * len(cells)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for way in options.ways.split(","):
            print(f"| {way} |", end="", flush=True)
            for _, choice in cells:
                target = Path(folder) / "cut.onnx"
                found = decided(analysis, calibration, way, choice)
                snpc.apply(found, target)
                print(f" {quality(target, options.metric, feeds, labels):.1f} |", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
