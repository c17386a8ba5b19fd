"""Union-find: connected components of pairs of integers, or of any hashable members."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from snpc.types import IntArray

Member = TypeVar("Member", bound=Hashable)


def connected_components(count: int, pairs: Sequence[tuple[IntArray, IntArray]]) -> IntArray:
    """[count]: the smallest member of the connected component that each of ``0 .. count - 1`` belongs to.

    Each element of ``pairs`` connects ``left[i]`` and ``right[i]`` for all i. All edges are processed at once: every
    root is linked to the smallest root that it is connected to, and paths are compressed until every parent is a root.
    """
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
            grandparent = parent[parent]
            if bool((grandparent == parent).all()):
                break
            parent = grandparent


def number_components(members: Iterable[Member], pairs: Iterable[tuple[Member, Member]]) -> dict[Member, int]:
    """The number of each member's connected component. ``members`` lists every member that ``pairs`` connects; two
    members have the same number exactly if a chain of pairs connects them."""
    index = {member: position for position, member in enumerate(dict.fromkeys(members))}
    edges = np.array([(index[a], index[b]) for a, b in pairs], np.int64).reshape(-1, 2)
    components = connected_components(len(index), [(edges[:, 0], edges[:, 1])])
    return dict(zip(index, components.tolist(), strict=True))
