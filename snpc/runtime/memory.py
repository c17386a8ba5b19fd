"""How much memory is free, and how much running a model takes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from snpc.passes.shapes import weight_bytes
from snpc.types import Model

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
GIGABYTE = 1 << 30


def run_bytes(model: Model) -> int:
    """What a session of ``model`` on the CPU takes: its weights, and those of half precision once more as floats (the
    CPU has no arithmetic for them)."""
    held = [v.const_value for v in model.graph.graph.initializers.values() if v.const_value is not None]
    weights = {id(tensor): tensor for tensor in held}.values()
    return sum(weight_bytes(t) * (3 if t.dtype in HALVES else 1) for t in weights)


def free_bytes() -> int | None:
    """Memory that can be had without swapping, where the system tells: the machine's, or less in a container."""
    found = [n for n in (machine_free(), container_free()) if n is not None]
    return min(found, default=None)


def machine_free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def container_free(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return int(most) - int(used)
    except (OSError, ValueError):  # no such limit ("max"), or another system
        return None


def too_large_to_run(model: Model) -> str:
    """In words, why the model cannot be run here; "" where it can."""
    needed, free = run_bytes(model), free_bytes()
    if free is None or needed <= free // 2:  # the masked original is run as well, and others use the machine
        return ""
    return f"running the model takes about {needed / GIGABYTE:.1f} GiB of memory, {free / GIGABYTE:.1f} GiB are free"
