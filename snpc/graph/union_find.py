"""Union-find: connected components of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from snpc.types import IntArray


def connected_components(count: int, pairs: Sequence[tuple[IntArray, IntArray]]) -> IntArray:
    """Smallest member of each member's connected component."""
    parent = np.arange(count, dtype=np.int64)
    if not pairs:
        return parent
    left = np.concatenate([a for a, _ in pairs])
    right = np.concatenate([b for _, b in pairs])
    while True:
        a, b = parent[left], parent[right]
        low, high = np.minimum(a, b), np.maximum(a, b)
        if bool((low == high).all()):
            return parent
        np.minimum.at(parent, high, low)
        while True:
            shorter = parent[parent]
            if bool((shorter == parent).all()):
                break
            parent = shorter


class DisjointSets:
    """Disjoint sets of values."""

    def __init__(self) -> None:
        self.parent: dict[ir.Value, ir.Value] = {}
        self.numbers: dict[ir.Value, int] = {}

    def root(self, value: ir.Value) -> ir.Value:
        self.parent.setdefault(value, value)
        while self.parent[value] is not value:
            self.parent[value] = self.parent[self.parent[value]]
            value = self.parent[value]
        return value

    def join(self, one: ir.Value, other: ir.Value) -> None:
        self.parent[self.root(one)] = self.root(other)

    def number(self, value: ir.Value) -> int:
        return self.numbers.setdefault(self.root(value), len(self.numbers))
