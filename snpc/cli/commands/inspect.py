"""``snpc inspect``: what a model can lose, and why not the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import snpc
from snpc.cli import tables
from snpc.cli.advice import print_commands_to_try
from snpc.cli.arguments import (
    ArgumentGroup,
    CalibrationArguments,
    JsonArguments,
    LimitedExecutionArguments,
    TypedCommand,
    WatchedModelArguments,
    check_output_paths,
    command,
    option,
    subgroup,
)
from snpc.errors import UserError
from snpc.pipeline import PlanRequest, analysis_json, make_plan, planning_stages
from snpc.runtime.execution import announce


@dataclass(frozen=True)
class InspectArguments(ArgumentGroup):
    """What is listed beside the groups."""

    section: ClassVar[str] = "Output"

    pins: bool = option("--pins/--no-pins", default=True, help="List what cannot be pruned and why.")
    curves: bool = option(
        "--curves",
        is_flag=True,
        help="Measure how much the outputs change with the width of each group (needs --calib).",
    )
    json: JsonArguments = subgroup()


@command("inspect")
def inspect_command(
    model: WatchedModelArguments,
    output: InspectArguments,
    calibration: CalibrationArguments,
    running: LimitedExecutionArguments,
) -> None:
    """Show what can be made narrower in MODEL, and why the rest cannot."""
    analysis = model.load(model.dump.load())
    check_output_paths([output.json.json_path], *model.files(), calibration.calib)
    if output.curves != (calibration.calib is not None):
        raise UserError("--curves and --calib go together: curves are measured on calibration data")
    if running.work is not None and not output.curves:
        raise UserError("--work keeps what --curves measures: give --curves and --calib too, or leave it out")
    data = calibration.load(analysis)
    curves = {}
    if output.curves:
        request = PlanRequest(snpc.Budget(ratio=0), full_curves=True)
        execution = running.load()
        if data is not None:
            announce(execution.progress, planning_stages(analysis, data, request))
        with execution.progress.stage("curves", 1):
            curves = dict(make_plan(analysis, request, data, execution=execution).loss_curves)
    output.json.write(analysis_json(analysis, curves))
    if output.json.replaces_tables:
        return
    tables.print_groups(analysis)
    tables.print_sublayers(analysis)
    if output.curves:
        tables.print_loss_curves(analysis, curves)
    if output.pins:
        tables.print_pins(analysis)
    print_commands_to_try(analysis, TypedCommand.current())
