"""What is left of the digits example by all that needs torch: criteria, masks, schedules, adapters, new weights.

    python benchmarks/quality_torch.py [--steps 128] [--target macs=0.35] [--only criteria,masks,...]

Right answers on the 500 test images, in per cent, of the written files under onnxruntime. Trained on the example's 256
unlabelled training images. Two columns: as cut, and after ``--steps`` of distillation.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

import snpc
import snpc.torch
from snpc.torch import Training

DATA = Path(snpc.__file__).parent / "data" / "digits"
MODEL = DATA / "digits_vit.onnx"
SELECTED = ("magnitude", "mixed", "taylor", "lm", "qm", "fisher", "group_fisher", "movement", "gum", "lrp")
STEPS = (0, 8, 16, 32, 64, 128, 256)
PARTS = ("criteria", "masks", "schedules", "adapters", "reinit", "recovery")


def accuracy(path: Path) -> float:
    with np.load(DATA / "eval.npz") as arrays:
        found = ort.InferenceSession(str(path)).run(None, {"image": arrays["image"]})[0].argmax(-1)
        return 100 * float((found == arrays["labels"]).mean())


class Bench:
    """One analysis, its data, and a folder for files."""

    def __init__(self, folder: Path, target: str, training: Training) -> None:
        self.folder, self.target, self.training = folder, target, training
        self.analysis = snpc.analyze(snpc.load(MODEL))
        inputs = self.analysis.model.inputs
        self.data = snpc.load_calibration(DATA / "calib.npz", inputs, samples=256, batch=training.batch)

    def cut(self, criterion: str | None) -> Path:
        """By selection, or by the closed forms."""
        method = "auto" if criterion is None else "select"
        choice = snpc.Choice(target=self.target)
        found = snpc.decide(self.analysis, choice, calibration=self.data, method=method, criterion=criterion)
        path = self.folder / "cut.onnx"
        snpc.apply_plan(found.plan, path, compression=found.compression, calibration=self.data)
        return path

    def tuned(self, path: Path, training: Training) -> float:
        snpc.torch.finetune(path, MODEL, self.data, self.folder / "tuned.onnx", training=training)
        return accuracy(self.folder / "tuned.onnx")

    def row(self, name: str, path: Path, **options: object) -> str:
        start = time.monotonic()
        after = self.tuned(path, replace(self.training, **options))  # type: ignore[arg-type]
        return f"| {name} | {accuracy(path):.1f} | {after:.1f} | {time.monotonic() - start:.0f} |"


def criteria(bench: Bench) -> Iterator[str]:
    yield bench.row("closed forms", bench.cut(None))
    for name in SELECTED:
        yield bench.row(name, bench.cut(name))


def masks(bench: Bench) -> Iterator[str]:
    choice = snpc.Choice(target=bench.target)
    for kind in ("vib", "psp", "apma"):
        training = replace(bench.training, lr=snpc.torch.RATE)
        found = snpc.torch.learn_masks(bench.analysis, bench.data, kind, choice, training=training)
        snpc.apply_plan(found.plan, bench.folder / "cut.onnx", calibration=bench.data)
        yield bench.row(f"masks: {kind}", bench.folder / "cut.onnx")


def schedules(bench: Bench) -> Iterator[str]:
    """The steps are shared between the rounds, so that all rows train equally long."""
    way, target = snpc.torch.Way("select", "taylor"), bench.folder / "rounds.onnx"
    yield bench.row("one shot, taylor", bench.cut("taylor"))
    training = replace(bench.training, steps=max(1, bench.training.steps // 4))
    snpc.torch.prune_in_rounds(MODEL, bench.data, target, goal=bench.target, rounds=4, way=way, training=training)
    yield f"| cubic, 4 rounds, taylor | - | {accuracy(target):.1f} | |"
    found = snpc.torch.prune_adaptively(
        MODEL, bench.data, target, goal=bench.target, limit=0.15, rounds=4, way=way, training=training
    )
    reached = min(r.macs for r in found if r.kept)
    yield f"| adaptive, drift 0.15, taylor: macs={reached:.2f} | - | {accuracy(target):.1f} | |"


def adapters(bench: Bench) -> Iterator[str]:
    path = bench.cut("magnitude")
    for rank in (0, 2, 8):
        yield bench.row(f"magnitude, {f'adapters of rank {rank}' if rank else 'all weights'}", path, adapters=rank)


def reinit(bench: Bench) -> Iterator[str]:
    path = bench.cut("magnitude")
    for kind in ("none", "epochs", "budget"):
        yield bench.row(f"magnitude, new weights: {kind}", path, reinit=kind)


def recovery(bench: Bench) -> Iterator[str]:
    """Right answers after so many steps, each a run of its own."""
    yield f"| steps | {' | '.join(map(str, STEPS))} |"
    for name, criterion in (("closed forms", None), ("select magnitude", "magnitude")):
        path = bench.cut(criterion)
        found = [bench.tuned(path, replace(bench.training, steps=n)) if n else accuracy(path) for n in STEPS]
        yield f"| {name} | {' | '.join(f'{a:.1f}' for a in found)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--target", default="macs=0.35")
    parser.add_argument("--only", default=",".join(PARTS))
    options = parser.parse_args()
    rows: dict[str, Callable[[Bench], Iterator[str]]] = {
        "criteria": criteria, "masks": masks, "schedules": schedules, "adapters": adapters, "reinit": reinit,
        "recovery": recovery,
    }  # fmt: skip
    print(f"dense: {accuracy(MODEL):.1f}\n| {options.target} | cut | {options.steps} steps | s |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.target, Training(steps=options.steps, lr=options.lr))
        for part in options.only.split(","):
            for line in rows[part](bench):
                print(line, flush=True)


if __name__ == "__main__":
    main()
