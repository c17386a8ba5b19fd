"""The command line: each command parses, calls one verb, prints.

Exit codes: 0 done, 1 a check failed, 2 the request cannot be served.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from snpc.cli import bench as times
from snpc.cli import build as builds
from snpc.cli import progress as bars
from snpc.cli import sweep as sweeping
from snpc.cli import tables as show
from snpc.cli.arguments import (
    analysed,
    calibration_of,
    check_targets,
    liked_widths,
    read_plan,
    split_flags,
    statistics_of,
    with_tokens,
    workload_of,
    write_text,
)
from snpc.cli.finetune import export_torch, finetune
from snpc.cli.options import (
    FILE,
    as_json,
    at_sizes,
    building,
    caches,
    calibrating,
    choosing,
    model_argument,
    remembering,
    running,
    saving,
    target_name,
    timing,
)
from snpc.errors import CheckFailed, SnpcError, UserError
from snpc.pipeline import report_json
from snpc.planning.config import asks_latency


class Commands(click.Group):
    """Turns snpc's own errors into one line and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SnpcError as error:
            click.echo(f"snpc: {' '.join(str(error).split())}", err=True)  # names in a model may hold line breaks
            sys.exit(1 if isinstance(error, CheckFailed) else 2)


def decided(
    analysis: Any,
    calibration: Any,
    *,
    method: Any,
    criterion: str | None,
    load_stats: Sequence[Path],
    save_stats: Path | None,
    memory_limit: int | None,
    provider: str,
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
        return nothing_else(analysis, {**choice, "load_stats": load_stats, "save_stats": save_stats})
    wanted = snpc.Choice(**choice)
    statistics = statistics_of(load_stats)
    if save_stats is not None and calibration is None and statistics is None:
        raise UserError("--save-stats has nothing to write: give --calib, or --load-stats to add up")
    with watch.stage("score and plan"):
        decision = snpc.decide(
            analysis,
            wanted,
            calibration=calibration,
            statistics=statistics,
            method=method,
            criterion=criterion,
            memory_limit=memory_limit,
            provider=provider,
            progress=bars.batches("calibrating", calibration),
            workload=workload_of(batch, shapes, threads, artefact),
        )
    if save_stats is not None and decision.statistics is not None:
        snpc.save_statistics(decision.statistics, save_stats)
    if calibration is None and statistics is None and criterion is None:
        show.note("no --calib: scoring by weight magnitude, which needs no data and keeps less accuracy")
    show.skipped(decision.compression)
    return decision


def nothing_else(analysis: Any, choice: dict[str, Any]) -> Any:
    """The decision that --roles none leaves: no width is cut."""
    from snpc.pipeline.planner import uncut

    for name in ("ratio", "max_drift", "load_stats", "save_stats"):
        if choice[name] not in (None, ()):
            raise UserError(f"--roles none cuts no widths: leave out --{name.replace('_', '-')}")
    return uncut(analysis)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="snpc")
def main() -> None:
    """Make exported attention models small and fast: structured pruning of ONNX files, without training code."""


@main.command()
@model_argument
@as_json
@at_sizes
@caches
@click.option("--pins/--no-pins", default=True, help="List what cannot be pruned and why.")
@click.option("--curves", is_flag=True, help="Measure how much the outputs mind narrower groups (needs --calib).")
@calibrating
@running
def inspect(
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

    analysis = analysed(model, dims, kv_cache)
    check_targets([json_path], *model_files(model), calib["calib"])
    if curves != (calib["calib"] is not None):
        raise UserError("--curves and --calib go together: curves are measured on calibration data")
    calibration = calibration_of(analysis, **calib)
    found = None
    if curves:
        found = snpc.decide(analysis, snpc.Choice(ratio=0), calibration=calibration, provider=provider, whole=True)
    show.emit_json(report_json.analysis_json(analysis, found.curves if found else {}), json_path)
    if str(json_path) != "-":
        show.groups(analysis)
        if found:
            show.curves(analysis, found.curves)
        if pins:
            show.pins(analysis)


@main.command()
@model_argument
@choosing
@timing
@calibrating
@saving
@remembering
@running
@at_sizes
@caches
@click.option("-o", "--output", type=FILE, help="The pruned model.  [default: MODEL-pruned.onnx]")
@click.option("--plan", "plan_path", type=FILE, help="Also write the plan here.")
@as_json
@click.option(
    "--report", "page", type=FILE, metavar="HTML", help="Also write a page with charts: one file, no network."
)
@click.option("--dry-run", is_flag=True, help="Score and plan, show what would be kept, write no model.")
@click.option("--build", metavar="TARGET", callback=target_name, help="Also build the result, see `snpc build --help`.")
@building
def prune(
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
    from snpc.pipeline.prune import Stopwatch
    from snpc.runtime.io.atomic import data_file
    from snpc.runtime.io.load import model_files

    watch = Stopwatch()
    target = output or model.with_name(f"{model.stem}-pruned.onnx")
    with watch.stage("analyze"):
        analysis = analysed(model, dims, kv_cache)
    flags, build_flags = builds.split_build(flags, build)
    choice, calib = split_flags(flags)
    artefacts = builds.checked(build, target, provider, calib["calib"] is not None, choice["batch"], **build_flags)
    written = [] if dry_run else [target, data_file(target), *artefacts]
    if dry_run and page is not None:
        raise UserError("--report shows the written file and --dry-run writes none: give one of the two")
    read = [*model_files(model), calib["calib"], *choice["load_stats"]]
    check_targets([*written, plan_path, json_path, page, choice["save_stats"]], *read)
    with watch.stage("calibration"):
        calibration = calibration_of(analysis, **calib)
    tokens = choice.pop("tokens")
    with watch.stage("tokens"):
        choice |= liked_widths(choice, build, provider)
        analysis, calibration = with_tokens(analysis, calibration, tokens, choice, provider)
    latency = asks_latency(choice["target"])
    artefact = builds.artefact_of(build, latency, provider, calibration, choice["batch"], **build_flags)
    decision = decided(analysis, calibration, provider=provider, watch=watch, artefact=artefact, **choice)
    plan = decision.plan
    if plan_path is not None:
        write_text(plan_path, snpc.plan_to_json(plan))
    if dry_run:
        show.predicted(decision)
        show.emit_json(
            {"dry_run": True, "groups": report_json.plan_json(plan), "options": dict(plan.options)}, json_path
        )
        if str(json_path) != "-":
            show.plan(plan)
        return
    result = snpc.prune(
        decision,
        target,
        calibration=calibration,
        memory_limit=choice["memory_limit"],
        provider=provider,
        watch=watch,
    )
    if plan_path is not None and result.search is not None:
        write_text(plan_path, snpc.plan_to_json(result.plan))
    if page is not None:
        snpc.write_report(result, page, decision=decision, calibration=calibration)
    made = None
    if build is not None:
        made = builds.built(target, build, None, calibration, provider, batch=choice["batch"], **build_flags)
    finish(result, json_path, made)


def finish(result: Any, json_path: Path | None, made: Any = None) -> None:
    import snpc

    built = {"build": builds.build_json(made)} if made else {}
    show.emit_json({**snpc.report(result), **built}, json_path)
    if str(json_path) != "-":
        show.result(result)
        if made:
            show.build(made)


@main.command()
@model_argument
@choosing
@timing
@calibrating
@saving
@remembering
@running
@caches
@click.option("-o", "--output", type=FILE, help="The plan.  [default: MODEL.plan.json]")
def plan(model: Path, output: Path | None, provider: str, kv_cache: bool, **flags: Any) -> None:
    """Score MODEL and write a plan: small JSON that can be read and edited before `snpc apply`."""
    import snpc
    from snpc.pipeline.prune import Stopwatch
    from snpc.runtime.io.load import model_files

    target = output or model.with_name(f"{model.stem}.plan.json")
    analysis = analysed(model, kv_cache=kv_cache)
    choice, calib = split_flags(flags)
    check_targets([target, choice["save_stats"]], *model_files(model), calib["calib"], *choice["load_stats"])
    calibration = calibration_of(analysis, **calib)
    choice |= liked_widths(choice, None, provider)
    analysis, calibration = with_tokens(analysis, calibration, choice.pop("tokens"), choice, provider)
    decision = decided(analysis, calibration, provider=provider, watch=Stopwatch(), **choice)
    made = decision.plan
    write_text(target, snpc.plan_to_json(made))
    show.predicted(decision)
    show.plan(made)
    show.line(f"plan written to {target}")


@main.command()
@model_argument
@click.argument("plan_file", type=FILE)
@calibrating
@remembering
@running
@click.option("-o", "--output", type=FILE, help="The pruned model.  [default: MODEL-pruned.onnx]")
@as_json
def apply(
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
    from snpc.pipeline.prune import Stopwatch
    from snpc.pipeline.refit import compression_for
    from snpc.runtime.io.atomic import data_file
    from snpc.runtime.io.load import model_files

    watch = Stopwatch()
    with watch.stage("analyze"):
        plan = read_plan(plan_file, model)
    analysis = plan.analysis
    _, calib = split_flags(flags)
    target = output or model.with_name(f"{model.stem}-pruned.onnx")
    read = [*model_files(model), plan_file, calib["calib"], *load_stats]
    check_targets([target, data_file(target), json_path], *read)
    calibration = calibration_of(analysis, **calib)
    with watch.stage("closed forms"):
        compression = compression_for(
            plan, calibration, statistics=statistics_of(load_stats), memory_limit=memory_limit, provider=provider
        )
    result = snpc.apply_plan(
        plan,
        target,
        compression=compression,
        calibration=calibration,
        memory_limit=memory_limit,
        provider=provider,
        watch=watch,
    )
    finish(result, json_path)


@main.command()
@model_argument
@click.argument("pruned", type=FILE)
@click.option("--plan", "plan_path", type=FILE, help="The plan that made it: also checks that slicing equals masking.")
@click.option("--data", "calib", metavar="DATA", help="Inputs to run on (forms as --calib of prune); default: random.")
@click.option(
    "--max-drift", type=click.FloatRange(0), help="Fail if an output moves by more: root mean square, relative."
)
@as_json
@running
def verify(
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

    plan = read_plan(plan_path, model) if plan_path else None
    analysis = plan.analysis if plan else analysed(model)
    snpc.load(pruned)
    check_targets([json_path], *model_files(model), *model_files(pruned), plan_path, calib)
    calibration = snpc.load_calibration(calib, analysis.model.inputs) if calib else None
    verdict = snpc.verify(model, pruned, plan=plan, calibration=calibration, provider=provider)
    show.emit_json(verdict_json(verdict), json_path)
    if str(json_path) != "-":
        show.verdict(verdict)
    moved = max((d.relative for d in verdict.drift), default=0.0)
    if max_drift is not None and not moved <= max_drift:
        raise CheckFailed(f"{pruned}: outputs moved by {moved:.3g}, more than --max-drift {max_drift:g}")


@main.command()
@click.argument("name")
@click.argument("folder", type=FILE)
def example(name: str, folder: Path) -> None:
    """Write a shipped example into FOLDER: NAME is `digits`, a trained ViT with calibration and evaluation data."""
    import snpc

    for path in snpc.write_example(name, folder):
        show.line(str(path))


@main.command()
def criteria() -> None:
    """List the criteria and their options."""
    from snpc.criteria import describe

    show.criteria(describe())


main.add_command(times.bench)
main.add_command(finetune)
main.add_command(export_torch)
main.add_command(builds.build)
main.add_command(sweeping.sweep)
