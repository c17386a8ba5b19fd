"""How much memory running a model takes, and whether this machine has it."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph.shapes import weight_bytes
from snpc.runtime.memory import free_memory
from snpc.types import Model

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
GIGABYTE = 1 << 30


def run_bytes(model: Model) -> int:
    """What a session of ``model`` on the CPU takes: its weights, and those of half precision once more as floats (the
    CPU has no arithmetic for them)."""
    held = [v.const_value for v in model.graph.graph.initializers.values() if v.const_value is not None]
    weights = {id(tensor): tensor for tensor in held}.values()
    return sum(weight_bytes(t) * (3 if t.dtype in HALVES else 1) for t in weights)


def too_large_to_run(model: Model) -> str:
    """In words, why the model cannot be run here; "" where it can."""
    needed, free = run_bytes(model), free_memory()
    if needed <= free // 2:  # the masked original is run as well, and others use the machine
        return ""
    return f"running the model takes about {needed / GIGABYTE:.1f} GiB of memory, {free / GIGABYTE:.1f} GiB are free"
