"""How much of each layer can go, from weights alone: DIMAP (Data-independent Module-Aware Pruning, ICLR 2024, arXiv
2404.13648).

The change of a network's outputs by what one layer loses is bounded by the share of the layer's energy that is lost,
whatever the layer (eq. 8). So units are ranked across the layers of a module (query and key, value and output, hidden
layers: the roles) by energy over that of all units of the layer that hold as much or more, and one threshold per module
decides. The paper prunes single weights; here a unit's weights go together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from snpc.planning.config import Budget
from snpc.planning.descent import greedy_path
from snpc.planning.tied_widths import groups_ranked_together
from snpc.types import FloatArray, Group


def relative_energy(energies: FloatArray) -> FloatArray:
    """[blocks, size] squared weights of units -> [size]: of the units that go together (the k-th least of every block)
    the energy over that of all units that hold as much or more, least first; between 0 and 1, rising."""
    ordered = np.sort(energies, axis=1).sum(0)
    remaining = np.cumsum(ordered[::-1])[::-1]
    relative: FloatArray = ordered / np.maximum(remaining, 1e-300)
    return relative


def dimap_widths_at(
    groups: Sequence[Group], energies: Mapping[str, FloatArray], budget: Budget, ratio: float
) -> dict[str, int]:
    """Widths at which the fraction ``ratio`` of the units of every role is removed, least relative energy first."""
    widths: dict[str, int] = {}
    for members in groups_ranked_together(groups, list(dict.fromkeys(g.role for g in groups))):
        costs = {g.id: relative_energy(energies[g.id]) for g in members}
        path = greedy_path(members, costs, dict.fromkeys(costs, 1.0), budget)
        removed = path.cumulative({g.id: g.blocks * np.arange(g.size, -1.0, -1.0) for g in members})
        removable = ratio * sum(g.blocks * g.size for g in members)
        widths |= path.widths_after(int(np.flatnonzero(removed <= removable + 1e-9)[-1]))
    return widths
