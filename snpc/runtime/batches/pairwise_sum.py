"""Sums whose result does not depend on who adds which part: numbered arrays are added in pairs of neighbors, pairs of
these, and so on, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from snpc.types import AnyArray, FloatArray


@dataclass(frozen=True)
class SumNode:
    """The sum of the arrays from ``index * 2**level`` on, ``2**level`` of them; at level 0 an array itself."""

    level: int
    index: int
    array: AnyArray

    def precedes(self, other: SumNode) -> bool:
        """Do the two make a node of the next level?"""
        return self.level == other.level and self.index % 2 == 0 and self.index + 1 == other.index

    def joined(self, other: SumNode) -> SumNode:
        """The node of both; the array of this one is used for the sum where it is a sum already."""
        owned = self.level > 0 and self.array.flags.writeable
        out = self.array if owned else np.empty(self.array.shape)
        return SumNode(self.level + 1, self.index // 2, np.add(self.array, other.array, out=out, dtype=np.float64))


@dataclass
class PairwiseSum:
    """The nodes so far, in the order of their arrays; as few as there can be."""

    nodes: list[SumNode] = field(default_factory=list)

    def push(self, node: SumNode) -> None:
        """Add what follows the nodes so far."""
        while self.nodes and self.nodes[-1].precedes(node):
            node = self.nodes.pop().joined(node)
        self.nodes.append(node)

    def extend(self, nodes: Iterable[SumNode]) -> None:
        for node in nodes:
            self.push(node)

    def total(self) -> FloatArray:
        """The sum of all arrays."""
        total: FloatArray = np.array(self.nodes[-1].array, np.float64)
        for node in reversed(self.nodes[:-1]):
            np.add(node.array, total, out=total)
        return total
