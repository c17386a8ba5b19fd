"""REAP: how much an expert adds to the tokens that are routed to it (arXiv 2510.13999)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from snpc.criteria.activation import ROUTED, Activation
from snpc.types import CriterionInputs, FloatArray, Role


@dataclass(frozen=True)
class Reap:
    """Of experts the mean, over the tokens routed to them, of gate times norm of the output; else as activation.

        omega[e] = sum over the tokens t of e of g_e(t) |f_e(t)|, divided by the number of these tokens

    An expert without tokens scores 0. Where what experts add is not seen, as inside one fused node, the norm of the
    router's row times that of the expert's weights stands in.
    """

    name: ClassVar[str] = "reap"

    def probes(self, role: Role) -> tuple[str, ...]:
        """What experts add to their tokens, and what activation takes."""
        return (ROUTED,) if role == "experts" else Activation().probes(role)

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """``{"routed:expert": [2, experts]}``: sums of norms, and numbers of tokens."""
        if role != "experts":
            return Activation().observe(role, batch)
        return {ROUTED: np.asarray(batch[ROUTED].sum(axis=0))} if ROUTED in batch else {}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size]"""
        if inputs.role != "experts":
            return Activation().score(inputs)
        sums = inputs.sums.get(ROUTED)
        if sums is None:
            return weight_scores(inputs)
        return np.asarray(sums[0] / np.maximum(sums[1], 1)).reshape(inputs.blocks, inputs.size)


def weight_scores(inputs: CriterionInputs) -> FloatArray:
    """[blocks, size]: the norm of an expert's rows in the router times that of all its weights; a side without weights
    counts as one."""
    score = np.ones(inputs.blocks * inputs.size)
    for rows in (inputs.produce, inputs.consume):
        if rows:
            score *= np.sqrt(np.sum([np.square(weight).sum(axis=1) for weight in rows.values()], axis=0))
    return score.reshape(inputs.blocks, inputs.size)
