"""``snpc verify``: a pruned file against its original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click

import snpc
from snpc.cli import tables
from snpc.cli.advice import print_next
from snpc.cli.arguments import (
    FILE_PATH,
    ArgumentGroup,
    CalibrationArguments,
    JsonArguments,
    MetricArguments,
    ModelArguments,
    ModelPath,
    SpreadExecutionArguments,
    TypedCommand,
    argument,
    check_output_paths,
    command,
    option,
)
from snpc.errors import CheckFailed, UserError
from snpc.pipeline import completion_stages, verdict_json
from snpc.planning import PerplexityLimit, parse_perplexity_limit
from snpc.runtime.calibration import MAX_HELD_OUT
from snpc.runtime.execution import announce
from snpc.runtime.io import model_files
from snpc.types import Perplexity


@dataclass(frozen=True)
class VerifyArguments(ArgumentGroup):
    """The pruned file, and what is checked beside its structure."""

    section: ClassVar[str] = "Checks"

    pruned: Path = argument(type=ModelPath())
    plan_path: Path | None = option(
        "--plan", type=FILE_PATH, help="The plan that PRUNED was made by: also check that slicing equals masking."
    )
    max_drift: float | None = option(
        "--max-drift",
        type=click.FloatRange(0),
        help="Fail if an output changes by more than this (relative RMS, or as --metric says).",
    )
    max_ppl: str | None = option(
        "--max-ppl",
        metavar="FACTORx|VALUE",
        help="Fail if the perplexity of a language model is more than this: 1.1x is a factor on MODEL's.",
    )


@command("verify")
def verify_command(
    model: ModelArguments,
    arguments: VerifyArguments,
    inputs: CalibrationArguments,
    judging: MetricArguments,
    json: JsonArguments,
    running: SpreadExecutionArguments,
) -> None:
    """Check PRUNED against MODEL: structure, drift of the outputs, and slicing equals masking where --plan is given.

    Outputs are compared on the data of --calib, or on random inputs.
    """
    if running.cluster is not None and arguments.plan_path is None:
        raise UserError("--cluster spreads the refit of a plan: give --plan too, or leave it out")
    pruned, execution = arguments.pruned, running.load()
    limit = parse_perplexity_limit(arguments.max_ppl) if arguments.max_ppl is not None else None
    with execution.progress.stage("analysis", 1):
        loaded = snpc.load(model.path)
        sizes = model.at.sizes(loaded.inputs)
        slices = snpc.load_plan(arguments.plan_path, loaded, sizes) if arguments.plan_path else None
        analysis = slices.analysis if slices else model.load()
        snpc.load(pruned)
    check_output_paths([json.json_path], *model.files(), *model_files(pruned), arguments.plan_path, inputs.calib)
    refits = slices is not None and slices.method != "select"  # then DATA is what it was fitted to, apart from some
    calibration = inputs.load(analysis, MAX_HELD_OUT if refits else 0)
    if slices is not None and calibration is not None:
        announce(execution.progress, completion_stages(slices, calibration))
    with execution.progress.stage("verify", 1):
        verdict = snpc.verify(
            model.path,
            pruned,
            plan=snpc.complete_plan(slices, calibration, execution=execution) if slices else None,
            calibration=calibration,
            metric=judging.metric or None,
            dim_sizes=sizes,
            execution=execution,
        )
    json.write(verdict_json(verdict))
    if not json.replaces_tables:
        tables.print_verdict(verdict)
    print_next(TypedCommand("bench", (str(model.path), str(pruned)), ()))
    drift = verdict.quality.drift
    if arguments.max_drift is not None and not drift <= arguments.max_drift:
        raise CheckFailed(f"{pruned}: outputs moved by {drift:.3g}, more than --max-drift {arguments.max_drift:g}")
    if limit is not None:
        check_perplexity(pruned, verdict.quality.perplexity, limit)


def check_perplexity(pruned: Path, found: Perplexity | None, limit: PerplexityLimit) -> None:
    """Raise CheckFailed where the perplexity is above the limit, UserError where there is none."""
    if found is None:
        raise UserError("--max-ppl: no perplexity was measured: it takes a causal language model, and data in --calib")
    if not found.factor <= limit.factor(found.before):
        change = f"{found.after:.4g}, of the original {found.before:.4g}"
        raise CheckFailed(f"{pruned}: the perplexity is {change}: more than --max-ppl {limit}")
