"""Tied widths: groups of one tie, such as keys and values of a fused node, keep equally many channels per head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snpc.errors import UserError
from snpc.planning.config import Budget, allowed_widths
from snpc.types import Group, Role


def tied_sets(groups: Sequence[Group]) -> list[tuple[Group, ...]]:
    """The groups of one tie together, every other group alone; in the order of the first of each."""
    sets: dict[str, list[Group]] = {}
    for group in groups:
        sets.setdefault(f"tie {group.tie}" if group.tie else f"group {group.id}", []).append(group)
    return [tuple(members) for members in sets.values()]


def common_widths(members: Sequence[Group], budget: Budget) -> list[tuple[int, ...]]:
    """The widths that the groups of a tie may have together, widest first: units per block of each group."""
    first, *others = ({w * g.channels for w in allowed_widths(g, budget)} for g in members)
    channels = sorted(first.intersection(*others), reverse=True)
    return [tuple(count // g.channels for g in members) for count in channels]


def smallest_widths(groups: Sequence[Group], budget: Budget) -> dict[str, int]:
    """Group id -> the smallest width that the budget and the ties allow."""
    return {
        group.id: width
        for members in tied_sets(groups)
        for group, width in zip(members, common_widths(members, budget)[-1], strict=True)
    }


def groups_ranked_together(groups: Sequence[Group], roles: Sequence[Role]) -> list[list[Group]]:
    """The groups by role, in the order of ``roles``; roles between which there is a tie are one."""
    named: dict[Role, Role] = {}
    for members in tied_sets(groups):
        present = [role for role in roles if role in {g.role for g in members}]
        for role in present[1:]:
            named[role] = named.get(present[0], present[0])
    return [[g for g in groups if named.get(g.role, g.role) == role] for role in roles if named.get(role, role) == role]


def check_ties_are_whole(selected: Sequence[Group], groups: Sequence[Group], name: str) -> None:
    """Raise UserError where a budget selects some ``groups`` of a tie and not the others."""
    chosen = {g.id for g in selected}
    for members in tied_sets([g for g in groups if g.tie and g.prunable]):
        out = [g for g in members if g.id not in chosen]
        if out and len(out) < len(members):
            one = next(g for g in members if g.id in chosen)
            raise UserError(
                f"{name}: {one.id} ({one.role}) is as wide as {out[0].id} ({out[0].role}), as one node reads both and "
                "takes one head size: give --roles with both roles, and --include and --exclude that match both or none"
            )


def check_kept_widths(kept: Mapping[str, int], groups: Sequence[Group], name: str) -> None:
    """Raise UserError where a plan keeps widths that the kernels of the model do not take. ``kept``: group id -> units
    per block, of the groups that are cut."""
    for members in tied_sets(groups):
        widths = [kept.get(g.id, g.size) for g in members]
        for group, width in zip(members, widths, strict=True):
            if width < group.least:
                raise UserError(
                    f"{name}: {group.id} keeps {width} experts, but the router chooses {group.least} for each token"
                )
            if width % group.step and width != group.size:
                raise UserError(
                    f"{name}: {group.id} keeps {width} units of each block, but the kernel takes multiples of "
                    f"{group.step}"
                )
        channels = [width * g.channels for g, width in zip(members, widths, strict=True)]
        other = next((k for k, count in enumerate(channels) if count != channels[0]), None)
        if other is not None:
            raise UserError(
                f"{name}: {members[0].id} keeps {channels[0]} channels per head and {members[other].id} "
                f"{channels[other]}, but one node reads both and takes one head size; keep equally many"
            )
