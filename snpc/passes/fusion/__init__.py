"""Fusions that a runtime rewards: attention and biases in one node.

Files
  fuse_attention  Fuses attention in separate nodes into one node of onnxruntime's that computes the same.
  fuse_gemm_bias  Fuses a product and the bias that is added to it into one Gemm.
  head_columns    Finds the columns that heads are made of, by running movement nodes on position numbers.
  pad_heads       Makes the heads of queries, keys and values equally wide, by zeros.
  qkv_projection  Matches query, key and value that are columns of products of one value with constants
                  (com.microsoft.Attention).
"""

from __future__ import annotations

from snpc.passes.fusion.fuse_attention import FuseAttention, FusionResult, attention_names
from snpc.passes.fusion.fuse_gemm_bias import FuseGemmBias
from snpc.passes.fusion.pad_heads import PadAttentionHeads

__all__ = [
    "FuseAttention",
    "FuseGemmBias",
    "FusionResult",
    "PadAttentionHeads",
    "attention_names",
]
