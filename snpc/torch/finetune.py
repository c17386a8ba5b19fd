"""Finetuning: the weights of a pruned model are trained towards the outputs of the dense model that it came from.

The result is written as the same graph under the same names, with other numbers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snpc.errors import CheckFailed, UserError
from snpc.passes import Analysis, analyze
from snpc.pipeline import measure_quality, quality_json, verification_data
from snpc.planning import compact_json
from snpc.runtime.calibration import Calibration, count_held_out
from snpc.runtime.closed_form import residual_values
from snpc.runtime.evaluation import (
    OutputMetrics,
    check_structure,
    measure_differences,
    rounding_tolerance,
    run_batches,
    with_metrics,
)
from snpc.runtime.io import check_target, load, model_files, publish_files, refuse_branches, staging_folder
from snpc.torch.interface import check_same_interface, check_same_shapes
from snpc.torch.module import GraphModule
from snpc.torch.operators import to_tensor
from snpc.torch.training import (
    Batch,
    CheckpointFile,
    CheckpointOptions,
    Sparsifier,
    Sparsity,
    Teacher,
    TeacherOutputs,
    TrainingCallback,
    TrainingHooks,
    TrainingOptions,
    TrainingResult,
    Worker,
    add_adapters,
    copy_gathered_weights,
    cross_entropy,
    distillation_loss,
    distributed_worker,
    hold_out,
    load_labels,
    mean_squares,
    merge_adapters,
    open_checkpoint,
    reinitialize,
    run_fingerprint,
    sample_ids,
    shard_batches,
    shuffle_samples,
    skip_batches,
    teacher_function,
    train,
    wait_for_workers,
)
from snpc.torch.write_back import write_trained
from snpc.types import AnyArray, Feeds, IntArray, Model, Quality

GPU_TOLERANCE = 1e-3  # relative difference of outputs that is rounding, between a GPU and onnxruntime on a CPU


@dataclass(frozen=True)
class FinetuneResult:
    """A written file, and how far it is from the teacher.

    ``before`` and ``after``: how close the pruned and the finetuned file are to the teacher, all run by onnxruntime.
    ``structure``: what was checked of the written file. ``sparsity``: how many weights in it are zero.
    ``hidden``: values of the residual stream that were part of the loss.
    """

    path: Path
    trained: TrainingResult
    before: Quality
    after: Quality
    structure: tuple[str, ...]
    sparsity: Sparsity
    hidden: tuple[str, ...]
    training: TrainingOptions
    seconds: float

    @property
    def helped(self) -> bool:
        """Were any weights better than those that training began with? Else the latter are written."""
        return self.trained.best_step != 0


def finetune(
    pruned: Path,
    teacher: Path,
    data: Calibration,
    output: Path,
    *,
    training: TrainingOptions | None = None,
    labels: Path | AnyArray | None = None,
    checkpoints: CheckpointOptions | None = None,
    on_progress: TrainingCallback | None = None,
) -> FinetuneResult | None:
    """Train the weights of ``pruned`` on ``data`` towards the outputs of ``teacher``, and write them to ``output``.

    ``teacher`` is the dense file that ``pruned`` was made from. Weights are judged on samples that are not trained on
    (``data.held_out``, else a tenth of ``data``; of fewer than 16 samples on all), and the best ones are written, those
    of ``pruned`` included. ``labels``, one per sample of the data's source, are
    for the losses with "ce" only. Under torchrun every process calls this: the main one writes and returns the result,
    the others return None. Raises UserError for a model that cannot be trained, CheckFailed where the written file
    differs from the trained module.
    """
    training = training or TrainingOptions()
    start = time.perf_counter()
    check_target(output, *model_files(pruned), *model_files(teacher))
    student, dense = load(pruned), with_metrics(analyze(load(teacher)), training.metric or None)
    refuse_branches(student, "finetuning")
    check_same_interface(student, dense.model)
    classes = task_labels(training, labels, data)
    with distributed_worker() as worker:
        check_worker(worker, data, training)
        task = prepare_task(student, dense, data, training, classes, worker)
        checkpoint_file = None
        if checkpoints is not None:
            label_digest = None if classes is None else hashlib.sha256(classes.tobytes()).hexdigest()
            digests = (student.digest, dense.model.digest)
            run_id = run_fingerprint(data, *digests, training, label_digest, worker.world_size)
            checkpoint_file = open_checkpoint(checkpoints, run_id)
            wait_for_workers(worker)
        trained = run_training(task, checkpoint_file, on_progress)
        if training.sharded:
            task = gather_task(task, student)
        if not worker.is_main:
            return None
        structure = write_verified(task, student, output, finetuning_provenance(task, trained))
    before, after = measure_before_and_after(task, pruned, output)
    sparsity = Sparsity.of(task.module.parameters())
    seconds = time.perf_counter() - start
    return FinetuneResult(output, trained, before, after, structure, sparsity, task.hidden, training, seconds)


# -- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneTask:
    """All that a training run needs; also its source of batches.

    ``held_out``: data that is not trained on, None where there is too little. ``outputs`` and ``hidden``: names of the
    values that the loss compares. ``scales``: mean square of each of them in the teacher.
    """

    module: GraphModule
    teacher: Teacher
    dense: Analysis
    data: Calibration
    held_out: Calibration | None
    training: TrainingOptions
    labels: IntArray | None
    outputs: tuple[str, ...]
    hidden: tuple[str, ...]
    scales: dict[str, float]
    worker: Worker

    @property
    def steps_per_epoch(self) -> int:
        plan = shuffle_samples(self.data, (self.training.seed, 0), self.training.batch).batch_plan
        return sum(sum(map(len, pieces)) >= self.worker.world_size for pieces in plan)

    @property
    def steps(self) -> int:
        return self.training.steps or self.training.epochs * self.steps_per_epoch

    def epoch(self, number: int, first: int) -> Iterator[Batch]:
        """This process's part of every batch of epoch ``number``, from batch ``first`` on."""
        shuffled = shuffle_samples(self.data, (self.training.seed, number), self.training.batch)
        shard, weights = shard_batches(shuffled, self.worker.rank, self.worker.world_size)
        shard = skip_batches(shard, first)
        for ids, feeds, weight in zip(sample_ids(shard), shard.batches(), weights[first:], strict=True):
            targets = self.teacher(ids, feeds) if self.training.uses_teacher else {}
            labels = None if self.labels is None else torch.from_numpy(self.labels[ids])
            yield Batch(self.to_tensors(feeds), targets, labels, weight)

    def to_tensors(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        return {name: to_tensor(array).to(self.worker.device) for name, array in feeds.items()}


def prepare_task(
    student: Model,
    dense: Analysis,
    data: Calibration,
    training: TrainingOptions,
    labels: IntArray | None,
    worker: Worker,
) -> FinetuneTask:
    outputs = loss_output_names(student, training)
    hidden_candidates = hidden_state_names(student, dense) if training.layerwise else ()
    module = GraphModule(student, watch=hidden_candidates).to(worker.device)
    check_float32(module, student)
    teacher = Teacher(teacher_function(dense, (*outputs, *hidden_candidates), worker.device), worker.device)
    feeds = next(data.batches())
    expected = teacher.run(feeds)
    with torch.no_grad():
        values = module({name: to_tensor(array).to(worker.device) for name, array in feeds.items()})
    check_same_shapes(student, dense.model, {name: (values[name].shape, expected[name].shape) for name in outputs})
    hidden = tuple(name for name in hidden_candidates if values[name].shape == expected[name].shape)
    if training.layerwise and not hidden:
        raise UserError(
            f"{student.path}: no value of the residual stream is as wide as the teacher's: leave out --layerwise"
        )
    if set(hidden) != set(hidden_candidates):
        module = GraphModule(student, watch=hidden).to(worker.device)
        teacher = Teacher(teacher_function(dense, (*outputs, *hidden), worker.device), worker.device)
    train_on, held_out = split_held_out(data, training)
    if training.reinit != "none":
        reinitialize(module, student, training.seed)
        module.to(worker.device)
    scales = mean_squares(expected)
    task = FinetuneTask(module, teacher, dense, train_on, held_out, training, labels, outputs, hidden, scales, worker)
    if training.reinit == "budget":
        macs_ratio = dense.cost.macs / analyze(student, dense.dim_sizes).cost.macs
        task = replace(task, training=replace(training, steps=round(task.steps * macs_ratio)))
    if task.training.uses_teacher and task.steps * training.batch > data.samples:
        teacher.fill_cache(data)
    return task


def split_held_out(data: Calibration, training: TrainingOptions) -> tuple[Calibration, Calibration | None]:
    """(data to train on, data to evaluate on); all of it to train on where it is too little."""
    if data.held_out is not None:
        return data, data.held_out
    batch = data.sample_axes.batch_size
    samples = count_held_out(data.samples, data.samples, data.samples, batch)
    return hold_out(data, samples, training.seed) if samples else (data, None)


def check_float32(module: GraphModule, student: Model) -> None:
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for _, w in module.weights() if w.dtype != torch.float32})
    if dtypes:
        raise UserError(f"{student.path}: it has weights in {', '.join(dtypes)}: prune and train a float32 export")


def loss_output_names(student: Model, training: TrainingOptions) -> tuple[str, ...]:
    """The outputs that the loss compares: those named in the options, else the logits; for "mse" every float output."""
    floats = [spec.name for spec in student.outputs if spec.dtype.kind == "f"]
    unknown = [name for name in training.outputs if name not in floats]
    if unknown:
        raise UserError(f"{student.path}: it has no float output {unknown[0]}; there is {', '.join(floats)}")
    logits = [name for name in floats if "logit" in name.lower()]
    names = training.outputs or (floats if training.loss == "mse" or len(floats) == 1 else logits)
    if not names:
        raise UserError(
            f"{student.path}: which of {', '.join(floats) or 'no float outputs'} are logits? Name them "
            "(--output-name), or give --loss mse"
        )
    return tuple(names)


def hidden_state_names(student: Model, dense: Analysis) -> tuple[str, ...]:
    """Values of the residual stream that both models have."""
    student_values = {str(v.name) for node in student.graph.graph for v in node.outputs}
    return tuple(name for name in residual_values(dense) if name in student_values)


def task_labels(training: TrainingOptions, labels: Path | AnyArray | None, data: Calibration) -> IntArray | None:
    if training.uses_labels != (labels is not None):
        raise UserError(f"loss {training.loss}: " + ("give --labels" if training.uses_labels else "leave out --labels"))
    return None if labels is None else load_labels(labels, data)


def check_worker(worker: Worker, data: Calibration, training: TrainingOptions) -> None:
    if training.sharded and worker.world_size == 1:
        raise UserError("weights are sharded between processes, and this is one: start several with torchrun")
    if worker.world_size > 1 and data.sample_axes.batch_size:
        raise UserError(
            f"{data.source}: a model whose batch size is fixed at {data.sample_axes.batch_size} cannot share batches "
            "between processes: export it with a dynamic batch, or run one process"
        )


# -- training and writing --------------------------------------------------------------------------------------------


def run_training(
    task: FinetuneTask, checkpoint_file: CheckpointFile | None, on_progress: TrainingCallback | None
) -> TrainingResult:
    """Train the task's module in place: all of its weights, or adapters that are merged into them at the end."""
    training = task.training
    held_out_loss = HeldOutLoss(task)
    evaluate: Callable[[torch.nn.Module], float] = held_out_loss
    if training.sparsify:
        with torch.no_grad():
            evaluate = Sparsifier(held_out_loss, held_out_loss(task.module) + training.sparsify)
    adapters = add_adapters(task.module, training.adapters, training.seed) if training.adapters else None
    trained = train(
        task.module,
        distillation_loss(training, task.outputs, task.hidden, task.scales),
        task,
        training,
        worker=task.worker,
        parameters=list(adapters.parameters()) if adapters is not None else None,
        hooks=TrainingHooks(evaluate, checkpoint_file, on_progress, keep_best=not training.sparsify),
    )
    if adapters is not None:
        merge_adapters(task.module, adapters)
    return trained


def gather_task(task: FinetuneTask, student: Model) -> FinetuneTask:
    """The task with a module that holds whole weights, gathered from all processes."""
    module = GraphModule(student, watch=task.hidden).to(task.worker.device)
    copy_gathered_weights(task.module, module)
    return replace(task, module=module)


class HeldOutLoss:
    """How bad a module's outputs are on the held-out data, or on the data that it is trained on where there is none.

    Labels count by their cross entropy, as in the loss; else the distance from the teacher's outputs counts, each
    output's by its own metric, which is also what the quality of the written file is measured by.
    """

    def __init__(self, task: FinetuneTask) -> None:
        self.task, self.data = task, task.held_out or task.data
        metrics = OutputMetrics.of(task.dense)
        self.metrics = metrics if any(metrics[name].judged for name in task.outputs) else OutputMetrics()
        self.expected = [self.outputs_of(task.teacher.run(feeds)) for feeds in self.data.batches()]

    def __call__(self, module: torch.nn.Module) -> float:
        total = 0.0
        for ids, feeds, expected in zip(sample_ids(self.data), self.data.batches(), self.expected, strict=True):
            values = module(self.task.to_tensors(feeds))
            total += len(ids) * self.loss_of(values, expected, ids)
        return total / self.data.samples

    def loss_of(self, values: TeacherOutputs, expected: Mapping[str, AnyArray], ids: IntArray) -> float:
        task = self.task
        if task.labels is None:
            return self.metrics.change(expected, self.outputs_of(values))
        labels = torch.from_numpy(task.labels[ids]).to(task.worker.device)
        return float(np.mean([float(cross_entropy(values[name], labels).mean()) for name in task.outputs]))

    def outputs_of(self, values: TeacherOutputs) -> dict[str, AnyArray]:
        return {name: values[name].detach().float().cpu().numpy() for name in self.task.outputs}


def finetuning_provenance(task: FinetuneTask, trained: TrainingResult) -> dict[str, str]:
    """How a model was finetuned, as ``write_provenance`` takes it. ``options`` are those without their default value,
    ``best_step`` is the step whose weights were written."""
    default, teacher = asdict(TrainingOptions()), task.dense.model
    options = {name: value for name, value in asdict(task.training).items() if value != default[name]}
    return {
        "step": "finetune",
        "steps": str(trained.steps),
        "best_step": "" if trained.best_step is None else str(trained.best_step),
        "loss": task.training.loss,
        "options": compact_json(options) if options else "",
        "teacher": teacher.source.name,
        "teacher_sha256": teacher.digest,
        "calibration": task.data.describe(),
    }


def write_verified(task: FinetuneTask, student: Model, output: Path, entries: Mapping[str, str]) -> tuple[str, ...]:
    """Write the weights into a staging folder, and rename the file into place once onnxruntime computes from it what
    the module computes. Returns what was checked. Raises CheckFailed where they differ."""
    with staging_folder(output) as folder:
        staged = folder / output.name
        write_trained(task.module, student, staged, entries)
        structure = check_structure(student.path, staged)
        check_outputs(task, staged)
        publish_files([staged], output)
    return (*structure, "the written file computes what the trained module computes")


def check_outputs(task: FinetuneTask, path: Path) -> None:
    """Compare a file with the module on one batch."""
    feeds = next((task.held_out or task.data).batches())
    with torch.no_grad():
        outputs = task.module(task.to_tensors(feeds))
    names = [spec.name for spec in task.dense.model.outputs if spec.dtype.kind == "f"]
    expected = {name: outputs[name].float().cpu().numpy() for name in names}
    written = run_batches(path, [feeds])[0]
    tolerance = rounding_tolerance(task.dense.model)
    if task.worker.device.type != "cpu":
        tolerance = max(tolerance, GPU_TOLERANCE)
    for difference in measure_differences(expected, {name: written[name] for name in names}):
        if difference.relative > tolerance:
            raise CheckFailed(
                f"output {difference.output}: the written file differs from the trained module by "
                f"{difference.relative:.1e}"
            )


def measure_before_and_after(task: FinetuneTask, pruned: Path, output: Path) -> tuple[Quality, Quality]:
    """How close the pruned and the finetuned file are to the teacher, on held-out data where there is any."""
    data = verification_data(task.dense, replace(task.data, held_out=task.held_out))
    before, after = measure_quality(task.dense, (pruned, output), data)
    return before, after


def finetune_json(result: FinetuneResult) -> dict[str, Any]:
    """The content of ``--json``. Its keys are an interface."""
    trained = result.trained
    return {
        "snpc_finetune": 1,
        "output": str(result.path),
        "steps": trained.steps,
        "loss": {"first": trained.losses[0], "last": trained.losses[-1]} if trained.losses else None,
        "held_out_drift": trained.drift,
        "options": asdict(result.training),
        "hidden": list(result.hidden),
        "best_step": trained.best_step,
        "sparsity": result.sparsity._asdict(),
        "helped": result.helped,
        "before": quality_json(result.before),
        "after": quality_json(result.after),
        "structure": list(result.structure),
        "seconds": {"training": round(trained.seconds, 2), "all": round(result.seconds, 2)},
    }
