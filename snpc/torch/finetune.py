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
from snpc.pipeline.verify import check_batches
from snpc.runtime.calibration.dataset import Calibration
from snpc.runtime.closed_form.stages import borders
from snpc.runtime.evaluation.compare import check_structure, compare, compare_models, outputs_of, tolerance_of
from snpc.runtime.io.atomic import check_target, data_file, discard, publish
from snpc.runtime.io.load import load, model_files
from snpc.torch.module import GraphModule
from snpc.torch.operators.registry import tensor_of
from snpc.torch.training.adapters import adapted, fuse
from snpc.torch.training.checkpoints import Checkpoints, Saved, opened, run_name
from snpc.torch.training.distributed import Place, placed, together
from snpc.torch.training.fsdp import gathered
from snpc.torch.training.labels import load_labels
from snpc.torch.training.loop import Trained, train
from snpc.torch.training.losses import Batch, distillation
from snpc.torch.training.options import Report, Training
from snpc.torch.training.reinitialize import reinitialise
from snpc.torch.training.sampling import from_batch, sample_ids, shared, shuffled, split
from snpc.torch.training.teacher import Answers, Feeds, Teacher, asked, drift_of, mean_squares
from snpc.torch.write_back import save
from snpc.types import AnyArray, Difference, IntArray, Model

HELD = 0.1  # share of the data that early stopping holds out


@dataclass(frozen=True)
class Tuned:
    """A written file. ``before`` and ``after``: the pruned and the tuned file against the teacher, run by onnxruntime
    on ``compared``; ``hidden``: the values of the residual stream that the loss looked at."""

    path: Path
    trained: Trained
    before: tuple[Difference, ...]
    after: tuple[Difference, ...]
    compared: str
    structure: tuple[str, ...]
    hidden: tuple[str, ...]
    training: Training
    seconds: float


def finetune(
    pruned: Path,
    teacher: Path,
    data: Calibration,
    target: Path,
    *,
    training: Training | None = None,
    labels: Path | AnyArray | None = None,
    saved: Saved | None = None,
    report: Report | None = None,
) -> Tuned | None:
    """Train the weights of ``pruned`` on ``data`` towards what ``teacher`` says, and write them to ``target``.

    ``teacher`` is the dense file that ``pruned`` was made from; ``labels``, one per sample of the data's source, are
    for the losses with "ce" only. Under torchrun every process calls this; the first writes and returns, the others
    return None. Raises UserError for what cannot be trained, CheckFailed where the file is not what was trained.
    """
    training = training or Training()
    start = time.perf_counter()
    for path in (target, data_file(target)):
        check_target(path, *model_files(pruned), *model_files(teacher))
    student, dense = load(pruned), analyze(load(teacher))
    check_pair(student, dense.model)
    known = labels_for(training, labels, data)
    with placed() as place:
        check_place(place, data, training)
        task = task_of(student, dense, data, training, known, place)
        checkpoints = None
        if saved is not None:
            said = None if known is None else hashlib.sha256(known.tobytes()).hexdigest()
            run = run_name(data, student.digest, dense.model.digest, training, said, place.world)
            checkpoints = opened(saved, run)
            together(place)
        trained = fit(task, checkpoints, report)
        if training.sharded:
            task = brought_together(task, student)
        if not place.leads:
            return None
        structure = written(task, pruned, target)
    before, after, compared = drifts(task, pruned, target)
    seconds = time.perf_counter() - start
    return Tuned(target, trained, before, after, compared, structure, task.hidden, training, seconds)


# -- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A run made ready. ``held``: data that nothing is trained on, None without early stopping."""

    module: GraphModule
    teacher: Teacher
    dense: Analysis
    data: Calibration
    held: Calibration | None
    training: Training
    labels: IntArray | None
    outputs: tuple[str, ...]
    hidden: tuple[str, ...]
    scales: dict[str, float]
    place: Place

    @property
    def per_epoch(self) -> int:
        plan = shuffled(self.data, (self.training.seed, 0), self.training.batch).plan
        return sum(sum(map(len, pieces)) >= self.place.world for pieces in plan)

    def epoch(self, number: int, first: int) -> Iterator[Batch]:
        order = shuffled(self.data, (self.training.seed, number), self.training.batch)
        mine, weights = shared(order, self.place.rank, self.place.world)
        mine = from_batch(mine, first)
        for ids, feeds, weight in zip(sample_ids(mine), mine.batches(), weights[first:], strict=True):
            targets = self.teacher(ids, feeds) if self.training.distils else {}
            labels = None if self.labels is None else torch.from_numpy(self.labels[ids])
            yield Batch(self.tensors(feeds), targets, labels, weight)

    def tensors(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        return {name: tensor_of(array).to(self.place.device) for name, array in feeds.items()}


def task_of(
    student: Model, dense: Analysis, data: Calibration, training: Training, labels: IntArray | None, place: Place
) -> Task:
    outputs = outputs_for(student, training)
    wanted = hidden_states(student, dense) if training.layerwise else ()
    module = GraphModule(student, watch=wanted).to(place.device)
    half = sorted({str(w.dtype).removeprefix("torch.") for _, w in module.weights() if w.dtype != torch.float32})
    if half:
        raise UserError(f"{student.path}: it has weights in {', '.join(half)}: prune and train a float32 export")
    teacher = Teacher(asked(dense, (*outputs, *wanted), place.device), place.device)
    feeds = next(data.batches())
    said = teacher.ask(feeds)
    with torch.no_grad():
        found = module({name: tensor_of(array).to(place.device) for name, array in feeds.items()})
    hidden = tuple(name for name in wanted if found[name].shape == said[name].shape)
    if training.layerwise and not hidden:
        raise UserError(
            f"{student.path}: no value of the residual stream is as wide as the teacher's: leave out --layerwise"
        )
    if set(hidden) != set(wanted):
        module = GraphModule(student, watch=hidden).to(place.device)
        teacher = Teacher(asked(dense, (*outputs, *hidden), place.device), place.device)
    train_on, held = data, None
    if training.early_stop:
        train_on, held = split(data, max(data.axes.size or 1, round(HELD * data.samples)), training.seed)
    if training.reinit != "none":
        reinitialise(module, student, training.seed)
        module.to(place.device)
    task = Task(module, teacher, dense, train_on, held, training, labels, outputs, hidden, mean_squares(said), place)
    if training.reinit == "budget":
        longer = dense.cost.macs / analyze(student, dense.binding).cost.macs
        steps = round((training.steps or training.epochs * task.per_epoch) * longer)
        training = replace(training, steps=steps)
        task = replace(task, training=training)
    visits = (training.steps or training.epochs * task.per_epoch) * training.batch
    if training.distils and visits > data.samples:
        teacher.learn_all(data)
    return task


def outputs_for(student: Model, training: Training) -> tuple[str, ...]:
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


def hidden_states(student: Model, dense: Analysis) -> tuple[str, ...]:
    made = {str(v.name) for node in student.graph.graph for v in node.outputs}
    return tuple(name for name in borders(dense) if name in made)


def labels_for(training: Training, labels: Path | AnyArray | None, data: Calibration) -> IntArray | None:
    if training.labelled != (labels is not None):
        raise UserError(f"loss {training.loss}: " + ("give --labels" if training.labelled else "leave out --labels"))
    return None if labels is None else load_labels(labels, data)


def check_pair(student: Model, dense: Model) -> None:
    for what in ("inputs", "outputs"):
        ours, theirs = ([spec.name for spec in getattr(model, what)] for model in (student, dense))
        if ours != theirs:
            raise UserError(
                f"{student.path}: its {what} are {', '.join(ours)}, those of {dense.path} {', '.join(theirs)}: the "
                "teacher is the model that was pruned"
            )


def check_place(place: Place, data: Calibration, training: Training) -> None:
    if training.sharded and place.world == 1:
        raise UserError("weights are sharded between processes, and this is one: start several with torchrun")
    if place.world > 1 and data.axes.size:
        raise UserError(
            f"{data.source}: a model whose batch size is fixed at {data.axes.size} cannot share batches between "
            "processes: export it with a dynamic batch, or run one process"
        )


# -- training and writing --------------------------------------------------------------------------------------------


def fit(task: Task, checkpoints: Checkpoints | None, report: Report | None) -> Trained:
    loss = distillation(task.training, task.outputs, task.hidden, task.scales)
    evaluate = None
    if task.held is not None:
        expected = [answers_only(task, task.teacher.ask(feeds)) for feeds in task.held.batches()]
        evaluate = Drift(task, expected)
    training = task.training
    adapters = adapted(task.module, training.adapters, training.seed) if training.adapters else None
    trained = train(
        task.module,
        loss,
        task,
        training,
        place=task.place,
        parameters=list(adapters.parameters()) if adapters is not None else None,
        evaluate=evaluate,
        checkpoints=checkpoints,
        report=report,
    )
    if adapters is not None:
        fuse(task.module, adapters)
    return trained


def brought_together(task: Task, student: Model) -> Task:
    """The task with a module that has all weights."""
    module = GraphModule(student, watch=task.hidden).to(task.place.device)
    gathered(task.module, module)
    return replace(task, module=module)


@dataclass(frozen=True)
class Drift:
    """How far the outputs on the held-out data are from the teacher's."""

    task: Task
    expected: Sequence[Answers]

    def __call__(self, module: torch.nn.Module) -> float:
        assert self.task.held is not None
        found = [answers_only(self.task, module(self.task.tensors(feeds))) for feeds in self.task.held.batches()]
        return drift_of(found, self.expected)


def answers_only(task: Task, found: Answers) -> Answers:
    return {name: found[name] for name in task.outputs}


def written(task: Task, pruned: Path, target: Path) -> tuple[str, ...]:
    """Write the weights; the file gets its name when onnxruntime says of it what the module says."""
    temporary = target.with_name(f".{target.name}.unverified.onnx")
    try:
        save(task.module, pruned, temporary)
        structure = check_structure(pruned, temporary)
        feeds = [next((task.held or task.data).batches())]
        with torch.no_grad():
            said = task.module(task.tensors(feeds[0]))
        names = [spec.name for spec in task.dense.model.outputs if spec.dtype.kind == "f"]
        expected = {name: said[name].float().cpu().numpy() for name in names}
        found = outputs_of(temporary, feeds, "cpu")[0]
        for d in compare(expected, {name: found[name] for name in names}):
            if d.relative > max(tolerance_of(task.dense.model), 1e-3 if task.place.device.type != "cpu" else 0.0):
                raise CheckFailed(
                    f"output {d.output}: the written file differs from what was trained by {d.relative:.1e}"
                )
        publish(temporary, target)
    finally:
        discard(temporary)
    return (*structure, "the written file says what was trained")


def drifts(task: Task, pruned: Path, target: Path) -> tuple[tuple[Difference, ...], tuple[Difference, ...], str]:
    """The pruned and the tuned file against the teacher, on held-out data where there are any."""
    batches: list[Feeds]
    if task.held is not None:
        batches, compared = list(task.held.batches()), f"{task.held.samples} samples of {task.held.source}, held out"
    else:
        batches, compared = check_batches(task.dense, task.data)
        compared += ", which it was trained on"
    said = outputs_of(task.dense.model.path, batches, "cpu")
    (_, before), (_, after) = (compare_models(said, path, None, batches) for path in (pruned, target))
    return before, after, compared


def report(result: Tuned) -> dict[str, Any]:
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
