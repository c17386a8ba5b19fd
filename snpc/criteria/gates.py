"""Criteria from gate gradients: a gate is a factor on each unit, one in the model as it is, zero where it is removed.

The runtime measures the gates with torch (``snpc.torch.pruning.gradients``), all of them in one pass; nothing here
needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from snpc.types import CriterionInputs, FloatArray, Role


@dataclass(frozen=True)
class GateCriterion:
    """Sums of gate gradients over samples; what the criteria in this package that use them share.

    The loss is the cross entropy of ``labels``, or of what the model itself answers. Scores are losses (or in their
    unit), so they are compared across groups as they are.
    """

    name: ClassVar[str] = ""
    comparable: ClassVar[bool] = True

    labels: str = field(default="", metadata={"help": "file with a class per sample; else the model's own answer"})

    def probes(self, role: Role) -> tuple[str, ...]:
        """The gradient of each sample's loss by the gate of each unit."""
        return ("gate:loss",)

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """``first`` [blocks, size]: sum of the gradients; ``absolute`` and ``second``: of their sizes and squares."""
        if "gate:loss" not in batch:
            return {}
        gradients = batch["gate:loss"]
        return {
            "first": gradients.sum(axis=0),
            "absolute": np.abs(gradients).sum(axis=0),
            "second": np.square(gradients).sum(axis=0),
        }

    def mean(self, inputs: CriterionInputs, name: str) -> FloatArray:
        """[blocks, size]: a sum over samples as their mean; zeros where nothing was measured."""
        zeros = np.zeros((inputs.blocks, inputs.size))
        return np.asarray(inputs.sums.get(name, zeros) / max(inputs.samples, 1))
