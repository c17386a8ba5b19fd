"""Which groups of two models are the same, and can be cut alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.passes.companions.alignment import GraphAlignment
from snpc.types import Group, IntArray, Pin, Site

GroupShape = tuple[bool, int, int]
GroupPlace = tuple[Group, IntArray]


@dataclass(frozen=True)
class GroupMatch:
    """The group of the companion that is the same; ``units``: [blocks * size], its unit for each unit."""

    group: Group
    units: IntArray = field(repr=False)

    def keep(self, rows: Sequence[Sequence[int]], size: int) -> tuple[tuple[int, ...], ...]:
        """Positions that the companion's group keeps, block by block, where a group of ``size`` keeps ``rows``."""
        kept = sorted(int(self.units[block * size + k]) for block, row in enumerate(rows) for k in row)
        found: list[list[int]] = [[] for _ in range(self.group.blocks)]
        for unit in kept:
            found[unit // self.group.size].append(unit % self.group.size)
        return tuple(map(tuple, found))


class NotAlike(Exception):
    """A group cannot be cut in both models; the message says why."""


def match_groups(
    groups: Sequence[Group], others: Sequence[Group], alignment: GraphAlignment
) -> tuple[dict[str, GroupMatch], dict[str, str]]:
    """(group id -> the same group of the companion, group id -> why the companion cannot be cut alike). A group of
    whose constants the companion has none is in neither."""
    places = {
        (site.tensor, site.axis, shape_of(other)): (other, site.units) for other in others for site in other.sites
    }
    copies: dict[str, list[str]] = {}
    for name, original in alignment.constants.items():
        copies.setdefault(original, []).append(name)
    matches: dict[str, GroupMatch] = {}
    reasons: dict[str, str] = {}
    for group in groups:
        shared = [(site, name) for site in group.sites for name in copies.get(site.tensor, ())]
        if not shared:
            continue
        try:
            matches[group.id] = match_group(group, shared, places)
        except NotAlike as error:
            reasons[group.id] = str(error)
    return matches, reasons


def shape_of(group: Group) -> GroupShape:
    """What tells a group from others at the same sites: heads, and the channels of these heads."""
    return group.role == "head", group.blocks, group.size


def match_group(
    group: Group, shared: Sequence[tuple[Site, str]], places: Mapping[tuple[str, int, GroupShape], GroupPlace]
) -> GroupMatch:
    """The companion's group at the ``shared`` sites, each with the constant's name there. Raises NotAlike."""
    found: Group | None = None
    units = np.full(group.blocks * group.size, -1, np.int64)
    for site, name in shared:
        place = places.get((name, site.axis, shape_of(group)))
        if place is None or (found is not None and place[0].id != found.id):
            raise NotAlike(f"other units belong together at {name}")
        found, theirs = place
        if found.pins:
            raise NotAlike(found.pins[0].reason)
        inside = site.units >= 0
        if not np.array_equal(inside, theirs >= 0):
            raise NotAlike(f"other positions of {name} are cut")
        own = site.units[inside]
        units[own[units[own] < 0]] = theirs[inside][units[own] < 0]
        if not np.array_equal(units[own], theirs[inside]):
            raise NotAlike(f"other units belong together at {name}")
    assert found is not None
    check_same_blocks(group, found, units)
    return GroupMatch(found, units)


def check_same_blocks(group: Group, found: Group, units: IntArray) -> None:
    """Raises NotAlike where units are missing, or those of a block lie in several blocks of the companion."""
    blocks = units.reshape(group.blocks, group.size) // found.size
    if len(np.unique(units)) != len(units) or (units < 0).any() or (blocks != blocks[:, :1]).any():
        raise NotAlike("its units are grouped in another way")


def restrict_groups(groups: Sequence[Group], reasons: Mapping[str, str], companion: str) -> tuple[Group, ...]:
    """The groups, with a pin for each that ``companion`` cannot cut alike, and for those tied to it."""
    ties = {group.tie for group in groups if group.id in reasons and group.tie}
    restricted = []
    for group in groups:
        if group.pins or not group.sites or not (group.id in reasons or group.tie in ties):
            restricted.append(group)
            continue
        site = group.sites[0]
        reason = f"{companion} cannot be cut alike: {reasons.get(group.id, 'a group of the same width cannot')}"
        pin = Pin(site.tensor, site.axis, len(site.units), reason, companion)
        restricted.append(replace(group, pins=(pin,)))
    return tuple(restricted)
