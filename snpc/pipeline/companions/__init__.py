"""Companions of a pruned model: cut by the same plan, and verified with it.

Files
  cut      A plan, and what was fitted for it, carried over to the companions of the model.
  merge    Merged decoders: two pruned files as branches of one, which must do what the files do.
  write    Companions as files beside a candidate, verified alone and together with it.
"""

from __future__ import annotations

from snpc.pipeline.companions.cut import FittedPlan
from snpc.pipeline.companions.merge import write_merged
from snpc.pipeline.companions.write import WrittenCompanion, write_companions

__all__ = ["FittedPlan", "WrittenCompanion", "write_companions", "write_merged"]
