"""Units with the same sites, before they are groups: their role, their pins, their grid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from snpc.passes.grouping.feasibility import Lying, cannot_be_cut, values_by_unit
from snpc.passes.grouping.units import Units
from snpc.passes.propagation.labels import Flag, PinNote
from snpc.passes.propagation.propagate import Trace
from snpc.types import Ints, Role


@dataclass(frozen=True)
class Draft:
    """A group before it has a name: ``units[block, position]`` are unit numbers (see ``resolve.Units``)."""

    units: Ints
    role: Role
    flags: Flag
    pins: tuple[PinNote, ...]
    children: tuple[int, ...] = ()


def unit_flags(trace: Trace, units: Units) -> npt.NDArray[np.int32]:
    flags = np.zeros(trace.book.count, np.int32)
    np.bitwise_or.at(flags, units.unit, trace.book.flags[: trace.book.count])
    return flags


def signatures(trace: Trace, units: Units) -> npt.NDArray[np.uint64]:
    """A hash of the set of constant axes that each unit lives on."""
    rng = np.random.default_rng(0)
    found = np.zeros(trace.book.count, np.uint64)
    for axis in trace.book.axes:
        mine = np.unique(units.unit[axis.first : axis.first + axis.size])
        found[mine] += rng.integers(1, 1 << 63, dtype=np.uint64)
    return found


def pins_by_unit(trace: Trace, units: Units) -> dict[int, list[PinNote]]:
    found: dict[int, list[PinNote]] = defaultdict(list)
    for note in trace.book.pins:
        for unit in np.unique(units.unit[note.labels]):
            found[int(unit)].append(note)
    return found


def drafts(trace: Trace, units: Units) -> list[Draft]:
    flags = unit_flags(trace, units)
    signature = signatures(trace, units)
    pinned = pins_by_unit(trace, units)
    heads = np.unique(units.head[units.head >= 0])
    made = np.setdiff1d(np.flatnonzero(flags & int(Flag.PRODUCED)), heads)
    bundles: dict[tuple[int, bool, bool], list[int]] = defaultdict(list)
    for unit in made:
        blocked = units.block[unit] >= 0
        bundles[int(signature[unit]), int(unit) in pinned, bool(blocked)].append(int(unit))
    lying = values_by_unit(trace, units)
    found: list[Draft] = []
    for (_, is_pinned, _), members in bundles.items():
        notes = unique_notes(pinned, members) if is_pinned else ()
        for grid in grids(np.array(members), units.block):
            merged = Flag(int(np.bitwise_or.reduce(flags[grid.reshape(-1)])))
            found.append(Draft(grid, role_of(merged, notes), merged, notes))
    found = [pinned_where_ragged(trace, units, draft, lying) for draft in found]
    found += head_drafts(found, heads, units, pinned, flags)
    return sorted(found, key=lambda d: (int(d.units.min()), d.role == "head"))


def pinned_where_ragged(trace: Trace, units: Units, draft: Draft, lying: Lying) -> Draft:
    note = cannot_be_cut(trace, units, draft.units, lying) if not draft.pins else None
    return draft if note is None else replace(draft, pins=(note,))


def unique_notes(pinned: Mapping[int, list[PinNote]], members: list[int]) -> tuple[PinNote, ...]:
    notes: dict[int, PinNote] = {}
    for unit in members:
        for note in pinned.get(unit, ()):
            notes[id(note)] = note
    return tuple(notes.values())


def grids(members: Ints, block: Ints) -> list[Ints]:
    """[blocks, size] arrays of units; blocks of different sizes are different groups."""
    names = block[members]
    if (names < 0).all():
        return [np.sort(members)[None, :]]
    rows: dict[int, list[Ints]] = defaultdict(list)
    for name in np.unique(names):
        row = np.sort(members[names == name])
        rows[len(row)].append(row)
    return [np.array(sorted(row.tolist() for row in same), np.int64) for same in rows.values()]


def role_of(flags: Flag, notes: tuple[PinNote, ...]) -> Role:
    if flags & Flag.SCORED:
        return "qk"
    if flags & Flag.BATCHED:  # heads on an axis of their own in every weight
        return "head"
    if flags & Flag.CARRIED:
        return "vo"
    if flags & Flag.ADDED or any(note.kind in ("norm", "sum") for note in notes):
        return "residual"
    if flags & Flag.CONVOLVED:
        return "conv"
    return "ffn" if flags & Flag.CONSUMED else "other"


def head_drafts(
    found: list[Draft], heads: Ints, units: Units, pinned: Mapping[int, list[PinNote]], flags: npt.NDArray[np.int32]
) -> list[Draft]:
    """Whole blocks as units: one draft per set of groups whose blocks the same heads cover."""
    owners: dict[int, list[int]] = defaultdict(list)
    for index, draft in enumerate(found):
        if draft.role not in ("qk", "vo"):
            continue
        for row in draft.units:
            head = units.head[units.block[row[0]]] if units.block[row[0]] >= 0 else -1
            if head >= 0:
                owners[int(head)].append(index)
    bundles: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for head, indices in owners.items():
        bundles[tuple(sorted(set(indices)))].append(head)
    made = []
    for children, members in bundles.items():
        if len(members) < 2 or not any(found[k].flags & Flag.CARRIED for k in children):
            continue
        torn = [h for h in members if h in set(units.crossed.tolist())]
        notes = unique_notes(pinned, members)
        for child in children:
            hard = tuple(n for n in found[child].pins if n.kind == "hard" or spans_heads(n, units))
            notes = tuple(dict.fromkeys((*notes, *hard)))
        if torn:
            notes = (
                *notes,
                PinNote(np.array(torn), "", 0, len(torn), "something is shared by part of its heads", "", "hard"),
            )
        made.append(
            Draft(
                np.array(sorted(members))[None, :],
                "head",
                Flag(int(np.bitwise_or.reduce(flags[members]))),
                notes,
                children,
            )
        )
    return made


def spans_heads(note: PinNote, units: Units) -> bool:
    """Is a statistic taken over more than one head?"""
    return len(np.unique(units.block[units.unit[note.labels]])) > 1


def approximate(draft: Draft) -> bool:
    """Nothing but normalisations keeps its width: it can be cut where that is asked for."""
    mine = draft.role == "residual" and len(draft.units) == 1
    return mine and bool(draft.pins) and all(note.kind == "norm" for note in draft.pins)
