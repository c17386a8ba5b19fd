"""Commands with another amount to cut."""

from __future__ import annotations

from snpc.cli.arguments import TypedCommand
from snpc.pipeline import PruningPlan
from snpc.planning import PlanOutlook

CALIBRATION_FLAGS = ("--calib", "--calibration-data")
AMOUNT_FLAGS = ("--ratio", "--target", "--max-drift", "--max-ppl")
WIDTH_FLAGS = (
    "--roles", "--include", "--exclude", "--method", "--criterion", "--max-ratio", "--uniform", "--allocator",
    "--align", "--round-to", "--min-width",
)  # fmt: skip


def safe_command(plan: PruningPlan, outlook: PlanOutlook, typed: TypedCommand) -> TypedCommand:
    """The command for what the curves call safe, with as many tokens as they were measured at."""
    safer = typed.without(*AMOUNT_FLAGS, "--tokens").plus("--target", str(outlook.safe))
    reduction = plan.analysis.reduction
    if reduction is not None:
        return safer.plus("--tokens", reduction.spec)
    return safer.plus("--tokens", "none") if plan.analysis.tokens.points else safer
