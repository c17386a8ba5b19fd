"""Fusions that a runtime rewards: attention and biases in one node.

Files
  fuse_attention  Fuses attention in separate nodes into one node of onnxruntime's that computes the same.
  fuse_gemm_bias  Fuses a product and the bias that is added to it into one Gemm.
  head_columns    Finds the columns that heads are made of, by running movement nodes on position numbers.
  qkv_projection  Matches query, key and value that are columns of products of one value with constants
                  (com.microsoft.Attention).
"""

from __future__ import annotations

from snpc.passes.fusion.fuse_attention import FuseAttention, FusionResult
from snpc.passes.fusion.fuse_gemm_bias import FuseGemmBias

__all__ = [
    "FuseAttention",
    "FuseGemmBias",
    "FusionResult",
]
