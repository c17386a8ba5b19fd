"""Learn masks by distillation from the model itself, and make a plan of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.planning.allocate import groups_to_prune, make_slice_plan
from snpc.planning.config import Budget
from snpc.planning.plan import SlicePlan, UnitScores
from snpc.runtime.calibration.dataset import Calibration
from snpc.torch.finetune import FinetuneTask, loss_output_names
from snpc.torch.pruning.gates import canonical_module, make_gate
from snpc.torch.pruning.learned_masks import MaskedModule, make_masks
from snpc.torch.training.checkpoints import CheckpointOptions, open_checkpoint, run_fingerprint
from snpc.torch.training.distributed import Worker, distributed_worker, wait_for_workers
from snpc.torch.training.loop import TrainingResult, train
from snpc.torch.training.losses import Batch, distillation_loss
from snpc.torch.training.options import TrainingCallback, TrainingOptions
from snpc.torch.training.teacher import Teacher, mean_squares, teacher_function

MASK_LEARNING_RATE = 0.05  # learning rate that masks are trained with where none is asked for


@dataclass(frozen=True)
class LearnedPlan:
    """``macs``: the share of the dense MACs that the masks themselves kept, before the plan was made of them."""

    plan: SlicePlan
    result: TrainingResult
    kept_macs: float


def learn_masks(
    analysis: Analysis,
    data: Calibration,
    kind: str,
    choice: Budget,
    *,
    training: TrainingOptions | None = None,
    saved: CheckpointOptions | None = None,
    report: TrainingCallback | None = None,
) -> LearnedPlan:
    """Train masks of ``kind`` (vib, psp or apma) on ``data`` towards ``choice.target`` (macs=R), and plan by them.

    The loss is that of ``training``, between the model with masks and without, plus the masks' own. Weights are not
    trained. Raises UserError for other targets, losses with labels, and operators that torch has not.
    """
    training = replace(training or TrainingOptions(lr=MASK_LEARNING_RATE), decay=0.0)
    target = choice.target
    if target is None or target.kind != "macs":
        raise UserError("masks are learnt under a budget of MACs: give --target macs=R")
    if training.uses_labels or training.layerwise:
        raise UserError(f"masks are learnt from the model's own outputs: loss kd or mse, not {training.loss}"
                        + (" with --layerwise" if training.layerwise else ""))  # fmt: skip
    if training.sharded:
        raise UserError("masks are few numbers, and weights do not train with them: leave out --sharded")
    groups = groups_to_prune(analysis, choice)
    with distributed_worker() as place:
        masked = MaskedModule(
            canonical_module(analysis),
            [make_gate(analysis, g) for g in groups],
            make_masks(kind, analysis, groups, target.share),
        ).to(place.device)
        task = mask_task(analysis, data, training, masked, place)
        plain = distillation_loss(training, task.outputs, (), task.scales)

        def loss(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
            return plain(module, batch) + masked.masks.penalty()

        checkpoints = None
        if saved is not None:
            run = run_fingerprint(data, "masks", kind, analysis.model.digest, choice, training, place.world_size)
            checkpoints = open_checkpoint(saved, run)
            wait_for_workers(place)
        parameters = list(masked.masks.parameters())
        trained = train(
            masked, loss, task, training, place=place, parameters=parameters, checkpoints=checkpoints, report=report
        )
        kept = float(masked.masks.kept_macs().detach())
    scores = UnitScores(analysis, f"masks:{kind}", masked.masks.scores(), data.samples, comparable=True)
    return LearnedPlan(make_slice_plan(scores, choice), trained, kept)


def mask_task(
    analysis: Analysis, data: Calibration, training: TrainingOptions, masked: MaskedModule, place: Worker
) -> FinetuneTask:
    outputs = loss_output_names(analysis.model, training)
    teacher = Teacher(teacher_function(analysis, outputs, place.device), place.device)
    scales = mean_squares(teacher.run(next(data.batches())))
    task = FinetuneTask(masked.inner, teacher, analysis, data, None, training, None, outputs, (), scales, place)
    if (training.steps or training.epochs * task.steps_per_epoch) * training.batch > data.samples:
        teacher.fill_cache(data)
    return task
