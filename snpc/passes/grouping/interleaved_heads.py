"""Blocks whose positions alternate along a flat axis, as where the heads vary fastest.

What stays of a flat axis stays in its order. Cut apart, the blocks would meet the other side, where each block lies on
an axis of its own, in another order: so all of them keep the same positions.
"""

from __future__ import annotations

import numpy as np

from snpc.passes.grouping.units import Units, resolve_units
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import Trace
from snpc.types import IntArray


def find_units(trace: Trace) -> Units:
    """The units of everything that was traced."""
    units = resolve_units(trace.table)
    while True:
        news = [
            pair
            for axis in units_along_flat_axes(trace, units)
            for pair in unify_interleaved_blocks(axis, units.block_of_unit[axis])
        ]
        if not news:
            return units
        trace.table.pairs.extend(news)
        units = resolve_units(trace.table)


def units_along_flat_axes(trace: Trace, units: Units) -> list[IntArray]:
    """The units along every axis on which alone labels vary, each once."""
    found: dict[bytes, IntArray] = {}
    for carried in trace.values.values():
        for labels in carried.factors:
            if len(varying_axes(labels)) == 1:
                flat = labels.reshape(-1)
                axis = units.unit_of_label[flat[flat >= 0]]
                if (units.block_of_unit[axis] >= 0).any():
                    found.setdefault(axis.tobytes(), axis)
    return list(found.values())


def unify_interleaved_blocks(axis: IntArray, block: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Pairs that join blocks position by position, where another lies between two parts of one."""
    starts = np.flatnonzero(np.diff(block, prepend=-2))
    names = block[starts]
    if len(np.unique(names)) == len(names):
        return []
    runs: dict[int, list[frozenset[int]]] = {}
    for name, run in zip(names.tolist(), np.split(axis, starts[1:]), strict=True):
        if name >= 0:
            runs.setdefault(name, []).append(frozenset(run.tolist()))
    torn = [name for name, parts in runs.items() if any(part != parts[0] for part in parts)]
    rows = [np.array(list(dict.fromkeys(axis[block == name].tolist())), np.int64) for name in torn]
    same = [row for row in rows if len(row) == len(rows[0])]
    return [(same[0], row) for row in same[1:] if not np.array_equal(same[0], row)]
