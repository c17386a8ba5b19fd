"""Commands to try on a model."""

from __future__ import annotations

from snpc.cli.advice.commands import CALIBRATION_FLAGS
from snpc.cli.arguments import TypedCommand
from snpc.cli.tables import print_line
from snpc.passes import Analysis, macs_by_role
from snpc.planning import DEFAULT_ROLES
from snpc.report import format_share
from snpc.tokens import offer_tokens
from snpc.types import Role

DATA_WORD = "DATA"  # stands for the calibration data in commands to try
DATA_MEANING = f"{DATA_WORD}: unlabelled inputs, a folder of pictures or an .npz by input name"
TRIED_TARGET, TRIED_SHARE = 0.5, 0.35  # what is left of MACs where tokens can go; of what widths can save, what goes
HINTED_SHARE = 0.2  # of the MACs: a role off by default that holds so much is worth a word


def print_commands_to_try(analysis: Analysis, typed: TypedCommand) -> None:
    """The best commands for this model."""
    hint = role_hint(analysis)
    if hint:
        print_line(hint)
    lines = commands_to_try(analysis, typed.of("prune", drop=("--json", "--dump-after")))
    for command, why in lines:
        print_line(f"Try: {command.text()}  # {why}")
    if any(DATA_WORD in option for command, _ in lines for option in command.options):
        print_line(f"     {DATA_MEANING}")


def commands_to_try(analysis: Analysis, prune: TypedCommand) -> list[tuple[TypedCommand, str]]:
    """(command, why), the best first. ``prune``: the model, and the options that say how it is read."""
    offer, roles = offer_tokens(analysis), roles_to_try(analysis)
    with_data = prune if prune.has(*CALIBRATION_FLAGS) else prune.plus("--calib", DATA_WORD)
    tried: list[tuple[TypedCommand, str]] = []
    if offer is not None:
        without = prune.without(*CALIBRATION_FLAGS)
        way = "merging tokens" if offer.merges else "dropping tokens that get little attention"
        why = f"{format_share(offer.saved, 1)} of the MACs go by {way}, without data"
        tried.append((without.plus("--tokens", offer.spec), why))
    if roles:
        share = TRIED_TARGET if offer is not None else share_to_try(analysis, roles)
        chosen = with_data if set(roles) <= set(DEFAULT_ROLES) else with_data.plus("--roles", ",".join(roles))
        why = "tokens and widths, by what they change" if offer is not None else "widths, by what they change"
        tried.append((chosen.plus("--target", f"macs={share:g}"), why))
    return tried


def roles_to_try(analysis: Analysis) -> tuple[Role, ...]:
    """The roles by default, and ``conv`` where it holds much; empty where nothing of them can be cut."""
    shares = prunable_macs(analysis)
    return tuple(r for r in (*DEFAULT_ROLES, "conv") if shares.get(r, 0) > (HINTED_SHARE if r == "conv" else 0))


def share_to_try(analysis: Analysis, roles: tuple[Role, ...]) -> float:
    """A share of the MACs that takes less than half of what these roles can give."""
    shares = prunable_macs(analysis)
    free = analysis.dead_macs / max(analysis.cost.macs, 1)
    return max(round(1 - free - TRIED_SHARE * sum(shares[r] for r in roles), 2), 0.05)


def prunable_macs(analysis: Analysis) -> dict[Role, float]:
    """Role -> share of the MACs that its prunable groups can save, by what the planner counts."""
    shares: dict[Role, float] = {}
    for group in analysis.groups:
        if group.prunable and group.size > 1 and not group.approximate:
            part = group.macs * (1 - 1 / group.size) / max(analysis.cost.macs, 1)
            shares[group.role] = shares.get(group.role, 0.0) + part
    return shares


def role_hint(analysis: Analysis) -> str:
    """That convolutions, which are off by default, hold much of the MACs; "" where they do not."""
    count = sum(g.role == "conv" and g.prunable for g in analysis.groups)
    macs = macs_by_role(analysis).get("conv", 0) if count else 0
    if macs < HINTED_SHARE * max(analysis.cost.macs, 1):
        return ""
    share = f"{format_share(macs, analysis.cost.macs)} of the MACs"
    held = (
        f"1 conv group holds {share} and stays as it is"
        if count == 1
        else (f"{count} conv groups hold {share} and stay as they are")
    )
    return f"{held} by default: add --roles {','.join((*DEFAULT_ROLES, 'conv'))}"
