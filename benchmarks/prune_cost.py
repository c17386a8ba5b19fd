"""What pruning costs on a ViT-Base-sized model: seconds and peak memory per stage, beside loading and running it.

    python benchmarks/prune_cost.py [--model vit_base.onnx] [--ratio 0.5] [--json out.json]
    python benchmarks/prune_cost.py --data 64 --target macs=0.6 --effort normal,quick,search --uniform --sweep
        macs=0.9,macs=0.8,macs=0.7,macs=0.6,macs=0.5

Without --model a 12-layer, 768-wide ViT with random weights is exported first (needs torch and timm). Without --data,
stages of a prune that needs none run in this one process; the peak of each is the highest resident size seen while it
ran, less the size before anything was loaded. Plain loading (``onnx.load``) and one onnxruntime forward pass run in
processes of their own, in the same run. With --data, whole prunes run on so many random samples, each beside plain
forward passes over the same samples (``calibration_cost.py``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from calibration_cost import DataRow, anonymous_bytes, measure_row, print_cost, sampled_peaks

MEGABYTE = 1 << 20
ROOT = Path(__file__).resolve().parent.parent


class Watch:
    """Runs a stage while a thread samples the resident size."""

    def __init__(self) -> None:
        self.base = anonymous_bytes()
        self.rows: dict[str, tuple[float, int]] = {}

    def run(self, name: str, stage: Callable[[], Any]) -> Any:
        with sampled_peaks() as peaks:
            start = time.perf_counter()
            result = stage()
            seconds = time.perf_counter() - start
        self.rows[name] = (seconds, max(peaks.values()) - self.base)
        return result


def export_vit(path: Path) -> None:
    """A ViT-Base/16 with random weights, as timm and torch write it."""
    sys.path.insert(0, str(ROOT))
    import torch

    from tests.models.exports import _timm

    vit = _timm("timm.models.vision_transformer").VisionTransformer
    model = vit(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12).eval()
    torch.onnx.export(
        model,
        (torch.randn(1, 3, 224, 224),),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )


def reference(model: Path, what: str) -> tuple[float, int]:
    """Seconds and peak of plain loading, or of one forward pass, in a process of its own."""
    code = {
        "onnx.load": "import onnx; stage = lambda: onnx.load(path)",
        "forward": (
            "import numpy as np, onnxruntime as ort; "
            "s = ort.InferenceSession(path, providers=['CPUExecutionProvider']); "
            "x = {i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], 'f4') for i in s.get_inputs()}; "
            "stage = lambda: s.run(None, x)"
        ),
    }[what]
    script = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import prune_cost; "
        f"path = {str(model)!r}; w = prune_cost.Watch(); {code}; w.run('it', stage); print(json.dumps(w.rows['it']))"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    seconds, peak = json.loads(output.splitlines()[-1])
    return seconds, peak


def measure(model: Path, ratio: float, folder: Path) -> Watch:
    """Every stage of a data-free prune."""
    import snpc
    from snpc.passes.canonicalization.finalize import finalize
    from snpc.passes.slicing.rewrite import rewrite_model
    from snpc.planning.plan import cuts_of

    watch, target = Watch(), folder / "pruned.onnx"
    loaded = watch.run("load", lambda: snpc.load(model))
    analysis = watch.run("analyze", lambda: snpc.analyze(loaded))
    scores = watch.run("score (magnitude)", lambda: snpc.score(analysis, "magnitude"))
    plan = watch.run("plan", lambda: snpc.make_slice_plan(scores, snpc.Budget(ratio)))
    rewritten = watch.run("rewrite", lambda: rewrite_model(analysis.traced_graph, cuts_of(plan)))
    watch.run("write", lambda: snpc.save(finalize(rewritten.model), target))
    watch.run("verify", lambda: snpc.verify(model, target))
    return watch


def print_stages(model: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The table of a prune without data."""
    size = model.stat().st_size
    rows = {what: reference(model, what) for what in ("onnx.load", "forward")}
    stages = measure(model, options.ratio, folder).rows
    print(f"{model.name}: {size / MEGABYTE:.0f} MiB")
    print(f"{'stage':20s} {'seconds':>8s} {'peak MiB':>9s} {'x model':>8s}")
    for stage, (seconds, peak) in {**rows, **stages}.items():
        print(f"{stage:20s} {seconds:8.2f} {peak / MEGABYTE:9.0f} {peak / size:8.2f}")
    total = sum(seconds for seconds, _ in stages.values())
    highest = max(peak for _, peak in stages.values())
    print(f"{'all stages of snpc':20s} {total:8.2f} {highest / MEGABYTE:9.0f} {highest / size:8.2f}")
    loads, passes = total / rows["onnx.load"][0], total / rows["forward"][0]
    print(f"that is {loads:.1f} x onnx.load and {passes:.1f} x one forward pass")
    return {"bytes": size, "reference": rows, "stages": stages}


def data_rows(model: Path, options: argparse.Namespace) -> Iterator[DataRow]:
    """What is asked for of prunes with data."""
    asked = {"target": options.target, "tokens": options.tokens}
    sized = (model, options.data, options.threads)
    for effort in filter(None, options.effort.split(",")):
        yield DataRow(f"{options.target}, {effort}", *sized, {**asked, "effort": effort})
    if options.uniform:
        yield DataRow(f"{options.target}, uniform", *sized, {**asked, "uniform": True})
    if options.sweep:
        targets = tuple(options.sweep.split(","))
        yield DataRow(f"a sweep of {len(targets)} targets", *sized, {"tokens": options.tokens}, targets)


def print_data_rows(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The tables of prunes with data, each measured in a process of its own."""
    found = {}
    for row in data_rows(model, options):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            cost = pool.submit(measure_row, row).result()
        print_cost(cost, options.data)
        found[row.name] = asdict(cost)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5, help="of a prune without data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=int, metavar="N", help="prune with N random samples")
    parser.add_argument("--target", default="macs=0.6")
    parser.add_argument("--tokens", default="none")
    parser.add_argument("--effort", default="normal", help="one or more of quick, normal, search; '' for none")
    parser.add_argument("--uniform", action="store_true", help="the same width in all layers, too")
    parser.add_argument("--sweep", default="", metavar="TARGETS", help="several targets at once, too")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = options.model or Path(name) / "vit_base.onnx"
        if options.model is None:
            export_vit(model)
        found = print_data_rows(model, options) if options.data else print_stages(model, options, Path(name))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
