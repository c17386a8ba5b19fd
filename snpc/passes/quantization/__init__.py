"""Quantized files: what is quantized, and the float model that such a file stands for.

Files
  dequantize    Dequantization: nodes on quantized values become the float nodes that they stand for.
  float_values  The float values behind quantized ones: constants that are dequantized, and activations before they were
                quantized.
  moved_constants
                Constants that are moved before a node on quantized values reads them: onnxruntime-genai's builder lays
                the weight of the last layer out anew for the table of embeddings that shares it.
  not_negative  Which values are never below zero.
  summary       What is quantized in a file, in words, and what to do about it.
"""

from __future__ import annotations

from snpc.passes.quantization.dequantize import DEQUANTIZATION_PASSES, Dequantize, quantized_operators
from snpc.passes.quantization.summary import describe_quantization, is_mostly_quantized, operator_counts

__all__ = [
    "DEQUANTIZATION_PASSES",
    "Dequantize",
    "describe_quantization",
    "is_mostly_quantized",
    "operator_counts",
    "quantized_operators",
]
