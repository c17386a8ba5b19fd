"""Activation: how much signal a unit carries on calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from snpc.types import CriterionInputs, FloatArray, Role

ROUTED = "routed:expert"


@dataclass(frozen=True)
class Activation:
    """Mean squared activation, times the weights that read it.

    With E[x^2] the mean over all samples and rows:

        qk     sqrt(E[q^2] E[k^2])        the energy of the unit's rank-one term: MoDeGPT's CR score sqrt(C_Q,jj C_K,jj)
                                          (arXiv 2408.09632)
        vo     E[c^2] |W[j, :]|^2         c the context; FLAP's fluctuation metric (arXiv 2312.11983) and A3's
        other  E[h^2] |W[j, :]|^2         lambda (2505.12942, 6.7) have this form; |W[j, :]| over all that read the unit
        head   the sum of c^2 over the head's width, times |W|^2 of the head's rows

    **experts**: the sum over its tokens of the norm of what an expert adds to them.

    A factor that does not exist counts as one: the query energy where the query is a constant, the weights where
    nothing with weights reads the unit, the energy of a residual stream that the runtime does not watch.
    """

    name: ClassVar[str] = "activation"

    weighted: bool = field(default=True, metadata={"help": "multiply by the squared norm of the weights that read it"})

    def probes(self, role: Role) -> tuple[str, ...]:
        """The energies it multiplies."""
        if role == "experts":
            return (ROUTED,)
        if role == "qk":
            return ("energy:query", "energy:key")
        return ("energy:context",) if role in ("vo", "head") else ("energy:hidden",)

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """``energy:K`` [blocks, size] and ``tokens:K`` [] of the batch, summed over its samples; of experts
        ``routed:expert`` [2, experts]."""
        names = [name for probe in self.probes(role) for name in (probe, _row_count_name(probe))]
        return {name: np.asarray(batch[name].sum(axis=0)) for name in names if name in batch}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], in squared units of the activation (times the weights that read it)."""
        score = np.ones((inputs.blocks, inputs.size))
        if inputs.role == "experts":
            return np.asarray(inputs.sums[ROUTED][0].reshape(score.shape)) if ROUTED in inputs.sums else score
        for probe in self.probes(inputs.role):
            if probe in inputs.sums:
                rows = float(inputs.sums.get(_row_count_name(probe), np.float64(inputs.samples)))
                score *= inputs.sums[probe] / max(rows, 1.0)
        if inputs.role == "qk":
            return np.sqrt(score)
        if self.weighted and inputs.consume:
            score *= _squared_norms(inputs.consume).reshape(score.shape)
        return score


def _row_count_name(probe: str) -> str:
    return probe.replace("energy:", "tokens:")


def _squared_norms(weights: Mapping[str, FloatArray]) -> FloatArray:
    """[units]: squared norm of each unit's rows."""
    return np.asarray(np.sum([np.square(weight).sum(axis=1) for weight in weights.values()], axis=0))
