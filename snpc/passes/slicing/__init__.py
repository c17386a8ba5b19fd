"""Rewrites that remove units: sliced weights, recomputed shape parameters, and the masked oracle.

Files
  attention_scale    Keeps the attention scale right when the width d of Q and K changes: the scores of kept channels
                     must not change.
  mask               The masked model, which every sliced model is checked against: full size, with the removed units at
                     zero.
  masked_statistics  Statistics over the units that stay, in a graph that still has all of them.
  query_scale        Folds the scale of attention into what makes queries, so that no number multiplies scores,
                     queries or keys.
  restriction        A model that says less: logits of some entries of the vocabulary, or of the last position only.
  rewrite            The rewrite: split packed projections where widths would differ, slice, keep attention scales,
                     check the result.
  rewrite_as_stored  Rewriting for a file: that of a quantized one has the nodes and codes of the file in place of the
                     float ones.
  shape_parameters   Writes recomputed parameters into the graph: a constant, or the smallest change of the nodes that
                     compute one.
  slice              Slicing: removes units from every constant and recomputes every parameter that spells a size.
  split_packed       Splits a packed projection, so that Q, K and V can be cut to different widths.
  weighted_statistics  Statistics with a weight for each unit, in a graph that still has all units.
"""

from __future__ import annotations

from snpc.passes.slicing.mask import mask_constants, mask_model, zeroed_positions
from snpc.passes.slicing.masked_statistics import mask_statistic
from snpc.passes.slicing.query_scale import FoldAttentionScale
from snpc.passes.slicing.restriction import find_logits, keep_last_row, vocabulary_cuts
from snpc.passes.slicing.rewrite import REWRITE_PASSES, RewrittenModel, rewrite_model
from snpc.passes.slicing.rewrite_as_stored import rewrite_as_stored
from snpc.passes.slicing.shape_parameters import ShapeParameterEditor
from snpc.passes.slicing.slice import Cuts, find_removed_units
from snpc.passes.slicing.weighted_statistics import unit_weights, weigh_statistics, weights_name

__all__ = [
    "REWRITE_PASSES",
    "Cuts",
    "FoldAttentionScale",
    "RewrittenModel",
    "ShapeParameterEditor",
    "find_logits",
    "find_removed_units",
    "keep_last_row",
    "mask_constants",
    "mask_model",
    "mask_statistic",
    "rewrite_as_stored",
    "rewrite_model",
    "unit_weights",
    "vocabulary_cuts",
    "weigh_statistics",
    "weights_name",
    "zeroed_positions",
]
