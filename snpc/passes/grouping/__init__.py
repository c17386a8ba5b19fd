"""Grouping: from labels to units, and from units to groups of heads x width with their sites.

Files
  drafts             Group drafts: units with the same sites, with role, pins and [blocks, size] grid, before they get
                     names.
  experts            Whole experts as units: what pins them, how many must stay, what is theirs alone, and where they
                     are observed.
  feasibility        Whether a group can be cut at all: every tensor that its blocks share with others must stay
                     rectangular.
  groups             From drafts to groups: names, sites, probes, freedom, and the cost that each group accounts for.
  heads              Heads: cells that go together where one score matrix, and what is made of it, goes as a whole.
  interleaved_heads  Blocks that are interleaved along a flat axis, as where the head index varies fastest.
  traced             A graph with its labels and units: the result of label propagation that all later stages read.
  units              Resolves the label table to units, blocks and heads.
  width_ties         Width ties: keys and values of a fused node whose kernel takes one head size for both.
"""

from __future__ import annotations

from snpc.passes.grouping.drafts import GroupDraft, draft_groups
from snpc.passes.grouping.experts import pins_that_hold
from snpc.passes.grouping.groups import build_groups, to_pin
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.grouping.units import Units

__all__ = [
    "GroupDraft",
    "TracedGraph",
    "Units",
    "build_groups",
    "draft_groups",
    "pins_that_hold",
    "to_pin",
    "trace_graph",
]
