"""Planning: from scores and a budget to the widths of a plan. Nothing here runs a model.

Files
  allocate     Allocation: how wide each group stays under a ratio, a target or a drift limit.
  config       Budgets: how much to cut, of which groups, and the widths that are allowed.
  descent      Allocation paths: the steps that narrow groups, in the order in which a greedy allocation takes them.
  dimap        How much of each layer can go, from weights alone: DIMAP (Data-independent Module-Aware Pruning, ICLR
               2024, arXiv 2404.13648).
  outlook      Outlook: what a plan takes before anything is written, what its curves predict, and up to where they
               are safe.
  plan         Scores of units, and the slice plan made of them: which units each group keeps.
  plan_file    A plan as a file: JSON that can be read, edited and applied again.
  provenance   Provenance: what a written file says of how it was made, as entries of its ``metadata_props``.
  savings      Savings: how many MACs, parameters, bytes or ms go with units. What several groups cut at once is counted
               once.
  tied_widths  Tied widths: groups of one tie, such as keys and values of a fused node, keep equally many channels per
               head.
"""

from __future__ import annotations

from snpc.planning.allocate import (
    GUESSED_DRIFT,
    allocate_widths,
    allocation_path,
    check_ranked_streams,
    groups_to_prune,
    make_slice_plan,
    predicted_drift,
    predicted_surprise,
)
from snpc.planning.config import (
    DEFAULT_ROLES,
    Allocator,
    Budget,
    Effort,
    PerplexityLimit,
    ResourceTarget,
    allowed_widths,
    parse_max_ratios,
    parse_perplexity_limit,
    parse_target,
)
from snpc.planning.descent import AllocationPath
from snpc.planning.outlook import SAFE_DRIFT, PlanOutlook, plan_outlook
from snpc.planning.plan import LatencyCurves, PruningMethod, SlicePlan, UnitScores, cuts_of, select_units, top_units
from snpc.planning.plan_file import (
    metric_texts,
    metrics_in,
    plan_from_json,
    plan_to_json,
    prunes_kv_cache,
    token_reduction_in,
    with_planned_entries,
    without_removed_layers,
)
from snpc.planning.provenance import (
    VOCABULARY_ENTRY,
    ProvenanceStep,
    compact_json,
    complete_step,
    layers_of,
    options_of,
    provenance_in,
    pruning_of,
    pruning_provenance,
    read_provenance,
    target_text,
    widths_of,
    write_provenance,
)
from snpc.planning.savings import saved_at, savings_by_width

__all__ = [
    "DEFAULT_ROLES",
    "GUESSED_DRIFT",
    "SAFE_DRIFT",
    "VOCABULARY_ENTRY",
    "AllocationPath",
    "Allocator",
    "Budget",
    "Effort",
    "LatencyCurves",
    "PerplexityLimit",
    "PlanOutlook",
    "ProvenanceStep",
    "PruningMethod",
    "ResourceTarget",
    "SlicePlan",
    "UnitScores",
    "allocate_widths",
    "allocation_path",
    "allowed_widths",
    "check_ranked_streams",
    "compact_json",
    "complete_step",
    "cuts_of",
    "groups_to_prune",
    "layers_of",
    "make_slice_plan",
    "metric_texts",
    "metrics_in",
    "options_of",
    "parse_max_ratios",
    "parse_perplexity_limit",
    "parse_target",
    "plan_from_json",
    "plan_outlook",
    "plan_to_json",
    "predicted_drift",
    "predicted_surprise",
    "provenance_in",
    "prunes_kv_cache",
    "pruning_of",
    "pruning_provenance",
    "read_provenance",
    "saved_at",
    "savings_by_width",
    "select_units",
    "target_text",
    "token_reduction_in",
    "top_units",
    "widths_of",
    "with_planned_entries",
    "without_removed_layers",
    "write_provenance",
]
