"""Magnitude: how large the weights of a unit are. The classic baseline, and a weak one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from snpc.criteria.reap import weight_scores
from snpc.types import CriterionInputs, FloatArray, Role

WeightNorm = Literal["l1", "l2"]
WeightSide = Literal["both", "produce", "consume"]


@dataclass(frozen=True)
class Magnitude:
    """Norm of the unit's weights; needs no data.

    l1: sum of ``|w|``; l2: ``sqrt(sum of w^2)``; over the unit's rows in every weight of ``side``. Where that side has
    no weights (nothing but an activation reads a query), the other side stands in. A head is made of tensors of
    different sizes, so there each counts by its mean instead of its sum: l2 is ``sqrt(sum over tensors of mean w^2)``.
    Of a whole expert it is the norm of the router's row times that of all its weights.
    """

    name: ClassVar[str] = "magnitude"

    norm: WeightNorm = field(default="l2", metadata={"help": "l1 or l2"})
    side: WeightSide = field(default="both", metadata={"help": "weights that make the unit, that read it, or both"})

    def probes(self, role: Role) -> tuple[str, ...]:
        """(): weights only."""
        return ()

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """{}: nothing is measured."""
        return {}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size]; zeros where the group has no weights at all."""
        if inputs.role == "experts":
            return weight_scores(inputs)
        total = np.zeros(inputs.blocks * inputs.size)
        for weight in self._weights(inputs):
            terms = np.abs(weight) if self.norm == "l1" else np.square(weight)
            total += terms.mean(axis=1) if inputs.role == "head" else terms.sum(axis=1)
        total = total if self.norm == "l1" else np.sqrt(total)
        return total.reshape(inputs.blocks, inputs.size)

    def _weights(self, inputs: CriterionInputs) -> Iterator[FloatArray]:
        """One at a time: a group may span every layer of a large model."""
        produce, consume = inputs.produce, inputs.consume
        if self.side == "both":
            yield from produce.values()
            yield from consume.values()
        else:
            preferred, other = (produce, consume) if self.side == "produce" else (consume, produce)
            yield from (preferred or other).values()
