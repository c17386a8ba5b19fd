"""Learn masks by distillation from the model itself, and make a plan of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.planning.allocate import chosen_groups, make_plan
from snpc.planning.config import Choice, parse_target
from snpc.planning.plan import Plan, Scores
from snpc.runtime.calibration.dataset import Calibration
from snpc.torch.finetune import Task, outputs_for
from snpc.torch.pruning.gates import gate_of, module_of
from snpc.torch.pruning.learned_masks import Masked, masks_of
from snpc.torch.training.checkpoints import Saved, opened, run_name
from snpc.torch.training.distributed import Place, placed, together
from snpc.torch.training.loop import Trained, train
from snpc.torch.training.losses import Batch, distillation
from snpc.torch.training.options import Report, Training
from snpc.torch.training.teacher import Teacher, asked, mean_squares

RATE = 0.05  # learning rate that masks are trained with where none is asked for


@dataclass(frozen=True)
class Learned:
    """``macs``: the share of the dense MACs that the masks themselves kept, before the plan was made of them."""

    plan: Plan
    trained: Trained
    macs: float


def learn_masks(
    analysis: Analysis,
    data: Calibration,
    kind: str,
    choice: Choice,
    *,
    training: Training | None = None,
    saved: Saved | None = None,
    report: Report | None = None,
) -> Learned:
    """Train masks of ``kind`` (vib, psp or apma) on ``data`` towards ``choice.target`` (macs=R), and plan by them.

    The loss is that of ``training``, between the model with masks and without, plus the masks' own. Weights are not
    trained. Raises UserError for other targets, losses with labels, and operators that torch has not.
    """
    training = replace(training or Training(lr=RATE), decay=0.0)
    target = parse_target(choice.target) if choice.target is not None else None
    if target is None or target.kind != "macs":
        raise UserError("masks are learnt under a budget of MACs: give --target macs=R")
    if training.labelled or training.layerwise:
        raise UserError(f"masks are learnt from the model's own outputs: loss kd or mse, not {training.loss}"
                        + (" with --layerwise" if training.layerwise else ""))  # fmt: skip
    if training.sharded:
        raise UserError("masks are few numbers, and weights do not train with them: leave out --sharded")
    groups = chosen_groups(analysis, choice)
    with placed() as place:
        masked = Masked(
            module_of(analysis), [gate_of(analysis, g) for g in groups], masks_of(kind, analysis, groups, target.share)
        ).to(place.device)
        task = task_for(analysis, data, training, masked, place)
        plain = distillation(training, task.outputs, (), task.scales)

        def loss(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
            return plain(module, batch) + masked.masks.penalty()

        checkpoints = None
        if saved is not None:
            run = run_name(data, "masks", kind, analysis.model.digest, choice, training, place.world)
            checkpoints = opened(saved, run)
            together(place)
        parameters = list(masked.masks.parameters())
        trained = train(
            masked, loss, task, training, place=place, parameters=parameters, checkpoints=checkpoints, report=report
        )
        kept = float(masked.masks.macs().detach())
    scores = Scores(analysis, f"masks:{kind}", masked.masks.scores(), data.samples, comparable=True)
    return Learned(make_plan(scores, choice), trained, kept)


def task_for(analysis: Analysis, data: Calibration, training: Training, masked: Masked, place: Place) -> Task:
    outputs = outputs_for(analysis.model, training)
    teacher = Teacher(asked(analysis, outputs, place.device), place.device)
    scales = mean_squares(teacher.ask(next(data.batches())))
    task = Task(masked.inner, teacher, analysis, data, None, training, None, outputs, (), scales, place)
    if (training.steps or training.epochs * task.per_epoch) * training.batch > data.samples:
        teacher.learn_all(data)
    return task
