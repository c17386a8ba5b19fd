"""Finetune a pruned graph against the dense one that it came from, and write it under the same names."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from snpc.errors import CheckFailed, UserError
from snpc.passes.analyze import Analysis, analyze
from snpc.pipeline.verify import verification_batches
from snpc.runtime.calibration.dataset import Calibration
from snpc.runtime.closed_form.stages import residual_values
from snpc.runtime.evaluation.compare import (
    check_structure,
    compare_models,
    measure_differences,
    rounding_tolerance,
    run_batches,
)
from snpc.runtime.io.atomic import check_target, discard_model, external_data_path, rename_into_place
from snpc.runtime.io.load import load, model_files
from snpc.torch.module import GraphModule
from snpc.torch.operators.registry import to_tensor
from snpc.torch.training.adapters import add_adapters, merge_adapters
from snpc.torch.training.checkpoints import CheckpointFile, CheckpointOptions, open_checkpoint, run_fingerprint
from snpc.torch.training.distributed import Worker, distributed_worker, wait_for_workers
from snpc.torch.training.fsdp import copy_gathered_weights
from snpc.torch.training.labels import load_labels
from snpc.torch.training.loop import TrainingResult, train
from snpc.torch.training.losses import Batch, distillation_loss
from snpc.torch.training.options import TrainingCallback, TrainingOptions
from snpc.torch.training.reinitialize import reinitialize
from snpc.torch.training.sampling import hold_out, sample_ids, shard_batches, shuffle_samples, skip_batches
from snpc.torch.training.teacher import Teacher, TeacherOutputs, mean_squares, relative_drift, teacher_function
from snpc.torch.write_back import save_graph_module
from snpc.types import AnyArray, Difference, Feeds, IntArray, Model

HELD_OUT_FRACTION = 0.1  # share of the data that early stopping holds out


@dataclass(frozen=True)
class FinetuneResult:
    """A written file. ``before`` and ``after``: the pruned and the tuned file against the teacher, run by onnxruntime
    on ``compared``; ``hidden``: the values of the residual stream that the loss looked at."""

    path: Path
    trained: TrainingResult
    before: tuple[Difference, ...]
    after: tuple[Difference, ...]
    compared: str
    structure: tuple[str, ...]
    hidden: tuple[str, ...]
    training: TrainingOptions
    seconds: float


def finetune(
    pruned: Path,
    teacher: Path,
    data: Calibration,
    target: Path,
    *,
    training: TrainingOptions | None = None,
    labels: Path | AnyArray | None = None,
    saved: CheckpointOptions | None = None,
    report: TrainingCallback | None = None,
) -> FinetuneResult | None:
    """Train the weights of ``pruned`` on ``data`` towards what ``teacher`` says, and write them to ``target``.

    ``teacher`` is the dense file that ``pruned`` was made from; ``labels``, one per sample of the data's source, are
    for the losses with "ce" only. Under torchrun every process calls this; the first writes and returns, the others
    return None. Raises UserError for what cannot be trained, CheckFailed where the file is not what was trained.
    """
    training = training or TrainingOptions()
    start = time.perf_counter()
    for path in (target, external_data_path(target)):
        check_target(path, *model_files(pruned), *model_files(teacher))
    student, dense = load(pruned), analyze(load(teacher))
    check_same_interface(student, dense.model)
    known = task_labels(training, labels, data)
    with distributed_worker() as place:
        check_worker(place, data, training)
        task = prepare_task(student, dense, data, training, known, place)
        checkpoints = None
        if saved is not None:
            said = None if known is None else hashlib.sha256(known.tobytes()).hexdigest()
            run = run_fingerprint(data, student.digest, dense.model.digest, training, said, place.world_size)
            checkpoints = open_checkpoint(saved, run)
            wait_for_workers(place)
        trained = run_training(task, checkpoints, report)
        if training.sharded:
            task = gather_task(task, student)
        if not place.is_main:
            return None
        structure = write_verified(task, pruned, target)
    before, after, compared = measure_drift(task, pruned, target)
    seconds = time.perf_counter() - start
    return FinetuneResult(target, trained, before, after, compared, structure, task.hidden, training, seconds)


# -- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneTask:
    """A run made ready. ``held``: data that nothing is trained on, None without early stopping."""

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

    def epoch(self, number: int, first: int) -> Iterator[Batch]:
        order = shuffle_samples(self.data, (self.training.seed, number), self.training.batch)
        mine, weights = shard_batches(order, self.worker.rank, self.worker.world_size)
        mine = skip_batches(mine, first)
        for ids, feeds, weight in zip(sample_ids(mine), mine.batches(), weights[first:], strict=True):
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
    place: Worker,
) -> FinetuneTask:
    outputs = loss_output_names(student, training)
    wanted = hidden_state_names(student, dense) if training.layerwise else ()
    module = GraphModule(student, watch=wanted).to(place.device)
    half = sorted({str(w.dtype).removeprefix("torch.") for _, w in module.weights() if w.dtype != torch.float32})
    if half:
        raise UserError(f"{student.path}: it has weights in {', '.join(half)}: prune and train a float32 export")
    teacher = Teacher(teacher_function(dense, (*outputs, *wanted), place.device), place.device)
    feeds = next(data.batches())
    said = teacher.run(feeds)
    with torch.no_grad():
        found = module({name: to_tensor(array).to(place.device) for name, array in feeds.items()})
    hidden = tuple(name for name in wanted if found[name].shape == said[name].shape)
    if training.layerwise and not hidden:
        raise UserError(
            f"{student.path}: no value of the residual stream is as wide as the teacher's: leave out --layerwise"
        )
    if set(hidden) != set(wanted):
        module = GraphModule(student, watch=hidden).to(place.device)
        teacher = Teacher(teacher_function(dense, (*outputs, *hidden), place.device), place.device)
    train_on, held = data, None
    if training.early_stop:
        train_on, held = hold_out(
            data, max(data.sample_axes.batch_size or 1, round(HELD_OUT_FRACTION * data.samples)), training.seed
        )
    if training.reinit != "none":
        reinitialize(module, student, training.seed)
        module.to(place.device)
    task = FinetuneTask(
        module, teacher, dense, train_on, held, training, labels, outputs, hidden, mean_squares(said), place
    )
    if training.reinit == "budget":
        longer = dense.cost.macs / analyze(student, dense.dim_sizes).cost.macs
        steps = round((training.steps or training.epochs * task.steps_per_epoch) * longer)
        training = replace(training, steps=steps)
        task = replace(task, training=training)
    visits = (training.steps or training.epochs * task.steps_per_epoch) * training.batch
    if training.uses_teacher and visits > data.samples:
        teacher.fill_cache(data)
    return task


def loss_output_names(student: Model, training: TrainingOptions) -> tuple[str, ...]:
    """The outputs that the loss looks at: those named, else the logits, for "mse" every float one."""
    floats = [spec.name for spec in student.outputs if spec.dtype.kind == "f"]
    unknown = [name for name in training.outputs if name not in floats]
    if unknown:
        raise UserError(f"{student.path}: it has no float output {unknown[0]}; there is {', '.join(floats)}")
    logits = [name for name in floats if "logit" in name.lower()]
    found = training.outputs or (floats if training.loss == "mse" or len(floats) == 1 else logits)
    if not found:
        raise UserError(
            f"{student.path}: which of {', '.join(floats) or 'no float outputs'} are logits? Name them (--output), or "
            "give --loss mse"
        )
    return tuple(found)


def hidden_state_names(student: Model, dense: Analysis) -> tuple[str, ...]:
    made = {str(v.name) for node in student.graph.graph for v in node.outputs}
    return tuple(name for name in residual_values(dense) if name in made)


def task_labels(training: TrainingOptions, labels: Path | AnyArray | None, data: Calibration) -> IntArray | None:
    if training.uses_labels != (labels is not None):
        raise UserError(f"loss {training.loss}: " + ("give --labels" if training.uses_labels else "leave out --labels"))
    return None if labels is None else load_labels(labels, data)


def check_same_interface(student: Model, dense: Model) -> None:
    for what in ("inputs", "outputs"):
        ours, theirs = ([spec.name for spec in getattr(model, what)] for model in (student, dense))
        if ours != theirs:
            raise UserError(
                f"{student.path}: its {what} are {', '.join(ours)}, those of {dense.path} {', '.join(theirs)}: the "
                "teacher is the model that was pruned"
            )


def check_worker(place: Worker, data: Calibration, training: TrainingOptions) -> None:
    if training.sharded and place.world_size == 1:
        raise UserError("weights are sharded between processes, and this is one: start several with torchrun")
    if place.world_size > 1 and data.sample_axes.batch_size:
        raise UserError(
            f"{data.source}: a model whose batch size is fixed at {data.sample_axes.batch_size} cannot share batches "
            "between processes: export it with a dynamic batch, or run one process"
        )


# -- training and writing --------------------------------------------------------------------------------------------


def run_training(
    task: FinetuneTask, checkpoints: CheckpointFile | None, report: TrainingCallback | None
) -> TrainingResult:
    loss = distillation_loss(task.training, task.outputs, task.hidden, task.scales)
    evaluate = None
    if task.held_out is not None:
        expected = [select_outputs(task, task.teacher.run(feeds)) for feeds in task.held_out.batches()]
        evaluate = HeldOutDrift(task, expected)
    training = task.training
    adapters = add_adapters(task.module, training.adapters, training.seed) if training.adapters else None
    trained = train(
        task.module,
        loss,
        task,
        training,
        place=task.worker,
        parameters=list(adapters.parameters()) if adapters is not None else None,
        evaluate=evaluate,
        checkpoints=checkpoints,
        report=report,
    )
    if adapters is not None:
        merge_adapters(task.module, adapters)
    return trained


def gather_task(task: FinetuneTask, student: Model) -> FinetuneTask:
    """The task with a module that has all weights."""
    module = GraphModule(student, watch=task.hidden).to(task.worker.device)
    copy_gathered_weights(task.module, module)
    return replace(task, module=module)


@dataclass(frozen=True)
class HeldOutDrift:
    """How far the outputs on the held-out data are from the teacher's."""

    task: FinetuneTask
    expected: Sequence[TeacherOutputs]

    def __call__(self, module: torch.nn.Module) -> float:
        assert self.task.held_out is not None
        found = [
            select_outputs(self.task, module(self.task.to_tensors(feeds))) for feeds in self.task.held_out.batches()
        ]
        return relative_drift(found, self.expected)


def select_outputs(task: FinetuneTask, found: TeacherOutputs) -> TeacherOutputs:
    return {name: found[name] for name in task.outputs}


def write_verified(task: FinetuneTask, pruned: Path, target: Path) -> tuple[str, ...]:
    """Write the weights; the file gets its name when onnxruntime says of it what the module says."""
    temporary = target.with_name(f".{target.name}.unverified.onnx")
    try:
        save_graph_module(task.module, pruned, temporary)
        structure = check_structure(pruned, temporary)
        feeds = [next((task.held_out or task.data).batches())]
        with torch.no_grad():
            said = task.module(task.to_tensors(feeds[0]))
        names = [spec.name for spec in task.dense.model.outputs if spec.dtype.kind == "f"]
        expected = {name: said[name].float().cpu().numpy() for name in names}
        found = run_batches(temporary, feeds)[0]
        for d in measure_differences(expected, {name: found[name] for name in names}):
            if d.relative > max(
                rounding_tolerance(task.dense.model), 1e-3 if task.worker.device.type != "cpu" else 0.0
            ):
                raise CheckFailed(
                    f"output {d.output}: the written file differs from what was trained by {d.relative:.1e}"
                )
        rename_into_place(temporary, target)
    finally:
        discard_model(temporary)
    return (*structure, "the written file says what was trained")


def measure_drift(
    task: FinetuneTask, pruned: Path, target: Path
) -> tuple[tuple[Difference, ...], tuple[Difference, ...], str]:
    """The pruned and the tuned file against the teacher, on held-out data where there are any."""
    batches: list[Feeds]
    if task.held_out is not None:
        batches, compared = (
            list(task.held_out.batches()),
            f"{task.held_out.samples} samples of {task.held_out.source}, held out",
        )
    else:
        batches, compared = verification_batches(task.dense, task.data)
        compared += ", which it was trained on"
    said = run_batches(task.dense.model.path, batches)
    (_, before), (_, after) = (compare_models(said, path, None, batches) for path in (pruned, target))
    return before, after, compared


def finetune_json(result: FinetuneResult) -> dict[str, Any]:
    """What ``--json`` writes: an interface."""
    trained = result.trained
    return {
        "snpc_finetune": 1,
        "output": str(result.path),
        "steps": trained.steps,
        "loss": {"first": trained.losses[0], "last": trained.losses[-1]} if trained.losses else None,
        "held_out_drift": trained.drift,
        "options": asdict(result.training),
        "hidden": list(result.hidden),
        "compared": result.compared,
        "before": [asdict(d) for d in result.before],
        "after": [asdict(d) for d in result.after],
        "structure": list(result.structure),
        "seconds": {"training": round(trained.seconds, 2), "all": round(result.seconds, 2)},
    }
