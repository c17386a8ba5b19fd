"""SeReNe: how sensitive the outputs are to what a unit says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from snpc.errors import UserError
from snpc.types import CriterionInputs, FloatArray, Role


@dataclass(frozen=True)
class Serene:
    """Mean over samples and outputs of |dy/dp|, p what the unit says behind its activation function.

    Tartaglione et al. 2021 (arXiv 2102.03773), who keep this sensitivity of a neuron while its weights decay in
    proportion to what it is short of one. Sizes are added over the rows (tokens) that a unit speaks in, the derivatives
    by output over the positions of that output. Scores of different groups are compared as they are.

    With ``outputs`` the likeliest classes (of other outputs the largest values) are differentiated one by one. Zero
    takes |sum over all outputs of dy/dp| / outputs, the paper's lower bound, in one pass: what raises one output and
    lowers another cancels there.
    """

    name: ClassVar[str] = "serene"
    comparable: ClassVar[bool] = True

    outputs: int = field(
        default=8, metadata={"help": "outputs to differentiate, the largest; 0: their sum, all at once"}
    )

    def __post_init__(self) -> None:
        if self.outputs < 0:
            raise UserError(
                f"criterion 'serene': outputs={self.outputs} is negative: give a number, or 0 for their sum"
            )

    def probes(self, role: Role) -> tuple[str, ...]:
        """The sensitivity of each sample's outputs to each unit."""
        return ("gate:sensitivity",)

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """``sensitivity`` [blocks, size], summed over samples."""
        return {"sensitivity": batch["gate:sensitivity"].sum(axis=0)} if "gate:sensitivity" in batch else {}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], in units of the outputs per unit of activation."""
        zeros = np.zeros((inputs.blocks, inputs.size))
        return np.asarray(inputs.sums.get("sensitivity", zeros) / max(inputs.samples, 1))
