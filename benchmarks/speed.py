"""How much faster per MAC removed: published widths, and the same MACs at aligned widths, under onnxruntime.

    python benchmarks/speed.py deit-t deit-s deit-b --batch 1 --batch 8

Models of random weights are exported from transformers (DeiT) and timm (EfficientFormer), cut by snpc to what SNP (Shim
et al., ECCV 2024) arrives at, and built by `snpc build --target ort`. All variants run in the same interleaved rounds;
ratios are to onnxruntime's default session on the dense file. MACs are those of the written files, and the script stops
where they are not the published ones, to 2 % or the digit that is published. "per MAC" is speed-up / MAC reduction: 1
where a removed MAC saves as much time as an average one takes. ``--clock cpu`` with ``--threads 1`` counts processor
seconds: what to use on a machine that others load. Needs torch, transformers and timm.

The widths of DeiT are SNP's own. Those of DeiT-B with whole heads removed and of EfficientFormer-L1 are not published:
here half of the heads and as many hidden units go as give the published MACs, and the same share of every width.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import snpc
from snpc.runtime.evaluation.bench import median_interval, run_rounds
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.feeds import random_feeds
from snpc.runtime.execution.runners import open_runner
from snpc.types import Group

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TOKENS = 197


@dataclass(frozen=True)
class Widths:
    """Heads per layer, residual width, and per layer the head widths of Q/K and V and the hidden width."""

    heads: int
    residual: int
    qk: tuple[int, ...]
    vo: tuple[int, ...]
    ffn: tuple[int, ...]

    @property
    def macs(self) -> int:
        d, n, heads = self.residual, TOKENS, self.heads
        total = (n - 1) * 768 * d + 1000 * d
        for qk, vo, ffn in zip(self.qk, self.vo, self.ffn, strict=True):
            total += n * d * heads * 2 * (qk + vo) + heads * n * n * (qk + vo) + 2 * n * d * ffn
        return total

    @property
    def unread_macs(self) -> int:
        """Of the last block for the tokens that are not read behind it: in the published count, not in the file."""
        d, n, qk, vo, ffn = self.residual, TOKENS, self.qk[-1], self.vo[-1], self.ffn[-1]
        return (n - 1) * (d * self.heads * (qk + vo) + self.heads * n * (qk + vo) + 2 * d * ffn)


@dataclass(frozen=True)
class Case:
    """``gmacs``: published, in thousand millions, of the dense and of the cut model. ``title``: whose cut it is."""

    gmacs: tuple[float, float]
    title: str

    def module(self) -> Any:
        """The dense model, a torch module."""
        raise NotImplementedError

    def width(self, group: Group, multiple: int) -> int:
        """How many units of each block stay; with ``multiple`` 1 as published, else the nearest that is aligned."""
        raise NotImplementedError

    def unread_macs(self, multiple: int) -> int:
        """MACs that the published count has and the cut file has not, because nothing reads what they compute."""
        return 0


@dataclass(frozen=True)
class DeiT(Case):
    heads: int
    dense: int
    published: Widths

    def module(self) -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=self.dense, num_attention_heads=self.heads, intermediate_size=4 * self.dense, num_labels=1000,
            attn_implementation="sdpa",
        )  # fmt: skip
        return ViTForImageClassification(config)

    def widths(self, multiple: int) -> Widths:
        return self.published if multiple == 1 else aligned(self.published, 4 * self.dense, multiple)

    def unread_macs(self, multiple: int) -> int:
        return self.widths(multiple).unread_macs

    def width(self, group: Group, multiple: int) -> int:
        widths = self.widths(multiple)
        one_size = {"residual": widths.residual, "head": widths.heads}
        per_layer = {"qk": widths.qk, "vo": widths.vo, "ffn": widths.ffn}
        if group.role in per_layer:
            return per_layer[group.role][group.layer]
        return one_size.get(group.role, group.size)


@dataclass(frozen=True)
class EfficientFormer(Case):
    """The ``share`` of every width, of the stem and the stages too; all heads stay."""

    share: float

    def module(self) -> Any:
        sys.path.insert(0, str(ROOT))
        from tests.models.exports import _timm

        return _timm("timm.models.efficientformer").efficientformer_l1()

    def width(self, group: Group, multiple: int) -> int:
        if group.role == "head":
            return group.size
        return min(group.size, max(multiple, round(self.share * group.size / multiple) * multiple))


def spread(text: str) -> tuple[int, ...]:
    """``39x3 32`` -> (39, 39, 39, 32)."""
    words = [word.partition("x") for word in text.split()]
    return tuple(int(width) for width, _, times in words for _ in range(int(times or 1)))


def with_hidden_units(widths: Widths, gmacs: float) -> Widths:
    """The same share of every hidden width, so that MACs are as many as these."""
    without = replace(widths, ffn=(0,) * len(widths.ffn)).macs
    share = (1e9 * gmacs - without) / (widths.macs - without)
    return replace(widths, ffn=tuple(round(share * width) for width in widths.ffn))


DEIT_B = Widths(
    12, 538, spread("19x5 26 19x4 26 19"), spread("19x5 26 19 26 19x2 38 32"),
    spread("2150 1229 2150x3 1536 2150 1843 2150 1843x2 922"),
)  # fmt: skip
CASES: dict[str, Case] = {
    "deit-t": DeiT((1.3, 0.6), "SNP's widths", 3, 192, Widths(
        3, 153, spread("39x3 32 26 32 26 20x5"), spread("51x2 38 31 38 19 38x2 31 25 19x2"),
        spread("614x5 460 537x2 614 537 460 383"))),
    "deit-s": DeiT((4.6, 2.0), "SNP's widths", 6, 384, Widths(
        6, 307, spread("25x7 13x5"), spread("51 38x3 31x3 25 19x2 12x2"), spread("1228x5 1075 1228 921x3 307x2"))),
    "deit-b": DeiT((17.6, 6.4), "SNP's widths", 12, 768, DEIT_B),
    "deit-b-heads": DeiT(
        (17.6, 3.5), "MACs of SNP + Head", 12, 768, with_hidden_units(replace(DEIT_B, heads=6), 3.5)
    ),
    "efficientformer-l1": EfficientFormer((1.3, 0.6), "SNP's MACs", 0.68),
    "efficientformer-l1-0.5": EfficientFormer((1.3, 0.5), "SNP's MACs", 0.62),
}  # fmt: skip


def aligned(published: Widths, most: int, multiple: int) -> Widths:
    """The published widths in multiples, and as many hidden units more or less, up to ``most``, as bring the MACs
    back."""

    def near(width: int) -> int:
        return max(multiple, round(width / multiple) * multiple)

    rows = (tuple(near(width) for width in row) for row in (published.qk, published.vo, published.ffn))
    made = Widths(published.heads, near(published.residual), *rows)
    step = 2 * TOKENS * made.residual * multiple
    for turn in range(1000):
        missing = published.macs - made.macs
        if abs(missing) <= step / 2:
            break
        layer = turn % 12
        ffn = min(most, max(multiple, made.ffn[layer] + (multiple if missing > 0 else -multiple)))
        made = replace(made, ffn=(*made.ffn[:layer], ffn, *made.ffn[layer + 1 :]))
    return made


def export(case: Case, path: Path) -> None:
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            case.module().eval(), (torch.zeros(1, 3, 224, 224),), str(path), opset_version=17, dynamo=False,
            input_names=["image"], output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip


def cut(analysis: snpc.Analysis, case: Case, multiple: int, path: Path) -> float:
    """Random units of every group, as many as the case says. Returned: the MAC reduction."""
    rng = np.random.default_rng(0)
    keep = {}
    for group in analysis.groups:
        width = case.width(group, multiple)
        if group.prunable and width < group.size:
            picks = [np.sort(rng.permutation(group.size)[:width]) for _ in range(group.blocks)]
            keep[group.id] = tuple(tuple(int(k) for k in pick) for pick in picks)
    made = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(analysis, "random", {}, keep)), path)
    check_published(made.before.macs, case.gmacs[0])
    check_published(made.after.macs + case.unread_macs(multiple), case.gmacs[1])
    return made.before.macs / made.after.macs


def check_published(macs: float, published: float) -> None:
    """Raises SystemExit where the counted MACs are not the published ones, which have one decimal."""
    if abs(macs / 1e9 - published) > max(0.02 * published, 0.05):
        raise SystemExit(f"{macs / 1e9:.3f} G MACs are counted, {published} G are published")


def variants(name: str, folder: Path, multiples: list[int]) -> Iterator[tuple[str, Path, float]]:
    """(what, file, MAC reduction). Files that are there are not made again."""
    case = CASES[name]
    dense = folder / f"{name}.onnx"
    if not dense.exists():
        export(case, folder / "export.onnx")
        (folder / "export.onnx").rename(dense)
    yield "dense", dense, 1.0
    analysis: snpc.Analysis | None = None
    for multiple in (1, *multiples):
        path = folder / f"{name}-{multiple}.onnx"
        record = path.with_suffix(".reduction")
        if not record.exists():
            analysis = analysis or snpc.analyze(snpc.load(dense))
            record.write_text(repr(cut(analysis, case, multiple, path)))
        yield case.title if multiple == 1 else f"multiples of {multiple}", path, float(record.read_text())


def built(made: list[tuple[str, Path, float]], batch: int) -> Iterator[tuple[str, Path, float]]:
    """Each as it is, and built for this batch size."""
    for title, path, less in made:
        yield title, path, less
        target = path.with_name(f"{path.stem}-built-{batch}.onnx")
        if not target.exists():
            snpc.build(path, "ort", target, batch=batch)
        yield f"{title}, built", target, less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=[*CASES])
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--multiple", type=int, action="append", help="alignments  [default: 8 and 16]")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps the files, so that a run that was stopped makes the rest")
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    options = parser.parse_args()
    print("| model | batch | | MACs | time, ms | speed-up | 95 % | per MAC |\n|---|---:|---|---:|---:|---:|---:|---:|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            pruned = list(variants(name, folder, options.multiple or [8, 16]))
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
