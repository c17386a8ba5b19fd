"""Sublayers: what a model computes between a read of its residual stream and the sum that returns to it.

Files
  find             Sublayers by provenance: what lies between a read of the residual stream and the sum that returns to
                   it.
  remove           Removal of whole sublayers from a graph, and the same in place: the oracle of the removal, and the
                   graph of trials.
"""

from __future__ import annotations

from snpc.passes.sublayers.find import SublayerGraph
from snpc.passes.sublayers.remove import NO_MEANS, Means, SublayerRemoval, switch_name, with_switches, without_sublayers

__all__ = [
    "NO_MEANS",
    "Means",
    "SublayerGraph",
    "SublayerRemoval",
    "switch_name",
    "with_switches",
    "without_sublayers",
]
