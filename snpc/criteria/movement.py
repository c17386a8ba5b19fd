"""Movement: which units training would make larger, and which smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from snpc.criteria.gates import GateCriterion
from snpc.types import CriterionInputs, FloatArray, Role


@dataclass(frozen=True)
class Movement(GateCriterion):
    """-dL/dgate, averaged: units that a step of training makes larger stay.

    Sanh et al. 2020 (arXiv 2005.07683, eq. 4) add up -w dL/dw over the steps of a finetuning; here it is one step, over
    all the data. Of a model that has been trained to its end this is mostly noise.
    """

    name: ClassVar[str] = "movement"

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], in units of the loss; of either sign."""
        return -self.mean(inputs, "first")


@dataclass(frozen=True)
class Gum(Movement):
    """Movement, plus how little a unit's activation looks like those of the others.

    After Santacroce et al. 2023 (arXiv 2302.03773, globally unique movement), who reward uniqueness while training:
    here one minus the mean |cosine| to the other units of the block on the data, times ``unique`` and the mean size of
    the group's movement.
    """

    name: ClassVar[str] = "gum"

    unique: float = field(default=1.0, metadata={"help": "weight of uniqueness"})

    def probes(self, role: Role) -> tuple[str, ...]:
        """Gate gradients and, where units have activations of their own, their inner products."""
        kinds = {"qk": "key", "vo": "context"}
        return ("gate:loss",) if role == "head" else ("gate:loss", f"gram:{kinds.get(role, 'hidden')}")

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """``first`` [blocks, size] and ``gram`` [blocks, size, size], summed over samples."""
        grams = [array.sum(axis=0) for name, array in batch.items() if name.startswith("gram:")]
        return {**super().observe(role, batch), **({"gram": grams[0]} if grams else {})}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], in units of the loss; of either sign."""
        movement = super().score(inputs)
        if "gram" not in inputs.sums or inputs.size < 2:
            return movement
        gram = inputs.sums["gram"]
        norm = np.sqrt(np.maximum(np.einsum("bii->bi", gram), 0.0))
        safe = np.where(norm > 0, norm, 1.0)
        cosine = np.abs(gram / safe[:, :, None] / safe[:, None, :])
        others = (cosine.sum(axis=2) - np.einsum("bii->bi", cosine)) / (inputs.size - 1)
        unique: FloatArray = np.where(norm > 0, 1.0 - others, 0.0)  # a silent unit says nothing of its own
        return movement + self.unique * float(np.abs(movement).mean()) * unique
