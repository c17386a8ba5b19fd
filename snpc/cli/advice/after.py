"""What is said of a result that lost much, and what follows any command."""

from __future__ import annotations

from snpc.cli.advice.commands import AMOUNT_FLAGS, CALIBRATION_FLAGS, safe_command
from snpc.cli.arguments import TypedCommand
from snpc.cli.tables import print_note, print_step, print_warning
from snpc.pipeline import PrunedModel, PruningPlan


def print_loss_first(result: PrunedModel, plan: PruningPlan, typed: TypedCommand) -> None:
    """The first line of a result whose outputs no longer resemble the original's: what was lost, and what keeps it."""
    if result.quality.grade != "poor":
        return
    worst = max(result.quality.differences, key=lambda d: d.drift)
    same = (
        f", the same top entry in {100 * worst.agreement:.1f} %"
        if worst.agreement is not None and worst.metric == "kl"
        else ""
    )
    print_warning(
        f"the outputs no longer resemble the original's: drift {worst.drift:.2g} in {worst.output}{same} "
        f"({result.quality.source}). {kept_by(result, plan, typed)}",
        err=False,
    )


def kept_by(result: PrunedModel, plan: PruningPlan, typed: TypedCommand) -> str:
    outlook = plan.outlook
    if outlook is not None and outlook.safe is not None:
        return f"By the loss curves {outlook.safe} keeps them: {safe_command(plan, outlook, typed).text()}"
    if not result.calibration:
        return "Give --calib, cut less, or finetune the result (snpc finetune)"
    return "Cut less, or finetune the result (snpc finetune)"


def print_better_command(result: PrunedModel, typed: TypedCommand) -> None:
    """Where --ratio did damage: the command that comes to the same MACs by what costs least."""
    grade = result.quality.grade
    if grade not in ("fair", "poor") or not typed.has("--ratio") or not typed.has(*CALIBRATION_FLAGS):
        return
    share = max(result.after.macs / result.before.macs, 0.01)
    better = typed.without(*AMOUNT_FLAGS, "--uniform", "--dry-run").plus("--target", f"macs={share:.2f}")
    print_note(f"the same MACs at less loss, taken where they cost least: {better.text()}")


def print_next(command: TypedCommand | str) -> None:
    """The command that usually follows, on stderr."""
    print_step(f"next: {command if isinstance(command, str) else command.text()}")
