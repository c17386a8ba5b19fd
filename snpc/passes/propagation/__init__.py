"""Label propagation: which positions of which constants each position of a tensor depends on.

Files
  attention            Label propagation through fused attention nodes, by the rules of the separate nodes that they
                       replace.
  concat               Label propagation through Concat: concatenated along the axis, unified on all others.
  contraction          Label propagation through contractions (sums of products), in Einstein notation.
  copies               Copies: equal positions along an axis that Expand makes, such as one key head repeated for all
                       query heads.
  head_layout          Labels under the head layout changes inside fused nodes: splitting, merging and repeating heads.
  kv_cache             KV caches: past inputs that are concatenated in front of new keys and values, and the present
                       outputs.
  labels               The label table: all labels of a model and what propagation has found out about them.
  pointwise            Label propagation through element-wise operators: labels at the same position are unified,
                       covered or pinned.
  propagate            Label propagation: every axis of every float constant gets labels, and the graph is executed on
                       label arrays.
  removal              Removed units and the sliced shape of a tensor: positions that stay, axis by axis or block by
                       block.
  rotary_embedding     Label propagation through RotaryEmbedding: both channels of a pair and their table column are
                       unified.
  routing              Label propagation where tokens are routed to experts: a choice along an axis, and what its
                       indices then name.
  state                State of label propagation: the labels on each value, the node being visited, and everything
                       recorded so far.
  statistics           Consumers of normalization statistics: where a mean over units is used, in one node or in
                       several.
"""

from __future__ import annotations

from snpc.passes.propagation.attention import unify_keys_and_values
from snpc.passes.propagation.kv_cache import mark_shared_caches, resize_interface
from snpc.passes.propagation.labels import Cover, LabeledAxis, LabelFlag, LabelPin, LabelTable, varying_axes
from snpc.passes.propagation.propagate import propagate_labels
from snpc.passes.propagation.removal import (
    NotRectangular,
    RemovedUnits,
    SlicedShape,
    affected_statistics,
    removed_along,
    slice_shape,
    to_cut,
)
from snpc.passes.propagation.state import (
    Contraction,
    LabeledValue,
    NormalizationStatistic,
    RoutingComparison,
    Trace,
    WidthTie,
)
from snpc.passes.propagation.statistics import moves_from_own_axis, statistic_paths

__all__ = [
    "Contraction",
    "Cover",
    "LabelFlag",
    "LabelPin",
    "LabelTable",
    "LabeledAxis",
    "LabeledValue",
    "NormalizationStatistic",
    "NotRectangular",
    "RemovedUnits",
    "RoutingComparison",
    "SlicedShape",
    "Trace",
    "WidthTie",
    "affected_statistics",
    "mark_shared_caches",
    "moves_from_own_axis",
    "propagate_labels",
    "removed_along",
    "resize_interface",
    "slice_shape",
    "statistic_paths",
    "to_cut",
    "unify_keys_and_values",
    "varying_axes",
]
