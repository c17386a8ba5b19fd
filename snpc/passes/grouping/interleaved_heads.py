"""Blocks that are interleaved along a flat axis, as where the head index varies fastest.

Slicing keeps the order of a flat axis. If interleaved blocks kept different positions, their channels would be in
another order than on the other side, where each block has an axis of its own. So all of them keep the same positions.
"""

from __future__ import annotations

import numpy as np

from snpc.passes.grouping.units import Units, resolve_units
from snpc.passes.grouping.width_ties import needs_equal_positions
from snpc.passes.propagation import Trace, unify_keys_and_values, varying_axes
from snpc.types import IntArray


def find_units(trace: Trace) -> Units:
    """Resolve all labels to units; interleaved blocks are unified position by position until nothing changes, and so
    are keys and values of one width that cannot have units of their own."""
    tied: list[tuple[IntArray, IntArray]] = []
    units = resolve_units(trace.table)
    while True:
        new_pairs = [
            pair
            for axis in units_along_flat_axes(trace, units)
            for pair in unify_interleaved_blocks(axis, units.block_of_unit[axis])
        ]
        if not new_pairs:
            alike = [tie for tie in trace.width_ties if needs_equal_positions(tie, units)]
            if not alike:
                return units
            for tie in alike:
                unify_keys_and_values(tie)
                trace.width_ties.remove(tie)
        tied += new_pairs
        units = resolve_units(trace.table, tied)


def units_along_flat_axes(trace: Trace, units: Units) -> list[IntArray]:
    """Units along every axis that some factor varies on alone. Equal rows of units occur once."""
    axes: dict[bytes, IntArray] = {}
    for labeled_value in trace.values.values():
        for labels in labeled_value.factors:
            if len(varying_axes(labels)) == 1:
                flat = labels.reshape(-1)
                axis = units.unit_of_label[flat[flat >= 0]]
                if (units.block_of_unit[axis] >= 0).any():
                    axes.setdefault(axis.tobytes(), axis)
    return list(axes.values())


def unify_interleaved_blocks(axis: IntArray, block: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Pairs of units that unify blocks position by position, where blocks of equal size are interleaved along
    ``axis``."""
    starts = np.flatnonzero(np.diff(block, prepend=-2))
    names = block[starts]
    if len(np.unique(names)) == len(names):
        return []
    runs: dict[int, list[frozenset[int]]] = {}
    for name, run in zip(names.tolist(), np.split(axis, starts[1:]), strict=True):
        if name >= 0:
            runs.setdefault(name, []).append(frozenset(run.tolist()))
    interleaved = [name for name, parts in runs.items() if any(part != parts[0] for part in parts)]
    rows = [np.array(list(dict.fromkeys(axis[block == name].tolist())), np.int64) for name in interleaved]
    same = [row for row in rows if len(row) == len(rows[0])]
    return [(same[0], row) for row in same[1:] if not np.array_equal(same[0], row)]
