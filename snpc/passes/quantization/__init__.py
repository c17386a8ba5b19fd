"""Quantized files: what is quantized, and the float model that such a file stands for.

Files
  dequantize    Dequantization: nodes on quantized values become the float nodes that they stand for.
  cut_constants  What a quantized file holds once its float constants are cut: codes as they are, or quantized anew.
  float_model   The float graph that a quantized file stands for, as it is analyzed: in memory, its weights computed
                when read.
  float_values  The float values behind quantized ones: constants that are dequantized, and activations before they were
                quantized.
  moved_constants
                Constants that are moved before a node on quantized values reads them: onnxruntime-genai's builder lays
                the weight of the last layer out anew for the table of embeddings that shares it.
  not_negative  Which values are never below zero.
  record        Which float nodes, values and constants stand for the quantized ones: noted while a graph becomes float.
  stored_widths  Widths that quantized constants take: rows of packed codes fill bytes, those of experts whole blocks.
  summary       What is quantized in a file, in words, and what to do about it.
  write_back    Writing back: the float graph, cut, becomes a graph on quantized values again, with the nodes that the
                file has.
"""

from __future__ import annotations

from snpc.passes.quantization.cut_constants import CutConstant, cut_constants
from snpc.passes.quantization.dequantize import DEQUANTIZATION_PASSES, Dequantize, quantized_operators
from snpc.passes.quantization.float_model import with_float_graph
from snpc.passes.quantization.stored_widths import with_stored_widths
from snpc.passes.quantization.summary import describe_quantization, is_mostly_quantized, operator_counts
from snpc.passes.quantization.write_back import write_back

__all__ = [
    "DEQUANTIZATION_PASSES",
    "CutConstant",
    "Dequantize",
    "cut_constants",
    "describe_quantization",
    "is_mostly_quantized",
    "operator_counts",
    "quantized_operators",
    "with_float_graph",
    "with_stored_widths",
    "write_back",
]
