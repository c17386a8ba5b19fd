"""A model that runs on the values of every batch: which outputs are added up, which are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from snpc.runtime.calibration import Calibration
from snpc.types import AnyArray, FloatArray


class Observer(Protocol):
    """From the outputs of a program on one batch to arrays that are added up. It can be sent to another process."""

    def __call__(
        self, outputs: Mapping[str, AnyArray], calibration: Calibration, number: int
    ) -> Mapping[str, AnyArray]:
        """``number``: of the batch in ``calibration``, for messages."""
        ...


class Derivation(Protocol):
    """From the outputs of a program on one batch to values by name. It can be sent to another process."""

    def __call__(self, outputs: Mapping[str, AnyArray]) -> Mapping[str, AnyArray]: ...


@dataclass(frozen=True)
class BatchProgram:
    """One step over all batches. The inputs of ``model`` are named values of a batch.

    ``sums``: outputs that are added up over the batches. ``kept``: output -> the name under which it becomes a value of
    its batch. ``live``: the values that the batch keeps afterwards; None: all. ``observe``: makes of the outputs on a
    batch what is added up besides; ``derive``: what the batch keeps besides. ``model`` must not be used again.
    """

    model: ir.Model
    sums: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    live: frozenset[str] | None = None
    observe: Observer | None = None
    derive: Derivation | None = None


@dataclass
class BatchSums:
    """Outputs added up in float64, those of even and of odd batches apart: each half checks what the other fits."""

    even: dict[str, FloatArray] = field(default_factory=dict)
    odd: dict[str, FloatArray] = field(default_factory=dict)

    def total(self, name: str) -> FloatArray:
        """The sum over all batches."""
        return self.even[name] + self.odd[name] if name in self.odd else self.even[name]
