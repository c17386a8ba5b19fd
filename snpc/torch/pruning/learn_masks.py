"""Learn masks by distillation from the model itself, and make a plan of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from snpc.errors import UserError
from snpc.passes import Analysis, cost_without, remove_sublayers
from snpc.planning import Budget, SlicePlan, UnitScores, check_ranked_streams, groups_to_prune, make_slice_plan
from snpc.runtime.calibration import Calibration
from snpc.runtime.sensitivity import removable_sublayers
from snpc.torch.finetune import FinetuneTask, loss_output_names
from snpc.torch.pruning.gates import Gate, canonical_module, layer_gates, make_gate
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
from snpc.types import LAYER_ROLE, Sublayer

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
    layers = layers_to_gate(analysis, kind, budget)
    if training.uses_labels or training.layerwise:
        raise UserError(f"masks are learned from the model's own outputs: loss kd or mse, not {training.loss}"
                        + (" with --layerwise" if training.layerwise else ""))  # fmt: skip
    if training.sharded:
        raise UserError("masks are few numbers, and weights do not train with them: leave out --sharded")
    if training.sparsify:
        raise UserError("masks prune whole units, and weights do not train with them: leave out --sparsify")
    gates = layer_gates(analysis, layers) if layers else unit_gates(analysis, budget)
    with distributed_worker() as worker:
        masked = MaskedModule(
            canonical_module(analysis, gated_layers=layers),
            gates,
            make_masks(kind, analysis, [gate.group for gate in gates], target.share),
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
    plan = plan_by_layers(scores, layers, budget) if layers else make_slice_plan(scores, budget)
    return LearnedPlan(plan, result, kept_macs)


def unit_gates(analysis: Analysis, budget: Budget) -> Sequence[Gate]:
    """Gates on the units of the groups that the budget names."""
    groups = groups_to_prune(analysis, budget)
    check_ranked_streams(analysis, groups, budget)
    return [make_gate(analysis, group) for group in groups]


def layers_to_gate(analysis: Analysis, kind: str, budget: Budget) -> Sequence[Sublayer]:
    """The layers that may go whole, where the budget has that role; none otherwise. Raises UserError for other roles
    beside it, and for other masks than those of VTrans."""
    if LAYER_ROLE not in budget.roles:
        return ()
    if set(budget.roles) != {LAYER_ROLE}:
        raise UserError("masks are learned for whole layers or for units: give --roles layer alone, or leave it out")
    if kind != "vib":
        raise UserError(f"--learn-masks {kind} compares units by their size: for whole layers take vib")
    return removable_sublayers(analysis, budget)


def plan_by_layers(scores: UnitScores, layers: Sequence[Sublayer], budget: Budget) -> SlicePlan:
    """The plan without the layers that are least important, as many as the target takes. Raises UserError where all of
    them are too few."""
    analysis, target = scores.analysis, budget.target
    assert target is not None
    importance = {layer.name: float(scores.values[layer.name].sum()) / max(layer.macs, 1) for layer in layers}
    order = sorted(importance, key=lambda name: importance[name])
    for count in range(1, len(order) + 1):
        if cost_without(analysis, order[:count]).macs <= target.share * analysis.cost.macs:
            shorter = remove_sublayers(analysis, order[:count])
            return SlicePlan(shorter, scores.criterion, budget.to_options(), {}, "select")
    raise UserError(f"target {target} cannot be reached: with all layers gone that can go, more is left")


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
