"""What works on the graph: canonicalization, label propagation, grouping, weight edits, slicing, fusion.

Files
  analyze            Analysis: the groups, pins and cost of a model (docs/how-it-works.md shows how they are found).
  canonicalization/  Canonicalization: rewrites without change of meaning that the analysis relies on.
  companions/        Companions: models with the same weights as another one, which are cut alike.
  fusion/            Fusions that a runtime rewards: attention and biases in one node.
  grouping/          Grouping: from labels to units, and from units to groups of heads x width with their sites.
  mac_breakdown      The multiply-accumulates of a model by role, every contraction counted once.
  output_kinds       What each output of a model is, by what the graph does at its end: scores of classes, a KV cache,
                     or plain values.
  pass_list          Every graph pass of snpc in the order in which passes run, and a way to write the graph after one
                     of them.
  propagation/       Label propagation: which positions of which constants each position of a tensor depends on.
  quantization/      Quantized files: what is quantized, and the float model that such a file stands for.
  rotation/          Rotation: residual streams in another orthogonal basis, with the same outputs.
  slicing/           Rewrites that remove units: sliced weights, recomputed shape parameters, and the masked oracle.
  sublayers/         Sublayers: what a model computes between a read of its residual stream and the sum that returns to
                     it, and their removal.
  token_analysis/    Token analysis: follows the token axis through the graph and finds where tokens can be reduced.
  weights/           Weights around a group: who produces it, who consumes it, and edits of both.
"""

from __future__ import annotations

from snpc.passes.analyze import (
    Analysis,
    Companion,
    GraphAtSizes,
    SizedFacts,
    analyze,
    analyze_graph,
    cost_without,
    enter_streams,
    quoted_facts,
    remove_sublayers,
    turn_streams,
)
from snpc.passes.mac_breakdown import macs_by_role
from snpc.passes.output_kinds import OutputKind, find_output_kinds, partly_written_outputs
from snpc.passes.pass_list import (
    FOLD_ATTENTION_SCALE,
    FUSE_ATTENTION,
    FUSE_ATTENTION_PROJECTIONS,
    FUSE_GEMM_BIAS,
    PAD_ATTENTION_HEADS,
    PASSES,
    DumpAfter,
)

__all__ = [
    "FOLD_ATTENTION_SCALE",
    "FUSE_ATTENTION",
    "FUSE_ATTENTION_PROJECTIONS",
    "FUSE_GEMM_BIAS",
    "PAD_ATTENTION_HEADS",
    "PASSES",
    "Analysis",
    "Companion",
    "DumpAfter",
    "GraphAtSizes",
    "OutputKind",
    "SizedFacts",
    "analyze",
    "analyze_graph",
    "cost_without",
    "enter_streams",
    "find_output_kinds",
    "macs_by_role",
    "partly_written_outputs",
    "quoted_facts",
    "remove_sublayers",
    "turn_streams",
]
