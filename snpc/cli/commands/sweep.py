"""``snpc sweep``: one model at several sizes, and which of them are worth having."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

import snpc
from snpc.cli import tables
from snpc.cli.advice import print_next
from snpc.cli.arguments import (
    FILE_PATH,
    ArgumentGroup,
    LimitedExecutionArguments,
    ModelArguments,
    PlanningArguments,
    ScoredCalibrationArguments,
    TrackingArguments,
    TypedCommand,
    check_output_paths,
    command,
    option,
    parse_target_name,
)
from snpc.errors import UserError
from snpc.pipeline import SweepBuilder, SweepRequest, sweep, write_json
from snpc.planning import parse_target
from snpc.report import check_picture, read_points, write_sweep_plot
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import Execution
from snpc.types import PRECISIONS, Precision


@dataclass(frozen=True)
class SweepArguments(ArgumentGroup):
    """The sizes, and how each is judged and timed."""

    targets: str = option(
        "--targets",
        required=True,
        metavar="macs=0.9,0.8,params=0.5",
        section="How much",
        help="Sizes to prune to, as of --target of prune.",
    )
    output: Path | None = option(
        "-o",
        "--output",
        type=FILE_PATH,
        section="Output",
        help="Folder for table, plot and models.  [default: MODEL-sweep]",
    )
    plot: Path | None = option(
        "--plot",
        type=FILE_PATH,
        metavar="SVG|PNG",
        section="Output",
        help="Where the plot goes; .png needs snpc[plots].  [default: sweep.svg in the folder]",
    )
    points: Path | None = option(
        "--points",
        type=FILE_PATH,
        metavar="CSV|JSON",
        section="Output",
        help="Also plot models of others: name, macs and score of each, the score as on the axis (per cent, or a "
        "perplexity).",
    )
    build: str | None = option(
        "--build",
        metavar="TARGET",
        callback=parse_target_name,
        section="Building",
        help="Build each model for a runtime, and time that.",
    )
    precision: Precision | None = option(
        "--precision", type=click.Choice(PRECISIONS), section="Building", help="Precision of the artifacts."
    )
    batch: int = option(
        "--batch",
        default=1,
        show_default=True,
        type=click.IntRange(1),
        section="Running",
        help="Batch size that models are timed at.",
    )
    iterations: int = option(
        "--iterations",
        default=30,
        show_default=True,
        type=int,
        section="Running",
        help="Interleaved rounds that are timed.",
    )


@command("sweep", refused=("--ratio", "--target", "--max-drift", "--max-ppl", "--max-drop", "--criterion"))
def sweep_command(
    model: ModelArguments,
    arguments: SweepArguments,
    planning: PlanningArguments,
    calibration: ScoredCalibrationArguments,
    tracking: TrackingArguments,
    running: LimitedExecutionArguments,
) -> None:
    """Prune MODEL to several sizes; write a table, a plot, and the models on the Pareto front.

    --tokens auto chooses the tokens for every target of MACs. Any other --tokens is the same for all targets, and
    widths are cut for the rest of the way.

    The folder gets sweep.json, sweep.svg (quality against MACs and latency) and the models that no other one beats.
    """
    check_sweep(arguments, planning, calibration)
    calibration.evaluating.check()
    execution = running.load()
    planning = planning.with_width_multiple(arguments.build, execution)
    targets = [parse_target(text) for text in parse_target_list(arguments.targets)]
    folder = arguments.output or model.sibling("-sweep")
    peers = read_points(arguments.points) if arguments.points is not None else ()
    if arguments.plot is not None:
        check_picture(arguments.plot)
    analysis = planning.judging.apply(model.load())
    data = calibration.load(analysis, others=[calibration.evaluating.held_out])
    assert data is not None  # --calib is required
    folder.mkdir(exist_ok=True)
    table, plot = folder / "sweep.json", arguments.plot or folder / "sweep.svg"
    check_output_paths([table, plot], model.path, *calibration.sources(), arguments.points)
    evaluation = calibration.load_scored(analysis, planning.judging.task())
    request = SweepRequest(
        planning.budget(targets[0]) if planning.selection.roles else None,
        planning.reduction.tokens,
        planning.selection.method,
        evaluation,
        arguments.batch,
        arguments.iterations,
        planning.selection.effort,
    )
    builder = sweep_builder(arguments, data, execution)
    with tracking.run() as run:
        with execution.progress.stage("sweep", 1):
            result = sweep(analysis, targets, folder, data, request, builder=builder, execution=execution)
        write_json(result.to_json(), table)
        dense = result.points[0]
        if peers and dense.accuracy is None and dense.perplexity is None:
            tables.print_warning(f"{arguments.points}: not plotted: scores of others need --eval DATA --labels NAME")
            peers = ()
        write_sweep_plot(result, plot, peers)
        if run is not None:
            run.log_files(table, plot)
            run.log_sweep(result, models=tracking.models)
    tables.print_sweep(result)
    tables.print_line(f"written to {folder}: sweep.json and the models on the front; the plot is {plot}")
    written = [folder / p.files[0].name for p in result.points if p.front and p.files[0] != model.path]
    if written and arguments.build is None:
        print_next(TypedCommand("build", (str(written[0]),), (("--target", "ort"),)))


def sweep_builder(arguments: SweepArguments, calibration: Calibration, execution: Execution) -> SweepBuilder | None:
    """What every model is built into, with --build. UserError: what is built cannot be timed here."""
    target = arguments.build
    if target is None:
        return None
    precision, batch = arguments.precision or "fp32", arguments.batch

    def build(model: Path, output: Path) -> tuple[Path, ...]:
        return snpc.build(
            model, target, output, precision=precision, execution=execution, calibration=calibration, batch=batch
        ).files

    artifact = snpc.timed_artifact(
        target, precision=precision, execution=execution, calibration=calibration, batch=batch
    )
    return SweepBuilder(snpc.TARGETS[target].suffix, build, artifact)


def check_sweep(
    arguments: SweepArguments, planning: PlanningArguments, calibration: ScoredCalibrationArguments
) -> None:
    """Refuse options of ``prune`` that a sweep sets itself, and options that lack what they need."""
    for flag in planning.amount.given_flags:
        raise UserError(f"{flag}: a sweep goes through --targets; leave it out")
    if planning.selection.criterion is not None:
        raise UserError("--criterion: a sweep uses closed forms; leave it out")
    if arguments.precision is not None and arguments.build is None:
        raise UserError("--precision is for a build: give --build TARGET too, or leave it out")
    if calibration.calib is None:
        raise UserError("a sweep measures what goes: give --calib DATA")


def parse_target_list(text: str) -> list[str]:
    """``macs=0.9,0.8,params=0.5`` -> ``["macs=0.9", "macs=0.8", "params=0.5"]``."""
    targets: list[str] = []
    kind = ""
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        kind = name if equals else kind
        if not kind:
            raise UserError(f"--targets {text!r}: must look like macs=0.9,0.8")
        targets.append(f"{kind}={number}")
    return targets
