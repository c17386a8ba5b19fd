"""What pruning costs: seconds and peak memory per stage on a ViT-Base-sized model, beside loading and running it.

    python benchmarks/prune_cost.py [--model vit_base.onnx] [--ratio 0.5] [--json out.json]

Without --model a 12-layer, 768-wide ViT with random weights is exported first (needs torch and timm). Every stage runs
in this one process; its peak is the highest resident size seen while it ran, less the size before anything was loaded.
Plain loading (``onnx.load``) and one onnxruntime forward pass run in processes of their own, in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEGABYTE = 1 << 20
ROOT = Path(__file__).resolve().parent.parent


def resident() -> int:
    """Bytes of this process in memory, without pages of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


class Watch:
    """Runs a stage while a thread samples the resident size."""

    def __init__(self) -> None:
        self.base = resident()
        self.rows: dict[str, tuple[float, int]] = {}

    def run(self, name: str, stage: Callable[[], Any]) -> Any:
        peak, done = [resident()], threading.Event()

        def sample() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], resident())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        start = time.perf_counter()
        try:
            return stage()
        finally:
            seconds = time.perf_counter() - start
            done.set()
            thread.join()
            self.rows[name] = (seconds, max(peak[0], resident()) - self.base)


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
    from snpc.pipeline.verify import verify_candidate
    from snpc.planning.plan import cuts_of

    watch, target = Watch(), folder / "pruned.onnx"
    loaded = watch.run("load", lambda: snpc.load(model))
    analysis = watch.run("analyze", lambda: snpc.analyze(loaded))
    scores = watch.run("score (magnitude)", lambda: snpc.score(analysis, "magnitude"))
    plan = watch.run("plan", lambda: snpc.make_slice_plan(scores, snpc.Budget(ratio)))
    rewritten = watch.run("rewrite", lambda: rewrite_model(analysis.traced_graph, cuts_of(plan)))
    watch.run("write", lambda: snpc.save(finalize(rewritten.model), target))
    watch.run("verify", lambda: verify_candidate(analysis, target, rewritten, None))
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = arguments.model or Path(name) / "vit_base.onnx"
        if arguments.model is None:
            export_vit(model)
        size = model.stat().st_size
        rows = {what: reference(model, what) for what in ("onnx.load", "forward")}
        stages = measure(model, arguments.ratio, Path(name)).rows
        print(f"{model.name}: {size / MEGABYTE:.0f} MiB")
        print(f"{'stage':20s} {'seconds':>8s} {'peak MiB':>9s} {'x model':>8s}")
        for stage, (seconds, peak) in {**rows, **stages}.items():
            print(f"{stage:20s} {seconds:8.2f} {peak / MEGABYTE:9.0f} {peak / size:8.2f}")
        total = sum(seconds for seconds, _ in stages.values())
        highest = max(peak for _, peak in stages.values())
        print(f"{'all stages of snpc':20s} {total:8.2f} {highest / MEGABYTE:9.0f} {highest / size:8.2f}")
        loads, passes = total / rows["onnx.load"][0], total / rows["forward"][0]
        print(f"that is {loads:.1f} x onnx.load and {passes:.1f} x one forward pass")
        if arguments.json:
            arguments.json.write_text(json.dumps({"bytes": size, "reference": rows, "stages": stages}, indent=1))


if __name__ == "__main__":
    main()
