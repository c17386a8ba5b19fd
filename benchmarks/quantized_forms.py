"""Cut every quantized form of five models as it is stored, and print a table.

    python benchmarks/quantized_forms.py FOLDER [--models NAME ...] [--forms FORM ...]

Each model of the tests is quantized by onnxruntime's tools in each form of ``tests/models/quantized.py``. Random units
go, 30 % of each group (``--method select``), and then the same share is cut by the default method, fitted to three
samples. Columns: parameters, and bytes of all constants, after the cut as a share of those before; the largest relative
difference of the written file from its masked original, as the verification compares them, and (where no block is cut
in part) from the stored file with removed codes at their zero points, as both run; how many constants were rounded anew
by either cut, and what that rounding changed.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

import snpc
from tests.models.exports import export, load_feeds
from tests.models.quantized import FORMS
from tests.oracle import run
from tests.quantized_oracle import relative, silenced

MODELS = ("bert__ts17_sdpa", "vit_timm__ts17", "gpt2__ts17", "llama__dyn20", "bart__ts17")
HEADER = ("form", "model", "parameters", "bytes", "to masked", "to stored codes", "anew", "fitted: anew", "changes")


def weight_bytes(path: Path) -> int:
    """Of all initializers and constants."""
    graph = onnx.load(path).graph
    held = [a.t for node in graph.node for a in node.attribute if a.name == "value" and node.op_type == "Constant"]
    return sum(tensor.ByteSize() for tensor in (*graph.initializer, *held))


def row(form: str, name: str, folder: Path) -> tuple[str, ...]:
    """Of one form of one model."""
    stored, feeds = folder / f"{name}_{form}.onnx", load_feeds(name)
    if not stored.exists():
        FORMS[form](export(name), stored, feeds)
    with tempfile.TemporaryDirectory() as scratch:
        analysis = snpc.analyze(snpc.load(stored))
        plan = snpc.plan(analysis, snpc.Budget(ratio=0.3), method="select", criterion="random")
        cut = snpc.apply(plan, Path(scratch) / "cut.onnx")
        direct = ""
        if cut.verification.requantization is not None and not cut.verification.requantization.requantized:
            masked = silenced(stored, analysis, plan.slices, Path(scratch) / "masked.onnx")
            direct = f"{max(map(relative, run(cut.path, feeds), run(masked, feeds))):.0e}"
        np.savez(Path(scratch) / "data.npz", **feeds)
        fitted = snpc.prune(stored, Path(scratch) / "fitted.onnx", ratio=0.3, calibration=Path(scratch) / "data.npz")
        records = [result.verification.requantization for result in (cut, fitted)]
        assert records[0] is not None and records[1] is not None
        return (
            form,
            name,
            f"{100 * cut.after.params / cut.before.params:.0f} %",
            f"{100 * weight_bytes(cut.path) / weight_bytes(stored):.0f} %",
            f"{max(d.relative for d in cut.verification.equals_mask):.0e}",
            direct,
            str(records[0].requantized),
            str(records[1].requantized),
            f"{records[1].relative:.0e}",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the quantized files are kept")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    given = parser.parse_args(arguments)
    given.folder.mkdir(exist_ok=True)
    logging.disable(logging.CRITICAL)
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for form in given.forms:
        for name in given.models:
            print(f"| {' | '.join(row(form, name, given.folder))} |", flush=True)


if __name__ == "__main__":
    main()
