"""How many attentions TensorRT for RTX computes in one kernel: of models and their pruned forms, before and after
``snpc build`` rewrites them. No GPU is needed.

    python benchmarks/attention_kernels.py vit_tiny_patch16_224.onnx bart_g2p_us.onnx --precision fp16

Models are cut by ``--ratio 0.5`` without data, once with widths of any size and once in multiples of 8. Needs
``snpc[trt-rtx]``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import snpc
from snpc.types import Precision


def counts(model: Path, precision: Precision, folder: Path) -> str:
    """``after of all (before)``."""
    options = snpc.BuildOptions(sm=(86,))
    built = snpc.build(model, "trt-rtx", folder / "out.engine", precision=precision, options=options)
    before = [kernel.one_kernel_before for kernel in built.attentions]
    known = "refused" if any("is refused" in note for note in built.notes) else str(sum(map(bool, before)))
    return f"{sum(k.one_kernel for k in built.attentions)} of {len(before)} (as it was: {known}), {built.seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--precision", default="fp16")
    arguments = parser.parse_args()
    for path in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            print(f"{path.stem}: {counts(path, arguments.precision, folder)}", flush=True)
            for multiple in (1, 8):
                pruned = folder / f"pruned{multiple}.onnx"
                snpc.prune(path, pruned, ratio=0.5, round_to=multiple)
                print(f"  pruned, multiples of {multiple}: {counts(pruned, arguments.precision, folder)}", flush=True)


if __name__ == "__main__":
    main()
