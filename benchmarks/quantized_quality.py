"""Prune before or after quantizing: what is left of a model's quality, and how long it takes, in one table.

    PYTHONPATH=. python benchmarks/quantized_quality.py model.onnx --calib images/ --eval held-out/ --labels labels.csv
    PYTHONPATH=. python benchmarks/quantized_quality.py encoder.onnx --calib calib.npz --eval eval.npz --metric spearman

Each form of ``tests/models/quantized.py`` that is named is written from the float model, and calibrated on the first
samples of ``--calib`` where it asks for data. Columns: the metric of the quantized model; of that model pruned as it is
stored; of its float model pruned and quantized again; of the float model pruned and then quantized; seconds of pruning
as stored. ``spearman`` is the rank correlation, in per cent, of pairwise cosines of embeddings [N, D] with those of the
float model. Other metrics, and ``--eval``, are those of ``quality.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from quality import METRICS, add_data_arguments, cosines, evaluation, numbers, quality
from scipy.stats import spearmanr

import snpc
from tests.models.quantized import FORMS

HEADER = ("form", "quantized", "pruned as stored", "dequantized, pruned, quantized", "pruned, quantized", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_data_arguments(parser, (*METRICS, "spearman"))
    parser.add_argument("--target", default="macs=0.7")
    parser.add_argument("--forms", nargs="+", default=["dynamic", "qdq_per_channel", "uint4_blocks"], choices=FORMS)
    options = parser.parse_args()
    model = snpc.load(options.model)
    images = snpc.ImageOptions(mean=numbers(options.image_mean), std=numbers(options.image_std))
    shaped = {"images": images} if Path(options.calib).is_dir() else {}
    calibration = snpc.load_calibration(options.calib, model.inputs, samples=options.calib_samples, **shaped)
    feeds, labels = evaluation(options, model)
    ranges = {name: array[:32] for name, array in next(iter(calibration.batches())).items()}
    whole = cosines(options.model, feeds) if options.metric == "spearman" else None

    def measured(path: Path) -> float:
        if whole is not None:
            return 100 * float(spearmanr(whole, cosines(path, feeds)).statistic)
        return quality(path, options.metric, feeds, labels)

    def pruned(source: Path, target: Path, **given: Any) -> float:
        """Seconds that it took."""
        start = time.perf_counter()
        snpc.prune(source, target, target=options.target, calibration=calibration, **given)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seconds = pruned(options.model, folder / "float.onnx")
        print(
            f"float: {measured(options.model):.2f}, pruned {measured(folder / 'float.onnx'):.2f}, {seconds:.0f} s",
            flush=True,
        )
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
        for form in options.forms:
            write, stored, direct, floats, again, after = (
                FORMS[form],
                *(folder / f"{form}_{name}.onnx" for name in ("stored", "direct", "floats", "again", "after")),
            )
            write(options.model, stored, ranges)
            seconds = pruned(stored, direct)
            pruned(stored, floats, dequantize=True)
            write(floats, again, ranges)
            write(folder / "float.onnx", after, ranges)
            values = " | ".join(f"{measured(path):.2f}" for path in (stored, direct, again, after))
            print(f"| {form} | {values} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
