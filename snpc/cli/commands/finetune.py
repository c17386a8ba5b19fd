"""``snpc finetune`` and ``snpc export-torch``: what needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import snpc
from snpc.cli import tables
from snpc.cli.advice import print_next
from snpc.cli.arguments import (
    FILE_PATH,
    ArgumentGroup,
    CheckpointArguments,
    JsonArguments,
    ModelArguments,
    ModelPath,
    QuietArguments,
    ScheduleArguments,
    SizeArguments,
    TrackingArguments,
    TrainingArguments,
    TrainingDataArguments,
    TypedCommand,
    argument,
    check_output_paths,
    command,
    import_torch_package,
    load_and_analyze,
    option,
    subgroup,
)
from snpc.cli.progress import print_round, training_progress
from snpc.errors import UserError
from snpc.planning import parse_target
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import EvaluationData
from snpc.runtime.io import model_files

if TYPE_CHECKING:  # these need torch, or MLflow
    from snpc.integrations import TrackedRun
    from snpc.torch import CheckpointOptions, TrainingOptions, TrainingProgress


MAX_TRAINING_HELD_OUT = 1024  # samples: weights are judged on them many times


@dataclass(frozen=True)
class FinetuneModels(ArgumentGroup):
    """The model to train, and its teacher."""

    pruned: Path = argument(type=ModelPath())
    teacher: Path = option(
        "--teacher", type=FILE_PATH, required=True, section="Inputs", help="The dense model that PRUNED was made from."
    )

    at: SizeArguments = subgroup()

    @property
    def are_one(self) -> bool:
        """Is the model to prune the dense one itself?"""
        return self.pruned.resolve() == self.teacher.resolve()


@dataclass(frozen=True)
class FinetuneOutput(ArgumentGroup):
    """What a finetuning writes."""

    section: ClassVar[str] = "Output"

    output: Path | None = option(
        "-o", "--output", type=FILE_PATH, help="The finetuned model to write.  [default: PRUNED-tuned.onnx]"
    )
    plan_path: Path | None = option("--plan", type=FILE_PATH, help="With --learn-masks: also write the plan.")
    json: JsonArguments = subgroup()
    tracking: TrackingArguments = subgroup()


@dataclass(frozen=True)
class FinetuneRun:
    """What all ways of training need: models, data, options, and where the result goes."""

    models: FinetuneModels
    data: Calibration
    training: TrainingOptions
    checkpoint: CheckpointOptions | None
    target: Path
    output: FinetuneOutput
    tracked: TrackedRun | None = None

    def write(self, report: Mapping[str, Any]) -> None:
        """The report as JSON, and to MLflow with the plan, and with the model where that is asked for."""
        self.output.json.write(report)
        if self.tracked is not None:
            models = sorted(model_files(self.target)) if self.output.tracking.models else []
            self.tracked.log_report(report)
            self.tracked.log_files(*([self.output.plan_path] if self.output.plan_path is not None else []), *models)

    @contextmanager
    def progress(self) -> Iterator[Callable[[TrainingProgress], None]]:
        """Shows training steps, and logs them where that is asked for."""
        with training_progress() as show:
            callbacks = [show] if self.tracked is None else [show, self.tracked.log_step]

            def report(now: TrainingProgress) -> None:
                for callback in callbacks:
                    callback(now)

            yield report


@command("finetune")
def finetune_command(
    models: FinetuneModels,
    inputs: TrainingDataArguments,
    arguments: TrainingArguments,
    pruning: ScheduleArguments,
    checkpoint: CheckpointArguments,
    output: FinetuneOutput,
    printing: QuietArguments,
) -> None:
    """Train PRUNED towards the outputs of the dense model, and write it under the same names.

    No labels are needed. Under torchrun, processes share every batch.
    """
    import_torch_package()
    target = output.output or models.pruned.with_name(f"{models.pruned.stem}-tuned.onnx")
    training, saved = arguments.load(inputs.seed), checkpoint.load()
    check_output_paths(
        [target, output.json.json_path, output.plan_path],
        *model_files(models.pruned),
        *model_files(models.teacher),
        inputs.calib,
        pruning.held_out,
    )
    analysis = load_and_analyze(models.teacher, models.at)
    inputs.text.check(inputs.calib, pruning.held_out)
    calibration = inputs.as_calibration(training.batch)
    data = calibration.load_data(inputs.calib, analysis, MAX_TRAINING_HELD_OUT)
    with output.tracking.run() as tracked:
        run = FinetuneRun(models, data, training, saved, target, output, tracked)
        pruning.check_unused()
        if pruning.schedule is not None:
            evaluation = None
            if pruning.held_out is not None:
                evaluation = calibration.load_evaluation(pruning.held_out, inputs.labels, analysis)
            check_schedule(pruning, models, inputs.labels, evaluation, output.plan_path)
            prune_on_schedule(run, pruning, evaluation)
        elif pruning.masks is not None:
            if not models.are_one or inputs.labels is not None:
                raise UserError("--learn-masks cuts the dense model: give it as --teacher too, and no labels")
            if arguments.lr is None:
                run = replace(run, training=with_mask_learning_rate(training))
            learn_masks_and_prune(analysis, run, pruning)
        elif pruning.target is not None or output.plan_path is not None:
            raise UserError(
                "--target and --plan are for --learn-masks and --schedule: cut with `snpc prune`, then finetune"
            )
        else:
            finetune_only(run, inputs.labels)


def finetune_only(run: FinetuneRun, labels: str | None) -> None:
    """Train the weights as they are cut."""
    from snpc.torch import finetune, finetune_json

    with run.progress() as report:
        result = finetune(
            run.models.pruned,
            run.models.teacher,
            run.data,
            run.target,
            training=run.training,
            labels=Path(labels) if labels else None,
            checkpoints=run.checkpoint,
            on_progress=report,
        )
    if result is None:
        return  # one of several processes, and not the one that writes
    run.write(finetune_json(result))
    if not run.output.json.replaces_tables:
        tables.print_finetuned(result)
    print_next(TypedCommand("bench", (str(run.models.teacher), str(run.target)), ()))


# -- pruning in rounds -----------------------------------------------------------------------------------------------


def check_schedule(
    pruning: ScheduleArguments,
    models: FinetuneModels,
    labels: str | None,
    evaluation: EvaluationData | None,
    plan_path: Path | None,
) -> None:
    """Refuse what does not go together with a schedule, and limits without the data that they are judged on."""
    if not models.are_one or pruning.masks is not None or plan_path is not None:
        raise UserError("--schedule cuts the dense model: give it as --teacher too, and no masks or --plan")
    drift, drop = pruning.max_drift, pruning.max_drop
    if pruning.schedule == "cubic" and (drift, drop, evaluation, labels) != (None,) * 4:
        raise UserError("--max-drift, --max-drop, --eval and --labels are for --schedule adaptive")
    if pruning.schedule == "adaptive" and (drift is None) == (drop is None):
        raise UserError("--schedule adaptive takes --max-drift, or --max-drop with --eval and --labels")
    if (drop is not None) != (evaluation is not None and labels is not None) or (drop is None and labels is not None):
        raise UserError("--max-drop is judged on --eval DATA --labels NAME: give all three, or --max-drift")


def prune_on_schedule(run: FinetuneRun, pruning: ScheduleArguments, evaluation: EvaluationData | None) -> None:
    """Prune and train in rounds."""
    from snpc.torch import AccuracyDrop, DriftLimit, Rounds, prune_adaptively, prune_in_rounds

    schedule = Rounds(
        target=pruning.target or "macs",
        count=pruning.rounds or 4,
        method="select" if pruning.criterion else None,
        criterion=pruning.criterion,
        training=run.training,
        checkpoints=run.checkpoint,
    )
    source = run.models.pruned
    if pruning.schedule == "cubic":
        rounds = prune_in_rounds(source, run.data, run.target, schedule, on_round=print_round)
    else:
        objective: DriftLimit | AccuracyDrop
        if evaluation is not None and pruning.max_drop is not None:
            objective = AccuracyDrop(pruning.max_drop / 100, run.models.teacher, evaluation)
        else:
            assert pruning.max_drift is not None  # check_schedule
            objective = DriftLimit(pruning.max_drift)
        rounds = prune_adaptively(source, run.data, run.target, schedule, objective, on_round=print_round)
    reports = [asdict(r) for r in rounds]
    if run.tracked is not None:
        for index, report in enumerate(reports):
            run.tracked.log_numbers({name: n for name, n in report.items() if isinstance(n, int | float)}, index)
    run.write({"snpc_rounds": 1, "output": str(run.target), "rounds": reports})


# -- learned masks ---------------------------------------------------------------------------------------------------


def with_mask_learning_rate(training: TrainingOptions) -> TrainingOptions:
    """The same options with the learning rate of masks, which is higher than that of weights."""
    from snpc.torch import MASK_LEARNING_RATE

    return replace(training, lr=MASK_LEARNING_RATE)


def learn_masks_and_prune(analysis: snpc.Analysis, run: FinetuneRun, pruning: ScheduleArguments) -> None:
    """Train masks, plan by them, and write the pruned model, as `snpc prune` writes and shows it."""
    from snpc.torch import learn_masks

    budget = snpc.Budget(target=parse_target(pruning.target or "macs"))
    if pruning.roles is not None:
        budget = replace(budget, roles=pruning.roles)
    with run.progress() as report:
        learned = learn_masks(
            analysis,
            run.data,
            str(pruning.masks),
            budget,
            training=run.training,
            checkpoints=run.checkpoint,
            on_progress=report,
        )
    output = run.output
    if output.plan_path is not None:
        snpc.save_plan(learned.plan, output.plan_path)
    result = snpc.apply(snpc.PruningPlan(learned.plan, calibration=run.data), run.target)
    run.write(snpc.json_report(result))
    if not output.json.replaces_tables:
        tables.print_result(result)


# -- export-torch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportOutput(ArgumentGroup):
    """Where the exported files go."""

    section: ClassVar[str] = "Output"

    output: Path | None = option(
        "-o", "--output", type=FILE_PATH, help="Folder for both files.  [default: MODEL without its suffix]"
    )


@command("export-torch")
def export_torch_command(model: ModelArguments, output: ExportOutput) -> None:
    """Write the weights of MODEL as safetensors, and the widths of its layers as JSON."""
    import_torch_package()
    from snpc.torch import export_tensors

    for path in export_tensors(model.path, output.output or model.path.with_suffix("")):
        tables.print_line(str(path))
