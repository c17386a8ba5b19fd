"""What is quantized in a file, in words, and what to do about it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping

from snpc.passes.quantization.dequantize import quantized_operators
from snpc.types import Cost, Model

MOSTLY = 0.5  # of the weights: from here on pins tell of quantized nodes only


def is_mostly_quantized(cost: Cost) -> bool:
    """Whether what cannot be pruned is so because of quantized weights."""
    return cost.quantized_params >= MOSTLY * max(cost.params, 1)


def operator_counts(counts: Mapping[str, int]) -> str:
    """``14 MatMulNBits, 1 GatherBlockQuantized``."""
    return ", ".join(f"{number} {op}" for op, number in Counter(counts).most_common())


def describe_quantization(model: Model, cost: Cost) -> str:
    """How many of the weights are quantized, in which forms, what becomes of them, and which command makes them float;
    "" where none are."""
    if not cost.quantized:
        return ""
    forms = [entry.form for entry in sorted(cost.quantized, key=lambda entry: -entry.params)]
    named = "; ".join(forms[:3]) + ("; ..." if len(forms) > 3 else "")
    file = shlex.quote(str(model.path))
    share = f"{100 * cost.quantized_params / cost.params:.0f} % of the weights are quantized ({named})"
    dequantize = f"takes their float model, or write it: snpc dequantize {file} -o float.onnx"
    if model.quantized is None:
        return f"{share}: `snpc prune --dequantize` {dequantize}"
    left = quantized_operators(model.graph)
    but = f", but for {operator_counts(left)}, which stay" if left else ""
    return f"{share}, and are cut as they are stored{but}; `--dequantize` {dequantize}"
