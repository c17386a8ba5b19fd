"""Fisher information: squared gradients, of single weights or of whole units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from snpc.criteria.gates import GateCriterion
from snpc.types import CriterionInputs, FloatArray, Role


@dataclass(frozen=True)
class Fisher(GateCriterion):
    """Half the sum over the unit's weights of (w dL/dw)^2, averaged over samples.

    Optimal brain damage (LeCun et al. 1990) with the diagonal of the empirical Fisher information for the curvature,
    summed over what makes and what reads the unit.
    """

    name: ClassVar[str] = "fisher"

    def probes(self, role: Role) -> tuple[str, ...]:
        """Squares of weight times gradient, summed over a unit's weights, of each sample."""
        return ("gate:weights",)

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """``weights`` [blocks, size], summed over samples."""
        return {"weights": batch["gate:weights"].sum(axis=0)} if "gate:weights" in batch else {}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], in units of the loss."""
        return self.mean(inputs, "weights") / 2


@dataclass(frozen=True)
class GroupFisher(GateCriterion):
    """Mean squared gradient of the gate, per MAC, activation or unit.

    Liu et al. 2021 (arXiv 2108.00708, eqs. 6 to 9): gradients of all that is cut together are summed before they are
    squared, and the sum is divided by what the unit's removal saves.
    """

    name: ClassVar[str] = "group_fisher"

    per: Literal["memory", "macs", "unit"] = field(
        default="memory", metadata={"help": "divide by activations (memory), macs, or not at all (unit)"}
    )

    def probes(self, role: Role) -> tuple[str, ...]:
        """Gate gradients, and what a unit costs."""
        return ("gate:loss", "gate:macs", "gate:memory")

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """``second`` [blocks, size], and ``macs`` and ``memory`` [], summed over samples."""
        statistics = dict(super().observe(role, batch))
        return statistics | {name: np.asarray(batch[f"gate:{name}"].sum()) for name in ("macs", "memory") if statistics}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size]: squared loss per million of what is saved."""
        saved = float(inputs.sums.get(self.per, np.zeros(()))) / max(inputs.samples, 1) / 1e6
        return self.mean(inputs, "second") / (saved if self.per != "unit" and saved > 0 else 1.0)
