"""``snpc prune``: score, plan, write and verify in one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import snpc
from snpc.cli import tables
from snpc.cli.advice import announce_cost, announce_plan, print_better_command, print_loss_first, print_next
from snpc.cli.arguments import (
    FILE_PATH,
    ArgumentGroup,
    JsonArguments,
    LimitedExecutionArguments,
    PlanningArguments,
    PruneBuildArguments,
    PrunedModelArguments,
    SavedStatisticsArguments,
    ScoredCalibrationArguments,
    TypedCommand,
    WorkloadArguments,
    check_output_paths,
    command,
    option,
    parse_precisions,
    subgroup,
)
from snpc.cli.commands.build import build_json
from snpc.cli.commands.plan import measured_shard, plan_from_arguments
from snpc.errors import UserError
from snpc.folders import (
    ModelFolder,
    ModelParts,
    OutputFolder,
    PrunedFolder,
    WholeVerdict,
    check_part_options,
    open_output_folder,
    single_model_folder,
)
from snpc.pipeline import ALL_TOKENS, PruningPlan, Stopwatch, check_labels, groups_json, run_stages
from snpc.report import PICTURE_SUFFIXES, check_picture, format_count
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import announce
from snpc.runtime.io import model_files
from snpc.targets import kept_vocabulary, vocabulary_path, write_vocabulary


@dataclass(frozen=True)
class PruneOutput(ArgumentGroup):
    """What a prune writes."""

    section: ClassVar[str] = "Output"

    output: str | None = option(
        "-o",
        "--output",
        metavar="FILE|FOLDER/",
        help="The pruned model, or folder, to write.  [default: MODEL-pruned.onnx, FOLDER-pruned]",
    )
    precisions: tuple[str, ...] = option(
        "--precisions",
        metavar="fp16,q8",
        callback=parse_precisions,
        help="Write a folder with the model at these precisions too: fp16, q8, int8, uint8, q4, q4f16, bnb4.",
    )
    plan_path: Path | None = option("--plan", type=FILE_PATH, help="Also write the plan.")
    json: JsonArguments = subgroup()
    page: Path | None = option(
        "--report",
        type=FILE_PATH,
        metavar="HTML|SVG|PNG",
        help="Also write a page with charts: one file that loads nothing. Or the charts alone; .png needs snpc[plots].",
    )
    dry_run: bool = option(
        "--dry-run", is_flag=True, help="Score and plan only: show what would be kept, write no model."
    )

    def place(self) -> Path | None:
        return Path(self.output) if self.output is not None else None

    def is_folder(self) -> bool:
        """Is a folder written even of one model?"""
        named = self.output is not None and (self.output.endswith("/") or Path(self.output).is_dir())
        return named or bool(self.precisions)

    def paths(self, model: Path, artifacts: list[Path]) -> list[Path | None]:
        """What will be written, apart from statistics. ``model``: where the pruned model goes."""
        written = [] if self.dry_run else [model, *artifacts]
        return [*written, self.plan_path, self.json.json_path, self.page]


@dataclass(frozen=True)
class OutputPlace:
    """Where the pruned model is written: a file, or a file of a new ``folder``."""

    path: Path
    folder: OutputFolder | None = None

    def publish(
        self, result: snpc.PrunedModel, execution: snpc.Execution
    ) -> tuple[snpc.PrunedModel, PrunedFolder | None]:
        """The result where it is for good."""
        if self.folder is None:
            return result, None
        published = self.folder.publish(result, execution)
        return published.model, published


@contextmanager
def output_place(
    model: PrunedModelArguments, output: PruneOutput
) -> Iterator[tuple[PrunedModelArguments, OutputPlace]]:
    """The model, of a folder its file, and where the pruned one goes."""
    source = model.folder()
    if source is None and not output.is_folder():
        yield model, OutputPlace(output.place() or model.sibling("-pruned.onnx"))
        return
    if source is None:
        source, default = single_model_folder(model.path, model.companions), model.sibling("-pruned")
    else:
        default = source.path.resolve().with_name(f"{source.path.resolve().name}-pruned")
    with open_output_folder(source, output.place() or default, output.precisions) as folder:
        yield model.of_folder(source), OutputPlace(folder.model_path, folder)


@command("prune")
def prune_command(
    model: PrunedModelArguments,
    planning: PlanningArguments,
    calibration: ScoredCalibrationArguments,
    statistics: SavedStatisticsArguments,
    output: PruneOutput,
    build: PruneBuildArguments,
    workload: WorkloadArguments,
    running: LimitedExecutionArguments,
) -> None:
    """Prune MODEL, write the result, verify what was written, and show before and after.

    MODEL may be a folder, as onnxruntime-genai, optimum and transformers.js load it: then a folder is written.

    \b
    snpc prune vit.onnx --target macs=0.7 --calib pictures/
    snpc prune bert.onnx --target macs=0.8 --calib sentences.jsonl
    snpc prune detector.onnx --max-drift 0.1 --calib data.npz
    snpc prune vit.onnx --tokens guided:20@3-9        (no data: tokens only)
    """
    observer, typed = model.dump.load(), TypedCommand.current()
    execution = replace(running.load(), observer=observer)
    stopwatch = Stopwatch(execution.progress)
    if output.dry_run:
        planning.check_predictable()
    calibration.evaluating.check()
    if output.dry_run and output.page is not None:
        raise UserError("--report shows the written file and --dry-run writes none: give one of the two")
    if output.page is not None and output.page.suffix in PICTURE_SUFFIXES:
        check_picture(output.page)
    with output_place(model, output) as (model, place):
        if place.folder is not None and place.folder.source.encoder is not None:
            both = PartsCommand(model, planning, calibration, statistics, output, execution, typed)
            both.check(place.folder.source, build)
            both.run(place.folder)
            return
        with stopwatch.stage("analyze"):
            analysis = planning.judging.apply(model.load(observer))
        if model.restricts:
            planning = planning.alone()
        artifacts = build.check(place.path, execution, calibration.calib is not None)
        artifacts += [vocabulary_path(place.path)] if model.vocabulary is not None else []
        inputs = [*model.files(), *calibration.sources(), *statistics.load_stats]
        check_output_paths([*output.paths(place.path, artifacts), statistics.save_stats], *inputs)
        with stopwatch.stage("calibration"):
            data = calibration.load(analysis, others=[calibration.evaluating.held_out])
            evaluation = calibration.load_scored(analysis, planning.judging.task())
        planning = planning.with_width_multiple(build.build, execution)
        artifact, shapes = None, None
        if planning.amount.wants_latency:
            artifact, shapes = build.timed_artifact(execution, data, workload.batch), model.at.input_shapes()
        timed = workload.load(artifact, shapes)
        request, writes = planning.request(timed), not output.dry_run
        check_labels(request.budget if request is not None else None, evaluation)
        announce(execution.progress, planning.stages(analysis, data, timed, writes=writes))
        announce_cost(analysis, data, planning, request, execution, writes=writes)
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
        result, folder = place.publish(
            snpc.apply(plan, place.path, stopwatch=stopwatch, evaluation=evaluation), execution
        )
    if output.plan_path is not None and result.search is not None:
        snpc.save_plan(result.plan, output.plan_path)
    kept = kept_vocabulary(plan.analysis.model)
    mapping = write_vocabulary(result.path, kept) if kept is not None else None
    if output.page is not None:
        snpc.write_report(result, output.page, plan=plan, command=typed.text())
    built = build.load(result.path, execution, data, workload.batch)
    extra = {**({"build": build_json(built)} if built else {}), **({"folder": folder.to_json()} if folder else {})}
    output.json.write({**snpc.json_report(result), **extra})
    if not output.json.replaces_tables:
        print_loss_first(result, plan, typed)
        tables.print_result(result)
        if mapping:
            tables.print_line(f"vocabulary: {mapping} has the new id of each old one")
        if folder:
            print_folder(folder)
        if built:
            tables.print_build(built)
    print_better_command(result, typed)
    print_next(TypedCommand("bench", (str(model.path), str(result.path)), ()))


@dataclass(frozen=True)
class PartsCommand:
    """The command where MODEL is a folder of an encoder and its decoder: both are cut."""

    model: PrunedModelArguments
    planning: PlanningArguments
    calibration: ScoredCalibrationArguments
    statistics: SavedStatisticsArguments
    output: PruneOutput
    execution: snpc.Execution
    typed: TypedCommand

    def check(self, source: ModelFolder, build: PruneBuildArguments) -> None:
        """Refuse options for one model."""
        amount, sizes = self.planning.amount, self.model.at
        check_part_options(
            source,
            {
                "--tokens": self.planning.reduction.schedule,
                "--last-logits": self.model.last_logits,
                "--target latency": amount.wants_latency,
                "--dim-param": sizes.dims,
                "--input-shapes": sizes.shapes,
                "--plan": self.output.plan_path,
                "--report": self.output.page,
                "--build": build.build,
                "--save-stats": self.statistics.save_stats,
                "--load-stats": self.statistics.load_stats,
                "--shard": self.statistics.shard,
                "--eval": self.calibration.evaluating.held_out,
                "--max-drop": amount.max_drop,
            },
        )

    def run(self, place: OutputFolder) -> None:
        parts = ModelParts.of(place.source)
        inputs = set().union(*(model_files(place.source.path / file) for file in place.source.cut))
        check_output_paths([self.output.json.json_path], *inputs, self.calibration.calib)
        data = self.calibration.load_whole(parts.inputs, parts.decoder)
        if self.output.dry_run:
            self.show_plans(parts, data)
            return
        pruned = parts.prune(place.encoder_path, place.model_path, data, self.prune_part, self.execution)
        folder = place.publish(pruned.decoder, self.execution, pruned.encoder, pruned.whole)
        assert folder.encoder is not None
        report = {**snpc.json_report(folder.model), "encoder": snpc.json_report(folder.encoder)}
        self.output.json.write({**report, "folder": folder.to_json()})
        if not self.output.json.replaces_tables:
            for result in (folder.encoder, folder.model):
                tables.print_result(result)
            print_whole(pruned.whole)
            print_folder(folder)

    def prune_part(self, path: Path, target: Path, data: Calibration | None) -> snpc.PrunedModel:
        """See ``PrunePart``."""
        stopwatch = Stopwatch(self.execution.progress)
        return snpc.apply(self.plan_part(path, data, stopwatch), target, stopwatch=stopwatch)

    def plan_part(self, path: Path, data: Calibration | None, stopwatch: Stopwatch) -> PruningPlan:
        companions = self.model.companions if path == self.model.path else ()
        with stopwatch.stage("analyze"):
            loaded = replace(self.model, path=path, companions=companions).load(self.execution.observer)
            analysis = self.planning.judging.apply(loaded)
        data = data if data is not None else self.calibration.load(analysis)
        planning = self.planning.with_width_multiple(None, self.execution)
        request, writes = planning.request(None), not self.output.dry_run
        announce(self.execution.progress, run_stages(analysis, data, request, ALL_TOKENS, writes=writes))
        announce_cost(analysis, data, planning, request, self.execution, writes=writes)
        plan = plan_from_arguments(analysis, data, planning, self.statistics, None, self.execution, stopwatch)
        announce_plan(plan, self.typed)
        return plan

    def show_plans(self, parts: ModelParts, data: Calibration | None) -> None:
        """What --dry-run shows: the decoder is planned on the states of the original encoder, since none is written."""
        behind = parts.decoder_data(data, parts.encoder, self.execution) if data is not None else None
        own = parts.reads.encoder_data(data) if data is not None else None
        stopwatch = Stopwatch(self.execution.progress)
        plans = {
            path.name: self.plan_part(path, of_part, stopwatch)
            for path, of_part in ((parts.encoder, own), (parts.decoder, behind))
        }
        groups = {name: groups_json(plan.slices) for name, plan in plans.items()}
        self.output.json.write({"dry_run": True, "groups": groups})
        if not self.output.json.replaces_tables:
            for plan in plans.values():
                tables.note_if_predicted(plan)
                tables.print_plan(plan.slices)


def print_whole(whole: WholeVerdict) -> None:
    """What holds of encoder and decoder together."""
    for check in whole.checks:
        tables.print_line(check)
    if whole.quality is not None:
        tables.print_line("encoder and decoder together:")
        tables.print_quality(whole.quality)


def print_folder(folder: PrunedFolder) -> None:
    """What went with the model, and what the configurations say now."""
    tables.print_line(f"folder: {folder.path}: {len(folder.copied)} other files copied")
    if folder.generation:
        tables.print_line(f"  {folder.generation}")
    for file, changes in folder.changed.items():
        tables.print_line(f"  {file}: {', '.join(changes)}")
    for file, reasons in folder.unsaid.items():
        tables.print_warning(f"{file}: {'; '.join(reasons)}")
    if folder.cache_offer:
        now, narrower = folder.cache_offer
        tables.print_note(
            f"key/value caches stay at {now:,} bytes per token: no genai_config.json says their width, and optimum "
            "and transformers.js take it from the number of heads. For a runtime that reads it from the graph, "
            f"--prune-kv-cache makes them about {narrower:,}: heads then lose the share that the rest lost"
        )
    for written in folder.precisions:
        size, place = format_count(written.path.stat().st_size), written.path.relative_to(folder.path)
        tables.print_line(f"  {place}: {size}B, outputs differ by {written.difference:.2g} ({written.compared})")
    if folder.conversions:
        names = ", ".join(map(str, folder.conversions))
        tables.print_note(f"left out, since they hold the dense model: {names}; the pruned one makes them again:")
        for command in folder.conversions.values():
            tables.print_step(command)


def show_plan(plan: PruningPlan, json: JsonArguments) -> None:
    """What --dry-run shows in place of a result."""
    tables.note_if_predicted(plan)
    json.write({"dry_run": True, "groups": groups_json(plan.slices), "options": dict(plan.slices.options)})
    if not json.replaces_tables:
        tables.print_plan(plan.slices)
