"""What the user asks for: how much is to go, from where, and what widths are allowed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from snpc.errors import UserError
from snpc.types import ROLES, Group, Role

DEFAULT_ROLES: tuple[Role, ...] = ("qk", "vo", "ffn")
Allocator = Literal["loss", "dimap"]
TargetKind = Literal["macs", "params", "bytes", "latency"]


@dataclass(frozen=True)
class ResourceTarget:
    """``kind`` is to come down to ``share`` of the dense model's: MACs, parameters, bytes of the weights, or the time
    of a run; that may be given in ``ms`` instead."""

    kind: TargetKind
    share: float
    ms: float | None = None

    def milliseconds(self, dense: float) -> float:
        """The latency to reach, where the dense model takes ``dense`` ms."""
        return self.ms if self.ms is not None else self.share * dense


def is_latency_target(target: str | None) -> bool:
    return target is not None and parse_target(target).kind == "latency"


def parse_target(text: str) -> ResourceTarget:
    """``macs=0.6``, ``params=0.6``, ``bytes=0.6``, ``latency=0.6`` or ``latency=12ms``."""
    kind, _, number = text.partition("=")
    absolute = kind == "latency" and number.endswith("ms")
    try:
        share = float(number.removesuffix("ms") if absolute else number)
    except ValueError:
        share = -1.0
    if kind not in get_args(TargetKind) or not 0 < share <= (1e9 if absolute else 1):
        raise UserError(
            f"target {text!r}: must look like macs=0.6, params=0.6, bytes=0.6 or latency=0.6, a share of the dense "
            "model in (0, 1], or like latency=12ms"
        )
    return ResourceTarget(kind, 1.0, share) if absolute else ResourceTarget(kind, share)  # type: ignore[arg-type]


def parse_max_ratios(text: str) -> dict[str, float]:
    """``0.5`` for every role, or ``ffn=0.5,vo=0.3``: role -> the largest share of a group's units that may go."""
    found: dict[str, float] = {}
    for part in text.split(","):
        role, equals, number = part.strip().rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        known = role in ROLES if equals else not found and part == text
        if not known or not 0 <= share < 1:
            raise UserError(f"--max-ratio {text!r}: must look like 0.5 or ffn=0.5,vo=0.3, shares of units in [0, 1)")
        found |= {role: share} if equals else dict.fromkeys(ROLES, share)
    return found


@dataclass(frozen=True)
class Budget:
    """What to cut. ``ratio``: fraction of the units of every role in ``roles`` that goes, in [0, 1); or ``target``:
    the share of the MACs, parameters, bytes or latency to come down to ("macs=0.6"), taken from all roles where it
    costs least; or ``max_drift``: as much as keeps the outputs within this root mean square change, relative, of the
    dense model's (the largest of the outputs' on the samples that verification compares).

    ``uniform`` takes the same share of every group; otherwise units are ranked across groups by the loss they bring
    (for a ratio: across those of a role, by score relative to their group's mean where no loss is known).
    Widths are multiples of ``round_to`` and at least ``min_width`` (where the group has that many); no group loses more
    than ``max_ratio`` ("0.5", or by role "ffn=0.5,vo=0.3"). ``include``/``exclude``: regular expressions searched in
    group ids. ``allocator`` "dimap": how much of each group goes is read off its weights alone, one threshold per role
    on the relative energy of units (``passes.energy``).
    """

    ratio: float | None = None
    roles: tuple[Role, ...] = DEFAULT_ROLES
    target: str | None = None
    uniform: bool = False
    round_to: int = 1
    min_width: int = 1
    include: str | None = None
    exclude: str | None = None
    max_ratio: str | None = None
    max_drift: float | None = None
    allocator: Allocator = "loss"

    def __post_init__(self) -> None:
        if [self.ratio, self.target, self.max_drift].count(None) != 2:
            raise UserError(
                "give either --ratio R or --target macs=R (or params=R, bytes=R, latency=R) or --max-drift X, one "
                "of the three"
            )
        if self.target is not None:
            parse_target(self.target)
        by_time = self.target is not None and parse_target(self.target).kind == "latency"
        if self.allocator == "dimap" and (self.uniform or self.max_drift is not None or by_time):
            raise UserError(
                "--allocator dimap sets widths by weights alone: give --ratio, or --target macs=R, params=R or "
                "bytes=R, without --uniform"
            )
        if self.max_drift is not None and not 0 < self.max_drift < math.inf:
            raise UserError(
                f"--max-drift {self.max_drift:g} is not above 0: it is a relative change of the outputs, such as 0.1"
            )
        if self.ratio is None and "head" in self.roles:
            raise UserError("--target and --max-drift choose widths themselves: leave out the role head")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UserError(
                f"ratio {self.ratio:g} is not in [0, 1): it is the fraction of units to remove, such as 0.5"
            )
        if self.round_to < 1 or self.min_width < 1:
            raise UserError("--round-to and --min-width must be at least 1")
        unknown = [r for r in self.roles if r not in ROLES]
        if unknown or not self.roles:
            raise UserError(
                f"unknown role {', '.join(map(repr, unknown)) or '(none given)'}: choose from {', '.join(ROLES)}"
            )
        if self.max_ratio is not None:
            parse_max_ratios(self.max_ratio)
        for pattern in (self.include, self.exclude):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression ({error})") from None


def minimum_width(group: Group, choice: Budget) -> int:
    """The least width the options allow."""
    cap = parse_max_ratios(choice.max_ratio).get(group.role, 1.0) if choice.max_ratio is not None else 1.0
    capped = math.ceil(group.size * (1 - cap) - 1e-9)
    return min(group.size, max(choice.min_width, choice.round_to, capped))


def allowed_widths(group: Group, choice: Budget) -> list[int]:
    """Widths a group may have, descending; its own width first."""
    least = minimum_width(group, choice)
    multiples = range(group.size - group.size % choice.round_to, 0, -choice.round_to)
    return [group.size, *(w for w in multiples if least <= w < group.size)]


def is_latency_budget(choice: Budget) -> bool:
    return is_latency_target(choice.target)
