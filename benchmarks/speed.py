"""How much faster per MAC removed: published widths, and the same MACs at aligned widths, under onnxruntime.

    python benchmarks/speed.py deit-t deit-s deit-b --batch 1 --batch 8

DeiT models of random weights are exported from transformers, cut by snpc to the widths that SNP (Shim et al., ECCV
2024) arrives at, and built by `snpc build --target ort`. All variants run in the same interleaved rounds; ratios are
to onnxruntime's default session on the dense file. MACs are those of the written files. "per MAC" is speed-up / MAC
reduction: 1 where a removed MAC saves as much time as an average one takes. ``--clock cpu`` with ``--threads 1`` counts
processor seconds: what to use on a machine that others load. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import snpc
from snpc.runtime.evaluation.bench import median_interval, run_rounds
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.feeds import random_feeds
from snpc.runtime.execution.runners import open_runner

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TOKENS = 197


@dataclass(frozen=True)
class Widths:
    """Residual width, and per layer the head widths of Q/K and V and the hidden width."""

    residual: int
    qk: tuple[int, ...]
    vo: tuple[int, ...]
    ffn: tuple[int, ...]

    def macs(self, heads: int) -> int:
        d, n = self.residual, TOKENS
        total = (n - 1) * 768 * d + 1000 * d
        for qk, vo, ffn in zip(self.qk, self.vo, self.ffn, strict=True):
            total += n * d * heads * 2 * (qk + vo) + heads * n * n * (qk + vo) + 2 * n * d * ffn
        return total


@dataclass(frozen=True)
class Case:
    heads: int
    dense: int
    published: Widths


def spread(text: str) -> tuple[int, ...]:
    """``39x3 32`` -> (39, 39, 39, 32)."""
    words = [word.partition("x") for word in text.split()]
    return tuple(int(width) for width, _, times in words for _ in range(int(times or 1)))


CASES = {
    "deit-t": Case(3, 192, Widths(
        153, spread("39x3 32 26 32 26 20x5"), spread("51x2 38 31 38 19 38x2 31 25 19x2"),
        spread("614x5 460 537x2 614 537 460 383"))),
    "deit-s": Case(6, 384, Widths(
        307, spread("25x7 13x5"), spread("51 38x3 31x3 25 19x2 12x2"), spread("1228x5 1075 1228 921x3 307x2"))),
    "deit-b": Case(12, 768, Widths(
        538, spread("19x5 26 19x4 26 19"), spread("19x5 26 19 26 19x2 38 32"),
        spread("2150 1229 2150x3 1536 2150 1843 2150 1843x2 922"))),
}  # fmt: skip


def aligned(case: Case, multiple: int) -> Widths:
    """The published widths in multiples, and as many hidden units more or less as bring the MACs back."""

    def near(width: int) -> int:
        return max(multiple, round(width / multiple) * multiple)

    made, wanted = case.published, case.published.macs(case.heads)
    made = Widths(near(made.residual), *(tuple(near(w) for w in row) for row in (made.qk, made.vo, made.ffn)))
    step = 2 * TOKENS * made.residual * multiple
    for turn in range(1000):
        missing = wanted - made.macs(case.heads)
        if abs(missing) <= step / 2:
            break
        layer = turn % 12
        ffn = min(4 * case.dense, max(multiple, made.ffn[layer] + (multiple if missing > 0 else -multiple)))
        made = replace(made, ffn=(*made.ffn[:layer], ffn, *made.ffn[layer + 1 :]))
    return made


def export(case: Case, path: Path) -> None:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=case.dense, num_attention_heads=case.heads, intermediate_size=4 * case.dense, num_labels=1000,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.zeros(1, 3, 224, 224),), str(path), opset_version=17, dynamo=False, input_names=["image"],
            output_names=["logits"], dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip


def cut(analysis: snpc.Analysis, widths: Widths, path: Path) -> float:
    """Random units of every group, as many as ``widths`` says. Returned: the MAC reduction."""
    rng = np.random.default_rng(0)
    keep = {}
    for group in analysis.groups:
        rows = {"qk": widths.qk, "vo": widths.vo, "ffn": widths.ffn, "residual": (widths.residual,) * 12}.get(
            group.role
        )
        if rows and group.prunable and rows[group.layer] < group.size:
            picks = [np.sort(rng.permutation(group.size)[: rows[group.layer]]) for _ in range(group.blocks)]
            keep[group.id] = tuple(tuple(int(k) for k in pick) for pick in picks)
    made = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(analysis, "random", {}, keep)), path)
    return made.before.macs / made.after.macs


def variants(name: str, folder: Path, multiples: list[int]) -> Iterator[tuple[str, Path, float]]:
    """(what, file, MAC reduction)."""
    case = CASES[name]
    dense = folder / f"{name}.onnx"
    export(case, dense)
    analysis = snpc.analyze(snpc.load(dense))
    cuts = {"SNP's widths": case.published, **{f"multiples of {m}": aligned(case, m) for m in multiples}}
    yield "dense", dense, 1.0
    for title, widths in cuts.items():
        path = folder / f"{name}-{title.replace(' ', '-')}.onnx"
        yield title, path, cut(analysis, widths, path)


def built(made: list[tuple[str, Path, float]], batch: int) -> Iterator[tuple[str, Path, float]]:
    """Each as it is, and built for this batch size."""
    for title, path, less in made:
        yield title, path, less
        yield f"{title}, built", snpc.build(path, "ort", batch=batch).path, less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=[*CASES])
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--multiple", type=int, action="append", help="alignments  [default: 8 and 16]")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    options = parser.parse_args()
    print("| model | batch | | MACs | time, ms | speed-up | 95 % | per MAC |\n|---|---:|---|---:|---:|---:|---:|---:|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            pruned = list(variants(name, Path(folder), options.multiple or [8, 16]))
            for batch in options.batch or [1, 8]:
                made = list(built(pruned, batch))
                runners = [open_runner(path, execution=Execution(threads=options.threads)) for _, path, _ in made]
                feeds = random_feeds(runners[0].inputs, batch=batch)
                calls = [[runner.prepare(feeds)] for runner in runners]
                run_rounds(calls, iterations=2)
                times = run_rounds(calls, iterations=options.rounds, clock=CLOCKS[options.clock])
                for k, (title, _, less) in enumerate(made):
                    ratios = times[:, 0] / times[:, k]
                    ratio, (low, high) = float(np.median(ratios)), median_interval(ratios)
                    print(
                        f"| {name} | {batch} | {title} | {1 / less:.3f} | {1e3 * np.median(times[:, k]):.1f} "
                        f"| {ratio:.2f} x | {low:.2f} to {high:.2f} | {ratio / less:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
