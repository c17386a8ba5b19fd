"""Units with the same sites, before they are groups: their role, their pins, their grid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from snpc.passes.grouping.feasibility import ValuesByUnit, infeasible_cut_pin, values_by_unit
from snpc.passes.grouping.units import Units
from snpc.passes.propagation.labels import LabelFlag, LabelPin
from snpc.passes.propagation.state import Trace
from snpc.types import IntArray, Role


@dataclass(frozen=True)
class GroupDraft:
    """A group before it has a name: ``units[block, position]`` are unit numbers (see ``resolve.Units``)."""

    units: IntArray
    role: Role
    flags: LabelFlag
    pins: tuple[LabelPin, ...]
    children: tuple[int, ...] = ()


def flags_by_unit(trace: Trace, units: Units) -> npt.NDArray[np.int32]:
    flags = np.zeros(trace.table.count, np.int32)
    np.bitwise_or.at(flags, units.unit_of_label, trace.table.flags[: trace.table.count])
    return flags


def site_signatures(trace: Trace, units: Units) -> npt.NDArray[np.uint64]:
    """A hash of the set of constant axes that each unit lives on."""
    rng = np.random.default_rng(0)
    found = np.zeros(trace.table.count, np.uint64)
    for axis in trace.table.axes:
        mine = np.unique(units.unit_of_label[axis.first_label : axis.first_label + axis.size])
        found[mine] += rng.integers(1, 1 << 63, dtype=np.uint64)
    return found


def pins_by_unit(trace: Trace, units: Units) -> dict[int, list[LabelPin]]:
    found: dict[int, list[LabelPin]] = defaultdict(list)
    for note in trace.table.pins:
        for unit in np.unique(units.unit_of_label[note.labels]):
            found[int(unit)].append(note)
    return found


def draft_groups(trace: Trace, units: Units) -> list[GroupDraft]:
    flags = flags_by_unit(trace, units)
    signature = site_signatures(trace, units)
    pinned = pins_by_unit(trace, units)
    heads = np.unique(units.head_of_block[units.head_of_block >= 0])
    made = np.setdiff1d(np.flatnonzero(flags & int(LabelFlag.PRODUCED)), heads)
    bundles: dict[tuple[int, bool, bool], list[int]] = defaultdict(list)
    for unit in made:
        blocked = units.block_of_unit[unit] >= 0
        bundles[int(signature[unit]), int(unit) in pinned, bool(blocked)].append(int(unit))
    lying = values_by_unit(trace, units)
    found: list[GroupDraft] = []
    for (_, is_pinned, _), members in bundles.items():
        notes = unique_pins(pinned, members) if is_pinned else ()
        for grid in block_grids(np.array(members), units.block_of_unit):
            merged = LabelFlag(int(np.bitwise_or.reduce(flags[grid.reshape(-1)])))
            found.append(GroupDraft(grid, role_of(merged, notes), merged, notes))
    found = [pin_if_infeasible(trace, units, draft, lying) for draft in found]
    found += draft_head_groups(found, heads, units, pinned, flags)
    return sorted(found, key=lambda d: (int(d.units.min()), d.role == "head"))


def pin_if_infeasible(trace: Trace, units: Units, draft: GroupDraft, lying: ValuesByUnit) -> GroupDraft:
    note = infeasible_cut_pin(trace, units, draft.units, lying) if not draft.pins else None
    return draft if note is None else replace(draft, pins=(note,))


def unique_pins(pinned: Mapping[int, list[LabelPin]], members: list[int]) -> tuple[LabelPin, ...]:
    notes: dict[int, LabelPin] = {}
    for unit in members:
        for note in pinned.get(unit, ()):
            notes[id(note)] = note
    return tuple(notes.values())


def block_grids(members: IntArray, block: IntArray) -> list[IntArray]:
    """[blocks, size] arrays of units; blocks of different sizes are different groups."""
    names = block[members]
    if (names < 0).all():
        return [np.sort(members)[None, :]]
    rows: dict[int, list[IntArray]] = defaultdict(list)
    for name in np.unique(names):
        row = np.sort(members[names == name])
        rows[len(row)].append(row)
    return [np.array(sorted(row.tolist() for row in same), np.int64) for same in rows.values()]


def role_of(flags: LabelFlag, notes: tuple[LabelPin, ...]) -> Role:
    if flags & LabelFlag.SCORED:
        return "qk"
    if flags & LabelFlag.BATCHED:  # heads on an axis of their own in every weight
        return "head"
    if flags & LabelFlag.PASSED_THROUGH:
        return "vo"
    if flags & LabelFlag.ADDED or any(note.kind in ("norm", "sum") for note in notes):
        return "residual"
    if flags & LabelFlag.CONVOLVED:
        return "conv"
    return "ffn" if flags & LabelFlag.CONSUMED else "other"


def draft_head_groups(
    found: list[GroupDraft],
    heads: IntArray,
    units: Units,
    pinned: Mapping[int, list[LabelPin]],
    flags: npt.NDArray[np.int32],
) -> list[GroupDraft]:
    """Whole blocks as units: one draft per set of groups whose blocks the same heads cover."""
    owners: dict[int, list[int]] = defaultdict(list)
    for index, draft in enumerate(found):
        if draft.role not in ("qk", "vo"):
            continue
        for row in draft.units:
            head = units.head_of_block[units.block_of_unit[row[0]]] if units.block_of_unit[row[0]] >= 0 else -1
            if head >= 0:
                owners[int(head)].append(index)
    bundles: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for head, indices in owners.items():
        bundles[tuple(sorted(set(indices)))].append(head)
    made = []
    for children, members in bundles.items():
        if len(members) < 2 or not any(found[k].flags & LabelFlag.PASSED_THROUGH for k in children):
            continue
        torn = [h for h in members if h in set(units.partial_heads.tolist())]
        notes = unique_pins(pinned, members)
        for child in children:
            hard = tuple(n for n in found[child].pins if n.kind == "hard" or spans_several_heads(n, units))
            notes = tuple(dict.fromkeys((*notes, *hard)))
        if torn:
            notes = (
                *notes,
                LabelPin(np.array(torn), "", 0, len(torn), "something is shared by part of its heads", "", "hard"),
            )
        made.append(
            GroupDraft(
                np.array(sorted(members))[None, :],
                "head",
                LabelFlag(int(np.bitwise_or.reduce(flags[members]))),
                notes,
                children,
            )
        )
    return made


def spans_several_heads(note: LabelPin, units: Units) -> bool:
    """Is a statistic taken over more than one head?"""
    return len(np.unique(units.block_of_unit[units.unit_of_label[note.labels]])) > 1


def is_approximate(draft: GroupDraft) -> bool:
    """Nothing but normalisations keeps its width: it can be cut where that is asked for."""
    mine = draft.role == "residual" and len(draft.units) == 1
    return mine and bool(draft.pins) and all(note.kind == "norm" for note in draft.pins)
