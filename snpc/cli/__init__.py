"""The command line: each command parses, calls one verb, prints.

Exit codes: 0 done, 1 a check failed, 2 the request cannot be served.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from snpc.cli import bench as times
from snpc.cli import build as builds
from snpc.cli import progress as bars
from snpc.cli import sweep as sweeping
from snpc.cli import tables as show
from snpc.cli.arguments import (
    apply_token_flags,
    calibration_from_flags,
    check_output_paths,
    load_and_analyze,
    read_plan_file,
    resolve_width_multiple,
    split_calibration_flags,
    statistics_from_files,
    workload_from_flags,
    write_text_file,
)
from snpc.cli.finetune import export_torch_command, finetune_command
from snpc.cli.options import (
    PATH_TYPE,
    build_options,
    calibration_options,
    dim_size_option,
    execution_options,
    json_option,
    kv_cache_option,
    latency_options,
    model_argument,
    parse_target_name,
    planning_options,
    save_statistics_option,
    statistics_options,
)
from snpc.errors import CheckFailed, SnpcError, UserError
from snpc.pipeline import report_json
from snpc.pipeline.planner import PlanRequest, make_plan
from snpc.planning.config import parse_target
from snpc.runtime.execution.execution import Execution


class ErrorReportingGroup(click.Group):
    """Turns snpc's own errors into one line and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SnpcError as error:
            click.echo(f"snpc: {' '.join(str(error).split())}", err=True)  # names in a model may hold line breaks
            sys.exit(1 if isinstance(error, CheckFailed) else 2)


def plan_from_flags(
    analysis: Any,
    calibration: Any,
    *,
    method: Any,
    criterion: str | None,
    load_stats: Sequence[Path],
    save_stats: Path | None,
    execution: Execution,
    watch: Any,
    batch: int | None,
    shapes: tuple[str, ...],
    threads: int | None,
    artefact: Any = None,
    **choice: Any,
) -> Any:
    """Score and plan as the flags say (``artefact``: what is timed); say what is unused."""
    import snpc

    if not choice["roles"]:
        return plan_without_widths(
            analysis, calibration, execution, {**choice, "load_stats": load_stats, "save_stats": save_stats}
        )
    wanted = snpc.Budget(**choice)
    statistics = statistics_from_files(load_stats)
    if save_stats is not None and calibration is None and statistics is None:
        raise UserError("--save-stats has nothing to write: give --calib, or --load-stats to add up")
    with watch.stage("score and plan"):
        decision = snpc.plan(
            analysis,
            wanted,
            calibration,
            method=method,
            criterion=criterion,
            statistics=statistics,
            execution=replace(execution, progress=bars.batch_progress("calibrating", calibration)),
            workload=workload_from_flags(batch, shapes, threads, artefact),
        )
    if save_stats is not None and decision.statistics is not None:
        snpc.save_statistics(decision.statistics, save_stats)
    if calibration is None and statistics is None and criterion is None:
        show.print_note("no --calib: scoring by weight magnitude, which needs no data and keeps less accuracy")
    show.print_skipped_groups(decision.closed_forms)
    return decision


def plan_without_widths(analysis: Any, calibration: Any, execution: Any, choice: dict[str, Any]) -> Any:
    """The decision that --roles none leaves: no width is cut."""
    import snpc

    for name in ("ratio", "max_drift", "load_stats", "save_stats"):
        if choice[name] not in (None, ()):
            raise UserError(f"--roles none cuts no widths: leave out --{name.replace('_', '-')}")
    return snpc.plan(analysis, None, calibration, execution=execution)


@click.group(cls=ErrorReportingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="snpc")
def main() -> None:
    """Make exported attention models small and fast: structured pruning of ONNX files, without training code."""


@main.command("inspect")
@model_argument
@json_option
@dim_size_option
@kv_cache_option
@click.option("--pins/--no-pins", default=True, help="List what cannot be pruned and why.")
@click.option("--curves", is_flag=True, help="Measure how much the outputs mind narrower groups (needs --calib).")
@calibration_options
@execution_options
def inspect_command(
    model: Path,
    json_path: Path | None,
    dims: tuple[str, ...],
    kv_cache: bool,
    pins: bool,
    curves: bool,
    provider: str,
    **calib: Any,
) -> None:
    """Show what can be made narrower in MODEL, and why the rest cannot."""
    import snpc
    from snpc.runtime.io.load import model_files

    analysis = load_and_analyze(model, dims, kv_cache)
    check_output_paths([json_path], *model_files(model), calib["calib"])
    if curves != (calib["calib"] is not None):
        raise UserError("--curves and --calib go together: curves are measured on calibration data")
    calibration = calibration_from_flags(analysis, **calib)
    found = None
    if curves:
        request = PlanRequest(snpc.Budget(ratio=0), full_curves=True)
        found = make_plan(analysis, request, calibration, execution=Execution(provider))
    show.emit_json(report_json.analysis_json(analysis, found.loss_curves if found else {}), json_path)
    if str(json_path) != "-":
        show.print_groups(analysis)
        if found:
            show.print_loss_curves(analysis, found.loss_curves)
        if pins:
            show.print_pins(analysis)


@main.command("prune")
@model_argument
@planning_options
@latency_options
@calibration_options
@save_statistics_option
@statistics_options
@execution_options
@dim_size_option
@kv_cache_option
@click.option("-o", "--output", type=PATH_TYPE, help="The pruned model.  [default: MODEL-pruned.onnx]")
@click.option("--plan", "plan_path", type=PATH_TYPE, help="Also write the plan here.")
@json_option
@click.option(
    "--report", "page", type=PATH_TYPE, metavar="HTML", help="Also write a page with charts: one file, no network."
)
@click.option("--dry-run", is_flag=True, help="Score and plan, show what would be kept, write no model.")
@click.option(
    "--build", metavar="TARGET", callback=parse_target_name, help="Also build the result, see `snpc build --help`."
)
@build_options
def prune_command(
    model: Path,
    output: Path | None,
    plan_path: Path | None,
    json_path: Path | None,
    page: Path | None,
    dry_run: bool,
    build: str | None,
    provider: str,
    dims: tuple[str, ...],
    kv_cache: bool,
    **flags: Any,
) -> None:
    """Prune MODEL, write the result, verify what was written, and show before and after."""
    import snpc
    from snpc.pipeline.candidate import Stopwatch
    from snpc.runtime.io.atomic import external_data_path
    from snpc.runtime.io.load import model_files

    watch = Stopwatch()
    target = output or model.with_name(f"{model.stem}-pruned.onnx")
    with watch.stage("analyze"):
        analysis = load_and_analyze(model, dims, kv_cache)
    flags, build_flags = builds.split_build_flags(flags, build)
    choice, calib = split_calibration_flags(flags)
    execution = Execution(provider=provider, memory_limit=choice.pop("memory_limit"))
    artefacts = builds.expected_artifacts(
        build, target, execution, calib["calib"] is not None, choice["batch"], **build_flags
    )
    written = [] if dry_run else [target, external_data_path(target), *artefacts]
    if dry_run and page is not None:
        raise UserError("--report shows the written file and --dry-run writes none: give one of the two")
    read = [*model_files(model), calib["calib"], *choice["load_stats"]]
    check_output_paths([*written, plan_path, json_path, page, choice["save_stats"]], *read)
    with watch.stage("calibration"):
        calibration = calibration_from_flags(analysis, **calib)
    tokens = choice.pop("tokens")
    with watch.stage("tokens"):
        choice |= resolve_width_multiple(choice, build, execution)
        analysis = apply_token_flags(analysis, calibration, tokens, choice, execution)
    latency = choice["target"] is not None and parse_target(choice["target"]).kind == "latency"
    artefact = builds.timed_artifact_from_flags(build, latency, execution, calibration, choice["batch"], **build_flags)
    decision = plan_from_flags(analysis, calibration, execution=execution, watch=watch, artefact=artefact, **choice)
    plan = decision.slices
    if plan_path is not None:
        write_text_file(plan_path, snpc.plan_to_json(plan))
    if dry_run:
        show.note_if_predicted(decision)
        show.emit_json(
            {"dry_run": True, "groups": report_json.plan_groups_json(plan), "options": dict(plan.options)}, json_path
        )
        if str(json_path) != "-":
            show.print_plan(plan)
        return
    result = snpc.apply(decision, target, stopwatch=watch)
    if plan_path is not None and result.search is not None:
        write_text_file(plan_path, snpc.plan_to_json(result.plan))
    if page is not None:
        snpc.write_report(result, page, decision=decision, calibration=calibration)
    made = None
    if build is not None:
        made = builds.build_from_flags(
            target, build, None, calibration, execution, batch=choice["batch"], **build_flags
        )
    present_result(result, json_path, made)


def present_result(result: Any, json_path: Path | None, made: Any = None) -> None:
    import snpc

    built = {"build": builds.build_json(made)} if made else {}
    show.emit_json({**snpc.json_report(result), **built}, json_path)
    if str(json_path) != "-":
        show.print_result(result)
        if made:
            show.print_build(made)


@main.command("plan")
@model_argument
@planning_options
@latency_options
@calibration_options
@save_statistics_option
@statistics_options
@execution_options
@kv_cache_option
@click.option("-o", "--output", type=PATH_TYPE, help="The plan.  [default: MODEL.plan.json]")
def plan_command(model: Path, output: Path | None, provider: str, kv_cache: bool, **flags: Any) -> None:
    """Score MODEL and write a plan: small JSON that can be read and edited before `snpc apply`."""
    import snpc
    from snpc.pipeline.candidate import Stopwatch
    from snpc.runtime.io.load import model_files

    target = output or model.with_name(f"{model.stem}.plan.json")
    analysis = load_and_analyze(model, kv_cache=kv_cache)
    choice, calib = split_calibration_flags(flags)
    execution = Execution(provider=provider, memory_limit=choice.pop("memory_limit"))
    check_output_paths([target, choice["save_stats"]], *model_files(model), calib["calib"], *choice["load_stats"])
    calibration = calibration_from_flags(analysis, **calib)
    choice |= resolve_width_multiple(choice, None, execution)
    analysis = apply_token_flags(analysis, calibration, choice.pop("tokens"), choice, execution)
    decision = plan_from_flags(analysis, calibration, execution=execution, watch=Stopwatch(), **choice)
    made = decision.slices
    write_text_file(target, snpc.plan_to_json(made))
    show.note_if_predicted(decision)
    show.print_plan(made)
    show.print_line(f"plan written to {target}")


@main.command("apply")
@model_argument
@click.argument("plan_file", type=PATH_TYPE)
@calibration_options
@statistics_options
@execution_options
@click.option("-o", "--output", type=PATH_TYPE, help="The pruned model.  [default: MODEL-pruned.onnx]")
@json_option
def apply_command(
    model: Path,
    plan_file: Path,
    output: Path | None,
    json_path: Path | None,
    load_stats: tuple[Path, ...],
    memory_limit: int | None,
    provider: str,
    **flags: Any,
) -> None:
    """Apply PLAN_FILE to MODEL, write the result and verify it.

    A plan of --method auto needs --calib, the data that it was made with, one of --method parallel that or
    --load-stats; others use --calib for verification only.
    """
    import snpc
    from snpc.pipeline.candidate import Stopwatch
    from snpc.runtime.io.atomic import external_data_path
    from snpc.runtime.io.load import model_files

    watch = Stopwatch()
    with watch.stage("analyze"):
        plan = read_plan_file(plan_file, model)
    analysis = plan.analysis
    _, calib = split_calibration_flags(flags)
    target = output or model.with_name(f"{model.stem}-pruned.onnx")
    read = [*model_files(model), plan_file, calib["calib"], *load_stats]
    check_output_paths([target, external_data_path(target), json_path], *read)
    calibration = calibration_from_flags(analysis, **calib)
    execution = Execution(provider=provider, memory_limit=memory_limit)
    with watch.stage("closed forms"):
        pruning_plan = snpc.complete_plan(
            plan,
            calibration,
            statistics=statistics_from_files(load_stats),
            execution=execution,
        )
    result = snpc.apply(pruning_plan, target, stopwatch=watch)
    present_result(result, json_path)


@main.command("verify")
@model_argument
@click.argument("pruned", type=PATH_TYPE)
@click.option(
    "--plan", "plan_path", type=PATH_TYPE, help="The plan that made it: also checks that slicing equals masking."
)
@click.option("--data", "calib", metavar="DATA", help="Inputs to run on (forms as --calib of prune); default: random.")
@click.option(
    "--max-drift", type=click.FloatRange(0), help="Fail if an output moves by more: root mean square, relative."
)
@json_option
@execution_options
def verify_command(
    model: Path,
    pruned: Path,
    plan_path: Path | None,
    calib: str | None,
    max_drift: float | None,
    json_path: Path | None,
    provider: str,
) -> None:
    """Check PRUNED against MODEL: structure, drift of the outputs, and slicing equals masking where --plan is given."""
    import snpc
    from snpc.pipeline.report_json import verdict_json
    from snpc.runtime.io.load import model_files

    plan = read_plan_file(plan_path, model) if plan_path else None
    analysis = plan.analysis if plan else load_and_analyze(model)
    snpc.load(pruned)
    check_output_paths([json_path], *model_files(model), *model_files(pruned), plan_path, calib)
    calibration = snpc.load_calibration(calib, analysis.model.inputs) if calib else None
    execution = Execution(provider)
    pruning_plan = snpc.complete_plan(plan, calibration, execution=execution) if plan is not None else None
    verdict = snpc.verify(model, pruned, plan=pruning_plan, calibration=calibration, execution=execution)
    show.emit_json(verdict_json(verdict), json_path)
    if str(json_path) != "-":
        show.print_verdict(verdict)
    moved = max((d.relative for d in verdict.drift), default=0.0)
    if max_drift is not None and not moved <= max_drift:
        raise CheckFailed(f"{pruned}: outputs moved by {moved:.3g}, more than --max-drift {max_drift:g}")


@main.command("example")
@click.argument("name")
@click.argument("folder", type=PATH_TYPE)
def example_command(name: str, folder: Path) -> None:
    """Write a shipped example into FOLDER: NAME is `digits`, a trained ViT with calibration and evaluation data."""
    import snpc

    for path in snpc.write_example(name, folder):
        show.print_line(str(path))


@main.command("criteria")
def criteria_command() -> None:
    """List the criteria and their options."""
    from snpc.criteria import describe

    show.print_criteria(describe())


main.add_command(times.bench_command)
main.add_command(finetune_command)
main.add_command(export_torch_command)
main.add_command(builds.build_command)
main.add_command(sweeping.sweep_command)
