"""Prune the digits ViT that ships with snpc, and put the written files side by side.

    python examples/prune_digits.py            # a few settings: what the commands are, and one table
    python examples/prune_digits.py --all      # everything at three ratios, as the Markdown table of the documentation

Files go to build/digits. Parameters and MACs are read from each written file, accuracy is that of onnxruntime on the
500 labelled images in eval.npz, which were neither trained on nor calibrated with, and the latencies of all models are
measured in turn (snpc bench).
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

import snpc

BATCHES = (1, 64)
RATIOS = (0.25, 0.5, 0.75)
CLOSED = "closed form"  # what snpc does by default when it has calibration data
SHOWN = ((CLOSED, 0.5), (CLOSED, 0.75), ("magnitude", 0.5), ("magnitude", 0.75))
CRITERIA = ("mixed", "activation", "magnitude", "snp")  # selection: units go or stay, nothing else changes
SEEDS = 5
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measured:
    """One written model. ``speed``: times as fast as the original, per batch size of ``BATCHES``."""

    parameters: float
    macs: float
    bytes: float
    accuracy: float
    speed: tuple[float, ...]


def run(*arguments: str | Path) -> None:
    """One command of snpc, shown as it would be typed."""
    words = [str(a) for a in arguments]
    print(f"$ snpc {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "snpc.cli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def prune(folder: Path, way: str, ratio: float) -> Path:
    """Prune by the closed form, or by the criterion ``way``."""
    target = folder / f"{way.replace(' ', '-').replace(':seed=', '-')}-{ratio:g}.onnx"
    chosen = [] if way == CLOSED else ["--criterion", way]
    run("prune", folder / "digits_vit.onnx", "--ratio", f"{ratio:g}", *chosen, "--calib", folder / "calib.npz",
        "-o", target)  # fmt: skip
    return target


def accuracy(model: Path, data: Path) -> float:
    """Share of the labelled images that ``model`` gets right."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    with np.load(data) as images:
        (logits,) = session.run(None, {"image": images["image"]})
        return float((np.asarray(logits).argmax(-1) == images["labels"]).mean())


def measure(models: Sequence[Path], data: Path) -> list[Measured]:
    """All models, the first of them the original."""
    print(f"timing {len(models)} models in turn ...", flush=True)
    speeds: list[list[float]] = [[] for _ in models]
    for batch in BATCHES:
        protocol = snpc.TimingProtocol(warmup=20, iterations=300 if batch == 1 else 60)
        timed = snpc.bench(list(models), snpc.RandomInputs(batch=batch), protocol=protocol)
        for found, ratio in zip(speeds, (1.0, *(s.ratio for s in timed.speedups)), strict=True):
            found.append(ratio)
    rows = []
    for model, speed in zip(models, speeds, strict=True):
        cost = snpc.analyze(snpc.load(model)).cost
        rows.append(Measured(cost.params, cost.macs, model.stat().st_size, accuracy(model, data), tuple(speed)))
    return rows


def lines(found: Measured) -> list[str]:
    """The cells of one model, in the order of ``TITLES``."""
    return [f"{found.parameters:,.0f}".replace(",", " "), f"{found.macs:,.0f}".replace(",", " "),
            f"{found.bytes:,.0f}".replace(",", " "), f"{100 * found.accuracy:.1f} %",
            *(f"{speed:.2f} x" for speed in found.speed)]  # fmt: skip


TITLES = ("parameters", "MACs per image", "bytes on disk", "accuracy, 500 images",
          *(f"speed, batch {batch}" for batch in BATCHES))  # fmt: skip


def show(names: Sequence[str], models: Sequence[Measured]) -> None:
    columns = [["", *TITLES], *([name, *lines(found)] for name, found in zip(names, models, strict=True))]
    widths = [max(map(len, column)) for column in columns]
    print()
    for row in zip(*columns, strict=True):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("   ".join((first.strip().ljust(widths[0]), *rest)))


def markdown(names: Sequence[str], models: Sequence[Measured], spread: Sequence[str]) -> None:
    print(f"\n| | {' | '.join(TITLES)} |")
    print(f"|---|{'---:|' * len(TITLES)}")
    for name, found, note in zip(names, models, spread, strict=True):
        cells = lines(found)
        cells[3] += note
        print(f"| {name} | {' | '.join(cells)} |")


def mean(found: Sequence[Measured]) -> Measured:
    """Each number, averaged over several models."""
    table = np.array([(m.parameters, m.macs, m.bytes, m.accuracy, *m.speed) for m in found])
    parameters, macs, size, right, *speed = table.mean(axis=0).tolist()
    return Measured(parameters, macs, size, right, tuple(speed))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="all ways at all ratios, random with five seeds")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "digits", help="folder for the files")
    options = parser.parse_args()
    folder = Path(options.out)
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    folder.mkdir(parents=True, exist_ok=True)
    run("example", "digits", folder)
    original, data = folder / "digits_vit.onnx", folder / "eval.npz"
    if options.all:
        table(folder, original, data)
        return
    models = [original, *(prune(folder, way, ratio) for way, ratio in SHOWN)]
    show(["original", *(f"{way} {100 * ratio:.0f} %" for way, ratio in SHOWN)], measure(models, data))
    print(
        "\nPer cent: how much of the Q/K, V/O and feed-forward widths was removed. Nothing was trained; the closed form"
    )
    print("used 128 images without labels, magnitude none.")
    print(f"The files are in {folder}")


def table(folder: Path, original: Path, data: Path) -> None:
    """Everything at every ratio; the random draws become one row of means per ratio."""
    ways: list[tuple[str, tuple[str, ...]]] = [(way, (way,)) for way in (CLOSED, *CRITERIA)]
    ways.append((f"random ({SEEDS} seeds)", tuple(f"random:seed={seed}" for seed in range(SEEDS))))
    cells = [(name, ratio, [prune(folder, way, ratio) for way in draws]) for ratio in RATIOS for name, draws in ways]
    first, *found = measure([original, *(model for *_, models in cells for model in models)], data)
    names, rows, notes = ["original"], [first], [""]
    for name, ratio, models in cells:
        draws, found = found[: len(models)], found[len(models) :]
        least, most = min(m.accuracy for m in draws), max(m.accuracy for m in draws)
        names.append(f"{name}, {ratio:g}")
        rows.append(mean(draws))
        notes.append(f" ({100 * least:.1f} to {100 * most:.1f})" if len(draws) > 1 else "")
    markdown(names, rows, notes)


if __name__ == "__main__":
    main()
