"""First and second order models of what the loss does when a unit goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from snpc.criteria.gates import GateCriterion
from snpc.types import CriterionInputs, FloatArray


@dataclass(frozen=True)
class Taylor(GateCriterion):
    """Mean over samples of |dL/dgate|: the first-order change of each sample's loss.

    Molchanov et al. 2017 (arXiv 1611.06440, eq. 7): activation times gradient, summed over a unit's positions, in
    absolute value, averaged over samples.
    """

    name: ClassVar[str] = "taylor"

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], in units of the loss."""
        return self.mean(inputs, "absolute")


@dataclass(frozen=True)
class Linear(GateCriterion):
    """|mean dL/dgate|: the linear model (LM) of the change of the mean loss.

    Laurent et al. 2020 (arXiv 2006.12279): |g th| with the gate (one) as th, which for a unit's weights is the sum over
    them.
    """

    name: ClassVar[str] = "lm"

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], in units of the loss."""
        return np.abs(self.mean(inputs, "first"))


@dataclass(frozen=True)
class Quadratic(GateCriterion):
    """|-g + h/2| of the gate, h its mean squared gradient: the quadratic model (QM) of the change of the mean loss.

    Laurent et al. 2020 (arXiv 2006.12279): |-g th + th H th / 2| with the gate (one) as th, and the empirical Fisher
    information for the curvature H.
    """

    name: ClassVar[str] = "qm"

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], in units of the loss."""
        return np.abs(self.mean(inputs, "second") / 2 - self.mean(inputs, "first"))
