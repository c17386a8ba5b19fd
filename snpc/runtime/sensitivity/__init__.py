"""Sensitivity analysis: how much the outputs change as each group gets narrower.

Files
  curve_fit        Fits loss curves to a few noisy trials: the closed-form loss times a factor that varies with the
                   width.
  joint_search     Joint search over the widths of a plan: groups are made narrower and wider with all others cut too.
  layer_search     Which whole sublayers go: chosen by what the outputs change when they are gone.
  layers_and_widths  Whole layers and widths in one budget: how many layers go is decided by trials of both together.
  layer_trials     Trials of removed sublayers: the outputs with any of them switched off, on a few samples.
  loss_curves      Sensitivity of the model's outputs to the width of each group, measured at a few widths, one group at
                   a time.
  plan_trials      Trials of whole plans: the outputs with all groups cut at once, to the widths that are asked for.
  predicted_curves  Loss curves without trials: the closed-form losses of all groups, brought to one scale.
  segmented_model  A model in segments whose weights are inputs, so that a trial of changed weights runs only from their
                   segment on.
  session_pool     Sessions that are opened when they are first run, and closed where the weights of all take more
                   memory than there is.
"""

from __future__ import annotations

from snpc.runtime.sensitivity.curve_fit import UNUSABLE_CHANGE
from snpc.runtime.sensitivity.joint_search import search_samples, search_widths
from snpc.runtime.sensitivity.layer_search import (
    REFITTED_SETS,
    check_layer_budget,
    removable_sublayers,
    remove_layers,
)
from snpc.runtime.sensitivity.layer_trials import LAYER_SAMPLES
from snpc.runtime.sensitivity.layers_and_widths import remove_layers_beside_widths
from snpc.runtime.sensitivity.loss_curves import (
    CURVE_SAMPLES,
    CURVE_SHARES,
    REFINEMENT_ROUNDS,
    SAMPLES_PER_WIDTH,
    measurable_widths,
    measure_loss_curves,
)
from snpc.runtime.sensitivity.predicted_curves import predicted_curves

__all__ = [
    "CURVE_SAMPLES",
    "CURVE_SHARES",
    "LAYER_SAMPLES",
    "REFINEMENT_ROUNDS",
    "REFITTED_SETS",
    "SAMPLES_PER_WIDTH",
    "UNUSABLE_CHANGE",
    "check_layer_budget",
    "measurable_widths",
    "measure_loss_curves",
    "predicted_curves",
    "removable_sublayers",
    "remove_layers",
    "remove_layers_beside_widths",
    "search_samples",
    "search_widths",
]
