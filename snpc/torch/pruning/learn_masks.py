"""Learn masks by distillation from the model itself, and make a plan of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.planning import Budget, SlicePlan, UnitScores, check_ranked_streams, groups_to_prune, make_slice_plan
from snpc.runtime.calibration import Calibration
from snpc.torch.finetune import FinetuneTask, loss_output_names
from snpc.torch.pruning.gates import canonical_module, make_gate
from snpc.torch.pruning.learned_masks import MaskedModule, make_masks
from snpc.torch.training import (
    Batch,
    CheckpointOptions,
    Teacher,
    TrainingCallback,
    TrainingHooks,
    TrainingOptions,
    TrainingResult,
    Worker,
    distillation_loss,
    distributed_worker,
    mean_squares,
    open_checkpoint,
    run_fingerprint,
    teacher_function,
    train,
    wait_for_workers,
)
from snpc.types import LAYER_ROLE

MASK_LEARNING_RATE = 0.05  # default for masks


@dataclass(frozen=True)
class LearnedPlan:
    """A plan made from learned masks. ``kept_macs``: the share of the dense MACs that the masks themselves kept."""

    plan: SlicePlan
    result: TrainingResult
    kept_macs: float


def learn_masks(
    analysis: Analysis,
    data: Calibration,
    kind: str,
    budget: Budget,
    *,
    training: TrainingOptions | None = None,
    checkpoints: CheckpointOptions | None = None,
    on_progress: TrainingCallback | None = None,
) -> LearnedPlan:
    """Train masks of ``kind`` (vib, psp or apma) on ``data`` towards ``budget.target`` (macs=R), and plan by them.

    The loss is that of ``training`` between the model with masks and the one without, plus the masks' penalty. Weights
    are not trained. Raises UserError for other targets, losses with labels, and operators without a torch
    implementation.
    """
    training = replace(training or TrainingOptions(lr=MASK_LEARNING_RATE), decay=0.0)
    target = budget.target
    if target is None or target.kind != "macs":
        raise UserError("masks are learned under a budget of MACs: give --target macs=R")
    if LAYER_ROLE in budget.roles:
        raise UserError("masks are learned for units: leave out the role layer")
    if training.uses_labels or training.layerwise:
        raise UserError(f"masks are learned from the model's own outputs: loss kd or mse, not {training.loss}"
                        + (" with --layerwise" if training.layerwise else ""))  # fmt: skip
    if training.sharded:
        raise UserError("masks are few numbers, and weights do not train with them: leave out --sharded")
    if training.sparsify:
        raise UserError("masks prune whole units, and weights do not train with them: leave out --sparsify")
    groups = groups_to_prune(analysis, budget)
    check_ranked_streams(analysis, groups, budget)
    with distributed_worker() as worker:
        masked = MaskedModule(
            canonical_module(analysis),
            [make_gate(analysis, g) for g in groups],
            make_masks(kind, analysis, groups, target.share),
        ).to(worker.device)
        task = mask_task(analysis, data, training, masked, worker)
        distillation = distillation_loss(training, task.outputs, (), task.scales)

        def loss(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
            return distillation(module, batch) + masked.masks.penalty()

        checkpoint_file = None
        if checkpoints is not None:
            run_id = run_fingerprint(data, "masks", kind, analysis.model.digest, budget, training, worker.world_size)
            checkpoint_file = open_checkpoint(checkpoints, run_id)
            wait_for_workers(worker)
        result = train(
            masked,
            loss,
            task,
            training,
            worker=worker,
            parameters=list(masked.masks.parameters()),
            hooks=TrainingHooks(None, checkpoint_file, on_progress),
        )
        kept_macs = float(masked.masks.kept_macs().detach())
    scores = UnitScores(analysis, f"masks:{kind}", masked.masks.scores(), data.samples, comparable=True)
    return LearnedPlan(make_slice_plan(scores, budget), result, kept_macs)


def mask_task(
    analysis: Analysis, data: Calibration, training: TrainingOptions, masked: MaskedModule, worker: Worker
) -> FinetuneTask:
    """Distillation of the masked model from the model itself."""
    outputs = loss_output_names(analysis.model, training)
    teacher = Teacher(teacher_function(analysis, outputs, worker.device), worker.device)
    scales = mean_squares(teacher.run(next(data.batches())))
    task = FinetuneTask(masked.inner, teacher, analysis, data, None, training, None, outputs, (), scales, worker)
    if task.steps * training.batch > data.samples:
        teacher.fill_cache(data)
    return task
