"""Operators on quantized values: what they cost, which of their inputs are weights.

Files
  costs  What nodes on quantized or re-laid-out values cost. snpc does not look through them, but counts them.
"""

from __future__ import annotations

from snpc.ops.quantization.costs import COSTS, NCHWC, QuantizedCost, WeightCount

__all__ = ["COSTS", "NCHWC", "QuantizedCost", "WeightCount"]
