"""What an NVIDIA GPU saves: plain passes, statistics and whole prunes on CPU and GPU, and dense against pruned latency.

    python benchmarks/gpu.py --out gpu-results   # a ViT-Base-sized model; benchmarks/gpu.sh installs and calls it
    python benchmarks/gpu.py --cpu --out smoke   # a small model, and no GPU: whether everything here still runs

Every step runs in a process of its own within a time limit, and all of them within --seconds: a step that takes longer
is stopped, and its row says so. The rows that need a GPU come first. A table is written, and the rows as JSON. The GPU
rows run with ``Execution(provider="cuda", algebra="torch")``. Latencies are medians over rounds in turns: onnxruntime's
CUDA provider as it is (TF32 and all), and torch with the same graphs (``snpc.torch.load``), TF32 allowed too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout, whether it is installed or not

TARGET = "macs=0.6"
BATCH = 8
GPU_ROWS = "cuda"


@dataclass(frozen=True)
class Setting:
    """What all steps share. ``smoke``: no GPU, and every row runs on the CPU."""

    folder: Path
    layers: int
    width: int
    image: int
    samples: int
    smoke: bool

    @property
    def model(self) -> Path:
        return self.folder / "dense.onnx"

    @property
    def data(self) -> Path:
        return self.folder / "images.npz"

    @property
    def rounds(self) -> int:
        """Of latencies."""
        return 3 if self.smoke else 50

    def pruned(self, device: str) -> Path:
        return self.folder / f"pruned-{device}.onnx"


@dataclass(frozen=True)
class Step:
    """A row: what is measured, on which device, and the seconds that it may take."""

    name: str
    device: str
    limit: float


STEPS = (
    Step("export", "cpu", 60),
    Step("plain passes", "cuda", 45),
    Step("statistics", "cuda", 60),
    Step("whole prune", "cuda", 120),
    Step("latency, onnxruntime", "cuda", 45),
    Step("latency, torch", "cuda", 45),
    Step("plain passes", "cpu", 60),
    Step("statistics", "cpu", 60),
    Step("whole prune", "cpu", 240),
)


# -- the steps, each in a process of its own -------------------------------------------------------------------------


def execution_on(setting: Setting, device: str) -> Any:
    """The CPU with numpy's algebra, or the GPU with torch's. A smoke run has torch's algebra on the CPU."""
    import snpc
    import snpc.torch  # registers its algebra

    if device == "cpu":
        return snpc.Execution()
    return snpc.Execution(provider="cpu" if setting.smoke else "cuda", algebra="torch")


def export_model(setting: Setting, device: str) -> dict[str, Any]:
    """A pre-norm ViT of random weights, as torch exports it, and random images."""
    import torch
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Tensor) -> Tensor:
            heads = x.shape[-1] // 64
            q, k, v = self.qkv(self.norm1(x)).reshape(x.shape[0], -1, 3, heads, 64).permute(2, 0, 3, 1, 4)
            attention = (q * 64**-0.5 @ k.transpose(-2, -1)).softmax(-1)
            x = x + self.proj((attention @ v).transpose(1, 2).reshape(x.shape))
            return x + self.mlp(self.norm2(x))

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, tokens = setting.width, (setting.image // 16) ** 2
            self.patches = nn.Conv2d(3, width, 16, 16)
            self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
            self.blocks = nn.Sequential(*[Block(width) for _ in range(setting.layers)])
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

        def forward(self, image: Tensor) -> Tensor:
            x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
            return self.head(self.norm(self.blocks(x)).mean(1))

    torch.manual_seed(0)
    shape = (3, setting.image, setting.image)
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        Vit().eval(), (torch.randn(1, *shape),), str(setting.model), dynamo=False, opset_version=17,
        input_names=["image"], output_names=["logits"], dynamic_axes=axes,
    )  # fmt: skip
    images = np.random.default_rng(0).normal(size=(setting.samples, *shape)).astype(np.float32)
    np.savez(setting.data, image=images)
    return {"bytes": setting.model.stat().st_size}


def batches_of(setting: Setting) -> list[dict[str, Any]]:
    images = np.load(setting.data)["image"]
    return [{"image": images[start : start + BATCH]} for start in range(0, len(images), BATCH)]


def time_passes(setting: Setting, device: str) -> dict[str, Any]:
    """Seconds of one pass of the dense model over all samples; the first batch runs once before."""
    from snpc.runtime.execution import open_session, run_session

    session = open_session(setting.model, execution=execution_on(setting, device))
    batches = batches_of(setting)
    run_session(session, batches[0])
    start = time.perf_counter()
    for batch in batches:
        run_session(session, batch)
    return {"seconds": time.perf_counter() - start}


def time_statistics(setting: Setting, device: str) -> dict[str, Any]:
    """Seconds of the statistics that closed forms take, sessions and all."""
    import snpc

    analysis = snpc.analyze(snpc.load(setting.model))
    calibration = snpc.load_calibration(setting.data, analysis.model.inputs, batch=BATCH)
    groups = [group for group in analysis.groups if group.prunable and group.role in ("qk", "vo", "ffn")]
    execution = execution_on(setting, device)
    start = time.perf_counter()
    snpc.measure_statistics(analysis, calibration, groups, execution=execution)
    return {"seconds": time.perf_counter() - start}


def time_prune(setting: Setting, device: str) -> dict[str, Any]:
    """Seconds of a whole prune to ``TARGET``, with its verification."""
    import snpc

    execution = execution_on(setting, device)
    start = time.perf_counter()
    result = snpc.prune(
        setting.model, setting.pruned(device), target=TARGET, tokens="none", calibration=setting.data,
        execution=execution,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "macs": result.after.macs / result.before.macs}


def time_onnxruntime(setting: Setting, device: str) -> dict[str, Any]:
    """Milliseconds of the dense and the pruned model for a batch."""
    import snpc

    result = snpc.bench(
        [setting.model, setting.pruned(device)],
        batches_of(setting)[0],
        protocol=snpc.TimingProtocol(iterations=setting.rounds),
        execution=execution_on(setting, device),
    )
    dense, pruned = (timing.median for timing in result.timings)
    return {"dense_ms": dense, "pruned_ms": pruned}


def time_torch(setting: Setting, device: str) -> dict[str, Any]:
    """The same in torch, on the GPU where there is one."""
    import torch

    import snpc.torch

    torch.backends.cuda.matmul.allow_tf32 = True
    if setting.smoke:
        torch.set_num_threads(1)
    target = torch.device("cpu" if setting.smoke else "cuda")
    modules = [snpc.torch.load(path).eval().to(target) for path in (setting.model, setting.pruned(device))]
    images = torch.from_numpy(batches_of(setting)[0]["image"]).to(target)

    def milliseconds(module: torch.nn.Module) -> float:
        start = time.perf_counter()
        module(images)
        if not setting.smoke:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    with torch.no_grad():
        for module in modules * 3:
            milliseconds(module)
        times = np.array([[milliseconds(module) for module in modules] for _ in range(setting.rounds)])
    dense, pruned = np.median(times, axis=0)
    return {"dense_ms": float(dense), "pruned_ms": float(pruned)}


MEASURES: Mapping[str, Callable[[Setting, str], dict[str, Any]]] = {
    "export": export_model,
    "plain passes": time_passes,
    "statistics": time_statistics,
    "whole prune": time_prune,
    "latency, onnxruntime": time_onnxruntime,
    "latency, torch": time_torch,
}


# -- all of them -----------------------------------------------------------------------------------------------------


def run_step(setting: Setting, step: Step, limit: float) -> dict[str, Any]:
    """What a step measured, or ``why`` it has nothing."""
    fields = {**asdict(setting), "folder": str(setting.folder)}
    words = [sys.executable, str(Path(__file__)), "--step", json.dumps([step.name, step.device, fields])]
    if limit < 1:
        return {"why": "no time was left"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"why": f"stopped after {limit:.0f} s"}
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or ["it ended"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def missing_gpu() -> str:
    """Why nothing runs on an NVIDIA GPU here; empty where it does."""
    import onnxruntime as ort
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU"
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} has no CUDA provider: pip install onnxruntime-gpu"
    return ""


def describe_machine(smoke: bool) -> str:
    import onnxruntime as ort
    import torch

    from snpc.runtime.execution import available_cores, cpu_name

    gpu = "no GPU" if smoke else torch.cuda.get_device_name()
    versions = f"onnxruntime {ort.__version__}, torch {torch.__version__}"
    return f"{gpu}; {cpu_name()} x {available_cores()}; {versions}"


def results_table(rows: Mapping[tuple[str, str], Mapping[str, Any]], machine: str, setting: Setting) -> str:
    """Markdown."""
    title = "No GPU: a smoke run, every row on the CPU" if setting.smoke else "CPU against GPU"
    lines = [
        f"# {title}", "", f"{machine}. A ViT of {setting.layers} layers of {setting.width}, {setting.samples} images "
        f"of {setting.image} x {setting.image}, batches of {BATCH}, `--target {TARGET}`.",
        "", "| seconds | CPU, numpy | GPU, torch | times faster |", "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name in ("plain passes", "statistics", "whole prune"):
        cpu, gpu = rows[name, "cpu"], rows[name, GPU_ROWS]
        both = "seconds" in cpu and "seconds" in gpu
        ratio = f"{cpu['seconds'] / gpu['seconds']:.2f}" if both else ""
        lines.append(f"| {name} | {cell(cpu, 'seconds')} | {cell(gpu, 'seconds')} | {ratio} |")
    lines += ["", "| milliseconds per batch, GPU | dense | pruned | times faster |", "| --- | ---: | ---: | ---: |"]
    for name in ("latency, onnxruntime", "latency, torch"):
        row = rows[name, GPU_ROWS]
        ratio = f"{row['dense_ms'] / row['pruned_ms']:.2f}" if "dense_ms" in row else ""
        lines.append(f"| {name} | {cell(row, 'dense_ms')} | {cell(row, 'pruned_ms')} | {ratio} |")
    return "\n".join(lines) + "\n"


def cell(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.2f}" if key in row else str(row.get("why", ""))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    parser.add_argument("--cpu", action="store_true", help="a smoke run of a small model, without a GPU")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=460, help="that all steps may take together")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    if options.step:
        name, device, fields = json.loads(options.step)
        setting = Setting(**{**fields, "folder": Path(fields["folder"])})
        print(json.dumps(MEASURES[name](setting, device)))
        return 0
    why = "" if options.cpu else missing_gpu()
    if why:
        print(f"gpu.py: {why}; --cpu tries the script without a GPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    layers, width, image, samples = (2, 128, 64, 16) if options.cpu else (12, 768, 224, options.samples)
    setting = Setting(options.out, layers, width, image, samples, options.cpu)
    end, rows = time.monotonic() + options.seconds, {}
    for step in STEPS:
        limit = step.limit * (4 if options.cpu else 1)  # a machine with other work finishes, too
        found = run_step(setting, step, min(limit, end - time.monotonic()))
        rows[step.name, step.device] = found
        print(f"{step.name} ({step.device}): {json.dumps(found)}", flush=True)
    machine = describe_machine(options.cpu)
    table = results_table(rows, machine, setting)
    (options.out / "results").with_suffix(".md").write_text(table)
    named = [{"name": name, "device": device, **found} for (name, device), found in rows.items()]
    (options.out / "results.json").write_text(json.dumps({"machine": machine, "rows": named}, indent=2) + "\n")
    print(table)
    return 0 if all("why" not in found for found in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
