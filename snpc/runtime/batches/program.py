"""A model that runs on the values of every batch: which outputs are added up, which are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from snpc.types import FloatArray


@dataclass(frozen=True)
class BatchProgram:
    """One step over all batches. The inputs of ``model`` are named values of a batch.

    ``sums``: outputs that are added up over the batches. ``kept``: output -> the name under which it becomes a value of
    its batch. ``half``: those of these names that may be held in half precision. ``live``: the values that the batch
    keeps afterwards; None: all. ``model`` must not be used again.
    """

    model: ir.Model
    sums: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    half: frozenset[str] = frozenset()
    live: frozenset[str] | None = None


@dataclass
class BatchSums:
    """Outputs added up in float64, those of even and of odd batches apart: each half checks what the other fits."""

    even: dict[str, FloatArray] = field(default_factory=dict)
    odd: dict[str, FloatArray] = field(default_factory=dict)

    def total(self, name: str) -> FloatArray:
        """The sum over all batches."""
        return self.even[name] + self.odd[name] if name in self.odd else self.even[name]
