"""``snpc prune``: score, plan, write and verify in one step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import snpc
from snpc.cli import tables
from snpc.cli.advice import announce_cost, announce_plan, print_better_command, print_loss_first, print_next
from snpc.cli.arguments import (
    FILE_PATH,
    ArgumentGroup,
    CalibrationArguments,
    JsonArguments,
    LimitedExecutionArguments,
    PlanningArguments,
    PruneBuildArguments,
    SavedStatisticsArguments,
    TypedCommand,
    WatchedModelArguments,
    WorkloadArguments,
    check_output_paths,
    command,
    option,
    subgroup,
)
from snpc.cli.build import build_json
from snpc.cli.plan import measured_shard, plan_from_arguments
from snpc.errors import UserError
from snpc.pipeline import PruningPlan, Stopwatch, groups_json, run_stages
from snpc.runtime.execution import announce


@dataclass(frozen=True)
class PruneOutput(ArgumentGroup):
    """What a prune writes."""

    section: ClassVar[str] = "Output"

    output: Path | None = option(
        "-o", "--output", type=FILE_PATH, help="The pruned model to write.  [default: MODEL-pruned.onnx]"
    )
    plan_path: Path | None = option("--plan", type=FILE_PATH, help="Also write the plan.")
    json: JsonArguments = subgroup()
    page: Path | None = option(
        "--report", type=FILE_PATH, metavar="HTML", help="Also write a page with charts: one file that loads nothing."
    )
    dry_run: bool = option(
        "--dry-run", is_flag=True, help="Score and plan only: show what would be kept, write no model."
    )

    def paths(self, model: Path, artifacts: list[Path]) -> list[Path | None]:
        """What will be written, apart from statistics. ``model``: where the pruned model goes."""
        written = [] if self.dry_run else [model, *artifacts]
        return [*written, self.plan_path, self.json.json_path, self.page]


@command("prune")
def prune_command(
    model: WatchedModelArguments,
    planning: PlanningArguments,
    calibration: CalibrationArguments,
    statistics: SavedStatisticsArguments,
    output: PruneOutput,
    build: PruneBuildArguments,
    workload: WorkloadArguments,
    running: LimitedExecutionArguments,
) -> None:
    """Prune MODEL, write the result, verify what was written, and show before and after."""
    observer, typed = model.dump.load(), TypedCommand.current()
    execution = replace(running.load(), observer=observer)
    stopwatch = Stopwatch(execution.progress)
    path = output.output or model.sibling("-pruned.onnx")
    with stopwatch.stage("analyze"):
        analysis = planning.judging.apply(model.load(observer))
    artifacts = build.check(path, execution, calibration.calib is not None)
    if output.dry_run and output.page is not None:
        raise UserError("--report shows the written file and --dry-run writes none: give one of the two")
    inputs = [*model.files(), calibration.calib, *statistics.load_stats]
    check_output_paths([*output.paths(path, artifacts), statistics.save_stats], *inputs)
    with stopwatch.stage("calibration"):
        data = calibration.load(analysis)
    planning = planning.with_width_multiple(build.build, execution)
    artifact, shapes = None, None
    if planning.amount.wants_latency:
        artifact, shapes = build.timed_artifact(execution, data, workload.batch), model.at.input_shapes()
    timed = workload.load(artifact, shapes)
    stages = run_stages(analysis, data, planning.request(timed), planning.reduction.tokens, writes=not output.dry_run)
    announce(execution.progress, stages)
    announce_cost(analysis, data, planning, planning.request(timed), execution, writes=not output.dry_run)
    with stopwatch.stage("tokens"):
        analysis = planning.reduce_tokens(analysis, data, timed, execution)
    if measured_shard(analysis, data, planning, statistics, execution):
        return
    plan = plan_from_arguments(analysis, data, planning, statistics, timed, execution, stopwatch)
    if output.plan_path is not None:
        snpc.save_plan(plan, output.plan_path)
    announce_plan(plan, typed)
    if output.dry_run:
        show_plan(plan, output.json)
        return
    result = snpc.apply(plan, path, stopwatch=stopwatch)
    if output.plan_path is not None and result.search is not None:
        snpc.save_plan(result.plan, output.plan_path)
    if output.page is not None:
        snpc.write_report(result, output.page, plan=plan)
    built = build.load(path, execution, data, workload.batch)
    output.json.write({**snpc.json_report(result), **({"build": build_json(built)} if built else {})})
    if not output.json.replaces_tables:
        print_loss_first(result, plan, typed)
        tables.print_result(result)
        if built:
            tables.print_build(built)
    print_better_command(result, typed)
    print_next(TypedCommand("bench", (str(model.path), str(path)), ()))


def show_plan(plan: PruningPlan, json: JsonArguments) -> None:
    """What --dry-run shows in place of a result."""
    tables.note_if_predicted(plan)
    json.write({"dry_run": True, "groups": groups_json(plan.slices), "options": dict(plan.slices.options)})
    if not json.replaces_tables:
        tables.print_plan(plan.slices)
