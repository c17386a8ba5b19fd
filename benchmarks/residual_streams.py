"""What a narrower residual stream costs by channels and rotated, side by side: quality after the cut, nothing trained.

    python benchmarks/residual_streams.py model.onnx --calib images/ --eval held-out/ --labels labels.csv
    python benchmarks/residual_streams.py model.onnx --calib calib.npz --eval eval.npz --metric perplexity

Per target the stream alone is cut (``--roles residual``). Rotated it goes to the target; by channels it then goes to
the same width, in the order of the criterion "mixed", which is the default of a stream that cannot be rotated. Both are
refitted on the same data. The losses are those that the plan knows beforehand: the share of what is read behind the
normalizations that a refit cannot bring back. ``--roles`` prunes other roles too: then each target is met with the
stream and without it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quality import METRICS, add_data_arguments, evaluation, numbers, outputs, quality_of

import snpc
from snpc.types import StreamBasis

Array = np.ndarray[Any, np.dtype[Any]]
WAYS = ("rotated", "channels", "with the stream", "without it")


def divergence(dense: Sequence[tuple[slice, Array]], pruned: Sequence[tuple[slice, Array]]) -> float:
    """The Kullback-Leibler divergence of the first output from the dense model's, mean over its rows, in nats."""
    total = rows = 0.0
    for (_, before), (_, after) in zip(dense, pruned, strict=True):
        p, q = (values - np.logaddexp.reduce(values, axis=-1, keepdims=True) for values in (before, after))
        total += float((np.exp(p) * (p - q)).sum())
        rows += p.size / p.shape[-1]
    return total / rows


def plans(
    analysis: snpc.Analysis, calibration: snpc.Calibration, target: str, options: argparse.Namespace
) -> Iterator[tuple[str, snpc.PruningPlan, str]]:
    """(what, plan, the loss of the streams that was known). One stream alone needs no loss curves: the target says its
    width."""
    roles = tuple(options.roles.split(","))
    if roles != ("residual",):
        for what, chosen in (("with the stream", roles), ("without it", tuple(r for r in roles if r != "residual"))):
            if options.way in (None, what):
                budget = snpc.Budget(target=target, roles=chosen)
                made = snpc.plan(analysis, budget, calibration, effort=options.effort)
                yield what, made, known_loss(made, made.analysis.stream_bases)
        return
    made = snpc.plan(analysis, snpc.Budget(target=target, roles=roles), calibration, effort="quick")
    streams = made.analysis.stream_bases
    if options.way in (None, "rotated"):
        yield "rotated", made, known_loss(made, streams)
    if options.way in (None, "channels"):
        ratio = 1 - made.slices.kept_width(made.analysis.group(streams[0].group)) / streams[0].size
        budget = snpc.Budget(ratio, roles=roles, uniform=True)
        by_channels = snpc.plan(analysis, budget, calibration, method="auto", criterion="mixed")
        yield "channels", by_channels, known_loss(by_channels, streams)


def known_loss(made: snpc.PruningPlan, streams: tuple[StreamBasis, ...]) -> str:
    """``159 of 192: 0.021`` for each stream."""
    words = []
    for stream in streams:
        kept = made.slices.kept_width(made.analysis.group(stream.group))
        curve = stream.rotation if made.analysis.stream_bases else stream.channels
        words.append(f"{kept} of {stream.size}: {curve[kept]:.3f}" if curve else f"{kept} of {stream.size}")
    return ", ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_data_arguments(parser, METRICS)
    parser.add_argument("--targets", default="macs=0.8,macs=0.7")
    parser.add_argument("--roles", default="residual")
    parser.add_argument("--way", choices=WAYS, help="one of the two rows, where both take too long at once")
    parser.add_argument("--effort", default="normal", choices=("quick", "normal", "search"))
    options = parser.parse_args()
    analysis = snpc.analyze(snpc.load(options.model))
    inputs = analysis.model.inputs
    images = snpc.ImageOptions(mean=numbers(options.image_mean), std=numbers(options.image_std))
    shaped = {"images": images} if Path(options.calib).is_dir() else {}
    calibration = snpc.load_calibration(options.calib, inputs, samples=options.calib_samples, **shaped)
    feeds, labels = evaluation(options, analysis.model)
    dense = list(outputs(options.model, feeds))
    print(f"dense: {quality_of(dense, options.metric, feeds, labels):.2f} ({options.metric})", flush=True)
    print("| target | stream | kept: loss | MACs | " + options.metric + " | KL | s |", flush=True)
    print("|---|---|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for target in options.targets.split(","):
            start = time.perf_counter()
            for what, made, known in plans(analysis, calibration, target, options):
                result = snpc.apply(made, Path(folder) / "cut.onnx")
                seconds = time.perf_counter() - start
                pruned = list(outputs(result.path, feeds))
                found = quality_of(pruned, options.metric, feeds, labels)
                away = divergence(dense, pruned)
                share = result.after.macs / result.before.macs
                print(
                    f"| {target} | {what} | {known} | {share:.3f} | {found:.2f} | {away:.3f} | {seconds:.0f} |",
                    flush=True,
                )
                start = time.perf_counter()


if __name__ == "__main__":
    main()
