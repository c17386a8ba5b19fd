"""Random: the floor that every other criterion has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from snpc.types import CriterionInputs, FloatArray, Role


@dataclass(frozen=True)
class Random:
    """Uniform random scores, reproducible by seed; needs no data.

    A group is known by its weights alone, so the stream is drawn from the seed and a digest of them: the same group
    always gets the same scores, two groups of one shape get unrelated ones, and no group's scores depend on which
    groups were scored before. Draws are handed out in the order of the units' own digests, so that reordering the units
    reorders the scores; only units that are equal in every weight fall back on their position.
    """

    name: ClassVar[str] = "random"

    seed: int = field(default=0, metadata={"help": "another seed, another draw"})

    def probes(self, role: Role) -> tuple[str, ...]:
        """(): weights only."""
        return ()

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """{}: nothing is measured."""
        return {}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size] in [0, 1)."""
        units = _digests(inputs)
        order = sorted(range(len(units)), key=units.__getitem__)
        stream = hashlib.sha256(repr((self.seed, inputs.role, inputs.blocks, inputs.size)).encode())
        for unit in order:
            stream.update(units[unit])
        scores = np.empty(len(units))
        scores[order] = np.random.default_rng(int.from_bytes(stream.digest(), "big")).random(len(units))
        return scores.reshape(inputs.blocks, inputs.size)


def _digests(inputs: CriterionInputs) -> list[bytes]:
    """One digest per unit of its rows in the weights that make it, or, where none does, in those that read it."""
    weights = inputs.produce or inputs.consume
    rows = [np.ascontiguousarray(weights[name]) for name in sorted(weights)]
    hashes = [hashlib.sha256() for _ in range(inputs.blocks * inputs.size)]
    for row in rows:
        for unit, digest in enumerate(hashes):
            digest.update(row[unit].tobytes())
    return [digest.digest() for digest in hashes]
