"""``snpc report``: files beside their original, as a page with charts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import snpc
from snpc.cli import tables
from snpc.cli.arguments import (
    FILE_PATH,
    ArgumentGroup,
    ExecutionArguments,
    JsonArguments,
    MetricArguments,
    ModelPath,
    ScoredCalibrationArguments,
    SizeArguments,
    WorkloadArguments,
    argument,
    check_output_paths,
    command,
    load_and_analyze,
    option,
    subgroup,
)
from snpc.report import PICTURE_SUFFIXES, check_picture
from snpc.runtime.execution import ARTIFACT_SUFFIXES, RandomInputs
from snpc.runtime.io import model_files


@dataclass(frozen=True)
class ReportModels(ArgumentGroup):
    """The original, and the files that were made of it."""

    original: Path = argument(type=ModelPath())
    files: tuple[Path, ...] = argument(nargs=-1, required=True, type=ModelPath())
    at: SizeArguments = subgroup()

    def inputs(self) -> set[Path]:
        """The files, and those of their weights, none of which may be overwritten."""
        models = [path for path in (self.original, *self.files) if path.suffix not in ARTIFACT_SUFFIXES]
        return {*self.files}.union(*map(model_files, models))


@dataclass(frozen=True)
class ReportOutput(ArgumentGroup):
    """The page, and how long files are timed for it."""

    section: ClassVar[str] = "Output"

    page: Path | None = option(
        "-o",
        "--output",
        type=FILE_PATH,
        metavar="HTML|SVG|PNG",
        help="The page to write, or its charts alone; .png needs snpc[plots].  [default: FILE-report.html]",
    )
    json: JsonArguments = subgroup()
    timing: bool = option("--timing/--no-timing", default=True, section="Running", help="Measure latencies too.")
    iterations: int = option(
        "--iterations",
        default=50,
        show_default=True,
        type=int,
        section="Running",
        help="Interleaved rounds that are timed.",
    )


@command("report")
def report_command(
    models: ReportModels,
    calibration: ScoredCalibrationArguments,
    judging: MetricArguments,
    output: ReportOutput,
    workload: WorkloadArguments,
    running: ExecutionArguments,
) -> None:
    """Show FILES beside ORIGINAL, of which they were made: what was cut where, what that cost, and how fast they are.

    FILES may be pruned, finetuned, built or quantized: .onnx, .ort and OpenVINO's .xml. What is not written in them is
    measured.

    \b
    snpc report model.onnx half.onnx --data calib.npz -o half.html
    snpc report model.onnx half.onnx tuned.onnx --data calib.npz --eval eval.npz --labels labels
    """
    page = output.page or models.files[0].with_name(f"{models.files[0].stem}-report.html")
    if page.suffix in PICTURE_SUFFIXES:
        check_picture(page)
    check_output_paths([page, output.json.json_path], *models.inputs(), *calibration.sources())
    calibration.evaluating.check()
    execution = running.load()
    with execution.progress.stage("analysis", 1):
        analysis = judging.apply(load_and_analyze(models.original, models.at))
        data = calibration.load(analysis, others=[calibration.evaluating.held_out])
        evaluation = calibration.load_scored(analysis, judging.task())
    with execution.progress.stage("comparison", 1):
        comparison = snpc.compare_files(
            analysis, models.files, calibration=data, evaluation=evaluation, execution=execution
        )
    timed = None
    if output.timing:
        timed = snpc.bench(
            [models.original, *models.files],
            RandomInputs(workload.batch or 1, models.at.input_shapes() or None, analysis.given_sizes),
            protocol=snpc.TimingProtocol(iterations=output.iterations),
            execution=replace(execution, threads=workload.threads or 0),
        )
    report = snpc.write_report(comparison, page, bench=timed)
    output.json.write({"snpc_comparison": 1, **report.to_json()})
    if not output.json.replaces_tables:
        tables.print_comparison(report)
        tables.print_line(f"written: {page}")
