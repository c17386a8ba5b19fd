"""Width ties: keys and values of a fused node whose kernel takes one head size for both.

The kernel wants equal widths, not equal positions: keys lose rotary pairs, values any channels, as many of them. So
each keeps units of its own, and the groups that hold them are tied. Only where the channels of a head are not units of
one kind (half of a head turns, for example) do keys and values keep the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from snpc.graph import number_components
from snpc.passes.grouping.units import Units
from snpc.passes.propagation import LabeledValue, LabelPin, WidthTie
from snpc.types import IntArray

if TYPE_CHECKING:
    from snpc.passes.grouping.drafts import GroupDraft


def needs_equal_positions(tie: WidthTie, units: Units) -> bool:
    """Whether keys and values cannot lose units of their own."""
    key, value = (channel_units(part, units) for part in (tie.key, tie.value))
    if tie.key.shape[3] != tie.value.shape[3]:  # a damaged file: what unifies them says so
        return True
    if key is None or value is None or np.intersect1d(key, value).size:
        return True
    return channels_per_unit(key, units) * channels_per_unit(value, units) == 0


def channel_units(part: LabeledValue, units: Units) -> IntArray | None:
    """[heads, width]: the units of the channels of keys or values; None where some channel has none."""
    factors = sorted((f for f in part.factors if f.shape[3] > 1), key=lambda f: -f.size)
    if not factors or any(f.shape[0] > 1 or f.shape[2] > 1 or (f < 0).any() for f in factors):
        return None
    rows, *others = (units.unit_of_label[f[0, :, 0, :]] for f in factors)
    return rows if all((np.broadcast_to(other, rows.shape) == rows).all() for other in others) else None


def channels_per_unit(rows: IntArray, units: Units) -> int:
    """How many channels of a head each unit stands for; 0 where units differ in that, or lie in several blocks."""
    counts = {int(count) for row in rows for count in np.unique(row, return_counts=True)[1]}
    one_block = all(len(np.unique(units.block_of_unit[row])) == 1 for row in rows)
    return counts.pop() if len(counts) == 1 and one_block else 0


@dataclass(frozen=True)
class TiedDrafts:
    """The drafts that hold the channels of one fused node. ``channels``: of a head that a unit of each stands for.
    ``reason``: why none can be cut, "" where they can."""

    tie: WidthTie
    channels: Mapping[int, int]
    reason: str


def tie_widths(ties: Sequence[WidthTie], units: Units, drafts: Sequence[GroupDraft]) -> list[GroupDraft]:
    """``drafts`` with the ties between them. Where one that is tied cannot be cut, none can."""
    owner = {int(unit): index for index, draft in enumerate(drafts) for unit in draft.units.reshape(-1)}
    found = [tied_drafts(tie, units, drafts, owner) for tie in ties]
    firsts = [min(tied.channels) for tied in found if tied.channels and tied.tie.every_layer]
    pairs = [(min(tied.channels), index) for tied in found for index in tied.channels]
    numbers = number_components(
        sorted({index for tied in found for index in tied.channels}), [*pairs, *((firsts[0], k) for k in firsts[1:])]
    )
    result = list(drafts)
    reasons = dict[int, str]()
    for tied in found:
        for index, channels in tied.channels.items():
            multiple = tied.tie.multiple // math.gcd(tied.tie.multiple, channels)
            step = math.lcm(result[index].step, multiple)
            result[index] = replace(result[index], channels=channels, step=step, tie=numbers[index] + 1)
            pinned = next((f"{p.tensor} axis {p.axis} stays: {p.reason}" for p in drafts[index].held_by), "")
            if tied.reason or pinned:
                reasons.setdefault(numbers[index], tied.reason or pinned)
    ties_by_number = {numbers[index]: tied.tie for tied in found for index in tied.channels}
    for index, number in numbers.items():
        if number in reasons and not drafts[index].held_by:
            pin = tie_pin(result[index], ties_by_number[number], reasons[number])
            result[index] = replace(result[index], pins=(pin,))
    return result


def tied_drafts(tie: WidthTie, units: Units, drafts: Sequence[GroupDraft], owner: Mapping[int, int]) -> TiedDrafts:
    """The drafts of a tie. ``owner``: unit -> the draft that it is in."""
    found, reason = dict[int, int](), ""
    for part in (tie.key, tie.value):
        rows = channel_units(part, units)
        assert rows is not None
        channels = channels_per_unit(rows, units)
        for row in rows:
            owners = {owner.get(int(unit), -1) for unit in row}
            index = owners.pop()
            if owners or index < 0 or drafts[index].units.shape[1] * channels != len(row):
                reason = f"{part.name} is not made of channels that one weight produces"
            else:
                found[index] = channels
    return TiedDrafts(tie, found, reason)


def tie_pin(draft: GroupDraft, tie: WidthTie, reason: str) -> LabelPin:
    """The pin of a draft that is tied to one that cannot be cut."""
    width = draft.units.shape[1] * draft.channels
    reason = f"keys and values are equally wide here, and {reason}"
    return LabelPin(draft.units.reshape(-1), tie.key.name, 3, width, reason, tie.context.operator, "hard")
