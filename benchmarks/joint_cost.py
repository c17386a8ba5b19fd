"""What a joint plan costs: tokens, whole layers and widths in one budget, beside a plan that cuts widths alone.

    python benchmarks/joint_cost.py [model.onnx --calib data.npz] [--target macs=0.5]

Without a model it plans the digits example that ships with snpc. Every kind of plan is made ``--runs`` times, in turns;
the table has the least processor time of each, which a busy machine moves little, and its ratio to widths alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import snpc
from snpc.planning import DEFAULT_ROLES
from snpc.types import LAYER_ROLE, Role

DIGITS = Path(snpc.__file__).parent / "data" / "digits"
KINDS: dict[str, tuple[tuple[Role, ...], str]] = {
    "widths": (DEFAULT_ROLES, "none"),
    "tokens, widths": (DEFAULT_ROLES, "auto"),
    "layers, widths": ((*DEFAULT_ROLES, LAYER_ROLE), "none"),
    "tokens, layers, widths": ((*DEFAULT_ROLES, LAYER_ROLE), "auto"),
}


def prune_once(options: argparse.Namespace, kind: str, folder: Path) -> tuple[float, snpc.PrunedModel]:
    """(seconds of processor time, the result)."""
    roles, tokens = KINDS[kind]
    data = snpc.load_calibration(str(options.calib), snpc.load(options.model).inputs, samples=options.samples)
    start = time.process_time()
    result = snpc.prune(
        options.model, folder / "cut.onnx", calibration=data, target=options.target, roles=roles, tokens=tokens,
        effort=options.effort, execution=snpc.Execution(threads=1),
    )  # fmt: skip
    return time.process_time() - start, result


def describe(result: snpc.PrunedModel) -> str:
    analysis = result.plan.analysis
    gone = [f"without {', '.join(analysis.removal.names)}"] if analysis.removal is not None else []
    tokens = [f"tokens {analysis.reduction.spec}"] if analysis.reduction is not None else []
    return "; ".join([*tokens, *gone]) or "widths"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=DIGITS / "digits_vit.onnx")
    parser.add_argument("--calib", type=Path, default=DIGITS / "calib.npz")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--target", default="macs=0.5")
    parser.add_argument("--effort", default="normal", choices=["quick", "normal", "search"])
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs):
            for kind in KINDS:
                seconds, result = prune_once(options, kind, Path(folder))
                times[kind].append(seconds)
                found[kind] = describe(result)
    print("| plan | processor seconds | of widths alone | takes |")
    print("|---|---:|---:|---|")
    for kind, seconds in times.items():
        print(f"| {kind} | {min(seconds):.1f} | {min(seconds) / min(times['widths']):.1f} x | {found[kind]} |")


if __name__ == "__main__":
    main()
