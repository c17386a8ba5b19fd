"""Sublayers: what a model computes between a read of its residual stream and the sum that returns to it.

Files
  find             Sublayers by provenance: what lies between a read of the residual stream and the sum that returns to
                   it.
  remove           Removal of whole sublayers from a graph, and the same in place: the oracle of the removal, and the
                   graph of trials.
  substitutes      What stands for a sublayer that is gone: a constant, or an affine map of what the sublayer read.
"""

from __future__ import annotations

from snpc.passes.sublayers.find import SublayerGraph
from snpc.passes.sublayers.remove import (
    SublayerRemoval,
    layer_scale_name,
    switch_name,
    with_layer_scales,
    with_switches,
    without_sublayers,
)
from snpc.passes.sublayers.substitutes import NO_SUBSTITUTES, Substitute, Substitutes, TokenMap, maps_tokens

__all__ = [
    "NO_SUBSTITUTES",
    "SublayerGraph",
    "SublayerRemoval",
    "Substitute",
    "Substitutes",
    "TokenMap",
    "layer_scale_name",
    "maps_tokens",
    "switch_name",
    "with_layer_scales",
    "with_switches",
    "without_sublayers",
]
