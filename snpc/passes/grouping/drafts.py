"""Group drafts: units with the same sites, with role, pins and [blocks, size] grid, before they get names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from snpc.passes.grouping.experts import least_experts, pins_that_hold
from snpc.passes.grouping.feasibility import ValuesByUnit, infeasible_cut_pin, infeasible_heads_pin, values_by_unit
from snpc.passes.grouping.units import Units
from snpc.passes.grouping.width_ties import tie_widths
from snpc.passes.propagation import LabelFlag, LabelPin, Trace
from snpc.types import IntArray, Role


@dataclass(frozen=True)
class GroupDraft:
    """A group before it has a name.

    ``units``: [blocks, size] names of units, or of heads (see ``Units``). ``channels``, ``step``: see ``Group``.
    ``tie``: number of the width tie from 1 on, 0 for none. ``of_heads``: do ``units`` name heads?
    """

    units: IntArray
    role: Role
    flags: LabelFlag
    pins: tuple[LabelPin, ...]
    channels: int = 1
    step: int = 1
    tie: int = 0
    least: int = 1
    of_heads: bool = False

    @property
    def approximate(self) -> bool:
        """Do only normalization statistics pin it? It can then be cut with an approximate result."""
        kinds = {pin.kind for pin in self.pins}
        if self.role == "qk":
            return bool(kinds) and kinds <= {"norm", "head_norm"}
        return kinds == {"norm"} and self.role in ("residual", "ffn", "conv") and len(self.units) == 1

    @property
    def held_by(self) -> tuple[LabelPin, ...]:
        """The pins for which it keeps its width."""
        return () if self.approximate else self.pins


def flags_by_unit(trace: Trace, units: Units) -> npt.NDArray[np.int32]:
    """[units]: the flags of all labels of each unit, combined."""
    flags = np.zeros(trace.table.count, np.int32)
    np.bitwise_or.at(flags, units.unit_of_label, trace.table.flags[: trace.table.count])
    return flags


def site_signatures(trace: Trace, units: Units) -> npt.NDArray[np.uint64]:
    """[units]: a hash of the set of constant axes that each unit occurs on, and of the selections of rotary columns: a
    unit of a head that turns has two channels, one beside it that does not has one."""
    rng = np.random.default_rng(0)
    signatures = np.zeros(trace.table.count, np.uint64)
    for axis in trace.table.axes:
        axis_units = np.unique(units.unit_of_label[axis.first_label : axis.first_label + axis.size])
        signatures[axis_units] += rng.integers(1, 1 << 63, dtype=np.uint64)
    for labels in trace.table.selections:
        signatures[np.unique(units.unit_of_label[labels])] += rng.integers(1, 1 << 63, dtype=np.uint64)
    return signatures


def pins_by_unit(trace: Trace, units: Units) -> dict[int, list[LabelPin]]:
    """unit -> pins of its labels."""
    pins: dict[int, list[LabelPin]] = defaultdict(list)
    for pin in pins_that_hold(trace, units):
        for unit in np.unique(units.unit_of_label[pin.labels]):
            pins[int(unit)].append(pin)
    return pins


def draft_groups(trace: Trace, units: Units) -> list[GroupDraft]:
    """All groups of units that some weight produces, and the groups of whole heads."""
    flags = flags_by_unit(trace, units)
    signature = site_signatures(trace, units)
    pins_of = pins_by_unit(trace, units)
    produced = np.setdiff1d(np.flatnonzero(flags & int(LabelFlag.PRODUCED)), units.whole_heads)
    bundles: dict[tuple[int, bool, bool], list[int]] = defaultdict(list)
    for unit in produced:
        blocked = units.block_of_unit[unit] >= 0
        bundles[int(signature[unit]), int(unit) in pins_of, bool(blocked)].append(int(unit))
    values = values_by_unit(trace, units)
    drafts: list[GroupDraft] = []
    for (_, is_pinned, _), bundle in bundles.items():
        pins = unique_pins(pins_of, bundle) if is_pinned else ()
        for grid in block_grids(np.array(bundle), units.block_of_unit):
            merged_flags = LabelFlag(int(np.bitwise_or.reduce(flags[grid.reshape(-1)])))
            role = role_of(merged_flags, pins)
            least = least_experts(trace, units, grid) if role == "experts" else 1
            drafts.append(GroupDraft(grid, role, merged_flags, pins, least=least))
    drafts = tie_widths(trace.width_ties, units, pin_infeasible(trace, units, drafts, values))
    drafts += draft_head_groups(trace, units, drafts, values)
    return sorted(drafts, key=lambda d: (int(d.units.min()), d.role == "head"))


def pin_infeasible(trace: Trace, units: Units, drafts: list[GroupDraft], values: ValuesByUnit) -> list[GroupDraft]:
    """``drafts`` with a pin where one cannot be cut on its own, unless it can be cut as wide as those that share the
    tensor: they are then one (heads that two weights produce, laid side by side)."""
    result = []
    sharing: dict[tuple[str, int, Role], list[GroupDraft]] = defaultdict(list)
    for draft in drafts:
        pin = infeasible_cut_pin(trace, units, draft.units, values) if not draft.pins else None
        if pin is None:
            result.append(draft)
        else:
            sharing[pin.tensor, draft.units.shape[1], draft.role].append(replace(draft, pins=(pin,)))
    for parts in sharing.values():
        grid = np.concatenate([part.units for part in parts])
        if len(parts) > 1 and infeasible_cut_pin(trace, units, grid, values) is None:
            flags = LabelFlag(int(np.bitwise_or.reduce([int(part.flags) for part in parts])))
            result.append(GroupDraft(grid, parts[0].role, flags, ()))
        else:
            result += parts
    return result


def unique_pins(pins_of: Mapping[int, list[LabelPin]], members: list[int]) -> tuple[LabelPin, ...]:
    """The pins of several units, each once."""
    unique: dict[int, LabelPin] = {}
    for unit in members:
        for pin in pins_of.get(unit, ()):
            unique[id(pin)] = pin
    return tuple(unique.values())


def block_grids(members: IntArray, block: IntArray) -> list[IntArray]:
    """[blocks, size] arrays of units. Blocks of different sizes are different groups."""
    names = block[members]
    if (names < 0).all():
        return [np.sort(members)[None, :]]
    rows: dict[int, list[IntArray]] = defaultdict(list)
    for name in np.unique(names):
        row = np.sort(members[names == name])
        rows[len(row)].append(row)
    return [np.array(sorted(row.tolist() for row in same), np.int64) for same in rows.values()]


def role_of(flags: LabelFlag, pins: tuple[LabelPin, ...]) -> Role:
    """The role of a group, from what operators did to its labels."""
    if flags & LabelFlag.ROUTED:
        return "experts"
    if flags & LabelFlag.SCORED:
        return "qk"
    if flags & LabelFlag.BATCHED:  # heads that have their own axis in every weight
        return "head"
    if flags & LabelFlag.PASSED_THROUGH:
        return "vo"
    if flags & LabelFlag.ADDED or any(pin.kind in ("sum", "head_norm", "choice") for pin in pins):
        return "residual"
    if flags & LabelFlag.CONVOLVED or (flags & LabelFlag.POINTWISE and flags & LabelFlag.DEPTHWISE):
        return "conv"
    return "ffn" if flags & LabelFlag.CONSUMED else "other"


def draft_head_groups(
    trace: Trace, units: Units, drafts: Sequence[GroupDraft], values: ValuesByUnit
) -> list[GroupDraft]:
    """Groups whose units are whole heads: one draft per set of groups that the same heads have channels of."""
    channels: dict[int, list[int]] = defaultdict(list)
    held = pins_that_hold(trace, units)
    for index, draft in enumerate(drafts):
        for head in heads_of_units(units, draft.units) if draft.role in ("qk", "vo") else ():
            channels[int(head)].append(index)
    bundles: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for head, indices in channels.items():
        bundles[tuple(indices)].append(head)
    head_groups = []
    for owners, members in bundles.items():
        if len(members) > 1 and any(drafts[k].flags & LabelFlag.PASSED_THROUGH for k in owners):
            heads = np.sort(np.array(members, np.int64))
            flags = int(
                np.bitwise_or.reduce(trace.table.flags[: trace.table.count][np.isin(units.head_of_label, heads)])
            )
            pins = pins_of_heads(held, units, heads)
            if not pins:
                parts = np.concatenate([drafts[k].units.reshape(-1) for k in owners])
                infeasible = infeasible_heads_pin(trace, units, heads, parts, values)
                pins = (infeasible,) if infeasible is not None else ()
            head_groups.append(GroupDraft(heads[None, :], "head", LabelFlag(flags), pins, of_heads=True))
    return head_groups


def heads_of_units(units: Units, members: IntArray) -> IntArray:
    """The heads in which some of these units have a part."""
    chosen = np.zeros(len(units.unit_of_label), bool)
    chosen[members] = True
    heads = np.unique(units.head_of_label[chosen[units.unit_of_label]])
    return heads[heads >= 0]


def pins_of_heads(held: Sequence[LabelPin], units: Units, heads: IntArray) -> tuple[LabelPin, ...]:
    """Those of the pins for which whole heads stay: hard ones, and those of statistics over more than one head."""
    pins = []
    for pin in held:
        owners = np.unique(units.head_of_label[pin.labels])
        if np.isin(owners, heads).any() and (pin.kind == "hard" or len(owners) > 1):
            pins.append(pin)
    return tuple(pins)
