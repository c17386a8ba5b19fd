"""What is said before the long part: what goes, and whether that is thought safe."""

from __future__ import annotations

from collections.abc import Mapping

from snpc.cli.advice.commands import AMOUNT_FLAGS, WIDTH_FLAGS, safe_command
from snpc.cli.arguments import PlanningArguments, TypedCommand
from snpc.cli.tables import is_quiet, print_step, print_warning
from snpc.passes import Analysis
from snpc.pipeline import PlanRequest, PruningPlan, effort_costs, plain_pass_seconds
from snpc.planning import Effort, PlanOutlook
from snpc.report import format_share
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import Execution
from snpc.tokens import offer_tokens, reduction_obstacle
from snpc.types import Role

DESTRUCTIVE_SHARE = 0.15  # of the units: from here on selection by magnitude usually destroys a model
LONG_RUN_SECONDS = 10.0  # from which on a run's cost is said before it begins


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
        fewer = typed.without(*AMOUNT_FLAGS, *WIDTH_FLAGS, "--dry-run").plus("--tokens", offer.spec)
        way = "merge" if offer.merges else "drop"
        instead = f", or {way} tokens, which takes {format_share(offer.saved, 1)} of the MACs: {fewer.text()}"
    print_warning(
        f"no calibration data: {removed_text(outlook.removed)} go by the size of their weights and nothing makes up "
        f"for them, which {cost}. Give --calib FOLDER_OR_NPZ (unlabelled inputs){instead}"
    )


def announce_cost(
    analysis: Analysis,
    calibration: Calibration | None,
    planning: PlanningArguments,
    request: PlanRequest | None,
    execution: Execution,
    writes: bool,
) -> None:
    """One line that says what each effort is to cost. Nothing where the run is short, as it is without calibration
    data, and where the model cannot be timed: what runs it next says why."""
    if calibration is None or request is None or is_quiet():
        return
    costs = effort_costs(analysis, calibration, request, planning.reduction.tokens, writes=writes)
    if request.effort not in costs:  # the planner says why it is not at hand
        return
    seconds = plain_pass_seconds(analysis, calibration, execution)
    if seconds is not None and costs[request.effort] * seconds >= LONG_RUN_SECONDS:
        print_step(cost_text(costs, request.effort, calibration, seconds))


def cost_text(costs: Mapping[Effort, float], effort: Effort, calibration: Calibration, seconds: float) -> str:
    """``seconds``: of a plain pass."""
    passes = f"about {costs[effort]:.1f} plain passes of {calibration.samples} samples"
    others = ", ".join(f"{name} {seconds_text(cost * seconds)}" for name, cost in costs.items() if name != effort)
    return f"effort {effort}: {passes}, {seconds_text(costs[effort] * seconds)}" + (f" ({others})" if others else "")


def seconds_text(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def announce_plan(plan: PruningPlan, typed: TypedCommand) -> None:
    """One line that says what goes, before anything is refitted or written; a warning where it is a cliff."""
    outlook = plan.outlook
    parts, removal = [f"tokens: {tokens_text(plan)}"], plan.analysis.removal
    if removal is not None:
        parts.append(f"layers: {', '.join(removal.names)} go")
    if outlook is not None:
        drift = (
            f", predicted drift {outlook.drift:.2g} (thought safe up to {outlook.limit:.2g})" if outlook.drift else ""
        )
        parts.append(f"widths: {removed_text(outlook.removed)} go{drift}")
    print_step("plan: " + "; ".join(parts))
    if outlook is not None and outlook.is_cliff and plan.calibration is not None:
        print_warning(cliff_text(plan, outlook, typed))


def tokens_text(plan: PruningPlan) -> str:
    """How tokens get fewer, or why they do not."""
    analysis = plan.analysis
    if analysis.reduction is not None:
        return analysis.reduction.summary
    return "all stay" + (reduction_obstacle(analysis) if not analysis.tokens.points else "")


def removed_text(removed: Mapping[Role, float]) -> str:
    return ", ".join(f"{format_share(share, 1)} of {role}" for role, share in removed.items()) or "no units"


def cliff_text(plan: PruningPlan, outlook: PlanOutlook, typed: TypedCommand) -> str:
    """What is asked for, what is thought safe, and the command for that."""
    much = f"{format_share(outlook.saved_share, 1)} of what these widths can give"
    if not outlook.exceeds_curves:
        return f"this takes {much}, and nothing was measured that says what it does to the outputs"
    drift = f"the loss curves predict a drift of {outlook.drift:.2g}, where {outlook.limit:.2g} is thought safe"
    if outlook.safe is None:
        return f"this takes {much}; {drift}; no smaller cut is thought safe"
    return (
        f"this takes {much}; {drift}. Thought safe down to {outlook.safe}: {safe_command(plan, outlook, typed).text()}"
    )
