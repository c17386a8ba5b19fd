"""Pruning with gradients: gates, learned masks, schedules of rounds.

Files
  gates          Gates: a factor for every unit of a group, multiplied with the weights that consume or produce the
                 unit.
  gradients      Gradients of each sample's loss with respect to unit gates.
  learn_masks    Learn masks by distillation from the model itself, and make a plan of them.
  learned_masks  Learned masks: a trained factor on every unit, with a penalty on MACs.
  objectives     Objectives of an adaptive schedule: how far the outputs may drift, or how many correct answers may be
                 lost.
  round_log      The log of a schedule's rounds, in a folder beside the models that they made, so that a killed run can
                 be resumed.
  schedule       Pruning in rounds with training between them: along a fixed schedule, or for as long as an objective
                 holds.
"""

from __future__ import annotations

from snpc.torch.pruning.gradients import compute_gate_gradients
from snpc.torch.pruning.learn_masks import MASK_LEARNING_RATE, LearnedPlan, learn_masks
from snpc.torch.pruning.objectives import AccuracyDrop, DriftLimit
from snpc.torch.pruning.round_log import PruningRound
from snpc.torch.pruning.schedule import Rounds, prune_adaptively, prune_in_rounds

__all__ = [
    "MASK_LEARNING_RATE",
    "AccuracyDrop",
    "DriftLimit",
    "LearnedPlan",
    "PruningRound",
    "Rounds",
    "compute_gate_gradients",
    "learn_masks",
    "prune_adaptively",
    "prune_in_rounds",
]
