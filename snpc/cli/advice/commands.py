"""Commands with another amount to cut."""

from __future__ import annotations

from snpc.cli.arguments import TypedCommand
from snpc.planning import PlanOutlook

CALIBRATION_FLAGS = ("--calib", "--calibration-data")
AMOUNT_FLAGS = ("--ratio", "--target", "--max-drift")
WIDTH_FLAGS = (
    "--roles", "--include", "--exclude", "--method", "--criterion", "--max-ratio", "--uniform", "--allocator",
    "--align", "--round-to", "--min-width",
)  # fmt: skip


def safe_command(outlook: PlanOutlook, typed: TypedCommand) -> TypedCommand:
    return typed.without(*AMOUNT_FLAGS).plus("--target", str(outlook.safe))
