"""Layer-wise relevance propagation: how much of the answer came through a unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from snpc.criteria.gates import GateCriterion
from snpc.types import CriterionInputs, FloatArray, Role


@dataclass(frozen=True)
class Relevance(GateCriterion):
    """Mean over samples of the |relevance| that passes through a unit from the answer back to the input.

    Yeom et al. 2021 (arXiv 1912.08881): relevance is conserved from layer to layer, each unit taking the share that it
    contributed. Rules for attention after Achtibat et al. 2024 (arXiv 2402.05602): normalizations with their deviation
    held fixed, products of two activations half to each, activation functions as the factor that they are.
    """

    name: ClassVar[str] = "lrp"

    def probes(self, role: Role) -> tuple[str, ...]:
        """Relevance by unit, of each sample."""
        return ("gate:relevance",)

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """``relevance`` [blocks, size], summed over samples."""
        return {"relevance": np.abs(batch["gate:relevance"]).sum(axis=0)} if "gate:relevance" in batch else {}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], in units of the model's answer."""
        return self.mean(inputs, "relevance")
