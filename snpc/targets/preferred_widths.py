"""Widths at which a runtime is fast, for ``--round-to auto``. docs/building.md has the measurements."""

from __future__ import annotations

from dataclasses import dataclass

from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, vector_width

TENSOR_CORE_MULTIPLE = 8  # tensor cores take half-precision matrices in multiples of 8
MIN_FUSED_HEAD = 16  # fused attention kernels start at heads of 16


@dataclass(frozen=True)
class PreferredWidths:
    """Widths are multiples of ``multiple`` and at least ``minimum``."""

    multiple: int
    minimum: int


def widths_for_target(target: str | None, execution: Execution = DEFAULT_EXECUTION) -> PreferredWidths:
    """Widths for a target of ``snpc build``, or for onnxruntime with this ``execution``."""
    if target in ("trt", "trt-rtx") or (target in (None, "ort") and not execution.on_cpu):
        return PreferredWidths(TENSOR_CORE_MULTIPLE, MIN_FUSED_HEAD)
    multiple = vector_width()
    return PreferredWidths(multiple, multiple)
