"""Weights around a group: who produces it, who consumes it, and edits of both.

Files
  attention_operands  The products of query and key, and of attention weights and value, with the constants that produce
                      their operands.
  closed_form_kinds   The weights around each group, and the closed form that they allow.
  consumers           The weights that consume a group's units, with the columns of each unit (several by repeats and
                      kernel size).
  edits               Edits of weights that keep every shape: a change of basis, refitted rows, and vectors that are
                      added to a bias.
  linear_path         Finds the constants that a value is linear in: a factor, or a change of basis, can be folded into
                      these.
  normalizations      Normalizations over units that are partly cut: their nodes, gain, bias and consumers.
"""

from __future__ import annotations

from snpc.passes.weights.attention_operands import ScoreAxes, score_axes
from snpc.passes.weights.closed_form_kinds import GroupWeights, LazyGroupWeights, closed_form_kinds, refusal_reasons
from snpc.passes.weights.consumers import ConsumerWeight
from snpc.passes.weights.edits import UnsupportedWeightForm, WeightEdits, WeightSlice, apply_edits, existing_bias
from snpc.passes.weights.linear_path import LinearPath, NotLinear, label_set, trace_linear_path
from snpc.passes.weights.normalizations import (
    HiddenNormalization,
    Normalization,
    affected_normalizations,
    normalization_consumers,
    with_own_parameters,
)

__all__ = [
    "ConsumerWeight",
    "GroupWeights",
    "HiddenNormalization",
    "LazyGroupWeights",
    "LinearPath",
    "Normalization",
    "NotLinear",
    "ScoreAxes",
    "UnsupportedWeightForm",
    "WeightEdits",
    "WeightSlice",
    "affected_normalizations",
    "apply_edits",
    "closed_form_kinds",
    "existing_bias",
    "label_set",
    "normalization_consumers",
    "refusal_reasons",
    "score_axes",
    "trace_linear_path",
    "with_own_parameters",
]
