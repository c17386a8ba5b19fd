"""What a prune costs per layer of a decoder in the style of seven billion parameters, and whether memory grows.

    python benchmarks/seven_billion.py FOLDER [--layers 1,2,4] [--target macs=0.8] [--sequence 128] [--samples 16]

Writes FOLDER/LAYERS/model.onnx with weights.bin beside it (0.4 GB a layer, half precision, random numbers, a small
vocabulary), unless they are there. For each number of layers, ``calibration_cost.py`` measures plain passes and one
``snpc.prune`` in a process of its own. Memory is anonymous memory: weights in mapped files do not count, but the copies
in single precision that onnxruntime makes of them do, and the peak of the plain passes is shown for that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from calibration_cost import DataCost, DataRow, measure_row, print_cost

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 1024  # embedding and head are the same for any number of layers: they shall not hide what a layer costs


def model_of(folder: Path, layers: int) -> Path:
    """The file of so many layers; written where it is missing."""
    sys.path.insert(0, str(ROOT))
    from tests.models.layouts import Llama, write_llama

    path = folder / str(layers) / "model.onnx"
    return path if path.is_file() else write_llama(path.parent, Llama(layers=layers, vocabulary=VOCABULARY))


def print_growth(costs: dict[int, DataCost]) -> None:
    """What each further layer takes, from the smallest to the largest file."""
    print("\n| layers | plain passes, s | their peak, MB | prune, s | x plain passes | peak, MB |")
    print("|---:|---:|---:|---:|---:|---:|")
    for layers, cost in costs.items():
        print(f"| {layers} | {cost.passes.wall:.1f} | {cost.passes_peak / 1e6:.0f} | {cost.total.wall:.1f} "
              f"| {cost.ratio.wall:.1f} | {cost.peak / 1e6:.0f} |")  # fmt: skip
    (least, first), (most, last) = min(costs.items()), max(costs.items())
    if most > least:
        count = most - least
        grown = {"plain passes": (last.passes.wall - first.passes.wall, last.passes_peak - first.passes_peak)}
        grown["prune"] = (last.total.wall - first.total.wall, last.peak - first.peak)
        for what, (seconds, size) in grown.items():
            print(f"{what}: {seconds / count:.1f} s and {size / count / 1e6:.0f} MB per further layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", default="1,2,4")
    parser.add_argument("--target", default="macs=0.8")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit", type=float, metavar="GB", default=2.0, help="of arrays that are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    options = parser.parse_args()
    sizes = {"sequence": options.sequence}
    asked: dict[str, Any] = {"target": options.target, "effort": options.effort}
    costs: dict[int, DataCost] = {}
    for layers in (int(text) for text in options.layers.split(",")):
        path = model_of(options.folder, layers)
        limit = int(options.memory_limit * 1e9)
        row = DataRow(
            f"{layers} layers", path, options.samples, options.threads, asked, sizes=sizes, memory_limit=limit
        )
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            costs[layers] = pool.submit(measure_row, row).result()
        print_cost(costs[layers], options.samples)
        if not options.keep:
            shutil.rmtree(path.parent)
    print_growth(costs)
    if options.json:
        options.json.write_text(json.dumps({layers: asdict(cost) for layers, cost in costs.items()}, indent=1))


if __name__ == "__main__":
    main()
