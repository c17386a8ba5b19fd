"""Widths at which a runtime is fast, for ``--round-to auto``. docs/building.md has the measurements."""

from __future__ import annotations

from dataclasses import dataclass

from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, vector_width

TENSOR_CORE_MULTIPLE = 8  # tensor cores take half-precision matrices in multiples of 8
MIN_FUSED_HEAD = 16  # fused attention kernels start at heads of 16
DECODING_HEADS = (64, 128, 256)  # that onnxruntime's fastest CUDA kernel for decoding (XQA) takes: PR 27246 there


@dataclass(frozen=True)
class PreferredWidths:
    """Widths are multiples of ``multiple`` and at least ``minimum``. ``head_sizes``: see ``Budget``."""

    multiple: int
    minimum: int
    head_sizes: tuple[int, ...] | None = None


def widths_for_target(target: str | None, execution: Execution = DEFAULT_EXECUTION) -> PreferredWidths:
    """Widths for a target of ``snpc build``, or for onnxruntime with this ``execution``."""
    if target in ("trt", "trt-rtx"):
        return PreferredWidths(TENSOR_CORE_MULTIPLE, MIN_FUSED_HEAD)
    if target in (None, "ort") and not execution.on_cpu:
        return PreferredWidths(TENSOR_CORE_MULTIPLE, MIN_FUSED_HEAD, DECODING_HEADS)
    multiple = vector_width()
    return PreferredWidths(multiple, multiple)


def slower_decoding_text(before: int, after: int) -> str:
    """What it costs on a GPU that a decoder's heads of ``before`` channels have ``after``, in words; "" if nothing."""
    if before not in DECODING_HEADS or after in DECODING_HEADS:
        return ""
    sizes = ", ".join(map(str, DECODING_HEADS))
    return (
        f"heads of {before} channels became {after}: onnxruntime's fastest CUDA kernel for decoding takes {sizes}, so "
        f"on an NVIDIA GPU tokens may come slower than before; --round-to {min(DECODING_HEADS)} keeps to it"
    )
