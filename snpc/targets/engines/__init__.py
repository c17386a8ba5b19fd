"""Engines of TensorRT and TensorRT for RTX: built here, or by a script on another machine.

Files
  attention_kernels  Attention that TensorRT computes in one kernel: what it asks of the graph, and what an engine says
                     of it.
  script             A model for TensorRT and the shell script that builds its engine on another machine, profiles and
                     compares it.
  shape_profile      Ranges of input shapes that an engine serves: given by the user, or derived from the dynamic axes.
  tensorrt           Build targets TensorRT and TensorRT for RTX, whose Python interfaces are the same.
"""

from __future__ import annotations

from snpc.targets.engines.tensorrt import TENSORRT_RTX_TARGET, TENSORRT_TARGET

__all__ = [
    "TENSORRT_RTX_TARGET",
    "TENSORRT_TARGET",
]
