"""Companions: models with the same weights as another one, which are cut alike.

A decoder comes as two models: one that reads a prompt, and one that goes on from its caches.

Files
  alignment   Which constants and nodes of two graphs are the same, by the contents of their weights.
  branches    Merged decoders: two models as branches of one ``If``, taken apart and put together again.
  matching    Which groups of two models are the same, and can be cut alike.
  transfer    What was fitted to one model, as edits of the other.
"""

from __future__ import annotations

from snpc.passes.companions.alignment import GraphAlignment, align_graphs
from snpc.passes.companions.branches import merge_branches, split_branches
from snpc.passes.companions.matching import GroupMatch, match_groups, restrict_groups
from snpc.passes.companions.transfer import transferred_edits

__all__ = [
    "GraphAlignment",
    "GroupMatch",
    "align_graphs",
    "match_groups",
    "merge_branches",
    "restrict_groups",
    "split_branches",
    "transferred_edits",
]
