"""The default where there is data: for each role the criterion that was measured to keep most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from snpc.criteria.activation import Activation
from snpc.criteria.reap import Reap
from snpc.criteria.snp import Snp
from snpc.types import CriterionInputs, FloatArray, Role


@dataclass(frozen=True)
class Mixed:
    """SNP's attention-score criterion for qk, REAP for whole experts, weighted activation for everything else.

    Measured on an ImageNet ViT-Tiny (dense 81.5 % top-1 on 400 pictures, 64 calibration pictures, half of one role
    removed uniformly, nothing trained): qk 73.8 by snp and 52.5 by activation; vo 1.3 and 45.0; ffn 3.0 and 4.0.
    """

    name: ClassVar[str] = "mixed"

    def probes(self, role: Role) -> tuple[str, ...]:
        return criterion_for_role(role).probes(role)

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        return criterion_for_role(role).observe(role, batch)

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], by the role's criterion with its default options."""
        return criterion_for_role(inputs.role).score(inputs)


def criterion_for_role(role: Role) -> Snp | Activation | Reap:
    return Snp() if role == "qk" else Reap() if role == "experts" else Activation()
