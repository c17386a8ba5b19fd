"""What is left of the digits example by all that needs torch: criteria, masks, schedules, adapters, new weights.

    python benchmarks/quality_torch.py [--steps 64] [--target macs=0.2] [--only criteria,masks] [--rows lrp,vib]

A table per part; ``--rows`` names the rows that are wanted, of all parts. Right answers on the 500 test images, in per
cent, of the written files under onnxruntime. Units are chosen with 64 and weights trained on all of the example's 256
unlabelled training images. Columns: as cut, after ``--steps`` of distillation, and seconds for both. ``quality.py`` is
for models of your own, without training.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

import snpc
import snpc.torch
from snpc.planning.plan import PruningMethod
from snpc.torch import TrainingOptions

DATA = Path(snpc.__file__).parent / "data" / "digits"
MODEL = DATA / "digits_vit.onnx"
SELECTED = (
    "random", "magnitude", "mixed", "taylor", "lm", "qm", "fisher", "group_fisher", "movement", "gum", "lrp", "serene",
)  # fmt: skip
METHODS: tuple[PruningMethod, PruningMethod] = ("select", "auto")
SCORED = 64  # samples that units are chosen with: gradients are taken one by one
STEPS = (0, 8, 16, 32, 64, 128, 256)
MASK_METHODS = ("vib", "psp", "apma")
METHOD, CRITERION = "select", "magnitude"  # of schedules
ROUNDS, LIMIT = 4, snpc.torch.DriftLimit(0.15)  # of schedules

Row = tuple[str, ...]
Rows = dict[str, Callable[[], Row]]


def accuracy(path: Path) -> float:
    with np.load(DATA / "eval.npz") as arrays:
        found = ort.InferenceSession(str(path)).run(None, {"image": arrays["image"]})[0].argmax(-1)
        return 100 * float((found == arrays["labels"]).mean())


class Bench:
    """One analysis, its data, and a folder for files."""

    def __init__(self, folder: Path, target: str, training: TrainingOptions) -> None:
        self.folder, self.target, self.training = folder, target, training
        self.analysis = snpc.analyze(snpc.load(MODEL))
        inputs = self.analysis.model.inputs
        self.data = snpc.load_calibration(DATA / "calib.npz", inputs, samples=256, batch=training.batch)
        self.some = snpc.load_calibration(DATA / "calib.npz", inputs, samples=SCORED, batch=training.batch)

    def cut(self, criterion: str | None) -> Path:
        """By selection, or by the closed forms."""
        choice, method = snpc.Budget(target=self.target), METHODS[criterion is None]
        found = snpc.plan(self.analysis, choice, calibration=self.some, method=method, criterion=criterion)
        path = self.folder / "cut.onnx"
        snpc.apply(found, path)
        return path

    def tuned(self, path: Path, training: TrainingOptions) -> float:
        snpc.torch.finetune(path, MODEL, self.data, self.folder / "tuned.onnx", training=training)
        return accuracy(self.folder / "tuned.onnx")

    def row(self, cut: Callable[[], Path], **options: object) -> Row:
        start = time.monotonic()
        path = cut()
        after = self.tuned(path, replace(self.training, **options))  # type: ignore[arg-type]
        return f"{accuracy(path):.1f}", f"{after:.1f}", f"{time.monotonic() - start:.0f}"

    def masked(self, kind: str) -> Path:
        """By masks that are learnt for as many steps."""
        choice, training = snpc.Budget(target=self.target), replace(self.training, lr=snpc.torch.MASK_LEARNING_RATE)
        found = snpc.torch.learn_masks(self.analysis, self.data, kind, choice, training=training)
        path = self.folder / "cut.onnx"
        snpc.apply(snpc.PruningPlan(found.plan, calibration=self.data), path)
        return path

    def rounds(self, adaptive: bool) -> Row:
        """The steps are shared between the rounds, so that all rows train equally long."""
        start, path = time.monotonic(), self.folder / "rounds.onnx"
        training = replace(self.training, steps=max(1, self.training.steps // ROUNDS))
        schedule = snpc.torch.Rounds(self.target, ROUNDS, METHOD, CRITERION, training)
        if adaptive:
            rounds = snpc.torch.prune_adaptively(MODEL, self.data, path, schedule, LIMIT)
        else:
            rounds = snpc.torch.prune_in_rounds(MODEL, self.data, path, schedule)
        reached = f"macs={min(r.macs for r in rounds if r.kept):.2f}"
        return reached, f"{accuracy(path):.1f}", f"{time.monotonic() - start:.0f}"


def criteria(bench: Bench) -> Rows:
    return {
        "closed forms": lambda: bench.row(lambda: bench.cut(None)),
        **{name: lambda name=name: bench.row(lambda: bench.cut(name)) for name in SELECTED},  # type: ignore[misc]
    }


def masks(bench: Bench) -> Rows:
    return {kind: lambda kind=kind: bench.row(lambda: bench.masked(kind)) for kind in MASK_METHODS}  # type: ignore[misc]


def schedules(bench: Bench) -> Rows:
    return {
        "one shot": lambda: bench.row(lambda: bench.cut(CRITERION)),
        "cubic": lambda: bench.rounds(adaptive=False),
        "adaptive": lambda: bench.rounds(adaptive=True),
    }


def adapters(bench: Bench) -> Rows:
    cut = lambda: bench.cut("magnitude")  # noqa: E731
    return {
        "all weights": lambda: bench.row(cut),
        "adapters of rank 2": lambda: bench.row(cut, adapters=2),
        "adapters of rank 8": lambda: bench.row(cut, adapters=8),
    }


def reinit(bench: Bench) -> Rows:
    cut = lambda: bench.cut("magnitude")  # noqa: E731
    return {
        "old weights": lambda: bench.row(cut),
        "new weights, epochs": lambda: bench.row(cut, reinit="epochs"),
        "new weights, budget": lambda: bench.row(cut, reinit="budget"),
    }


def recovery(bench: Bench) -> Rows:
    """Right answers after so many steps, each a run of its own."""

    def runs(criterion: str | None) -> Row:
        path = bench.cut(criterion)
        found = [bench.tuned(path, replace(bench.training, steps=n)) if n else accuracy(path) for n in STEPS]
        return tuple(f"{a:.1f}" for a in found)

    return {"closed forms": lambda: runs(None), "magnitude": lambda: runs("magnitude")}


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "criteria": criteria, "masks": masks, "schedules": schedules, "adapters": adapters, "reinit": reinit,
    "recovery": recovery,
}  # fmt: skip


def heading(part: str, steps: int) -> tuple[str, ...]:
    if part == "recovery":
        return tuple(map(str, STEPS))
    return ("cut to" if part == "schedules" else "as cut"), f"after {steps} steps", "s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--target", default="macs=0.2")
    parser.add_argument("--only", default=",".join(name for name in PARTS if name != "recovery"), help="parts")
    parser.add_argument("--rows", default="", help="names of rows; default: all")
    options = parser.parse_args()
    print(f"dense: {accuracy(MODEL):.1f}, {options.target}", flush=True)
    wanted = set(filter(None, options.rows.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.target, TrainingOptions(steps=options.steps, lr=options.lr))
        for part in options.only.split(","):
            rows = {name: row for name, row in PARTS[part](bench).items() if not wanted or name in wanted}
            if not rows:
                continue
            columns = heading(part, options.steps)
            print(f"\n| {part} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}", flush=True)
            for name, row in rows.items():
                print(f"| {name} | {' | '.join(row())} |", flush=True)


if __name__ == "__main__":
    main()
