"""Sublayers: what a model computes between a read of its residual stream and the sum that returns to it.

Files
  find             Sublayers by provenance: what lies between a read of the residual stream and the sum that returns to
                   it.
"""

from __future__ import annotations

from snpc.passes.sublayers.find import SublayerGraph

__all__ = ["SublayerGraph"]
