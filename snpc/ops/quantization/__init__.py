"""Operators on quantized values: what they cost, which of their inputs are weights, which float nodes they stand for.

Files
  arrays       Quantized arrays as floats: (q - zero point) * scale, per tensor, along an axis, or in blocks; packed or
               not.
  costs        What nodes on quantized or re-laid-out values cost. snpc does not look through them, but counts them.
  float_forms  Which float operator a node on quantized values stands for, and what its operands are.
  layouts      How quantized arrays lie in a file: as tensors of codes, in the blocks of MatMulNBits, or as packed
               tables.
  schemes      Quantized arrays that can be cut, and quantized anew: codes with their scales and zero points, and their
               range.
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
from snpc.ops.quantization.layouts import Layout, read_stored, write_stored
from snpc.ops.quantization.schemes import QuantizedArray, common_block

__all__ = [
    "COMMUTING",
    "COSTS",
    "DYNAMIC_QUANTIZERS",
    "FILLING",
    "KEEPS_SIGN",
    "NCHWC",
    "NOT_NEGATIVE",
    "FloatForm",
    "Layout",
    "Operand",
    "Packed",
    "Plain",
    "Quantized",
    "QuantizedArray",
    "QuantizedBias",
    "QuantizedCost",
    "WeightCount",
    "common_block",
    "dequantize_array",
    "float_form",
    "read_stored",
    "write_stored",
]
