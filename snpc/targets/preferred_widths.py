"""Widths that a runtime likes: what ``--round-to auto`` stands for. docs/building.md has the measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution

TENSOR_CORE_MULTIPLE = 8  # tensor cores take half-precision matrices in multiples of 8
MIN_FUSED_HEAD = 16  # fused attention kernels start at heads of 16
VECTOR_WIDTHS = (("avx512f", 16), ("avx", 8))  # float32 per vector


@dataclass(frozen=True)
class PreferredWidths:
    """Widths are multiples of ``multiple`` and at least ``least``."""

    multiple: int
    minimum: int


def widths_for_target(target: str | None, execution: Execution = DEFAULT_EXECUTION) -> PreferredWidths:
    """By what will run the model: a target of ``snpc build``, or onnxruntime as ``execution`` says."""
    if target in ("trt", "trt-rtx") or (target in (None, "ort") and not execution.on_cpu):
        return PreferredWidths(TENSOR_CORE_MULTIPLE, MIN_FUSED_HEAD)
    multiple = vector_width()
    return PreferredWidths(multiple, multiple)


def vector_width(info: Path = Path("/proc/cpuinfo")) -> int:
    """float32 numbers in one vector of this processor; 4 where it does not say (128 bits, as on Arm)."""
    text = info.read_text(errors="replace") if info.is_file() else ""
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return next((width for flag, width in VECTOR_WIDTHS if flag in flags), 4)
