"""Budgets: how much to cut, of which groups, and the widths that are allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from snpc.errors import UserError
from snpc.types import ROLES, Group, Role

DEFAULT_ROLES: tuple[Role, ...] = ("qk", "vo", "ffn")
Allocator = Literal["loss", "dimap"]
TargetKind = Literal["macs", "params", "bytes", "latency"]
Effort = Literal["quick", "normal", "search"]
"""What a plan may cost. "quick": widths come from the closed-form losses alone, and no trial runs the model. "normal":
loss curves are measured by trials. "search": moves of units between groups are tried from the normal plan on."""


@dataclass(frozen=True)
class ResourceTarget:
    """The ``share`` of the dense model's MACs, parameters, weight bytes or latency that is left, in (0, 1].

    A latency may be given in ``ms`` instead; then ``share`` is 1.
    """

    kind: TargetKind
    share: float
    ms: float | None = None

    def __str__(self) -> str:
        return f"{self.kind}={self.share:.12g}" if self.ms is None else f"{self.kind}={self.ms:.12g}ms"

    def milliseconds(self, dense: float) -> float:
        """The latency to reach in ms, if the dense model takes ``dense`` ms."""
        return self.ms if self.ms is not None else self.share * dense


def parse_target(text: str) -> ResourceTarget:
    """``macs=0.6``, ``params=0.6``, ``bytes=0.6``, ``latency=0.6`` or ``latency=12ms``.

    Raises UserError for any other text.
    """
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


@dataclass(frozen=True)
class PerplexityLimit:
    """The largest perplexity of a language model: ``value`` itself, or so many times the dense model's where
    ``relative``. Raises UserError where it allows no loss."""

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not 1 < self.value < math.inf:
            raise UserError(
                f"--max-ppl {self}: is not above 1: it is a perplexity such as 25, or a factor on the dense model's "
                "such as 1.1x"
            )

    def __str__(self) -> str:
        return f"{self.value:.12g}{'x' if self.relative else ''}"

    def factor(self, dense: float) -> float:
        """The limit as a multiple of the dense model's perplexity."""
        return self.value if self.relative else self.value / dense


def parse_perplexity_limit(text: str) -> PerplexityLimit:
    """``1.1x``: a factor on the dense model's perplexity; ``25``: a perplexity. Raises UserError for any other text."""
    number = text.strip()
    try:
        value = float(number.removesuffix("x"))
    except ValueError:
        raise UserError(
            f"--max-ppl {text!r}: must look like 1.1x, a factor on the dense model's perplexity, or like 25"
        ) from None
    return PerplexityLimit(value, number.endswith("x"))


def parse_max_ratios(text: str) -> dict[str, float]:
    """``0.5`` for every role, or ``ffn=0.5,vo=0.3``: role -> the largest fraction of a group's units to remove.

    Raises UserError for any other text.
    """
    ratios: dict[str, float] = {}
    for part in text.split(","):
        role, equals, number = part.strip().rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        known = role in ROLES if equals else not ratios and part == text
        if not known or not 0 <= share < 1:
            raise UserError(f"--max-ratio {text!r}: must look like 0.5 or ffn=0.5,vo=0.3, shares of units in [0, 1)")
        ratios |= {role: share} if equals else dict.fromkeys(ROLES, share)
    return ratios


@dataclass(frozen=True)
class Budget:
    """How much to cut, and where.

    One of five says how much. ``ratio``: the fraction of the units of every role that is removed, in [0, 1).
    ``target``: the share of the dense model's MACs, parameters, bytes or latency that is left, cut first where the
    predicted loss is smallest. ``max_drift``: the largest relative root mean square change of an output; as much is cut
    as stays within it. ``max_ppl``: the same for the perplexity of a language model. ``max_drop``: the same for the
    points (1: one in a hundred) by which the score on labels falls.

    ``roles``, ``include`` and ``exclude`` (regular expressions searched in group ids) choose the groups. Widths are
    multiples of ``round_to`` and at least ``min_width``, where the group has as many units. ``head_sizes``: channels
    per head that kernels of fused nodes with caches run fast; narrower heads there are of these, if there is a narrower
    one. ``max_ratio``: role -> the largest fraction of a group's units that is removed. ``uniform`` removes the same
    fraction of every group; otherwise units are ranked across groups by the loss that their removal causes.

    ``allocator`` "dimap" derives the widths from the weights alone (``planning.dimap``).

    ``target``, ``max_ratio`` and ``max_ppl`` may be given as text ("macs=0.6", "latency=12ms"; "0.5", "ffn=0.5,vo=0.3";
    "1.1x", "25"); they are parsed here, and never again. ``max_ppl`` as a number is a perplexity. Raises UserError for
    contradictory or malformed values.
    """

    ratio: float | None = None
    roles: tuple[Role, ...] = DEFAULT_ROLES
    target: ResourceTarget | None = None
    uniform: bool = False
    round_to: int = 1
    min_width: int = 1
    include: str | None = None
    exclude: str | None = None
    max_ratio: Mapping[str, float] | None = None
    max_drift: float | None = None
    allocator: Allocator = "loss"
    max_ppl: PerplexityLimit | None = None
    head_sizes: tuple[int, ...] | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if [self.ratio, self.target, self.max_drift, self.max_ppl, self.max_drop].count(None) != 4:
            raise UserError(
                "give either --ratio R or --target macs=R (or params=R, bytes=R, latency=R) or --max-drift X or "
                "--max-ppl X or --max-drop POINTS, one of the five"
            )
        if self.max_drop is not None and not 0 < self.max_drop < 100:
            raise UserError(
                f"--max-drop {self.max_drop:g} is not above 0 and below 100: it is in points of the score, such as 1.0"
            )
        if isinstance(self.max_ppl, str | int | float):
            object.__setattr__(self, "max_ppl", parse_perplexity_limit(str(self.max_ppl)))
        if isinstance(self.target, str):
            object.__setattr__(self, "target", parse_target(self.target))
        if isinstance(self.max_ratio, str):
            object.__setattr__(self, "max_ratio", parse_max_ratios(self.max_ratio))
        if self.target is not None and self.target.ms is None and not 0 < self.target.share <= 1:
            raise UserError(f"target {self.target}: is not a share of the dense model, in (0, 1]")
        if self.allocator == "dimap" and (self.uniform or self.limits_quality or self.is_latency):
            raise UserError(
                "--allocator dimap sets widths by weights alone: give --ratio, or --target macs=R, params=R or "
                "bytes=R, without --uniform"
            )
        if self.max_drift is not None and not 0 < self.max_drift < math.inf:
            raise UserError(
                f"--max-drift {self.max_drift:g} is not above 0: it is a relative change of the outputs, such as 0.1"
            )
        if self.ratio is None and "experts" in self.roles:
            raise UserError(
                "--target and limits of quality rank by measured losses, and none is measured of whole experts: "
                "give --ratio, or leave out the role experts"
            )
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
        for pattern in (self.include, self.exclude):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression ({error})") from None

    @property
    def limits_quality(self) -> bool:
        """Is as much to be cut as a drift, a perplexity or a score allows, which has to be measured?"""
        return self.quality_flag != ""

    @property
    def quality_flag(self) -> str:
        """The option that limits the quality; "" without one."""
        limits = {"--max-drift": self.max_drift, "--max-ppl": self.max_ppl, "--max-drop": self.max_drop}
        return next((flag for flag, value in limits.items() if value is not None), "")

    @property
    def is_latency(self) -> bool:
        """Is the target a latency, which has to be measured?"""
        return self.target is not None and self.target.kind == "latency"

    def to_options(self) -> dict[str, Any]:
        """The options that are set, as plan files and reports write them: targets and ratios as text."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.target is not None:
            options["target"] = str(self.target)
        if self.max_ppl is not None:
            options["max_ppl"] = str(self.max_ppl)
        if self.max_ratio is not None:
            options["max_ratio"] = max_ratios_text(self.max_ratio)
        return options


def max_ratios_text(ratios: Mapping[str, float]) -> str:
    """Text that ``parse_max_ratios`` reads back."""
    if set(ratios) == set(ROLES) and len(set(ratios.values())) == 1:
        return f"{next(iter(ratios.values())):.12g}"
    return ",".join(f"{role}={ratio:.12g}" for role, ratio in ratios.items())


def minimum_width(group: Group, budget: Budget) -> int:
    """The smallest width that the budget allows."""
    cap = budget.max_ratio.get(group.role, 1.0) if budget.max_ratio is not None else 1.0
    capped = math.ceil(group.size * (1 - cap) - 1e-9)
    wanted = math.ceil(max(budget.min_width, budget.round_to) / group.channels) if counts_channels(group) else 1
    return min(group.size, max(wanted, capped, group.least))


def counts_channels(group: Group) -> bool:
    """Whether the units of a group are channels, which widths of kernels are about; experts are none."""
    return group.role != "experts"


def allowed_widths(group: Group, budget: Budget) -> list[int]:
    """Widths that a group may have, descending; its full width first. ``round_to`` and ``min_width`` count channels, of
    which a unit may stand for several."""
    minimum = minimum_width(group, budget)
    round_to = budget.round_to if counts_channels(group) else 1
    step = math.lcm(group.step, round_to // math.gcd(round_to, group.channels))
    multiples = range(group.size - group.size % step, 0, -step)
    widths = [w for w in multiples if minimum <= w < group.size]
    fast = [w for w in widths if group.tie and w * group.channels in (budget.head_sizes or ())]
    return [group.size, *(fast or widths)]
