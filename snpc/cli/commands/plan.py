"""``snpc plan`` and ``snpc apply``: pruning in two steps, with a file in between that can be read and edited."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import snpc
from snpc.cli import tables
from snpc.cli.advice import announce_cost, announce_plan, print_loss_first, print_next, warn_without_data
from snpc.cli.arguments import (
    FILE_PATH,
    ArgumentGroup,
    CalibrationArguments,
    JsonArguments,
    LimitedExecutionArguments,
    PlanningArguments,
    PrunableModelArguments,
    QuantizedModelArguments,
    SavedStatisticsArguments,
    StatisticsArguments,
    TypedCommand,
    WorkloadArguments,
    argument,
    check_output_paths,
    command,
    import_gradient_provider,
    option,
    subgroup,
)
from snpc.errors import UserError
from snpc.pipeline import PlanRequest, PruningPlan, Stopwatch, completion_stages
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import Execution, announce


@dataclass(frozen=True)
class PlanOutput(ArgumentGroup):
    """Where the plan goes."""

    section: ClassVar[str] = "Output"

    output: Path | None = option(
        "-o", "--output", type=FILE_PATH, help="The plan to write.  [default: MODEL.plan.json]"
    )


@command("plan")
def plan_command(
    model: PrunableModelArguments,
    planning: PlanningArguments,
    calibration: CalibrationArguments,
    statistics: SavedStatisticsArguments,
    output: PlanOutput,
    workload: WorkloadArguments,
    running: LimitedExecutionArguments,
) -> None:
    """Score MODEL and write a plan: small JSON that can be read and edited before `snpc apply`."""
    execution, path, typed = running.load(), output.output or model.sibling(".plan.json"), TypedCommand.current()
    planning.check_predictable()
    analysis = planning.judging.apply(model.load())
    check_output_paths([path, statistics.save_stats], *model.files(), calibration.calib, *statistics.load_stats)
    data = calibration.load(analysis)
    planning = planning.with_width_multiple(None, execution)
    timed = workload.load(shapes=model.at.input_shapes() if planning.amount.wants_latency else None)
    announce(execution.progress, planning.stages(analysis, data, timed, writes=False))
    announce_cost(analysis, data, planning, planning.request(timed), execution, writes=False)
    with execution.progress.stage("tokens", 1):
        analysis = planning.reduce_tokens(analysis, data, timed, execution)
    if measured_shard(analysis, data, planning, statistics, execution):
        return
    plan = plan_from_arguments(analysis, data, planning, statistics, timed, execution, Stopwatch(execution.progress))
    snpc.save_plan(plan, path)
    announce_plan(plan, typed)
    tables.note_if_predicted(plan)
    tables.print_plan(plan.slices)
    tables.print_line(f"plan written to {path}")
    print_next(typed.of("apply", str(model.path), str(path), drop=("-o", "--output", "--load-stats")))


def measured_shard(
    analysis: snpc.Analysis,
    calibration: Calibration | None,
    planning: PlanningArguments,
    statistics: SavedStatisticsArguments,
    execution: Execution,
) -> bool:
    """Measure and write the part of --shard, where it is given; then nothing is left to do."""
    if statistics.shard is None or not planning.cuts_widths:
        return False
    selection = planning.selection
    import_gradient_provider(selection.criterion)
    request = PlanRequest(planning.budget(), selection.method, selection.criterion, effort=selection.effort)
    statistics.measure_shard(analysis, calibration, request, execution)
    return True


def plan_from_arguments(
    analysis: snpc.Analysis,
    calibration: Calibration | None,
    planning: PlanningArguments,
    statistics: SavedStatisticsArguments,
    workload: snpc.Workload | None,
    execution: Execution,
    stopwatch: Stopwatch,
) -> PruningPlan:
    """Score and plan; write the statistics where that is asked for, and note what the plan does without."""
    if not planning.cuts_widths:
        planning.check_no_widths()
        statistics.check_no_widths()
        return snpc.plan(analysis, None, calibration, method=planning.selection.method, execution=execution)
    budget, measured = planning.budget(), statistics.load()
    criterion = planning.selection.criterion
    if statistics.save_stats is not None and calibration is None and measured is None:
        raise UserError("--save-stats has nothing to write: give --calib, or --load-stats to add up")
    if calibration is not None:
        import_gradient_provider(criterion)
    with stopwatch.stage("score and plan"):
        plan = snpc.plan(
            analysis,
            budget,
            calibration,
            statistics=measured,
            method=planning.selection.method,
            criterion=criterion,
            execution=execution,
            workload=workload,
            effort=planning.selection.effort,
        )
    if statistics.save_stats is not None and plan.statistics is not None:
        snpc.save_statistics(plan.statistics, statistics.save_stats)
    if calibration is None and measured is None:
        warn_without_data(plan, TypedCommand.current())
    tables.print_skipped_groups(plan.closed_forms)
    return plan


# -- apply -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanFileArguments(ArgumentGroup):
    """The plan to apply."""

    plan_file: Path = argument(type=FILE_PATH)


@dataclass(frozen=True)
class ApplyOutput(ArgumentGroup):
    """What an apply writes."""

    section: ClassVar[str] = "Output"

    output: Path | None = option(
        "-o", "--output", type=FILE_PATH, help="The pruned model to write.  [default: MODEL-pruned.onnx]"
    )
    json: JsonArguments = subgroup()


@command("apply")
def apply_command(
    model: QuantizedModelArguments,
    plan: PlanFileArguments,
    calibration: CalibrationArguments,
    statistics: StatisticsArguments,
    output: ApplyOutput,
    running: LimitedExecutionArguments,
) -> None:
    """Apply PLAN_FILE to MODEL, write the result and verify it.

    A plan of --method auto needs --calib, the data that it was made with; one of --method parallel needs that or
    --load-stats. Other plans use --calib for verification only.
    """
    execution = running.load()
    stopwatch = Stopwatch(execution.progress)
    with stopwatch.stage("analyze"):
        loaded = model.read()
        slices = snpc.load_plan(plan.plan_file, loaded, model.at.sizes(loaded.inputs))
    path = output.output or model.sibling("-pruned.onnx")
    inputs = [*model.files(), plan.plan_file, calibration.calib, *statistics.load_stats]
    check_output_paths([path, output.json.json_path], *inputs)
    data = calibration.load(slices.analysis)
    if data is not None:
        announce(execution.progress, completion_stages(slices, data))
    with stopwatch.stage("closed forms"):
        completed = snpc.complete_plan(slices, data, statistics=statistics.load(), execution=execution)
    if completed.other_data and slices.method != "select":
        tables.print_note(
            f"weights are fitted to {completed.data_source}; the plan was made with {completed.other_data}, so this is "
            "another model than that of `snpc prune`"
        )
    result = snpc.apply(completed, path, stopwatch=stopwatch)
    output.json.write(snpc.json_report(result))
    if not output.json.replaces_tables:
        print_loss_first(result, completed, TypedCommand.current())
        tables.print_result(result)
    print_next(TypedCommand("bench", (str(model.path), str(path)), ()))
