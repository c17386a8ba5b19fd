"""Canonicalization: rewrites without change of meaning that the analysis relies on.

Files
  canonicalize           The canonical form of a graph, which every later stage reads: a private copy of the model in
                         which
  eliminate_dead_nodes   Dead-node elimination: nodes and initializers that no output depends on, in subgraphs too.
  eliminate_dead_rows    Dead-row elimination: a classifier reads one token, so the last layer need not compute the
                         others.
  eliminate_zero_terms   Elimination of zeros that are added: exporters of ``baddbmm`` keep its first term, times a beta
                         of zero.
  expand_einsum          Expands Einsum nodes that do not have two operands: one operand becomes a ReduceSum and a
                         Transpose, three or more become a chain of products of two, from the left as runtimes do it.
  expand_head_norms      Expands norms on the heads of queries and keys inside a fused attention node: each becomes
                         nodes in front of it.
  finalize               The last clean-up before a model is written: no dead nodes, forked constants merged, no stale
                         shapes.
  fold_shape_arithmetic  Constant folding of shape arithmetic: sizes that are the same for every input are stored, not
                         computed at every run.
  inline_branches        Inlines branches whose condition no input can change: exporters branch on ranks that they did
                         not know.
  inline_functions       Inlines model-local functions. How many nodes that makes is counted first: functions that call
                         others twice each grow to 2^depth nodes from a file of two kilobytes.
  rotary_tables          Rotary tables that layers share: each layer, and each head, selects columns of its own of
                         them.
  shared_constants       Constants with several consumers: forked for the analysis, merged again before writing.
  static_cache_widths    Static widths of KV caches: exporters declare the width of a cache as dynamic, though the node
                         that reads it takes one.
"""

from __future__ import annotations

from snpc.passes.canonicalization.canonicalize import (
    CANONICALIZATION_PASSES,
    FORK_SHARED_CONSTANTS,
    NameNodes,
    canonicalize,
)
from snpc.passes.canonicalization.eliminate_dead_nodes import EliminateDeadNodes
from snpc.passes.canonicalization.eliminate_dead_rows import ELIMINATE_DEAD_ROWS
from snpc.passes.canonicalization.finalize import FINALIZATION_PASSES, finalize
from snpc.passes.canonicalization.fold_shape_arithmetic import FOLD_SHAPE_ARITHMETIC, infer_shapes
from snpc.passes.canonicalization.inline_functions import InlineFunctions
from snpc.passes.canonicalization.shared_constants import original_name

__all__ = [
    "CANONICALIZATION_PASSES",
    "ELIMINATE_DEAD_ROWS",
    "FINALIZATION_PASSES",
    "FOLD_SHAPE_ARITHMETIC",
    "FORK_SHARED_CONSTANTS",
    "EliminateDeadNodes",
    "InlineFunctions",
    "NameNodes",
    "canonicalize",
    "finalize",
    "infer_shapes",
    "original_name",
]
