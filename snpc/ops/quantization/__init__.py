"""Operators on quantized values: what they cost, which of their inputs are weights, which float nodes they stand for.

Files
  arrays       Quantized arrays as floats: (q - zero point) * scale, per tensor, along an axis, or in blocks; packed or
               not.
  costs        What nodes on quantized or re-laid-out values cost. snpc does not look through them, but counts them.
  float_forms  Which float operator a node on quantized values stands for, and what its operands are.
"""

from __future__ import annotations

from snpc.ops.quantization.arrays import dequantize_array
from snpc.ops.quantization.costs import COSTS, NCHWC, QuantizedCost, WeightCount
from snpc.ops.quantization.float_forms import (
    COMMUTING,
    DYNAMIC_QUANTIZERS,
    FILLING,
    KEEPS_SIGN,
    NOT_NEGATIVE,
    FloatForm,
    Operand,
    Packed,
    Plain,
    Quantized,
    QuantizedBias,
    float_form,
)

__all__ = [
    "COMMUTING",
    "COSTS",
    "DYNAMIC_QUANTIZERS",
    "FILLING",
    "KEEPS_SIGN",
    "NCHWC",
    "NOT_NEGATIVE",
    "FloatForm",
    "Operand",
    "Packed",
    "Plain",
    "Quantized",
    "QuantizedBias",
    "QuantizedCost",
    "WeightCount",
    "dequantize_array",
    "float_form",
]
