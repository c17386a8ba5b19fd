"""Advice: what a request is likely to do, said before it is done, and commands to try next."""

from __future__ import annotations

from collections.abc import Mapping

from snpc.cli.arguments import TypedCommand
from snpc.cli.tables import print_line, print_note, print_step, print_warning
from snpc.passes import Analysis, macs_by_role
from snpc.pipeline import PrunedModel, PruningPlan
from snpc.planning import DEFAULT_ROLES, PlanOutlook
from snpc.report import format_share
from snpc.tokens import offer_tokens, reduction_obstacle
from snpc.types import Role

DATA_WORD = "DATA"  # stands for the calibration data in commands to try
DATA_MEANING = f"{DATA_WORD}: unlabelled inputs, a folder of pictures or an .npz by input name"
AMOUNT_FLAGS = ("--ratio", "--target", "--max-drift")
DESTRUCTIVE_SHARE = 0.15  # of the units: from here on selection by magnitude usually destroys a model
TRIED_TARGET, TRIED_SHARE = 0.5, 0.35  # what is left of MACs where tokens can go; of what widths can save, what goes
HINTED_SHARE = 0.2  # of the MACs: a role off by default that holds so much is worth a word


# -- inspect ---------------------------------------------------------------------------------------------------------


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
    with_data = prune if prune.has("--calib", "--calibration-data") else prune.plus("--calib", DATA_WORD)
    tried: list[tuple[TypedCommand, str]] = []
    if offer is not None:
        without = prune.without("--calib", "--calibration-data")
        why = f"{format_share(offer.saved, 1)} of the MACs go by merging tokens, without data"
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
    groups = "1 conv group holds" if count == 1 else f"{count} conv groups hold"
    share = format_share(macs, analysis.cost.macs)
    return (
        f"{groups} {share} of the MACs and stays as it is by default: add --roles {','.join((*DEFAULT_ROLES, 'conv'))}"
    )


# -- before the long part --------------------------------------------------------------------------------------------


def warn_without_data(plan: PruningPlan, typed: TypedCommand) -> None:
    """That units are chosen by weights alone, what that usually does, and what to give instead."""
    outlook = plan.outlook
    if outlook is None or not any(outlook.removed.values()):
        return
    most = max(outlook.removed.values())
    cost = "usually destroys accuracy" if most >= DESTRUCTIVE_SHARE else "costs accuracy"
    offer = offer_tokens(plan.analysis)
    instead = ""
    if offer is not None:
        merging = typed.without(*AMOUNT_FLAGS, *WIDTH_FLAGS).plus("--tokens", offer.spec)
        instead = f", or merge tokens, which takes {format_share(offer.saved, 1)} of the MACs: {merging.text()}"
    print_warning(
        f"no calibration data: {removed_text(outlook.removed)} go by the size of their weights and nothing makes up "
        f"for them, which {cost}. Give --calib FOLDER_OR_NPZ (unlabelled inputs){instead}"
    )


WIDTH_FLAGS = (
    "--roles", "--include", "--exclude", "--method", "--criterion", "--max-ratio", "--uniform", "--allocator",
    "--align", "--round-to", "--min-width",
)  # fmt: skip


def announce_plan(plan: PruningPlan, typed: TypedCommand) -> None:
    """One line that says what goes, before anything is refitted or written; a warning where it is a cliff."""
    outlook = plan.outlook
    parts = [f"tokens: {tokens_text(plan)}"]
    if outlook is not None:
        drift = (
            f", predicted drift {outlook.drift:.2g} (thought safe up to {outlook.limit:.2g})" if outlook.drift else ""
        )
        parts.append(f"widths: {removed_text(outlook.removed)} go{drift}")
    print_step("plan: " + "; ".join(parts))
    if outlook is not None and outlook.is_cliff and plan.calibration is not None:
        print_warning(cliff_text(outlook, typed))


def tokens_text(plan: PruningPlan) -> str:
    """How tokens get fewer, or why they do not."""
    analysis = plan.analysis
    if analysis.reduction is not None:
        steps = analysis.reduction.to_json()["steps"]
        return f"{steps[0]['tokens']} to {steps[-1]['after']} by {analysis.reduction.spec}"
    return "all stay" + (reduction_obstacle(analysis) if not analysis.tokens.points else "")


def removed_text(removed: Mapping[Role, float]) -> str:
    return ", ".join(f"{format_share(share, 1)} of {role}" for role, share in removed.items()) or "no units"


def cliff_text(outlook: PlanOutlook, typed: TypedCommand) -> str:
    """What is asked for, what is thought safe, and the command for that."""
    much = f"{format_share(outlook.saved_share, 1)} of what these widths can give"
    if not outlook.exceeds_curves:
        return f"this takes {much}, and nothing was measured that says what it does to the outputs"
    drift = f"the loss curves predict a drift of {outlook.drift:.2g}, where {outlook.limit:.2g} is thought safe"
    if outlook.safe is None:
        return f"this takes {much}; {drift}; no smaller cut is thought safe"
    return f"this takes {much}; {drift}. Thought safe down to {outlook.safe}: {safe_command(outlook, typed).text()}"


def safe_command(outlook: PlanOutlook, typed: TypedCommand) -> TypedCommand:
    return typed.without(*AMOUNT_FLAGS).plus("--target", str(outlook.safe))


# -- afterwards ------------------------------------------------------------------------------------------------------


def print_loss_first(result: PrunedModel, plan: PruningPlan, typed: TypedCommand) -> None:
    """The first line of a result whose outputs no longer resemble the original's: what was lost, and what keeps it."""
    if result.quality.grade != "poor":
        return
    worst = max(result.quality.differences, key=lambda d: d.drift)
    same = f", the same top entry in {100 * worst.agreement:.1f} %" if worst.agreement is not None else ""
    print_warning(
        f"the outputs no longer resemble the original's: drift {worst.drift:.2g} in {worst.output}{same} "
        f"({result.quality.source}). {kept_by(result, plan, typed)}",
        err=False,
    )


def kept_by(result: PrunedModel, plan: PruningPlan, typed: TypedCommand) -> str:
    outlook = plan.outlook
    if outlook is not None and outlook.safe is not None:
        return f"By the loss curves {outlook.safe} keeps them: {safe_command(outlook, typed).text()}"
    if not result.calibration:
        return "Give --calib, cut less, or finetune the result (snpc finetune)"
    return "Cut less, or finetune the result (snpc finetune)"


def print_better_command(result: PrunedModel, typed: TypedCommand) -> None:
    """Where --ratio did damage: the command that comes to the same MACs by what costs least."""
    grade = result.quality.grade
    if grade not in ("fair", "poor") or not typed.has("--ratio") or not typed.has("--calib", "--calibration-data"):
        return
    share = max(result.after.macs / result.before.macs, 0.01)
    better = typed.without(*AMOUNT_FLAGS, "--uniform", "--dry-run").plus("--target", f"macs={share:.2f}")
    print_note(f"the same MACs at less loss, taken where they cost least: {better.text()}")


def print_next(command: TypedCommand | str) -> None:
    """The command that usually follows, on stderr."""
    print_step(f"next: {command if isinstance(command, str) else command.text()}")
